"""Which modules sparsify may replace, and the reason where it may not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_kernels.nn._initial import check_block
from sparse_kernels.nn.base import SparseLayer

Exclude = str | type[nn.Module] | Callable[[str, nn.Module], bool]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on ``module``."""
    return any(getattr(module, name, None) for name in _HOOKS)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the forward and backward hooks of ``source``, with their options."""
    for name, table in source.__dict__.items():
        if name.startswith(_HOOKS) or name in ("_is_full_backward_hook",):
            target.__dict__[name] = table


class Exclusion:
    """The ``exclude`` argument of sparsify: names (or patterns as "head.*"), types, callables."""

    def __init__(self, exclude: Exclude | Iterable[Exclude], model: nn.Module) -> None:
        single = isinstance(exclude, (str, type)) or not isinstance(exclude, Iterable)
        self._rules: list[Exclude] = [exclude] if single else list(exclude)  # type: ignore
        names = [name for name, _ in model.named_modules()]
        for rule in self._rules:
            if isinstance(rule, str) and not any(_named(rule, name) for name in names):
                raise ValueError(
                    f"exclude names {rule!r}, but no module is called so; modules of this model: "
                    f"{', '.join(names[1:])}"
                )
            if not callable(rule) and not isinstance(rule, str):
                raise TypeError(
                    "exclude takes names, module types and callables (name, module) -> bool, got "
                    f"{rule!r}"
                )

    def reason(self, name: str, module: nn.Module) -> str | None:
        """Why ``module`` is excluded, or None."""
        for rule in self._rules:
            if isinstance(rule, str):
                if _named(rule, name):
                    return f"excluded by name {rule!r}"
            elif isinstance(rule, type):
                if isinstance(module, rule):
                    return f"excluded by type {rule.__name__}"
            elif rule(name, module):
                return f"excluded by {getattr(rule, '__name__', 'a callable')}"
        return None


def _named(rule: str, name: str) -> bool:
    """A rule names a module, everything below it, or matches by shell wildcards."""
    return name == rule or name.startswith(rule + ".") or fnmatchcase(name, rule)


class Eligibility:
    """Judges the nn.Linear and nn.Conv2d of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._fused: dict[int, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                owner = f"{type(module).__name__} {name!r}"
                self._fused.update((id(part), owner) for part in module.modules())
        self._users: dict[tuple[object, ...], list[str]] = {}
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    users = self._users.setdefault(_identity(parameter), [])
                    users.append(f"{name}.{key}" if name else key)

    def reason(self, module: nn.Module, block: int | tuple[int, int]) -> str | None:
        """Why the linear or convolution ``module`` must stay as it is, or None."""
        return (
            self._owner_reason(module)
            or _kind_reason(module)
            or self._tied_reason(module)
            or _block_reason(module, block)
        )

    def _owner_reason(self, module: nn.Module) -> str | None:
        owner = self._fused.get(id(module))
        return None if owner is None else f"{owner} reads its .weight in a fused path"

    def _tied_reason(self, module: nn.Module) -> str | None:
        weight = module._parameters["weight"]
        assert weight is not None
        users = self._users[_identity(weight)]
        return None if len(users) == 1 else f"tied weight, shared by {', '.join(users)}"


def _identity(parameter: Tensor) -> tuple[object, ...]:
    """Equal for parameters that share memory: one object, or two over one storage."""
    if parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
        return ("object", id(parameter))
    if parameter.numel() == 0:
        return ("object", id(parameter))
    # Slices of one flat buffer begin at different addresses: they are not tied.
    return ("memory", parameter.device, parameter.data_ptr())


def _kind_reason(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its sizes are unknown, run one forward pass first"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a subclass and may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if has_hooks(module):
        return "has forward or backward hooks (weight_norm and pruning are such), remove them first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    if weight.is_meta:
        return "on the meta device: materialise it first"
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {weight.dtype} in layout {weight.layout}"
    if getattr(weight, "_backward_hooks", None) or weight._post_accumulate_grad_hooks:
        return "its weight has gradient hooks, which would be lost"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    return None


def segment(module: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Rows and columns within one group and kernel position, which a block must fit."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels // module.groups, module.in_channels // module.groups


def _block_reason(module: nn.Module, block: int | tuple[int, int]) -> str | None:
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    size = segment(module)
    sides = check_block(block, (2**31, 2**31))
    if sides[0] > size[0] or sides[1] > size[1]:
        return f"smaller than the block: {size[0]} x {size[1]} per group and kernel position"
    return None


def is_candidate(module: nn.Module) -> bool:
    """Whether ``module`` is a linear or 2-d convolution layer, of which sparsify gives account."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, SparseLayer)
