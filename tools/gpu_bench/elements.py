"""Elements and V x 1 blocks, pass by pass: native CUDA beside Triton, cuSPARSE and dense torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_kernels import plan
from sparse_kernels.backends import triton
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.workbench.bench.contest import make_sparse, relative_error
from sparse_kernels.workbench.bench.shapes import LayerShape
from tools import gpu_roofline
from tools.gpu_bench.layers import Settings, Task, label_of
from tools.gpu_bench.measure import (
    TOLERANCE,
    Call,
    as_row,
    precision,
    race,
    reason,
    still_works,
)

PASSES = ("forward", "dgrad", "wgrad")
BOTH = "forward+wgrad"  # of issue 5's target for V = 32
LINEAR = LayerShape("linear-4096", 4096, 4096, net="elements")
FEW = LayerShape("linear-4096-batch-256", 4096, 4096, net="elements")
CONV = LayerShape("conv-256-14", 256, 256, 3, 14, net="elements")
SMALL = (LayerShape("linear-small", 64, 48, net="elements"), LayerShape("conv-small", 32, 8, 3, 5))


class Kind(NamedTuple):
    """A row: layer, batch, precision, height of the blocks, density."""

    shape: LayerShape
    batch: int
    precision: str
    side: int
    density: float

    @property
    def key(self) -> str:
        return f"{self.shape.name} {self.precision} {label_of(self.density, (self.side, 1))}"


def kinds(settings: Settings) -> Iterator[Kind]:
    """The targets first: V = 32 in bf16 at 5 %, elements in fp32 from 95 to 90 and 98 %."""
    if settings.small:
        yield from (Kind(shape, 4, "fp32", side, 0.1) for shape in SMALL for side in (1, 32))
        return
    yield Kind(LINEAR, 4096, "bf16", 32, 0.05)
    for density in (0.05, 0.1, 0.02, 0.15):
        yield Kind(LINEAR, 4096, "fp32", 1, density)
    yield Kind(CONV, 256, "fp32", 1, 0.05)
    yield Kind(CONV, 256, "bf16", 32, 0.05)
    for side in (4, 16, 32):
        for name in ("fp32", "bf16"):
            if (side, name) != (32, "bf16"):
                yield Kind(LINEAR, 4096, name, side, 0.05)
    yield Kind(LINEAR, 4096, "bf16", 1, 0.05)
    yield Kind(FEW, 256, "fp32", 1, 0.05)
    for density in (0.1, 0.02):
        yield Kind(CONV, 256, "fp32", 1, density)


def elements(settings: Settings) -> Iterator[Task]:
    """A row per layer, precision, block and density, with an entry per pass."""
    for kind in kinds(settings):
        yield kind.key, functools.partial(element_row, kind, settings)


def element_row(kind: Kind, settings: Settings) -> dict[str, Any]:
    """Each pass of all contenders, checked against the masked dense layer before it is timed."""
    torch.manual_seed(0)
    row: dict[str, Any] = {
        "shape": f"{kind.shape.name} {label_of(kind.density, (kind.side, 1))}",
        "batch": kind.batch,
        "precision": kind.precision,
        "errors": {},
    }
    with precision(kind.precision) as dtype:
        work = Work(kind, settings.device, dtype)
        for name in (*PASSES, BOTH):
            missing: dict[str, str] = {}
            calls = checked(work, name, settings, missing, row["errors"])
            timings, uncaptured = race(calls, settings.rounds, settings.device)
            row[name] = as_row(timings, {**missing, **uncaptured})
            floor = least_seconds(kind, dtype.itemsize, name)
            row[name]["floor"] = {"seconds": floor.seconds, "bound": floor.bound}
            row[name]["shares"] = {
                n: floor.seconds / t.median for n, t in timings.items() if not n.startswith("dense")
            }
    return row


def least_seconds(kind: Kind, itemsize: int, name: str) -> gpu_roofline.Floor:
    """The shared-memory roofline of the pass on a Hopper GPU (gpu_roofline).

    Its arithmetic is that of the plain fp32 cores, in bf16 too: a kernel on tensor cores may be
    faster. It bounds no dense product.
    """
    shape = kind.shape
    layer = gpu_roofline.Layer(
        shape.name,
        kind.batch * shape.positions,
        shape.rows,
        shape.columns,
        max(1, shape.kernel) ** 2,
    )
    names = name.split("+")
    parts = [
        gpu_roofline.shared_memory_floor(layer, kind.side, kind.density, itemsize, n) for n in names
    ]
    return gpu_roofline.Floor(sum(p.seconds for p in parts), parts[0].bound)


class Work:
    """Tensors of a row: the layer, x and grad in both layouts, the dense weight."""

    def __init__(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> None:
        made = kind.shape.dense()
        self.layer: SparseLayer = make_sparse(made, kind.density, (kind.side, 1)).to(device)
        self.side, self.device, self.dtype = kind.side, device, dtype
        self.index = self.layer.pattern.tensors()
        self.values = self.layer.values.detach()
        self.geometry = getattr(self.layer, "geometry", None)
        masked = self.layer.to_dense()
        self.weight = masked.weight.detach()  # type: ignore[union-attr]
        self.padding = kind.shape.kernel // 2
        self.x = torch.randn(kind.shape.input_shape(kind.batch), device=device).to(dtype)
        self.grad = torch.randn_like(self.forward(self.x.float(), self.weight)).to(dtype)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The dense layer, without bias."""
        if self.geometry is None:
            return nn.functional.linear(x, weight)
        return nn.functional.conv2d(x, weight, padding=self.padding)

    def dense(self, name: str, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """A pass of the dense layer."""
        if name == "forward":
            return self.forward(x, weight)
        if self.geometry is None:
            return grad @ weight if name == "dgrad" else grad.t() @ x
        which = [name == "dgrad", name == "wgrad", False]
        pair, one = [self.padding] * 2, [1, 1]
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, one, pair, one, False, [0, 0], 1, which
        )
        return found[which.index(True)]  # type: ignore[no-any-return]

    def expected(self, name: str) -> Tensor:
        """In strict float32 from the operands as they are rounded; values for the weight's."""
        with precision("fp32"):
            weight = self.weight.to(self.dtype).float()
            found = self.dense(name, self.x.float(), self.grad.float(), weight)
        return self.compressed(found) if name == "wgrad" else found

    def compressed(self, gradient: Tensor) -> Tensor:
        """A dense weight gradient at the pattern."""
        return self.layer.pattern.compress(self.layer.weight_to_matrix(gradient))

    def sparse(self, backend: str, name: str) -> Call:
        """A pass by one of our backends. Raises ValueError if it does not serve it."""
        module: Any = plan.BACKENDS[backend]
        op = "linear" if self.geometry is None else "conv2d"
        op = op if name == "forward" else f"{op}_{name}"
        operand = None if name == "wgrad" else self.values
        why = module.supports(op, self.x, operand, (self.side, 1))
        if why:
            raise ValueError(why)
        run, index = getattr(module, op), self.index
        x, grad = to_feature_major(self.x), to_feature_major(self.grad)
        tail: tuple[Any, ...] = () if self.geometry is None else (list(self.geometry),)
        if name == "forward":
            end = (*tail, False) if tail else (self.grad.shape[1], False)
            return lambda: run(x, self.values, *index, None, *end)
        if name == "dgrad":
            sizes = x.shape[2:] if tail else x.shape[1:]
            return lambda: run(grad, self.values, *index, *sizes, *tail)
        return lambda: run(grad, x, *index, self.side, 1, *tail)

    def cusparse(self, name: str) -> Call:
        """The same by CSR of torch on a GPU, operands as cuSPARSE likes them; linear layers."""
        matrix = self.weight.to(self.dtype)
        x, grad = self.x.t().contiguous(), self.grad.t().contiguous()
        if name == "forward":
            csr = matrix.to_sparse_csr()
            return lambda: torch.sparse.mm(csr, x)
        if name == "dgrad":
            csr = matrix.t().contiguous().to_sparse_csr()
            return lambda: torch.sparse.mm(csr, grad)
        csr, plain = matrix.to_sparse_csr(), self.x.contiguous()
        return lambda: torch.sparse.sampled_addmm(csr, grad, plain, beta=0.0)


