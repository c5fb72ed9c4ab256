"""What a state_dict of SparseMomentum must look like, checked before any of it is used."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .config import SparseMomentumConfig
from .limits import Limits
from .signals import LayerSignal
from .update import UpdateRecord

_COUNTERS = ("steps", "updates")


def described(config: SparseMomentumConfig) -> dict[str, Any]:
    """Hyper-parameters as plain data; a rule of the user's own by its name."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: _named(value) if callable(value) else value for name, value in found.items()}


def _named(rule: Any) -> str:
    return f"{getattr(rule, '__module__', '')}.{getattr(rule, '__qualname__', type(rule).__name__)}"


def warn_of_changes(state: dict[str, Any], config: SparseMomentumConfig) -> None:
    """Warn where the checkpoint's hyper-parameters are not `config`'s."""
    then, now = state.get("config", {}), described(config)
    changed = [f"{k} {then[k]!r} -> {now[k]!r}" for k in now if k in then and then[k] != now[k]]
    if changed:
        warnings.warn(
            f"SparseMomentum goes on with other settings than the checkpoint's: "
            f"{', '.join(changed)}; give the same ones for the same training",
            RuntimeWarning,
            stacklevel=3,
        )


def check_state(
    state: dict[str, Any],
    signals: Sequence[LayerSignal],
    limits: Limits,
    generator: torch.Generator,
) -> None:
    """Raise ValueError, naming the entry, if `state` is none that these signals can go on from."""
    try:
        held = state["signals"]
        counters = [state[name] for name in _COUNTERS]
        _check_names(held, signals)
        _check_config(state.get("config", {}))
        for signal in signals:
            entry = held[signal.name]
            counters += [entry["gathered"], entry.get("since_update", 0)]
            signal.check_state(entry)
        records(state["history"])
        limits.check_state(state)
        _check_generator(state["generator"], generator)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the state_dict of a SparseMomentum, got one with a fault: "
            f"{type(error).__name__}: {error}"
        ) from error
    if any(type(count) is not int or count < 0 for count in counters):
        raise ValueError(f"expected counts of steps, at least 0, got {counters}")


def _check_names(held: dict[str, Any], signals: Sequence[LayerSignal]) -> None:
    names = sorted(s.name for s in signals)
    if sorted(held) != names:
        raise ValueError(
            f"checkpoint has the sparse layers {sorted(held)}, the model has {names} (frozen ones "
            "not counted); sparsify and freeze the model as it was when the checkpoint was written"
        )


def _check_config(config: Any) -> None:
    plain = (str, int, float, type(None))
    if not isinstance(config, dict) or not all(isinstance(v, plain) for v in config.values()):
        raise ValueError("config must be a dict of numbers and names, as SparseMomentum makes it")


def records(history: Any) -> list[UpdateRecord]:
    """The records of `history`, which a state_dict holds as dicts."""
    return [UpdateRecord(**{**r, "reallocated": tuple(r["reallocated"])}) for r in history]


def _check_generator(state: Any, generator: torch.Generator) -> None:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise ValueError("expected the generator's state as an uint8 tensor")
    try:
        torch.Generator(device=generator.device).set_state(state)
    except RuntimeError as error:
        raise ValueError(f"the generator's state is none: {error}") from error
