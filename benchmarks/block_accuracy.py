"""What each block size costs in accuracy at equal density: LeNet-300-100 on MNIST.

    python benchmarks/block_accuracy.py --data-dir DIR
        --out benchmarks/results/MACHINE/block-accuracy.jsonl

One JSON line per finished run; what the file has is not run again, so an interrupted command goes
on (``--minutes`` ends one in time).  Afterwards a Markdown table lies beside the file.

Equal density: the classifier (10 x 100), into which large blocks do not fit, stays dense in EVERY
run, and the two hidden layers get what is left of the budget, so that density times all 266,200
weights exist whatever the block.  A mask update per epoch, 10 % of the training images held out;
blocks are pruned by mean |w| and grown by mean |momentum|.  What no option names is as in
`sparse-kernels train`: the paper's SGD with Nesterov momentum; the signal is `window`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_kernels.nn import SparseLayer, sparsify
from sparse_kernels.workbench import account, machine, models
from sparse_kernels.workbench.bench.results import markdown
from sparse_kernels.workbench.config import TrainConfig, parse_block
from sparse_kernels.workbench.contenders import Contender, drive
from sparse_kernels.workbench.datasets import BatchLoader, Dataset, hold_out, load

NET, CLASSIFIER = "lenet-300-100", "5"
BLOCKS = "1x1,2x1,4x1,8x1,4x4,8x8,16x16"
DENSITIES = "0.05,0.1"
DENSE = "dense"  # the key of the net with all its weights
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every run of a file shares; other settings need another file."""

    data: str
    epochs: int
    batch_size: int
    signal: str
    max_steps: int | None


def build(config: TrainConfig, block: str, seed: int, steps: int, every: int) -> Contender:
    """The net of a seed with ``config.density`` of all its weights, its optimizer and masks."""
    torch.manual_seed(seed)
    model = models.build(NET).train()
    report = None
    if block != DENSE:
        weights = sum(m.weight.numel() for m in model if isinstance(m, torch.nn.Linear))
        classifier = model.get_submodule(CLASSIFIER).weight.numel()
        density = (config.density * weights - classifier) / (weights - classifier)
        report = sparsify(
            model,
            density=density,
            block=parse_block(block),
            exclude=CLASSIFIER,
            generator=torch.Generator().manual_seed(seed),
        )
        if any(row.action == "skipped" and row.name != CLASSIFIER for row in report):
            raise ValueError(f"block {block} does not fit the hidden layers:\n{report}")
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    contender = Contender(block, "sparse", model, model, optimizer, None, config, report=report)
    if block != DENSE:
        drive(contender, seed, steps, every)
    return contender


def train(settings: Settings, dataset: Dataset, block: str, density: float, seed: int) -> Row:
    """One run: test accuracy after the last epoch, densities before and after, seconds."""
    config = TrainConfig(
        net=NET,
        data=settings.data,
        density=density,
        block=block,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        signal=settings.signal,
    )
    part, held = hold_out(dataset.train, config.holdout, seed)
    batches = BatchLoader(part, dataset, config.batch_size, seed=seed)
    total = len(batches) * settings.epochs
    contender = build(config, block, seed, total, len(batches))
    before = account.weight_density(account.layer_costs(contender.model, {}))
    steps = min(total, settings.max_steps or total)
    start = time.perf_counter()
    while contender.steps_done < steps:
        for images, labels in batches:
            loss = contender.step(images, labels)
            if contender.steps_done >= steps:
                break
    costs = account.layer_costs(contender.model, {})
    return {
        "block": block,
        "density": density,
        "seed": seed,
        "test_accuracy": contender.accuracy(BatchLoader(dataset.test, dataset, 500)),
        "validation_accuracy": contender.accuracy(BatchLoader(held, dataset, 500)),
        "train_loss": loss,
        "density_before": before,
        "density_after": account.weight_density(costs),
        "layers": {cost.name: cost.density for cost in costs},
        "storage": {
            name: layer.storage
            for name, layer in contender.model.named_modules()
            if isinstance(layer, SparseLayer)
        },
        "mask_updates": contender.masking.updates if contender.masking else 0,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
    }


def wanted(
    blocks: str, densities: str, seeds: int, dense: bool
) -> Iterator[tuple[str, float, int]]:
    """The runs in order: every block and density with one seed before the next seed."""
    for seed in range(seeds):
        if dense:
            yield DENSE, 1.0, seed
        for density in densities.split(","):
            for block in blocks.split(","):
                yield block, float(density), seed


