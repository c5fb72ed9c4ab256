"""Inference: the forward pass of a trained sparse net in evaluation mode, batch 1 and 32."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import densify
from .. import machine, models
from ..config import DENSE_LAYOUTS, TrainConfig
from ..contenders import build_sparse, forget_compiled
from ..datasets import BatchLoader, Dataset, load
from ..errors import WorkbenchError
from ..timing import interleave
from . import contest, nets
from .results import Journal, markdown, milliseconds

BATCHES = (1, 32)
_REAL_STEPS, _RANDOM_STEPS = 300, 8
_TEST_IMAGES, _TEST_BATCH = 2000, 250
_MIN_SAMPLE = 0.005
_TOLERANCE = 1e-3  # relative, of logits that went through many layers of float32


def run(
    configs: list[TrainConfig],
    *,
    steps: int | None,
    rounds: int,
    seconds: float,
    journal: Journal,
) -> dict[str, Any]:
    """Train every net under sparse momentum, then time its forward pass; one row per net and batch.

    Trained for ``steps`` steps with three mask updates on real data: those of ``data_dir``, or
    the shipped sample of MNIST. Where there are only random images (CIFAR nets without
    ``data_dir``) a few steps give the norms their statistics and the masks a pattern of sparse
    momentum. None: 300 steps and 8. Dense: the same masked net, eager and compiled.
    """
    rows = []
    for config in configs:
        config.check()
        missing = [b for b in BATCHES if f"{config.net} {b}" not in journal.rows]
        if missing:
            model, trained = _trained(config, steps)
            for batch in missing:
                row = _measure(model, config, batch, rounds, seconds)
                journal.add(f"{config.net} {batch}", {**row, "trained": trained})
        for batch in BATCHES:
            row = journal.rows[f"{config.net} {batch}"]
            print(f"{config.net:<16} batch {batch:<3} {row['speedup']:.2f}x", flush=True)
            rows.append(row)
    return {"rows": rows}


def _trained(config: TrainConfig, steps: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The net in evaluation mode; how long, on what and to which test accuracy it was trained."""
    sample = config.data_dir is None and models.spec(config.net).kind == "mnist"
    real = sample or config.data_dir is not None
    count = steps or (_REAL_STEPS if real else _RANDOM_STEPS)
    data = load("mnist-sample") if sample else nets.dataset_of(config, count * config.batch_size)
    # Values scaled to the fewer inputs: the training is short.
    config = dataclasses.replace(config, init="scaled")
    contender = build_sparse(config, nets.SEED, count, max(1, count // 4))
    batches = nets.endless(nets.loader_of(data, config))
    for _ in range(count):
        contender.step(*next(batches))
    accuracy = contender.accuracy(_test_batches(data)) if real else None
    source = f"{data.name} ({data.source})" if sample else data.source
    trained = {"steps": count, "data": source, "test_accuracy": accuracy}
    return contender.model.eval(), trained


def _test_batches(data: Dataset) -> BatchLoader:
    index = torch.arange(min(_TEST_IMAGES, len(data.test)))
    return BatchLoader(data.test.select(index), data, min(_TEST_BATCH, len(index)))


def _measure(
    model: nn.Module, config: TrainConfig, batch: int, rounds: int, seconds: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *models.spec(config.net).input_shape, generator=generator)
    calls: dict[str, Callable[[], object]] = {"sparse": _call(model, x)}
    reference = densify(copy.deepcopy(model)).eval()
    with torch.inference_mode():
        expected = reference(x)
        errors = {"sparse": contest.relative_error(model(x), expected)}
    if not errors["sparse"] <= _TOLERANCE:
        raise WorkbenchError(
            f"{config.net}, batch {batch}: logits differ from the masked dense net's by "
            f"{errors['sparse']:.1e}, expected at most {_TOLERANCE:.0e}; a wrong net is not timed"
        )
    rejected = {}
    forget_compiled()
    has_conv = any(isinstance(m, nn.Conv2d) for m in reference.modules())
    for name in DENSE_LAYOUTS:
        if name.endswith("channels_last") and not has_conv:
            continue
        try:
            module, arrange = contest.in_layout(copy.deepcopy(reference), name)
            call = _call(module, arrange(x))
            found = call()
            errors[name] = contest.relative_error(found, expected)
            if not errors[name] <= _TOLERANCE:
                raise WorkbenchError(f"logits differ by {errors[name]:.1e}")
        except Exception as error:  # torch.compile fails in many ways, none of them ours
            rejected[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            calls[name] = call
    timings = interleave(calls, rounds, 2, budget=seconds, min_seconds=_MIN_SAMPLE)
    return {
        "net": config.net,
        "batch": batch,
        "errors": errors,
        "rejected": rejected,
        "densities": nets.densities(model, config.net),
        **contest.compare(timings),
    }


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return forward


def tables(results: dict[str, Any]) -> str:
    """Markdown: one row per net and batch, every dense way beside sparse."""
    settings = results["settings"]
    rows = []
    for row in results["rows"]:
        cells = [row["net"], str(row["batch"])]
        for name in ("sparse", *DENSE_LAYOUTS):
            timing = row["timings"].get(name)
            cells.append(milliseconds(timing) if timing else "")
        eager = min(
            t["median"] for n, t in row["timings"].items()
            if n in ("contiguous", "channels_last")
        )  # fmt: skip
        rows.append([
            *cells, f"{eager / row['timings']['sparse']['median']:.2f}x", f"{row['speedup']:.2f}x"
        ])  # fmt: skip
    lines = [
        f"Inference at density {100 * settings['density']:g} %, block {settings['block']}, "
        "evaluation mode, milliseconds, median [quartiles].",
        machine.one_line(results["machine"]),
        "",
        *markdown(["net", "batch", "sparse", *DENSE_LAYOUTS, "against eager", "against the best"],
                  rows),
        "",
    ]  # fmt: skip
    lines += [f"{net}: {_training_line(how)}" for net, how in _trainings(results["rows"]).items()]
    for row in results["rows"]:
        for name, why in row["rejected"].items():
            lines.append(f"{row['net']}, batch {row['batch']}: no {name} ({why}).")
    return "\n".join(lines)


def _trainings(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["net"]: row["trained"] for row in rows}


def _training_line(how: dict[str, Any]) -> str:
    accuracy = how["test_accuracy"]
    found = "" if accuracy is None else f", test accuracy {100 * accuracy:.1f} %"
    return f"trained for {how['steps']} steps on {how['data']}{found}."
