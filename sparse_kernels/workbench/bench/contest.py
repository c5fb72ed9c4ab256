"""The contenders on one layer, all of them computing the same masked weight, checked before timed.

The dense contenders hold the sparse layer's weight with its zeros: their time does not depend on
the values, and so one reference checks everybody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import layout
from ...nn import SparseConv2d, SparseLinear
from ...nn.base import DENSE_MASKED, SparseLayer
from ..config import DENSE_LAYOUTS
from ..errors import WorkbenchError
from ..timing import Timing
from .shapes import LayerShape

# ||ours - reference|| / ||reference||; both may be float32, whose sums round in another order.
TOLERANCE = 2e-5
# Below so many multiplications the reference is float64; above it would take longer than the race.
_FLOAT64_BELOW = 2e9
Arrange = Callable[[Tensor], Tensor]
WeightGradient = Callable[[nn.Module, SparseLayer], Tensor]


@dataclass
class Entry:
    """One contender: how to run it, and what it computes.

    ``check`` returns output, input gradient and weight gradient ("output", "dx", "dvalues", the
    last in the order of the sparse layer's values); a contender without backward has "output".
    """

    name: str
    forward: Callable[[], object]
    both: Callable[[], object] | None
    check: Callable[[], dict[str, Tensor]]


@dataclass
class Contest:
    """A layer, its input and what the right results are.

    x: [batch, C(, H, W)] contiguous; grad: the gradient of the output; reference: as
    ``Entry.check``, from the dense masked layer.
    """

    shape: LayerShape
    sparse: SparseLayer
    dense: nn.Module
    x: Tensor
    grad: Tensor
    reference: dict[str, Tensor]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def admit(self, entry: Entry) -> None:
        """Check a contender; raises WorkbenchError if it is wrong."""
        found = entry.check()
        errors = {key: relative_error(value, self.reference[key]) for key, value in found.items()}
        for key, error in errors.items():
            if not error <= TOLERANCE:
                raise WorkbenchError(
                    f"{self.shape.name}, {entry.name}: {key} differs from the masked dense layer "
                    f"by {error:.1e} (relative), expected at most {TOLERANCE:.0e}; a wrong result "
                    "is not timed"
                )
        self.errors[entry.name] = errors

    def invite(self, name: str, make: Callable[[], Entry]) -> Entry | None:
        """A contender of others: one that cannot run or is wrong is noted as missing, and why."""
        try:
            entry = make()
            self.admit(entry)
        except Exception as error:  # whatever a stranger's code raises
            first = (str(error).splitlines() or [""])[0]
            self.missing[name] = f"{type(error).__name__}: {first}"[:300]
            return None
        return entry


def set_up(shape: LayerShape, density: float, block: tuple[int, int], batch: int) -> Contest:
    """Layer and input from seed 0, the reference, and the check that the pattern is as asked."""
    torch.manual_seed(0)
    dense = shape.dense()
    sparse = make_sparse(dense, density, block)
    check_nnz(sparse, density, shape.name)
    masked = sparse.to_dense()
    x = torch.randn(shape.input_shape(shape.batch or batch))
    with torch.no_grad():
        grad = torch.randn(masked(x[:1]).shape[1:]).expand(x.shape[0], *([-1] * (x.dim() - 1)))
        grad = grad * torch.rand(x.shape[0], *([1] * (x.dim() - 1)))
    products = 3 * shape.weights * shape.positions * x.shape[0]
    wide = torch.float64 if products < _FLOAT64_BELOW else torch.float32
    reference = results_of(copy.deepcopy(masked).to(wide), x.to(wide), grad.to(wide), sparse)
    return Contest(shape, sparse, masked, x, grad, reference)


def make_sparse(
    dense: nn.Linear | nn.Conv2d, density: float, block: tuple[int, int]
) -> SparseLayer:
    """The sparse copy of a dense layer on a random pattern (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    kind: Any = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear
    return cast(
        SparseLayer,
        kind.from_dense(dense, density=density, block=block, keep="random", generator=generator),
    )


def check_nnz(layer: SparseLayer, density: float, name: str) -> None:
    """Raise WorkbenchError unless the layer stores ``density`` of its blocks, to one block."""
    pattern = layer.pattern
    blocks = pattern.block_rows * pattern.block_cols
    wanted = max(1, round(density * blocks))
    if abs(pattern.nnzb - wanted) > 1:
        raise WorkbenchError(
            f"{name}: expected {wanted} of {blocks} blocks stored, got {pattern.nnzb}; a pattern "
            "of another density is not timed"
        )


def sparse_entry(contest: Contest) -> Entry:
    """The sparse layer, input and gradient feature-major as in the middle of a net."""
    return module_entry("sparse", contest.sparse, contest, layout.to_feature_major)


def dense_entries(contest: Contest, compiled: bool) -> list[Entry]:
    """The dense layer in every layout worth a trial, checked; torch.compile's if asked for."""
    torch._dynamo.reset()
    entries = []
    for name in DENSE_LAYOUTS:
        if (name.startswith("compile") and not compiled) or (
            name.endswith("channels_last") and not contest.shape.size
        ):
            continue
        entry = contest.invite(name, lambda name=name: dense_entry(contest, name))  # type: ignore[misc]
        if entry is not None:
            entries.append(entry)
    if not entries:
        raise WorkbenchError(f"{contest.shape.name}: no dense contender runs ({contest.missing})")
    return entries


def dense_entry(contest: Contest, name: str) -> Entry:
    """The masked dense layer in one of DENSE_LAYOUTS."""
    module, arrange = in_layout(copy.deepcopy(contest.dense), name)
    return module_entry(name, module, contest, arrange)


def in_layout(module: nn.Module, name: str) -> tuple[nn.Module, Arrange]:
    """The module in one of DENSE_LAYOUTS, and what puts a tensor into its layout."""
    arrange: Arrange = Tensor.contiguous
    if name.endswith("channels_last"):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        arrange = channels_last
    if name.startswith("compile"):
        module = cast(nn.Module, torch.compile(module, dynamic=False))
    return module, arrange


def channels_last(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in channels_last; anything else contiguous."""
    if x.dim() != 4:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def module_entry(
    name: str,
    module: nn.Module,
    contest: Contest,
    arrange: Arrange,
    gradient: WeightGradient | None = None,
) -> Entry:
    """A contender made of a module, with input and gradient in its own layout."""
    # Copies even where the layout is right already: gradients must not meet in one tensor.
    x = arrange(contest.x.clone()).detach().requires_grad_(True)
    grad = arrange(contest.grad)

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    def both() -> object:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad)
        return x.grad

    def check() -> dict[str, Tensor]:
        return results_of(module, x, grad, contest.sparse, gradient)

    return Entry(name, forward, both, check)


def results_of(
    module: nn.Module,
    x: Tensor,
    grad: Tensor,
    sparse: SparseLayer,
    gradient: WeightGradient | None = None,
) -> dict[str, Tensor]:
    """Output, dx and dvalues (as the values of ``sparse``) of one forward and backward pass."""
    x = x.detach().requires_grad_(True)
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.backward(grad)
    assert x.grad is not None
    values = (gradient or weight_gradient)(module, sparse)
    module.zero_grad(set_to_none=True)
    return {"output": y.detach(), "dx": x.grad, "dvalues": values}


def weight_gradient(module: nn.Module, sparse: SparseLayer) -> Tensor:
    """The weight gradient of a sparse or dense layer, as the values of ``sparse``."""
    if isinstance(module, SparseLayer):
        assert module.values.grad is not None
        return module.values.grad
    weight = module.get_parameter("weight" if hasattr(module, "weight") else "_orig_mod.weight")
    assert weight.grad is not None
    matrix = sparse.weight_to_matrix(weight.grad)
    if sparse.storage == DENSE_MASKED:
        return matrix * sparse.mask
    return sparse.pattern.compress(matrix)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, infinite if ours is not finite; shapes must be equal.

    Raises ValueError for other shapes.
    """
    if ours.shape != reference.shape:
        raise ValueError(f"expected shape {tuple(reference.shape)}, got {tuple(ours.shape)}")
    with torch.no_grad():
        difference = float(torch.linalg.vector_norm(ours - reference, dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(reference, dtype=torch.float64))
    if difference != difference or difference == float("inf"):
        return float("inf")
    return difference / max(norm, 1e-30)


def best_dense(timings: dict[str, Any]) -> str:
    """The fastest of the dense contenders, by median (of Timing objects or their dictionaries)."""

    def median(name: str) -> float:
        timing = timings[name]
        return timing.median if isinstance(timing, Timing) else float(timing["median"])

    return min((name for name in timings if name in DENSE_LAYOUTS), key=median)


def compare(timings: dict[str, Timing]) -> dict[str, Any]:
    """Timings as plain data, the best dense contender, and how much faster sparse is."""
    best = best_dense(timings)
    return {
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "dense_best": best,
        "speedup": timings[best].median / timings["sparse"].median,
    }