def read(out: Path, settings: Settings) -> list[Row]:
    """The finished runs in ``out``; its first line is written if there is none.

    A last line that was cut off in writing is dropped.  Raises ValueError for other settings.
    """
    mine = json.loads(json.dumps(asdict(settings)))
    lines = out.read_text().splitlines() if out.exists() else []
    if not lines:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine.header(), "settings": mine}) + "\n")
        return []
    found = json.loads(lines[0])["settings"]
    if found != mine:
        raise ValueError(f"{out} was made with {found}, now {mine}; give another --out")
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
            out.write_text("\n".join(lines[:-1]) + "\n")
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line per block and density; error in %, mean and standard deviation of seeds."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["density"], row["block"]), []).append(row)
    size = lambda key: (key[0], math.prod(parse_block(key[1])) if key[1] != DENSE else 0, key[1])  # noqa: E731
    body = []
    for density, block in sorted(groups, key=size):
        found = groups[density, block]
        errors, base = _errors(found), _errors(groups.get((density, "1x1"), []))
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        cost = f"{statistics.fmean(errors) - statistics.fmean(base):+.2f}" if base else ""
        body.append(
            [
                block,
                f"{100 * density:g} %",
                f"{statistics.fmean(errors):.2f}{spread}",
                cost,
                f"{100 * statistics.fmean(row['density_after'] for row in found):.2f} %",
                str(len(found)),
            ]
        )
    head = ["block", "density", "test error, %", "above 1x1", "weights at the end", "seeds"]
    return "\n".join(markdown(head, body))


def _errors(rows: list[Row]) -> list[float]:
    """Test errors in %."""
    return [100 * (1 - row["test_accuracy"]) for row in rows]


def write_table(out: Path, rows: list[Row], settings: Settings) -> Path:
    """The table beside ``out``, with the machine and the settings of the runs."""
    path = out.with_suffix(".md")
    first = json.loads(out.read_text().splitlines()[0])
    doc = (__doc__ or "").partition("Equal density: ")[2]
    text = [
        f"# Accuracy per block: {NET} on {settings.data}",
        "",
        table(rows),
        "",
        "Mean ± standard deviation over the seeds. Equal density: " + doc.strip(),
        "",
        f"Settings: {json.dumps(asdict(settings))}. {machine.one_line(first['machine'])}",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
    ]
    path.write_text("\n".join(text) + "\n")
    return path


def run(options: argparse.Namespace) -> list[Row]:
    """Make the runs that ``options.out`` does not have, until ``options.minutes`` are over."""
    settings = Settings(
        options.data, options.epochs, options.batch_size, options.signal, options.max_steps
    )
    rows = read(options.out, settings)
    done = {(row["block"], row["density"], row["seed"]) for row in rows}
    plan = list(wanted(options.blocks, options.densities, options.seeds, not options.no_dense))
    dataset = load(options.data, options.data_dir)
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    for block, density, seed in plan:
        if (block, density, seed) in done:
            continue
        if time.monotonic() + longest > end:
            print(f"--minutes {options.minutes:g} are over; the same command goes on", flush=True)
            break
        row = train(settings, dataset, block, density, seed)
        longest = max(longest, row["seconds"])
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        error = 100 * (1 - row["test_accuracy"])
        print(
            f"{block:>6} {100 * density:5.1f} %  seed {seed}  error {error:.2f} %  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    print(f"{len(rows)} runs of {len(plan)}: {write_table(options.out, rows, settings)}")
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", default="mnist", choices=["mnist", "mnist-sample"])
    parser.add_argument("--data-dir", default=None, help="directory of the MNIST files")
    parser.add_argument("--blocks", default=BLOCKS, help=f"default {BLOCKS}")
    parser.add_argument("--densities", default=DENSITIES, help=f"default {DENSITIES}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N - 1")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--signal", default="window", choices=["window", "exact"])
    parser.add_argument("--max-steps", type=int, default=None, help="end runs early (for trials)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no run that ends later"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense net")
    parser.add_argument("--out", type=Path, default=Path("block-accuracy.jsonl"))
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(machine.one_line(machine.header()))
    return run(options)


if __name__ == "__main__":
    main()
