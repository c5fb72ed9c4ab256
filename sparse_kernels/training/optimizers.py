"""What the growth signal must know about an optimizer: which state is momentum, and how it is
gathered.

Families: "sgd" (momentum_buffer), "adam" (exp_avg, exp_avg_sq: Adam, AdamW, NAdam, RAdam), "lion"
(exp_avg), "none" (every other elementwise optimizer, and SGD with momentum 0): there M is the
gradient itself, which is what the momentum recursion gives for a coefficient of 0.

Source of M: the official code of arXiv 1907.04840 (momentum_buffer, or exp_avg / (sqrt(exp_avg_sq)
+ 1e-8)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import device

ADAM_EPSILON = 1e-8
REFUSED = (
    "muon",
    "adafactor",
    "lbfgs",
    "shampoo",
    "distributedshampoo",
    "soap",
    "sparseadam",
    "kfac",
    "galore",
    "galoreadamw",
    "adamini",
)
_ADAM = ("adam", "adamw", "nadam", "radam")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers whose arithmetic depends on the shape of a parameter.

    Raises TypeError if `optimizer` is not a torch optimizer or is refused by name.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    for cls in type(optimizer).__mro__:
        if cls.__name__.lower().replace("_", "") in REFUSED:
            raise TypeError(
                f"{type(optimizer).__name__} cannot train sparse values: it depends on the shape "
                "of a parameter, but `values` is a list of blocks [capacity, bh, bw]; use an "
                "elementwise optimizer such as SGD, Adam or AdamW"
            )


class OptimizerView:
    """The optimizer's side of one layer's `values`: group, state, momentum.

    Raises ValueError if the optimizer does not hold `values`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, values: Tensor, name: str) -> None:
        self.optimizer = optimizer
        self.values = values
        self.name = name
        found = [
            i for i, g in enumerate(optimizer.param_groups) if any(p is values for p in g["params"])
        ]
        if not found:
            raise ValueError(
                f"layer {name!r}: the optimizer does not hold its `values` parameter. If it was "
                "made before sparsify() replaced the layer, build it from model.parameters() "
                "after sparsify(); if it trains a part of the model, give SparseMomentum that part "
                "(one SparseMomentum for each optimizer)"
            )
        self.group_index = found[0]

    @property
    def group(self) -> dict[str, Any]:
        """The param group (looked up each time: load_state_dict replaces the group's dict)."""
        return self.optimizer.param_groups[self.group_index]

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of `values`; empty before the first step."""
        return self.optimizer.state.get(self.values, {})

    @property
    def family(self) -> str:
        """ "sgd", "adam", "lion" or "none" (see the module's docstring)."""
        names = [cls.__name__.lower() for cls in type(self.optimizer).__mro__]
        if "sgd" in names:
            return "sgd" if self.group["momentum"] != 0 else "none"
        if any(n in names for n in _ADAM):
            return "adam"
        return "lion" if "lion" in names else "none"

    @property
    def beta(self) -> float:
        """Decay of the momentum per step; 0 for family "none"."""
        if self.family == "none":
            return 0.0
        if self.family == "sgd":
            return float(self.group["momentum"])
        return float(self.group["betas"][1 if self.family == "lion" else 0])

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors that the signal gathers for places that do not exist yet."""
        if self.family == "adam":
            amsgrad = ("max_exp_avg_sq",) if self.group.get("amsgrad") else ()
            return ("exp_avg", "exp_avg_sq", *amsgrad)
        return {"sgd": ("momentum_buffer",), "lion": ("exp_avg",)}.get(self.family, ())

    def has_state(self) -> bool:
        """True once the optimizer has gathered momentum for `values`."""
        return bool(self.state_names) and isinstance(self.state.get(self.state_names[0]), Tensor)

    def accumulate(self, buffers: dict[str, Tensor], grad: Tensor, first: bool) -> None:
        """One step of the optimizer's momentum recursion on `buffers` (made when missing), in
        place.

        grad: any shape, as the optimizer sees it (before its own maximize); given away: it may
            become a buffer or be written to. first: torch's SGD takes the very first gradient
            without dampening.
        """
        grad = grad.neg_() if self.group.get("maximize") else grad
        if self.family == "sgd":
            weight = 1.0 if first else 1.0 - self.group["dampening"]
            self._add_momentum(buffers, "momentum_buffer", grad, weight)
            return
        for name in self.state_names:
            if name not in buffers:
                buffers[name] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        if self.family == "lion":
            buffers["exp_avg"].lerp_(grad, 1.0 - self.beta)
        elif self.family == "adam":
            second = float(self.group["betas"][1])
            buffers["exp_avg"].lerp_(grad, 1.0 - self.beta)
            buffers["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1.0 - second)
            if "max_exp_avg_sq" in buffers:
                torch.maximum(
                    buffers["max_exp_avg_sq"], buffers["exp_avg_sq"], out=buffers["max_exp_avg_sq"]
                )

    def _add_momentum(
        self, buffers: dict[str, Tensor], name: str, grad: Tensor, weight: float
    ) -> None:
        """buffer = beta * buffer + weight * grad in as few passes over the matrix as torch has."""
        buffer = buffers.get(name)
        if buffer is None:  # momentum of zero: the gradient itself, without a pass or a copy
            buffers[name] = grad if weight == 1.0 else grad.mul_(weight)
        elif weight == 1.0:
            torch.add(grad, buffer, alpha=self.beta, out=buffer)
        else:
            buffer.mul_(self.beta).add_(grad, alpha=weight)

    def window_correction(self, gathered: int) -> float | Tensor:
        """Factor for a second moment that was gathered from zero over the last `gathered` steps.

        Dividing by 1 - beta2**gathered makes it an average; times 1 - beta2**step it has the (not
        yet bias-corrected) scale of the optimizer's own state after `step` steps.
        """
        second = float(self.group["betas"][1])
        step = self.state.get("step", 0)
        if isinstance(step, Tensor) and device.queued(step):
            # A fused or capturable optimizer counts on the GPU: the host must not wait for it.
            taken = 1.0 - torch.pow(second, step.double())
            return torch.where(step > 0, taken, 1.0) / (1.0 - second**gathered)
        step = float(step or 0)
        scale = 1.0 - second**step if step > 0 else 1.0
        return scale / (1.0 - second**gathered)

    def momentum(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """M from state tensors of any common shape. Source: the official code (module
        docstring).
        """
        if self.family == "adam":
            return buffers["exp_avg"] / (buffers["exp_avg_sq"].sqrt() + ADAM_EPSILON)
        return buffers[self.state_names[0]]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure in a call of Optimizer.step (args[0] is the optimizer)."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def found_overflow(optimizer: Any) -> bool:
    """True if a GradScaler tells a fused optimizer to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(float(found))
