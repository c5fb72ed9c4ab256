"""NaN and infinity: is there one, and which layer has it first. The search runs only after a find.

A usual step costs one norm over all gradients and one number read on the host; names are looked for
only when that number is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def gradients_finite(model: nn.Module) -> bool:
    """Whether every gradient of `model`'s parameters is finite (True where there is none).

    One pass over them and one synchronisation.  A norm that overflows is looked at again, element
    by element, so that large but finite gradients are not called infinite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients)
    total = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).sum()
    return math.isfinite(total.item()) or not bad_gradients(model)


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of the layers whose gradient holds NaN or infinity, in module order."""
    return _bad((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def bad_weights(model: nn.Module) -> list[str]:
    """Names of the layers with NaN or infinity in a parameter or floating point buffer."""
    return _bad([*model.named_parameters(), *model.named_buffers()])


def _bad(tensors: Any) -> list[str]:
    names = [
        name
        for name, tensor in tensors
        if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all())
    ]
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def bad_activation(model: nn.Module, forward: Callable[[], Any]) -> tuple[str, bool] | None:
    """(name of the first innermost module whose output holds NaN or infinity, whether its input
    does not), or None.

    `forward` is called once more with hooks on every module, without gradients; buffers (running
    statistics) and random state are put back.
    """
    first: list[tuple[str, bool]] = []

    def hook_for(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not first and not _finite(output):
                first.append((name, all(map(_finite, inputs))))

        return look

    leaves = [(n, m) for n, m in model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in leaves]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return first[0] if first else None


def _finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(value.isfinite().all())


def explain(model: nn.Module, forward: Callable[[], Any] | None = None) -> str:
    """Where NaN or infinity is: weights first, then gradients, then the first activation."""
    for what, names in (("weights", bad_weights(model)), ("gradient", bad_gradients(model))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"the {what} of layer {names[0]!r}{more} holds NaN or infinity"
    found = None if forward is None else bad_activation(model, forward)
    if found is not None:
        name, made_it = found
        if made_it:
            return f"layer {name!r} is the first whose output is not finite; its input is"
        return f"the input of layer {name!r}, the first to see it, holds NaN or infinity already"
    return "weights, gradients and the outputs of all layers are finite, the loss itself is not"
