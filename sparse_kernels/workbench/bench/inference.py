"""Inference: the forward pass of a trained sparse net in evaluation mode, batch 1 and 32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import densify
from .. import machine, models
from ..config import DENSE_LAYOUTS, TrainConfig
from ..contenders import build_sparse, forget_compiled
from ..errors import WorkbenchError
from ..timing import interleave
from . import contest, nets
from .results import Journal, markdown, milliseconds

BATCHES = (1, 32)
_MIN_SAMPLE = 0.005
_TOLERANCE = 1e-3  # relative, of logits that went through many layers of float32


def run(
    configs: list[TrainConfig], *, steps: int, rounds: int, seconds: float, journal: Journal
) -> dict[str, Any]:
    """Time every net and batch after ``steps`` training steps with a mask update in the middle.

    The steps give the norms running statistics and the masks a pattern of sparse momentum; speed
    does not depend on how well the net is trained. Dense: the same masked net, eager and compiled.
    """
    rows = []
    for config in configs:
        config.check()
        missing = [b for b in BATCHES if f"{config.net} {b}" not in journal.rows]
        if missing:
            model = _trained(config, steps)
            for batch in missing:
                journal.add(
                    f"{config.net} {batch}", _measure(model, config, batch, rounds, seconds)
                )
        for batch in BATCHES:
            row = journal.rows[f"{config.net} {batch}"]
            print(f"{config.net:<16} batch {batch:<3} {row['speedup']:.2f}x", flush=True)
            rows.append(row)
    return {"rows": rows}


def _trained(config: TrainConfig, steps: int) -> nn.Module:
    contender = build_sparse(config, nets.SEED, 2 * steps, max(1, steps // 2))
    data = nets.dataset_of(config, steps * config.batch_size)
    batches = nets.endless(nets.loader_of(data, config))
    for _ in range(steps):
        contender.step(*next(batches))
    return contender.model.eval()


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
    for row in results["rows"]:
        for name, why in row["rejected"].items():
            lines.append(f"{row['net']}, batch {row['batch']}: no {name} ({why}).")
    return "\n".join(lines)
