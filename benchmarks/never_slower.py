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

#: Layers of at most this many dense multiply-adds, forward: 200 of them are to take minutes.
LARGEST = 3e9
TOLERANCE = 2e-5  # ||difference|| / ||dense||, per tensor: float32 sums in another order
SLOWEST_ALLOWED = 0.95


def draw(seed: int, index: int) -> dict[str, Any]:
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
            pixels = -((-row["image"] // row["stride"]) ** 2)
            work = row["batch"] * row["in"] * row["out"] * row["kernel"] ** 2 * pixels
        if work <= LARGEST:
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


def run(layers: int, seed: int, out: Path, seconds: float, layout: str) -> list[dict[str, Any]]:
    """Measure layers 0 .. ``layers`` - 1 of ``seed`` that ``out`` does not have; all rows.

    Raises ValueError for a file made with other settings.
    """
    settings = {"seed": seed, "layout": layout, "threads": torch.get_num_threads()}
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if lines and lines[0]["settings"] != settings:
        raise ValueError(
            f"{out} was made with {lines[0]['settings']}, now {settings}; give another --out"
        )
    rows = {row["index"]: row for row in lines[1:]}
    with out.open("a") as file:
        if not lines:
            file.write(json.dumps({"machine": machine.header(), "settings": settings}) + "\n")
        for index in range(layers):
            if index in rows:
                continue
            row = {"index": index, **draw(seed, index)}
            torch.manual_seed(index)
            layer, x = build(row)
            check(layer, x)
            rows[index] = {**row, **race(layer, x, seconds, layout)}
            file.write(json.dumps(rows[index]) + "\n")
            file.flush()
            print(describe(rows[index]), flush=True)
    return [rows[index] for index in range(layers)]


def describe(row: dict[str, Any]) -> str:
    """One row as a line of the table."""
    shape = f"{row['in']}->{row['out']}"
    if row["kind"] == "conv2d":
        shape += f" {row['kernel']}x{row['kernel']}/{row['stride']} on {row['image']}"
    block = "x".join(map(str, row["block"]))
    mark = "" if row["settled"] != "time" and row["tuned"] != "time" else "  (not settled)"
    return (
        f"{row['index']:4d}  {row['kind']:6s}  {shape:22s}  batch {row['batch']:3d}  "
        f"{100 * row['density']:5.1f} %  {block}  {row['storage']:12s}  "
        f"{row['planned_ms']:9.3f} ms  dense {row['dense_ms']:9.3f} ms  "
        f"{row['ratio']:6.2f}x{mark}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The worst ten, how many miss the target, and which of the very sparse are not served so."""
    worst = sorted(rows, key=lambda row: row["ratio"])
    slow = [row for row in rows if row["ratio"] < SLOWEST_ALLOWED]
    wide = [r for r in rows if r["density"] <= 0.05 and min(r["in"], r["out"]) >= 64]
    dense = [row for row in wide if row["storage"] != COMPRESSED]
    lines = ["the worst ten:", *map(describe, worst[:10])]
    lines.append(f"under {SLOWEST_ALLOWED}x dense: {len(slow)} of {len(rows)}")
    lines.append(f"<= 5 % and >= 64 channels, not served sparse: {len(dense)} of {len(wide)}")
    return "\n".join([*lines, *map(describe, dense)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="cap on one comparison")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--layout",
        choices=["own", "seen"],
        default="own",
        help="own: each contender gets its inputs in the order it likes best, as inside of a net "
        "of its kind; seen: contiguous ones, conversions included, as a drop-in",
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON lines to append to")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = options.out or Path(f"never-slower-{options.seed}-{options.layout}.jsonl")
    print(machine.one_line(machine.header()))
    print(summary(run(options.layers, options.seed, out, options.seconds, options.layout)))


if __name__ == "__main__":
    main()
