"""Never slower than dense: random layers, planned by ``tune``, against torch's best layout.

    python benchmarks/never_slower.py --layers 200 --seed 0

Each layer is first checked, in both storages, against torch's dense layer with the same (masked)
weight: outputs and gradients.  Then ``tune`` chooses, and the planned layer is timed against the
dense one in contiguous and channels_last, interleaved, forward and backward.  torch.compile is no
contender: one convolution or product leaves it nothing to fuse.  Rows are appended to a file of
JSON lines as they come; a second call goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import SparseConv2d, SparseLinear, tune
from sparse_kernels.nn._tune_problem import Call, Problem
from sparse_kernels.nn.base import COMPRESSED, DENSE_MASKED, SparseLayer
from sparse_kernels.ops.masked_conv2d import FORMATS
from sparse_kernels.plan_measure import measure
from sparse_kernels.workbench import machine
from sparse_kernels.workbench.bench.results import machine_folder

#: Layers of at most this many dense multiply-adds, forward: 200 of them are to take minutes.
LARGEST = 3e9
TOLERANCE = 2e-5  # ||difference|| / ||dense||, per tensor: float32 sums in another order
SLOWEST_ALLOWED = 0.95


def draw(seed: int, index: int, largest: float = LARGEST) -> dict[str, Any]:
    """Layer ``index`` of the list of ``seed``: sizes, batch, density, block; plain data."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        row: dict[str, Any] = {
            "kind": rng.choice(["conv2d", "conv2d", "linear"]),
            "batch": rng.choice([1, 2, 3, 4, 8, 16, 17, 32, 50, 64, 100, 128, 256]),
            "density": round(0.005 * 120 ** rng.random(), 4),  # 0.5 % to 60 %, evenly by ratio
            "block": rng.choice([[1, 1], [1, 1], [1, 1], [4, 1]]),
            "bias": rng.random() < 0.5,
        }
        sizes = [3, 8, 16, 32, 64, 96, 128, 256, 512]
        if row["kind"] == "linear":
            row["in"], row["out"] = (
                rng.choice([*sizes[1:], 300, 784, 1024, 2048, 4096]) for _ in range(2)
            )
            work = row["batch"] * row["in"] * row["out"]
        else:
            row["in"], row["out"] = rng.choice(sizes), rng.choice(sizes[1:])
            row["kernel"], row["stride"] = rng.choice([1, 3, 3, 3, 5, 7]), rng.choice([1, 1, 1, 2])
            row["image"] = rng.choice([2, 4, 7, 8, 14, 16, 28, 32, 56])
            pixels = (-(-row["image"] // row["stride"])) ** 2
            work = row["batch"] * row["in"] * row["out"] * row["kernel"] ** 2 * pixels
        if work <= largest:
            return row


def build(row: dict[str, Any]) -> tuple[SparseLayer, Tensor]:
    """The layer and an input, both from fixed seeds."""
    generator = torch.Generator().manual_seed(1)
    options = {"density": row["density"], "block": tuple(row["block"]), "generator": generator}
    if row["kind"] == "linear":
        x = torch.randn(row["batch"], row["in"], generator=generator)
        return SparseLinear(row["in"], row["out"], row["bias"], **options), x
    size = (row["image"], row["image"])
    x = torch.randn(row["batch"], row["in"], *size, generator=generator)
    kernel = row["kernel"]
    layer = SparseConv2d(
        row["in"], row["out"], kernel, row["stride"], kernel // 2, bias=row["bias"], **options
    )
    return layer, x


def check(layer: SparseLayer, x: Tensor) -> None:
    """Outputs and gradients of both storages and image formats against torch's dense layer.

    Raises RuntimeError: a layer that computes something else is not timed.
    """
    dense = layer.to_dense()
    grad = torch.randn_like(dense(x))
    mask = layer.pattern.mask()
    expected = _results(dense, x, grad)
    expected[2] = layer.weight_to_matrix(expected[2]) * mask
    for storage in (COMPRESSED, DENSE_MASKED):
        for name in FORMATS if storage == DENSE_MASKED else [layer.image_format]:
            twin = copy.deepcopy(layer).to_storage_(storage)
            twin.image_format = name
            got = _results(twin, x, grad)
            if storage == COMPRESSED:
                got[2] = layer.pattern.expand(got[2])
            for what, a, b in zip(("output", "dx", "dw", "db"), got, expected, strict=False):
                error = float((a - b).norm() / b.norm().clamp_min(1e-30))
                if not error <= TOLERANCE:
                    raise RuntimeError(f"{layer} {storage}: {what} is off by {error:.1e}")


def _results(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    parameters = dict(module.named_parameters())
    weight = parameters.get("values", parameters.get("weight"))
    assert x.grad is not None and weight is not None and weight.grad is not None
    results = [y.detach(), x.grad, weight.grad]
    return [*results, module.bias.grad] if module.bias is not None else results  # type: ignore


def race(layer: SparseLayer, x: Tensor, seconds: float, layout: str) -> dict[str, Any]:
    """Tune, then time planned against dense; milliseconds, and dense / planned as ``ratio``."""
    # The input wants a gradient, as inside of a network.
    entry = tune(layer, x.clone().requires_grad_(), layout=layout, seconds=seconds)[""]  # type: ignore[arg-type]
    conv = isinstance(layer, SparseConv2d)
    order = "contiguous" if layout == "seen" else "feature-major"
    if layer.storage == DENSE_MASKED and layout == "own":
        order = layer.image_format if conv else "contiguous"
    problem = Problem(layer, tuple(x.shape), order, x.dtype, True, True)
    calls: dict[str, Call] = {"planned": Call(problem, copy.deepcopy(layer), order)}
    for name, memory_format in FORMATS.items():
        if conv or name == "contiguous":
            dense = layer.to_dense()
            if conv:
                dense = dense.to(memory_format=memory_format)  # type: ignore[call-overload]
            calls[name] = Call(problem, dense, name)
    result = measure(calls, seconds=2 * seconds, indifferent=0.01)
    best = min((n for n in calls if n != "planned"), key=lambda n: result.ratio(n, "planned"))
    return {
        "storage": layer.storage,
        "break_even": entry.break_even,
        "tuned": entry.settled,
        "planned_ms": 1e3 * result.seconds["planned"],
        "dense_ms": 1e3 * result.seconds[best],
        "dense_layout": best,
        "ratio": result.ratio(best, "planned"),
        "settled": result.settled,
        "rounds": result.rounds,
    }


def run(
    layers: int, out: Path, settings: dict[str, Any], seconds: float, largest: float
) -> list[dict[str, Any]]:
    """Measure layers 0 .. ``layers`` - 1 that the journal ``out`` does not have; all rows.

    A layer that fails its check gets a row with ``wrong``, and the run goes on.

    Raises ValueError for a journal made with other settings or by another commit.
    """
    lines = _journal(out)
    if lines and lines[0]["settings"] != settings:
        raise ValueError(
            f"{out} was made with {lines[0]['settings']}, now {settings}; give --fresh to begin "
            "anew, or another --out"
        )
    rows = {row["index"]: row for row in lines[1:]}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:  # whole lines only: the last one may have been cut off
        header = {"machine": machine.header(), "settings": settings}
        for line in lines or [header]:
            file.write(json.dumps(line) + "\n")
        file.flush()
        for index in range(layers):
            if index in rows:
                continue
            row = {"index": index, **draw(settings["seed"], index, largest)}
            torch.manual_seed(index)
            layer, x = build(row)
            try:
                check(layer, x)
                row.update(race(layer, x, seconds, settings["layout"]))
            except RuntimeError as error:
                row["wrong"] = str(error)
            rows[index] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(describe(row), flush=True)
    return [rows[index] for index in range(layers)]


def _journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; an interrupted run may have left a part of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _shape(row: dict[str, Any]) -> str:
    shape = f"{row['in']}->{row['out']}"
    if row["kind"] == "conv2d":
        shape += f" {row['kernel']}x{row['kernel']}/{row['stride']} on {row['image']}"
    return shape


def describe(row: dict[str, Any]) -> str:
    """One row as a line of text."""
    block = "x".join(map(str, row["block"]))
    start = (
        f"{row['index']:4d}  {row['kind']:6s}  {_shape(row):22s}  batch {row['batch']:3d}  "
        f"{100 * row['density']:5.1f} %  {block}  "
    )
    if "wrong" in row:
        return start + f"WRONG: {row['wrong']}"
    mark = "" if row["settled"] != "time" and row["tuned"] != "time" else "  (not settled)"
    return start + (
        f"{row['storage']:12s}  {row['planned_ms']:9.3f} ms  dense {row['dense_ms']:9.3f} ms  "
        f"{row['ratio']:6.2f}x{mark}"
    )


def _wide(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r["density"] <= 0.05 and min(r["in"], r["out"]) >= 64]


def verdict(rows: list[dict[str, Any]]) -> str:
    """The targets in one line."""
    timed = [row for row in rows if "wrong" not in row]
    if not timed:
        return f"no layer timed, wrong: {len(rows)}"
    slow = [row for row in timed if row["ratio"] < SLOWEST_ALLOWED]
    wide = _wide(timed)
    dense = sorted(row["dense_ms"] for row in wide if row["storage"] != COMPRESSED)
    text = (
        f"least ratio {min(row['ratio'] for row in timed):.2f}x; under {SLOWEST_ALLOWED}x dense: "
        f"{len(slow)} of {len(timed)}; <= 5 % and >= 64 channels: {len(wide) - len(dense)} of "
        f"{len(wide)} served sparse"
    )
    if dense:
        text += ", dense time of the others: " + ", ".join(f"{t:.3f}" for t in dense) + " ms"
    return text + f"; wrong: {len(rows) - len(timed)}"


def summary(rows: list[dict[str, Any]]) -> str:
    """The worst ten, the very sparse layers that are not served so, and the verdict."""
    timed = [row for row in rows if "wrong" not in row]
    worst = sorted(timed, key=lambda row: row["ratio"])[:10]
    dense = [row for row in _wide(timed) if row["storage"] != COMPRESSED]
    wrong = [row for row in rows if "wrong" in row]
    lines = ["the worst ten:", *map(describe, worst)]
    lines += ["<= 5 % and >= 64 channels, not served sparse:", *map(describe, dense)]
    return "\n".join([*lines, *map(describe, wrong), verdict(rows)])


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """Command, machine, verdict and a table of all rows, the slowest first."""
    lines = [
        "# Never slower: planned layers against the best dense layout",
        f"`{command}`",
        machine.one_line(machine.header()),
        verdict(rows) + ".",
        "Forward and backward of one layer, medians of interleaved rounds; dense: the faster of "
        "contiguous and channels_last.",
    ]
    table = [
        "| layer | batch | density | block | storage | planned ms | dense ms | dense / planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.get("ratio", 0.0)):
        block = "x".join(map(str, row["block"]))
        start = f"| {row['kind']} {_shape(row)} | {row['batch']} | {100 * row['density']:.1f} % "
        rest = f"| wrong: {row.get('wrong')} | | | |"
        if "wrong" not in row:
            mark = "" if "time" not in (row["settled"], row["tuned"]) else " (not settled)"
            times = f"{row['planned_ms']:.3f} | {row['dense_ms']:.3f} | {row['ratio']:.2f}{mark} |"
            rest = f"| {row['storage']} | {times}"
        table.append(f"{start}| {block} {rest}")
    return "\n\n".join([*lines, "\n".join(table)]) + "\n"


def main() -> None:
    """The command line; exit status 1 if a layer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="cap on one comparison")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--largest", type=float, default=LARGEST, help="multiply-adds of a layer, dense, forward"
    )
    parser.add_argument(
        "--layout",
        choices=["own", "seen"],
        default="own",
        help="own: each contender gets its inputs in the order it likes best, as inside of a net "
        "of its kind; seen: contiguous ones, conversions included, as a drop-in",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder; default benchmarks/results/<machine>"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has left")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    folder = options.out or Path("benchmarks/results") / machine_folder(torch.device("cpu"))
    tag = "" if options.largest == LARGEST else f"-upto{options.largest:g}"
    journal = folder / f"never-slower-s{options.seed}-{options.layout}-{threads}t{tag}.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    settings = {
        "seed": options.seed,
        "layout": options.layout,
        "threads": threads,
        "seconds": options.seconds,
        "largest": options.largest,
        "commit": machine.commit(),
    }
    print(machine.one_line(machine.header()))
    rows = run(options.layers, journal, settings, options.seconds, options.largest)
    print(summary(rows))
    table = journal.with_suffix(".md")
    table.write_text(markdown(rows, shlex.join(["python", *sys.argv])))
    print(f"wrote {journal} and {table}")
    if any("wrong" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
