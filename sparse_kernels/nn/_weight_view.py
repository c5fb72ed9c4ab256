"""The dense read-only tensor that ``layer.weight`` hands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WRITING_DUNDERS = {"__setitem__", "__set__"}


def _writes(name: str) -> bool:
    """Whether a torch function of this name changes its first argument (a trailing ``_``)."""
    if name.startswith("__") and name.endswith("__"):
        return name in _WRITING_DUNDERS or (name.startswith("__i") and name[3:-2] in _IN_PLACE)
    return name.endswith("_") and not name.startswith("_")


# x += y and its like; "__invert__", "__index__" and "__int__" also start with "__i".
_IN_PLACE = {
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
}
# Change nothing but the tensor's role in a graph: reading code may call them.
_HARMLESS = {"requires_grad_", "rename_"}
# Results that share memory without being views to autograd ("__get__" is `.data`, `.T` ...).
_SAME_MEMORY = {"__get__", "detach"}


class DenseWeightView(torch.Tensor):
    """A dense copy of a sparse layer's weight; writing raises, for it could not reach the layer.

    Reading works as with any tensor, and results of arithmetic are plain tensors.  Gradients flow
    back to the layer's ``values``, so that a penalty on ``layer.weight`` does what it says.
    torch's fused attention paths see that it is no plain tensor and call the layer instead.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        into = kwargs.get("out")
        # torch.nn.init hands its tensor over by this keyword.
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(into, DenseWeightView) or (
            isinstance(target, DenseWeightView) and _writes(name) and name not in _HARMLESS
        ):
            raise RuntimeError(
                f"{name}: `weight` of a sparse layer is a dense copy made on demand; writing into "
                "it would change nothing. Write to `layer.values` (its stored blocks), build a "
                "layer with `from_dense(module)`, or get a dense module with `layer.to_dense()`"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            # `.data`, `.detach()` and slices share memory: writing there would be as void.
            if type(result) is Tensor and (name in _SAME_MEMORY or result._is_view()):
                result = result.as_subclass(cls)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the plain tensor that it is a view of."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


def read_only(weight: Tensor) -> Tensor:
    """``weight`` as a DenseWeightView (same storage, same autograd graph)."""
    return weight.as_subclass(DenseWeightView)
