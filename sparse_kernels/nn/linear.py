"""SparseLinear: nn.Linear of which only part of the weights exist."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_kernels import ops
from sparse_kernels.nn import _dense, _masked, _probe
from sparse_kernels.nn._initial import check_size
from sparse_kernels.nn._operands import check_operand, operands
from sparse_kernels.nn._select import Keep, choose_pattern
from sparse_kernels.nn.base import DENSE_MASKED, SparseLayer
from sparse_kernels.pattern import SparsityPattern


class SparseLinear(SparseLayer):
    """y = x W^T + b with sparse W [out_features, in_features]; a drop-in for ``nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        density: fraction of weights that exist, in (0, 1]; the number of blocks is
            ``round(density * blocks)``, at least 1, drawn uniformly.
        block: (rows, columns) of a stored block; (1, 1) is element sparsity.
        pattern: where the weights are, instead of ``density`` and ``block``; copied.
        generator: source of the random pattern and values (default: torch's global one).
        capacity: number of blocks to allocate (default: exactly those that exist).

    Shape: input [..., in_features], output [..., out_features] (feature-major in memory).

    Raises:
        ValueError, TypeError: density outside (0, 1], a block larger than the layer, a pattern of
            another shape, a dtype that is not floating point.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.1,
        block: int | tuple[int, int] = (1, 1),
        pattern: SparsityPattern | None = None,
        generator: torch.Generator | None = None,
        capacity: int | None = None,
    ) -> None:
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        super().__init__(
            (out_features, in_features),
            bias=bias,
            density=density,
            block=block,
            pattern=pattern,
            generator=generator,
            capacity=capacity,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; ValueError for another last dimension."""
        y = None
        if self.storage == DENSE_MASKED:
            y = _masked.linear(self, x)
        elif x.dim() == 2 and x.shape[1] == self.in_features:
            y = ops.short_linear(x, operands(self), self.out_features)
        y = self._checked_forward(x) if y is None else y
        return y if self.probe_pattern is None else _probe.attach(self, x, y)

    def _checked_forward(self, x: Tensor) -> Tensor:
        """``forward`` for all that is unusual, or wrong."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"SparseLinear expected an input [..., {self.in_features}], got shape "
                f"{tuple(x.shape)}; reshape it or build the layer with in_features="
                f"{x.shape[-1] if x.dim() else 1}"
            )
        check_operand(self, x)
        if self.storage == DENSE_MASKED:
            return ops.masked_linear(x, self.values, self.mask, self.bias, _probe.dense(self))
        return ops.linear(x, *operands(self), out_features=self.out_features)

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """[out_features, in_features] itself: matrix and torch weight are the same."""
        return matrix

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """[out_features, in_features] itself: matrix and torch weight are the same."""
        return weight

    def to_dense(self) -> nn.Linear:
        """An independent ``nn.Linear`` with the same weights, bias, mode, device and dtype."""
        module = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        return _dense.filled(module, self)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        density: float = 0.1,
        block: int | tuple[int, int] = (1, 1),
        pattern: SparsityPattern | None = None,
        keep: Keep = "magnitude",
        generator: torch.Generator | None = None,
        nnzb: int | None = None,
    ) -> SparseLinear:
        """A sparse copy of a dense layer: its own weights at the kept positions.

        Args:
            module: an ``nn.Linear``; not changed.
            density, block, pattern: as for the constructor; ``nnzb`` fixes the number of blocks
                instead of ``density``.
            keep: "magnitude" keeps the blocks of largest mean |w| (ties: lowest index), "random"
                draws them uniformly.
            generator: source of the random draw.

        Raises:
            ValueError, TypeError: as the constructor; weights on the meta device or not finite.
        """
        weight = module.weight.detach()
        made = choose_pattern(weight, density, block, pattern, keep, generator, nnzb=nnzb)
        bias = module.bias is not None
        layer = cls(
            module.in_features, module.out_features, bias, "meta", weight.dtype, pattern=made
        )
        _dense.take(layer, module, made, weight)
        return layer

    def extra_repr(self) -> str:
        """Sizes as ``nn.Linear`` prints them, then density, nnz and block."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._describe()}"
