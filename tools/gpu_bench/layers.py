"""Products 1k to 8k and the convolutions of three nets: forward, and forward with gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.workbench.bench.contest import make_sparse, relative_error
from sparse_kernels.workbench.bench.shapes import LayerShape, choose
from tools.gpu_bench.measure import (
    PRECISIONS,
    TOLERANCE,
    Call,
    as_row,
    precision,
    race,
    reason,
    still_works,
)

Task = tuple[str, Callable[[], dict[str, Any]]]


class Settings:
    """What is raced: sizes, blocks and densities; ``small`` is the rehearsal."""

    def __init__(self, small: bool, device: torch.device, rounds: int) -> None:
        self.small, self.device, self.rounds = small, device, rounds
        self.blocks = ((16, 16),) if small else ((16, 16), (32, 32), (64, 64), (1, 1))
        self.densities = (0.1,) if small else (0.05, 0.1)
        self.products = (64,) if small else (1024, 2048, 4096, 8192)
        self.precisions = ("fp32",) if small else PRECISIONS
        # What the interpreter or a CPU cannot tell anything about.
        self.compiled = not small and device.type == "cuda"
        self.foreign = device.type == "cuda"
        # Contenders of the row at hand that broke the process when they ran, and how.
        self.faults: dict[str, str] = {}


def products(settings: Settings) -> Iterator[Task]:
    """Square linear layers, as many rows in the batch as features."""
    for name in settings.precisions:
        for n in settings.products:
            shape = LayerShape(f"product-{n}", n, n, net="products")
            yield _task(shape, n, name, settings)


def convolutions(net: str) -> Callable[[Settings], Iterator[Task]]:
    """The convolutions of the layers whose name begins with ``net``."""

    def tasks(settings: Settings) -> Iterator[Task]:
        shapes = [s for s in choose((net,), "core") if s.size and s.columns >= 16]
        if settings.small:
            shapes = [LayerShape(f"{net}-small", 32, 32, 3, 5, net=net)]
        for name in settings.precisions:
            for shape in shapes:
                yield _task(shape, 2 if settings.small else 128, name, settings)

    return tasks


def _task(shape: LayerShape, batch: int, name: str, settings: Settings) -> Task:
    return f"{shape.name} {name}", lambda: layer_row(shape, batch, name, settings)


def layer_row(shape: LayerShape, batch: int, name: str, settings: Settings) -> dict[str, Any]:
    """All contenders on one layer at one precision."""
    torch.manual_seed(0)
    device = settings.device
    batch = shape.batch or batch
    with precision(name) as dtype:
        x = torch.randn(shape.input_shape(batch), device=device).to(dtype)
        dense = shape.dense().to(device)
        with torch.no_grad():
            grad = torch.randn_like(dense(x.float())).to(dtype)
        missing: dict[str, str] = {}
        errors: dict[str, float] = {}
        calls = dict(dense_calls(copy.deepcopy(dense).to(dtype), x, grad, settings))
        for density, block in itertools.product(settings.densities, settings.blocks):
            label = label_of(density, block)
            if label in settings.faults:
                continue
            # Made on the CPU: patterns are drawn there.
            layer = make_sparse(copy.deepcopy(dense).cpu(), density, block).to(device)
            try:
                calls |= sparse_calls(label, layer, x, grad, TOLERANCE[name], errors)
            except Exception as error:  # reported in the row
                still_works(label, error)
                missing[label] = reason(error)
            if settings.foreign and not shape.size:
                calls |= foreign_calls(label, layer, x, block, settings, missing)
        missing |= settings.faults
        calls = {name: call for name, call in calls.items() if name not in settings.faults}
        timings, uncaptured = race(calls, settings.rounds, device)
    forward = {n: t for n, t in timings.items() if n.endswith("forward")}
    both = {n: t for n, t in timings.items() if not n.endswith("forward")}
    return {
        "shape": shape.name,
        "batch": batch,
        "precision": name,
        "errors": errors,
        "forward": as_row(forward, {}),
        "training": as_row(both, {**missing, **uncaptured}),
    }


def label_of(density: float, block: tuple[int, int]) -> str:
    """How tables call a sparse contender."""
    return f"{100 * density:g}% {block[0]}x{block[1]}"


def dense_calls(
    dense: nn.Module, x: Tensor, grad: Tensor, settings: Settings
) -> Iterator[tuple[str, Call]]:
    """The dense layer in both image layouts, eager and compiled."""
    forms = {"contiguous": torch.contiguous_format}
    if x.dim() == 4:
        forms["channels_last"] = torch.channels_last
    for label, form in forms.items():
        module: Any = dense.to(memory_format=form) if x.dim() == 4 else dense
        module = copy.deepcopy(module)
        arranged = [t.contiguous(memory_format=form) for t in (x, grad)]
        yield from passes(f"dense {label}", module, *arranged)
        if settings.compiled:
            yield from passes(f"dense {label} compiled", torch.compile(module), *arranged)


def sparse_calls(
    label: str, layer: SparseLayer, x: Tensor, grad: Tensor, bound: float, errors: dict[str, float]
) -> dict[str, Call]:
    """Our layer on activations in the layout that its kernels read; checked before it is timed."""
    x, grad = (in_layout_of(layer, t) for t in (x, grad))
    check_layer(label, layer, layer, x, bound, errors)
    return dict(passes(f"sparse {label}", layer, x, grad))


def check_layer(
    label: str,
    module: nn.Module,
    layer: SparseLayer,
    x: Tensor,
    bound: float,
    errors: dict[str, float],
) -> None:
    """Hold ``module`` against the dense twin of ``layer`` in strict float32. Raises ValueError."""
    masked = layer.to_dense()
    with precision("fp32"), torch.no_grad():
        expected = masked(x.float())
    with torch.no_grad():
        error = relative_error(module(x).float(), expected)
    errors[label] = error
    if not error <= bound:
        raise ValueError(f"relative error {error:.1e}, expected at most {bound:.0e}; not timed")


def in_layout_of(layer: SparseLayer, t: Tensor) -> Tensor:
    """``t`` as it comes from a layer of the same blocks."""
    from sparse_kernels import plan
    from sparse_kernels.layout import to_feature_major

    op = "conv2d" if t.dim() == 4 else "linear"
    if not plan.batch_major(op, t, layer.values):
        return to_feature_major(t)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def passes(label: str, module: Any, x: Tensor, grad: Tensor) -> Iterator[tuple[str, Call]]:
    """("... forward", without gradients) and ("...", forward, gradients of x and weights)."""
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(leaf), wanted, grad)

    yield f"{label} forward", forward
    yield label, both


def foreign_calls(
    label: str,
    layer: SparseLayer,
    x: Tensor,
    block: tuple[int, int],
    settings: Settings,
    missing: dict[str, str],
) -> dict[str, Call]:
    """torch's sparse products of a linear layer: BSR in bf16, CSR in strict float32."""
    name = f"torch sparse {label}"
    if name in settings.faults:
        return {}
    try:
        if x.dtype == torch.bfloat16:
            return bsr_call(label, layer, x, block)
        strict = torch.backends.cuda.matmul.fp32_precision == "ieee"
        return csr_call(label, layer, x) if strict and block == (1, 1) else {}
    except Exception as error:  # a stranger's: reported in the row
        still_works(name, error)
        missing[name] = reason(error)
        return {}


def bsr_call(label: str, layer: SparseLayer, x: Tensor, block: tuple[int, int]) -> dict[str, Call]:
    """torch's product of a BSR weight (its own Triton kernels); forward only."""
    if block == (1, 1):
        return {}
    weight = layer.weight.detach().to(x.dtype).to_sparse_bsr(block)

    def forward() -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, weight)

    forward()
    return {f"torch BSR {label} forward": forward}


def csr_call(label: str, layer: SparseLayer, x: Tensor) -> dict[str, Call]:
    """cuSPARSE through torch: CSR weight times x^T; forward only."""
    weight = layer.weight.detach().to_sparse_csr()
    turned = x.t().contiguous()

    def forward() -> Tensor:
        with torch.no_grad():
            return torch.sparse.mm(weight, turned)

    forward()
    return {f"cuSPARSE {label} forward": forward}
