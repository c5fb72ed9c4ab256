"""The row "tuned": what ``tune`` makes of a layer on this GPU, beside our default and dense.

``tune`` may also store a layer dense with a mask: "never slower than dense through plan" is the
speedup of this contender. Its cost is in the row.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import plan_variants, tune
from sparse_kernels._load import native_or_none
from sparse_kernels.backends import _cuda_variants
from sparse_kernels.backends.triton import chosen
from sparse_kernels.nn.base import DENSE_MASKED
from sparse_kernels.workbench.bench.contest import make_sparse
from sparse_kernels.workbench.bench.shapes import LayerShape, choose
from tools.gpu_bench import layers
from tools.gpu_bench.layers import Settings, Task, label_of, sparse_calls
from tools.gpu_bench.measure import TOLERANCE, Call, as_row, precision, race, reason, still_works

SECONDS, SMALL_SECONDS = 0.2, 0.01  # cap on one of tune's comparisons
DENSITY = 0.05


def tuned(settings: Settings) -> Iterator[Task]:
    """A row per layer, precision and block: the products, then convolutions of all nets."""
    if settings.small:
        yield _task(
            LayerShape("product-64", 64, 64, net="products"), 64, "fp32", (16, 16), settings
        )
        return
    products = [LayerShape(f"product-{n}", n, n, net="products") for n in (4096, 2048, 1024, 8192)]
    found = choose(("vgg", "wrn", "resnet"), "core")
    convolutions = [shape for shape in found if shape.size and shape.columns >= 64]
    for name, blocks in (("bf16", ((32, 32), (64, 64), (16, 16))), ("fp32", ((1, 1),))):
        for block in blocks:
            for shape in (*products, *convolutions):
                batch = shape.columns if shape.size == 0 else 128
                yield _task(shape, batch, name, block, settings)


def _task(
    shape: LayerShape, batch: int, name: str, block: tuple[int, int], settings: Settings
) -> Task:
    density = 0.1 if settings.small else DENSITY
    make = functools.partial(tuned_row, shape, batch, name, block, density, settings)
    return f"tuned {shape.name} {name} {label_of(density, block)}", make


class UnderAutocast(nn.Module):
    """A float32 layer on bf16 activations, as whole steps have it; its casts count."""

    def __init__(self, module: nn.Module, on: bool) -> None:
        super().__init__()
        self.module, self.on = module, on

    def forward(self, x: Tensor) -> Tensor:
        with autocast(x.device, self.on):
            return self.module(x)  # type: ignore[no-any-return]


def autocast(device: torch.device, on: bool) -> Any:
    """bf16 without the cache of casts: memory made in a capture belongs to the graph."""
    if not on:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def forget_choices() -> None:
    """Built-in rules and default configurations again, for the whole process."""
    chosen.clear()
    _cuda_variants.clear()
    if native_or_none() is not None:
        plan_variants.clear()


def tuned_row(
    shape: LayerShape,
    batch: int,
    name: str,
    block: tuple[int, int],
    density: float,
    settings: Settings,
) -> dict[str, Any]:
    """Dense in its layouts, ours by default, ours tuned."""
    torch.manual_seed(0)
    device, batch = settings.device, shape.batch or batch
    row: dict[str, Any] = {"shape": shape.name, "batch": batch, "precision": name, "errors": {}}
    missing: dict[str, str] = {}
    label = label_of(density, block)
    forget_choices()
    try:
        with precision(name) as dtype:
            x = torch.randn(shape.input_shape(batch), device=device).to(dtype)
            dense = shape.dense().to(device)
            with torch.no_grad():
                grad = torch.randn_like(dense(x.float())).to(dtype)
            layer = make_sparse(copy.deepcopy(dense).cpu(), density, block).to(device)
            calls: dict[str, Call] = dict(
                layers.dense_calls(copy.deepcopy(dense).to(dtype), x, grad, settings)
            )
            if label not in settings.faults:
                calls |= sparse_calls(label, layer, x, grad, TOLERANCE[name], row["errors"])
            later = functools.partial(_if_it_can, label, layer, x, grad, row, settings, missing)
            calls = {n: call for n, call in calls.items() if n not in settings.faults}
            timings, uncaptured = race(calls, settings.rounds, device, later)
    finally:
        forget_choices()
    forward = {n: t for n, t in timings.items() if n.endswith("forward")}
    both = {n: t for n, t in timings.items() if not n.endswith("forward")}
    missing |= {**uncaptured, **settings.faults}
    return {**row, "forward": as_row(forward, {}), "training": as_row(both, missing)}


def _if_it_can(
    label: str,
    layer: Any,
    x: Tensor,
    grad: Tensor,
    row: dict[str, Any],
    settings: Settings,
    missing: dict[str, str],
) -> dict[str, Call]:
    """The tuned contender, or in ``missing`` why there is none."""
    if f"{label} tuned" in settings.faults:
        return {}
    try:
        return _tuned_calls(label, layer, x, grad, row, settings)
    except Exception as error:  # reported in the row
        still_works(f"{label} tuned", error)
        missing[f"{label} tuned"] = reason(error)
        return {}


def _tuned_calls(
    label: str, layer: Any, x: Tensor, grad: Tensor, row: dict[str, Any], settings: Settings
) -> dict[str, Call]:
    """A copy of the layer after ``tune``, checked; what it chose and took goes into ``row``."""
    ours, half = copy.deepcopy(layer), x.dtype == torch.bfloat16
    example = layers.in_layout_of(ours, x).detach().requires_grad_()
    cap = SMALL_SECONDS if settings.small else SECONDS
    start = time.perf_counter()
    with autocast(x.device, half):
        report = tune(ours, example, layout="own", seconds=cap, cache=False)
    seconds = time.perf_counter() - start
    chosen_row = report.rows[0]
    row["tuned"] = {
        "seconds": seconds,
        "storage": ours.storage,
        "break_even": chosen_row.break_even,
        "settled": chosen_row.settled,
        "variants": {k: list(v) for k, v in chosen_row.variants.items()},
    }
    if ours.storage == DENSE_MASKED:
        form = torch.contiguous_format
        if x.dim() == 4 and ours.image_format == "channels_last":
            form = torch.channels_last
        x, grad = (t.contiguous(memory_format=form) for t in (x, grad))
    else:
        x, grad = (layers.in_layout_of(ours, t) for t in (x, grad))
    module = UnderAutocast(ours, half)
    layers.check_layer(
        f"{label} tuned", module, ours, x, TOLERANCE[row["precision"]], row["errors"]
    )
    return dict(layers.passes(f"sparse {label} tuned", module, x, grad))
