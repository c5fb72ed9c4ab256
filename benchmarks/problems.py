"""What is timed: one operator on one shape, by the sparse backend and by the best of dense PyTorch.

Every contender is checked against float64 before it is timed: a wrong operator has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sparse_kernels.backends import cpu, cuda, reference
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import to_feature_major
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.workbench.bench_layers import LAYERS, LayerShape

OPERATORS = ("forward", "dgrad", "wgrad")


# The table of `sparse-kernels bench layers`; for rehearsals and CI small odd shapes: seconds, not
# minutes.
SHAPES = LAYERS
SMALL_SHAPES = (LayerShape("conv-small", 13, 8, 3, 6), LayerShape("linear-small", 70, 96))
BATCH, SMALL_BATCH = 128, 33


class Problem(NamedTuple):
    """One row to be: an operator on a shape. `contenders` maps a name to a call without
    arguments.
    """

    operator: str
    shape: LayerShape
    batch: int
    density: float
    block: tuple[int, int]
    flops: float  # of the sparse computation: 2 * nnz * batch * output pixels
    dense_flops: float
    contenders: dict[str, Callable[[], torch.Tensor]]
    error: float  # ||sparse - float64|| / ||float64||

    @property
    def label(self) -> str:
        return f"{self.operator} {self.shape.name} {self.block[0]}x{self.block[1]}"


def backend_for(device: torch.device) -> ModuleType:
    return cuda if device.type == "cuda" else cpu


def _geometry(shape: LayerShape) -> Conv2dGeometry:
    k, pad = shape.kernel, shape.kernel // 2
    return Conv2dGeometry(shape.rows, shape.columns, k, k, 1, 1, pad, pad, pad, pad, 1, 1, 1)


def _pattern(
    shape: LayerShape, density: float, block: tuple[int, int], generator: torch.Generator
) -> SparsityPattern:
    taps = max(1, shape.kernel**2)
    return SparsityPattern.random(
        (shape.rows, taps * shape.columns),
        density=density,
        block=block,
        col_parts=taps,
        generator=generator,
    )


def problems(
    shapes: tuple[LayerShape, ...],
    batch: int,
    density: float,
    block: tuple[int, int],
    device: torch.device,
    operators: tuple[str, ...] = OPERATORS,
) -> Iterator[Problem]:
    """One problem at a time (the tensors of one shape are freed before the next); operators that
    the backend of this device lacks are left out."""
    for shape in shapes:
        for operator in operators:
            problem = make_problem(shape, batch, operator, density, block, device)
            if problem is not None:
                yield problem


def make_problem(
    shape: LayerShape,
    batch: int,
    operator: str,
    density: float,
    block: tuple[int, int],
    device: torch.device,
) -> Problem | None:
    """Inputs from seed 0, contenders for `operator` ("forward", "dgrad" or "wgrad") and the
    checked error.

    None where the backend of `device` has no such operator. Raises RuntimeError when the operator
    is wrong.
    """
    kind = "conv2d" if shape.kernel else "linear"
    name = kind if operator == "forward" else f"{kind}_{operator}"
    backend = backend_for(device)
    if not hasattr(backend, name):
        return None
    generator = torch.Generator().manual_seed(0)
    pattern = _pattern(shape, density, block, generator)
    image = (shape.size, shape.size) if shape.kernel else ()
    x = torch.randn((batch, shape.columns, *image), generator=generator)
    grad = torch.randn((batch, shape.rows, *image), generator=generator)
    dense = torch.randn(pattern.shape, generator=generator)
    values = pattern.compress(dense)
    if backend.supports(name, x.to(device), values.to(device)) is not None:
        return None
    exact = _sparse(
        reference, shape, operator, x.double(), grad.double(), values.double(), pattern
    )()
    x, grad, values, pattern = (t.to(device) for t in (x, grad, values, pattern))
    sparse = _sparse(
        backend, shape, operator, to_feature_major(x), to_feature_major(grad), values, pattern
    )
    difference = sparse().double().cpu() - exact
    error = float(difference.norm() / exact.norm().clamp_min(1e-300))
    if not error < 1e-5:
        raise RuntimeError(
            f"{name} on {shape.name}, block {block}: relative error {error:.1e} against float64, "
            "expected below 1e-5; a wrong operator is not timed"
        )
    contenders = {"sparse": sparse} | _dense(shape, operator, x, grad, dense.to(device))
    pixels = batch * max(1, shape.size) ** 2
    return Problem(
        operator, shape, batch, density, block,
        2.0 * pattern.nnz * pixels, 2.0 * pattern.numel * pixels, contenders, error,
    )  # fmt: skip


def _sparse(
    backend: ModuleType,
    shape: LayerShape,
    operator: str,
    x: torch.Tensor,
    grad: torch.Tensor,
    values: torch.Tensor,
    pattern: SparsityPattern,
) -> Callable[[], torch.Tensor]:
    """The backend's call for one operator, arguments in place."""
    weight = (values, *pattern.tensors())
    index, block = pattern.tensors(), pattern.block
    if not shape.kernel:
        return {
            "forward": lambda: backend.linear(x, *weight, None, shape.rows, False),
            "dgrad": lambda: backend.linear_dgrad(grad, *weight, shape.columns),
            "wgrad": lambda: backend.linear_wgrad(grad, x, *index, *block),
        }[operator]
    geometry = list(_geometry(shape))
    return {
        "forward": lambda: backend.conv2d(x, *weight, None, geometry, False),
        "dgrad": lambda: backend.conv2d_dgrad(grad, *weight, shape.size, shape.size, geometry),
        "wgrad": lambda: backend.conv2d_wgrad(grad, x, *index, *block, geometry),
    }[operator]


def _dense(
    shape: LayerShape, operator: str, x: torch.Tensor, grad: torch.Tensor, matrix: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Dense PyTorch in each layout worth trying; the best of them is the baseline."""
    if not shape.kernel:
        call = {
            "forward": lambda: F.linear(x, matrix),
            "dgrad": lambda: grad @ matrix,
            "wgrad": lambda: grad.t() @ x,
        }[operator]
        return {"dense": call}
    k = shape.kernel
    weight = matrix.reshape(shape.rows, k, k, shape.columns).permute(0, 3, 1, 2).contiguous()
    return {
        "dense": _dense_conv(operator, x, grad, weight, torch.contiguous_format),
        "dense channels_last": _dense_conv(operator, x, grad, weight, torch.channels_last),
    }


def _dense_conv(
    operator: str,
    x: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    memory_format: torch.memory_format,
) -> Callable[[], torch.Tensor]:
    x, grad, weight = (t.contiguous(memory_format=memory_format) for t in (x, grad, weight))
    pad = weight.shape[2] // 2
    if operator == "forward":
        return lambda: F.conv2d(x, weight, padding=pad)
    wanted = [operator == "dgrad", operator == "wgrad", False]
    which = 0 if operator == "dgrad" else 1

    def backward() -> torch.Tensor:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, wanted
        )[which]

    return backward