def dense_forms(work: Work, name: str) -> Iterator[tuple[str, Call]]:
    """The dense pass in the layouts that torch has for it."""
    weight = work.weight.to(work.dtype)
    forms = {"contiguous": torch.contiguous_format}
    if work.geometry is not None:
        forms["channels_last"] = torch.channels_last
    for label, form in forms.items():
        x, grad, w = (t.contiguous(memory_format=form) for t in (work.x, work.grad, weight))
        yield f"dense {label}", functools.partial(work.dense, name, x, grad, w)


def backends(device: torch.device) -> tuple[str, ...]:
    """Ours on this device; Triton only where it can run."""
    runs = triton.installed() and (device.type == "cuda" or triton.interpreting())
    return ("cuda" if device.type == "cuda" else "cpu", *(["triton"] if runs else []))


def checked(
    work: Work, name: str, settings: Settings, missing: dict[str, str], errors: dict[str, float]
) -> dict[str, Call]:
    """The contenders of a pass that are right; of BOTH those of forward and of wgrad together."""
    if name == BOTH:
        found = [checked(work, n, settings, missing, errors) for n in ("forward", "wgrad")]
        names = [n for n in found[0] if n in found[1]]
        return {n: functools.partial(_in_turn, found[0][n], found[1][n]) for n in names}
    bound = TOLERANCE["bf16" if work.dtype == torch.bfloat16 else "fp32"]
    expected = work.expected(name)
    calls: dict[str, Call] = {}
    for label, call in dense_forms(work, name):
        if label in settings.faults:
            missing[label] = settings.faults[label]
        else:
            calls[label] = call
    made: dict[str, Callable[[], Call]] = {
        f"sparse {b}": functools.partial(work.sparse, b, name) for b in backends(settings.device)
    }
    if settings.foreign and work.geometry is None:
        made["cuSPARSE"] = functools.partial(work.cusparse, name)
    for label, make in made.items():
        if label in settings.faults:
            missing[label] = settings.faults[label]
            continue
        try:
            call = make()
            error = _error(work, name, label, call(), expected)
            errors[f"{label} {name}"] = error
            if not error <= bound:
                raise ValueError(f"relative error {error:.1e}, expected at most {bound:.0e}")
            calls[label] = call
        except Exception as error:  # foreign code may raise anything; it is reported
            still_works(label, error)
            missing[label] = reason(error)
    return calls


def _in_turn(*calls: Call) -> None:
    for call in calls:
        call()


def _error(work: Work, name: str, label: str, found: Any, expected: Tensor) -> float:
    """Relative error of a contender, whatever form its result has."""
    if label == "cuSPARSE" and name == "wgrad":
        found = work.compressed(found.to_dense())
    elif label == "cuSPARSE":
        found = found.t()
    return relative_error(found.float(), expected)
