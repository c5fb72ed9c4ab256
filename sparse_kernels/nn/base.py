"""SparseLayer: what SparseLinear and SparseConv2d share: values, index buffers, storage modes."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_kernels.nn import _checkpoint, _probe, _refusals, _storage
from sparse_kernels.nn._initial import check_dtype, initial_pattern
from sparse_kernels.nn._parameter import note_replaced
from sparse_kernels.nn._storage import COMPRESSED, DENSE_MASKED
from sparse_kernels.nn._weight_view import read_only
from sparse_kernels.pattern import SparsityPattern

#: Above this density `sparsify` and mask updates keep a layer as a dense matrix and a mask.
DENSE_MASKED_ABOVE = 0.5

_NOT_COPIED = ("_pattern", "_pattern_source", "_mask_hooks", "probe", "probe_pattern")
_INDEX_NAMES = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")
_Self = TypeVar("_Self", bound="SparseLayer")


class SparseLayer(nn.Module, abc.ABC):
    """Base of the sparse layers: a weight of which only the blocks of a pattern exist.

    The weight is seen as a matrix [rows, cols] (``matrix_shape``), cut into ``row_parts`` x
    ``col_parts`` segments that no block spans (groups and kernel positions of a convolution).

    Attributes:
        values: one ``nn.Parameter`` object for ever.  In storage "compressed" [capacity, bh, bw],
            zero behind the last stored block; in storage "dense-masked" the matrix [rows, cols].
        crow_indices, col_indices: int32 buffers, saved with the state (compressed only).
        t_crow, t_row, t_perm: int32 buffers of the transposed index, rebuilt on loading.
        mask: bool buffer [rows, cols] (dense-masked only).
        bias: ``nn.Parameter`` [rows] or None.
        probe: None, or a never-read leaf [rows, cols] whose ``.grad`` gathers the dense gradient.
        probe_pattern: None, or the blocks whose gradients the probe [blocks, bh, bw] gathers.
        capacity_growths: how often the pattern outgrew its buffers and pointers changed.
        dense_above: density above which the layer is better dense-masked; ``tune`` measures it.
        image_format: how a dense-masked convolution computes, "channels_last" or "contiguous".
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor
    t_crow: Tensor
    t_row: Tensor
    t_perm: Tensor
    mask: Tensor
    probe: Tensor | None
    probe_pattern: SparsityPattern | None = None
    #: What ``_masked`` hooks to views of the values: the mask, the view's name, the hooks.
    _mask_hooks: tuple[Tensor, str, dict[int, Callable[[Tensor], Tensor | None]]] | None = None

    def __init__(
        self,
        matrix_shape: tuple[int, int],
        *,
        row_parts: int = 1,
        col_parts: int = 1,
        bias: bool = True,
        density: float = 0.1,
        block: int | tuple[int, int] = (1, 1),
        pattern: SparsityPattern | None = None,
        generator: torch.Generator | None = None,
        capacity: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = check_dtype(dtype)
        place = (
            torch.get_default_device() if device is None else torch.empty(0, device=device).device
        )
        self.matrix_shape = matrix_shape
        self.row_parts, self.col_parts = row_parts, col_parts
        self.storage = COMPRESSED
        self.capacity_growths = 0
        # Facts about this machine, not about the weights: not part of the state_dict.
        self.dense_above, self.image_format = DENSE_MASKED_ABOVE, "channels_last"
        self.probe = None
        self._pattern: SparsityPattern | None = None
        self._pattern_source: tuple[int, int] | None = None
        parts = (row_parts, col_parts)
        made = initial_pattern(matrix_shape, parts, density, block, pattern, generator, capacity)
        self.block = made.block
        # First: torch.export counts buffers that are None, too, and finds no input for later ones.
        self.register_buffer("mask", None)
        for name in _INDEX_NAMES:
            self.register_buffer(name, None, persistent=name in ("crow_indices", "col_indices"))
        self._register_pattern(made if place.type == "meta" else made.to(place))
        self.values = nn.Parameter(
            torch.zeros(made.capacity, *made.block, device=place, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.zeros(matrix_shape[0], device=place, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if place.type == "meta":
            self._apply(lambda tensor: tensor.to("meta"))
        else:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new values and bias at the present pattern.

        Each existing weight gets what the dense layer's own initialisation gives it (torch:
        ``kaiming_uniform_(a=sqrt(5))``, that is uniform in +-1/sqrt(fan_in) with the fan_in of the
        DENSE layer); the bias likewise.  The sparse momentum paper initialises so too: a mask over
        a densely initialised weight.
        """
        bound = 1 / math.sqrt(self.matrix_shape[1])
        with torch.no_grad():
            self.values.copy_(self._uniform(self.values, bound, generator))
            self._zero_outside()
            if self.bias is not None:
                self.bias.copy_(self._uniform(self.bias, bound, generator))

    @staticmethod
    def _uniform(like: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
        # A CPU generator also serves layers on other devices, so that seeds mean the same there.
        place = like.device if generator is None else generator.device
        drawn = torch.empty(like.shape, dtype=like.dtype, device=place)
        return drawn.uniform_(-bound, bound, generator=generator).to(like.device)

    def _zero_outside(self) -> None:
        """Zero what does not exist: the tail, entries outside of the matrix, masked entries."""
        _storage.zero_outside(self)

    # ---------------------------------------------------------------- pattern and storage

    def _register_pattern(self, pattern: SparsityPattern) -> None:
        """Make ``pattern``'s tensors the layer's buffers and the layer's ``pattern`` itself."""
        for name, tensor in zip(_INDEX_NAMES, pattern.tensors(), strict=True):
            self._buffers[name] = tensor
        self._buffers["mask"] = None
        self.storage = COMPRESSED
        self._pattern = pattern
        self._mask_hooks = None

    def _register_mask(self, mask: Tensor, pattern: SparsityPattern | None = None) -> None:
        for name in _INDEX_NAMES:
            self._buffers[name] = None
        self._buffers["mask"] = mask
        self.storage = DENSE_MASKED
        self._remember(pattern)

    def _remember(self, pattern: SparsityPattern | None) -> None:
        """Keep the pattern of which ``mask`` was made: to find it again reads the whole mask."""
        self._pattern = pattern
        self._pattern_source = None if pattern is None else (id(self.mask), self.mask._version)

    @property
    def pattern(self) -> SparsityPattern:
        """Where the weights are: a view over the index buffers, or made from ``mask``.

        Raises ValueError while the layer is on the meta device, where indices have no content.
        """
        if self.values.is_meta:
            raise ValueError(
                "a layer on the meta device has no pattern: expected real index buffers; call "
                "load_state_dict(..., assign=True) or build the layer on a real device"
            )
        if self.storage == DENSE_MASKED:
            # The mask is written in place at updates: its version tells whether the view is old.
            source = (id(self.mask), self.mask._version)
            if self._pattern is None or self._pattern_source != source:
                parts = (self.row_parts, self.col_parts)
                found = SparsityPattern.from_mask(self.mask, self.block, *parts)
                self._remember(found)
                return found
        elif self._pattern is None:
            self._pattern = SparsityPattern.from_indices(
                self.crow_indices,
                self.col_indices,
                self.t_crow,
                self.t_row,
                self.t_perm,
                self.matrix_shape,
                self.block,
                self.row_parts,
                self.col_parts,
            )
        return self._pattern

    @property
    def nnz(self) -> int:
        """Number of weights that exist (elements inside the matrix)."""
        return self.pattern.nnz

    @property
    def density(self) -> float:
        """Fraction of the weights that exist."""
        return self.pattern.density

    def set_pattern_(self, keys: Tensor, check: bool = True) -> None:
        """Rewrite the index buffers (or the mask) in place; values are the caller's business.

        Args:
            keys: int64 [nnzb], strictly increasing block_row * block_cols + block_col.
            check: False for keys that were just made by sorting; a check waits for the device.

        Where the keys outgrow the capacity, new and larger buffers are registered, counted in
        ``capacity_growths`` and logged (values must then be given the new capacity).  For both
        kinds of storage, ``training.rewrite`` is the function that also moves values and
        optimizer state.

        Raises:
            PatternError: keys out of order or out of range.
        """
        _storage.rewrite_pattern(self, keys, check)

    def to_storage_(self: _Self, storage: str) -> _Self:
        """Convert values, gradient and buffers to "compressed" or "dense-masked"; returns self.

        ``values`` stays the same object.  Optimizer state is not touched: use
        ``training.rewrite`` in mid-training.

        Raises:
            ValueError: an unknown name.
        """
        _storage.convert(self, storage)
        return self

    def make_probe(self, pattern: SparsityPattern | None = None) -> Tensor:
        """Set and return ``probe``: a leaf [rows, cols] whose ``.grad`` gathers the dense gradient.

        It holds one number (expanded) and is never read.  Each backward pass then computes the
        dense weight gradient too; set ``layer.probe = None`` to stop that.

        pattern: blocks of this layer's matrix; the probe is then [capacity of pattern, bh, bw] and
        gathers the gradient at those alone.  Raises ValueError for one of another geometry.
        """
        self.probe, self.probe_pattern = _probe.make(self, pattern), pattern
        return self.probe

    # ---------------------------------------------------------------- dense views

    @abc.abstractmethod
    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """A matrix [rows, cols] in the shape of torch's weight (a view)."""

    @abc.abstractmethod
    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """A weight in torch's shape as the matrix [rows, cols]."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight as torch has it."""
        return self.matrix_shape

    @abc.abstractmethod
    def to_dense(self) -> nn.Module:
        """An independent dense torch module with the same weights, bias, mode and dtype."""

    def dense_matrix(self) -> Tensor:
        """The weight as a new dense matrix [rows, cols], differentiable in ``values``."""
        if self.values.is_meta:
            return self.values.new_empty(self.matrix_shape)
        if self.storage == DENSE_MASKED:
            return self.values * self.mask
        return self.pattern.expand(self.values)

    @property
    def weight(self) -> Tensor:
        """The weight as a dense tensor in torch's shape, made on demand; costs rows x cols memory.

        A copy for reading: gradients flow back to ``values``, writing into it raises.
        """
        return read_only(self.matrix_to_weight(self.dense_matrix()))

    def __setattr__(self, name: str, value: Any) -> None:
        _refusals.check_set(self, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _refusals.check_delete(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; "weight..." is refused with a ValueError."""
        _refusals.check_register(name)
        super().register_parameter(name, param)

    # ---------------------------------------------------------------- copies, moves, checkpoints

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before, place = self.crow_indices, (self.values.device, self.values.dtype)
        super()._apply(fn, recurse)
        moved = (self.values.device, self.values.dtype) != place
        if moved:
            note_replaced(self.values)
        if self.probe is not None and moved:
            pattern = self.probe_pattern
            self.make_probe(None if pattern is None else pattern.to(self.values.device))
        if self.crow_indices is not before:
            self._pattern = None
            if self.storage == COMPRESSED and not self.values.is_meta:
                _checkpoint.empty_if_garbage(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the pattern view is rebuilt, a probe is not copied."""
        fresh = dict.fromkeys(_NOT_COPIED)
        return {**self.__dict__, **fresh}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        load = super()._load_from_state_dict
        lists = (missing_keys, unexpected_keys, error_msgs)
        _checkpoint.load(self, load, state_dict, prefix, local_metadata, strict, *lists)

    def _describe(self) -> str:
        if self.values.is_meta:
            return f"block={self.block}, on the meta device"
        text = f"density={self.density:.4g}, nnz={self.nnz}, block={self.block}"
        return text if self.storage == COMPRESSED else f"{text}, storage={self.storage}"
