"""What a net costs: bytes of what it holds between steps, and its share of dense FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends.cpu.lists import kept_bytes
from ..nn.base import SparseLayer
from ..training import SparseMomentum
from ..training.rewrite import DENSE_MASKED

_INDEX_BUFFERS = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm", "mask")
PARTS = ("weights", "indices", "gradients", "optimizer", "total")
SIGNAL_PARTS = {
    "signal": "growth signal, at most",
    "total_with_signal": "total with the growth signal, at most",
}


@dataclass(frozen=True)
class LayerCost:
    """One layer with a weight matrix: its size, what exists, how often a weight is used."""

    name: str
    shape: tuple[int, int]  # rows, columns of the weight as a matrix
    nnz: int
    positions: int  # outputs of one example per row: 1 for Linear, H * W for Conv2d
    dense_products: bool = False  # computed as a dense layer: nn layers and dense-masked storage

    @property
    def numel(self) -> int:
        """Weights that a dense layer would have."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """nnz / numel."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def executed(self) -> int:
        """Weights that the products work on: a dense product also multiplies by the zeros."""
        return self.numel if self.dense_products else self.nnz


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight matrix by name: sparse layers, nn.Linear and nn.Conv2d."""
    kinds = (SparseLayer, nn.Linear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def output_positions(model: nn.Module, input_shape: Iterable[int]) -> dict[str, int]:
    """How many outputs per row of the weight one example makes, by layer (by forward hooks)."""
    positions: dict[str, int] = {}
    handles = []
    for name, layer in weight_layers(model).items():

        def hook(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
            positions[name] = output.numel() // max(1, _matrix_shape(module)[0])

        handles.append(layer.register_forward_hook(hook))
    was_training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, device=device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return positions


def layer_costs(model: nn.Module, positions: dict[str, int]) -> list[LayerCost]:
    """The costs of all layers as they stand now; ``positions`` from ``output_positions``."""
    return [
        LayerCost(name, _matrix_shape(layer), _nnz(layer), positions.get(name, 0), _is_dense(layer))
        for name, layer in weight_layers(model).items()
    ]


def weight_density(costs: list[LayerCost]) -> float:
    """Existing weights over all weights, biases and norms aside."""
    return sum(c.nnz for c in costs) / max(1, sum(c.numel for c in costs))


def flops_density(costs: list[LayerCost]) -> float:
    """nnz x positions over numel x positions: FLOPs of existing weights against dense layers'."""
    dense = sum(c.numel * c.positions for c in costs)
    return sum(c.nnz * c.positions for c in costs) / max(1, dense)


def executed_flops_density(costs: list[LayerCost]) -> float:
    """As ``flops_density``, but a dense-masked layer counts as dense: so it computes."""
    dense = sum(c.numel * c.positions for c in costs)
    return sum(c.executed * c.positions for c in costs) / max(1, dense)


def memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights (all parameters), indices, gradients, optimizer state and their total.

    The lists that CPU kernels keep for a pattern count as indices; they exist after a step.  A
    gradient that is not there now counts as large as its parameter: during a step it is.  The
    growth signal is not in it: it comes and goes (``signal_bytes``).
    """
    parameters = list(model.parameters())
    indices = 0
    for module in model.modules():
        if isinstance(module, SparseLayer):
            buffers = dict(module.named_buffers(recurse=False))
            held = [buffers[name] for name in _INDEX_BUFFERS if name in buffers]
            indices += sum(_bytes(tensor) + kept_bytes(tensor) for tensor in held)
    state = 0
    for values in optimizer.state.values():
        state += sum(_bytes(v) for v in values.values() if isinstance(v, Tensor) and v.dim() > 0)
    weights = sum(_bytes(p) for p in parameters)
    gradients = sum(
        _bytes(p.grad if p.grad is not None else p) for p in parameters if p.requires_grad
    )
    parts = {"weights": weights, "indices": indices, "gradients": gradients, "optimizer": state}
    return {**parts, "total": sum(parts.values())}


def signal_bytes(masking: SparseMomentum | None) -> int:
    """Bytes that the growth signal holds now: its buffers, the probes' gradients and
    a sample's indices."""
    held = 0
    for signal in masking._signals if masking is not None else ():
        probe = signal.layer.probe
        if probe is not None and probe.grad is not None:
            held += _bytes(probe.grad)
        if signal.layer.probe_pattern is not None:
            held += sum(_bytes(t) + kept_bytes(t) for t in signal.layer.probe_pattern.tensors())
        held += sum(_bytes(buffer) for buffer in signal.buffers.values())
    return held


def _bytes(tensor: Tensor | None) -> int:
    # An expanded tensor holds less than numel says; its storage is what memory it takes.
    return tensor.untyped_storage().nbytes() if tensor is not None else 0


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, SparseLayer):
        rows, columns = layer.matrix_shape
        return int(rows), int(columns)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight[0].numel()


def _nnz(layer: nn.Module) -> int:
    if isinstance(layer, SparseLayer):
        return int(layer.nnz)
    rows, columns = _matrix_shape(layer)
    return rows * columns


def _is_dense(layer: nn.Module) -> bool:
    return not isinstance(layer, SparseLayer) or layer.storage == DENSE_MASKED
