"""The products under torch.func transforms and forward-mode derivatives: right, or refused.

torch looks for a derivative in other places there than in eager code: an operator's registered
derivative is not found by ``torch.func.grad``, and forward mode takes its result for a constant.
So each product has an ``autograd.Function`` of the kind that torch.func asks for, around the same
operator and the same backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

_FUNCTIONS: dict[str, Any] = {}
#: Products of [N, ...] by a weight: what ``vmap`` adds to their first argument is more batch.
_FOLDED = ("linear", "linear_dgrad", "conv2d", "conv2d_dgrad")


def active() -> bool:
    """Whether a torch.func transform or a forward-mode level is on."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply(name: str, *args: Any) -> Any:
    """Operator ``name`` by its Function for transforms."""
    return _FUNCTIONS[name].apply(*args)


def register(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Make the Function of the product ``name``; its forward is the operator itself."""
    operator = getattr(torch.ops.sparse_kernels, name)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"sparse_kernels::{name} has no forward-mode derivative (jvp), which torch.func.jvp, "
            "jacfwd, hessian and linearize need: use reverse mode (torch.func.vjp, jacrev, "
            "jacrev(jacrev(...))), or a dense copy of the layer from to_dense()"
        )

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmapped(name, info.batch_size, in_dims, args)

    methods = {
        "forward": staticmethod(operator),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "vmap": staticmethod(vmap),
    }
    _FUNCTIONS[name] = type(
        f"sparse_kernels_{name}_transformed", (torch.autograd.Function,), methods
    )


def _vmapped(
    name: str, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """The product over an added dimension: in one call where only activations have it, else one by
    one (a batch of weights, per-sample gradients), as slow as a loop.
    """
    dims = [d if isinstance(a, Tensor) else None for a, d in zip(args, in_dims, strict=True)]
    if name in _FOLDED and dims[0] is not None and not any(d is not None for d in dims[1:]):
        x = args[0].movedim(dims[0], 0)
        y = apply(name, x.flatten(0, 1), *args[1:])
        return y.unflatten(0, x.shape[:2]), 0
    if size == 0:
        raise ValueError(f"sparse_kernels::{name}: vmap over an empty dimension has no result")
    rows = [
        [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]
        for i in range(size)
    ]
    return torch.stack([apply(name, *row) for row in rows]), 0
