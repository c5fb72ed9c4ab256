"""What one weight costs in each layer: FLOPs, or measured time. Input of cost-aware redistribution.

cost = flops_per_weight(model, example)
SparseMomentum(model, optimizer, ..., cost=cost, cost_budget="start")
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn.base import SparseLayer

from .data_parallel import unwrapped
from .layers import sparse_layers


def flops_per_weight(model: nn.Module, example: Any) -> dict[str, float]:
    """FLOPs of one weight in a forward pass of one example, by sparse layer: 2 x its uses.

    A weight of a convolution is used once per output pixel, one of a linear layer once per row of
    its input. The backward passes cost the same again twice (once in the layer whose input needs no
    gradient), and are left out, as in the FLOPs of the field's papers.
    example: input of `model`, a batch of any size. A layer that is called twice counts twice.
    Names and forward pass are of the model itself where it is a DistributedDataParallel.
    Raises ValueError for a layer that the pass does not reach.
    """
    model = unwrapped(model)
    uses: dict[str, float] = {}

    def note(name: str, layer: SparseLayer, inputs: Any, output: Tensor) -> None:
        outputs = output.numel() / (layer.matrix_shape[0] * len(output))
        uses[name] = uses.get(name, 0.0) + 2.0 * outputs

    with torch.no_grad():
        _pass(model, example, note)
    return _of_all(model, uses)


def time_per_weight(model: nn.Module, example: Any, repeats: int = 5) -> dict[str, float]:
    """Seconds of forward and backward per stored weight, by sparse layer: the least of `repeats`.

    All of the time over all weights, at the density of now. A layer has fixed costs too, so one
    weight more costs less than this, and a budget of such times is kept in this unit, not by the
    clock. The gradient of an input is timed where training computes it.

    Measured on this machine: two runs differ a little, and so do the masks
    that follow; take `flops_per_weight` where runs must be equal. Of a DistributedDataParallel as
    there; each rank measures, and SparseMomentum takes what rank 0 has found.
    Raises ValueError for a layer that the pass does not reach, or one without a weight.
    """
    model = unwrapped(model)
    inputs: dict[str, list[tuple[SparseLayer, Tensor]]] = {}

    def note(name: str, layer: SparseLayer, arguments: Any, output: Tensor) -> None:
        x = arguments[0]
        inputs.setdefault(name, []).append((layer, x.detach().requires_grad_(x.requires_grad)))

    with torch.enable_grad():
        _pass(model, example, note)
    found = {}
    for name, calls in inputs.items():
        seconds = sum(_least(layer, x, repeats) for layer, x in calls)
        if calls[0][0].nnz == 0:
            raise ValueError(f"layer {name!r} stores no weight, so that none can be timed")
        found[name] = seconds / calls[0][0].nnz
    return _of_all(model, found)


def _least(layer: SparseLayer, x: Tensor, repeats: int) -> float:
    best = float("inf")
    with torch.enable_grad():
        for _ in range(max(2, repeats)):
            leaf = x.detach().clone().requires_grad_(x.requires_grad)
            _wait(x)
            start = time.perf_counter()
            output = layer(leaf)
            wanted = [t for t in (leaf, layer.values) if t.requires_grad]
            if wanted:
                torch.autograd.grad(output, wanted, torch.ones_like(output))
            _wait(x)
            best = min(best, time.perf_counter() - start)
    return best


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _pass(model: nn.Module, example: Any, note: Callable[..., None]) -> None:
    """One forward pass in evaluation mode with `note(name, layer, inputs, output)` as a hook."""
    handles = [
        layer.register_forward_hook(lambda m, i, o, name=name: note(name, m, i, o))
        for name, layer in sparse_layers(model)
    ]
    try:
        with _evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _of_all(model: nn.Module, found: dict[str, float]) -> dict[str, float]:
    missing = [name for name, _ in sparse_layers(model) if name not in found]
    if missing:
        raise ValueError(
            f"the forward pass of the example did not reach {missing}; give an example that does, "
            "or write their costs yourself"
        )
    return found
