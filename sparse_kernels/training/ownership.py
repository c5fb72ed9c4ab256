"""Which SparseMomentum drives a layer: one at a time, since a layer has one probe and one pattern.

Owners are held weakly: one that was collected or closed owns nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .signals import LayerSignal

_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def check_free(signals: Sequence[LayerSignal]) -> None:
    """Raise ValueError if one of the layers has an owner that is alive and not closed."""
    for signal in signals:
        owner = _owners.get(signal.layer)
        if owner is not None and owner() is not None:
            raise ValueError(
                f"layer {signal.name!r} is already driven by another SparseMomentum, and two would "
                "take each other's gradients; call close() on the old one first"
            )


def owner_of(layer: nn.Module) -> Any:
    """The SparseMomentum that drives `layer`, or None."""
    owner = _owners.get(layer)
    return None if owner is None else owner()


def claim(owner: Any, signals: Sequence[LayerSignal], hooks: Sequence[Any]) -> weakref.finalize:
    """Make `owner` the owner of the layers; the finalizer that is returned gives them back.

    It removes `hooks`, probes and gathered gradients, when called or when `owner` is collected.
    """
    reference = weakref.ref(owner)
    for signal in signals:
        _owners[signal.layer] = reference
    finalizer = weakref.finalize(owner, _release, list(signals), list(hooks))
    finalizer.atexit = False
    return finalizer


def _release(signals: Sequence[LayerSignal], hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()
    for signal in signals:
        signal.disarm()
        _owners.pop(signal.layer, None)


def weak_hook(method: Callable[..., None]) -> Callable[..., None]:
    """`method` as a hook that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any, **kwargs: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*args, **kwargs)

    return hook
