"""Growth signals: how much momentum a weight that does not exist would have.

Five kinds, which differ in the steps whose dense weight gradient they need. That gradient is a
layer's probe's (`layer.make_probe()`: a never-read tensor [rows, cols]); a signal takes it just
before the optimizer steps, and frees it at once:

- "exact": dense momentum in every step while updates are left, the official code of arXiv
  1907.04840 to the letter.
- "window": only the last L steps before an update, beta**L <= tolerance; what is missing of the
  momentum is beta**L (less, where windows overlap because updates are nearer than L steps).
- "sampled": as "window", but only at a random sample of the places, without any dense tensor
  (sampled.py).
- "gradient", the default: the one dense gradient of the step before the update (RigL, Evci et al.
  2020).
- "random": none, and no dense gradient ever (SET, Mocanu et al. 2018).

Outside its window a signal holds no memory and the layer has no probe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import BlockGrid
from .optimizers import OptimizerView
from .rules import LayerState
from .schedule import UpdateSchedule, window_length

SIGNALS = ("exact", "window", "sampled", "gradient", "random")
GRADIENT = "gradient"
_EVERYWHERE = slice(None)
ADAM_MIN_WINDOW = 10
"""Adam divides by a second moment: over fewer steps |M| is near 1 everywhere and says nothing."""


class LayerSignal:
    """The growth signal of one layer: buffers [blocks, bh, bw] that live only inside the window.

    kind: one of SIGNALS; tolerance: of "window". For an optimizer without momentum M is the
    gradient, so "exact", "window" and "sampled" need one step only.
    """

    def __init__(
        self, name: str, layer: Any, view: OptimizerView, kind: str, tolerance: float
    ) -> None:
        self.name = name
        self.layer = layer
        self.view = view
        self.kind = kind
        self.tolerance = tolerance
        self.buffers: dict[str, Tensor] = {}
        self.gathered = 0  # steps in the buffers
        self.since_update = 0  # steps gathered since the last update
        self._kept: Tensor | None = None  # see keep_gradient
        self._probe: Tensor | None = None  # the probe that carries the hooks
        self._handles: list[Any] = []
        self._task = -1  # the last backward pass that was looked at

    @property
    def starved(self) -> bool:
        """True if an update needs gradients and there was none since the last update."""
        return self.length() != 0 and self.since_update == 0

    @property
    def gathers_momentum(self) -> bool:
        """False where the signal is a single gradient (or nothing)."""
        return self.kind in ("exact", "window", "sampled") and self.view.family != "none"

    @property
    def linear(self) -> bool:
        """Whether an average of buffers is the buffer of the averaged gradient."""
        return not self.gathers_momentum or self.view.family != "adam"

    def length(self) -> int | None:
        """Steps with dense gradients before an update; None means all."""
        if self.kind == "random":
            return 0
        if not self.gathers_momentum:
            return 1
        if self.kind == "exact":
            return None
        steps = window_length(self.view.beta, self.tolerance)
        return max(steps, ADAM_MIN_WINDOW) if self.view.family == "adam" else steps

    @property
    def frozen(self) -> bool:
        """True while `values` is not trained: the layer then keeps its pattern."""
        return not self.layer.values.requires_grad

    # ---- the probe -----------------------------------------------------------------------------

    def arm(self, schedule: UpdateSchedule, next_step: int, sampling: Any = None) -> None:
        """Make the probe if `next_step` lies in the window; else remove probe and buffers.

        sampling: what "sampled" draws by (sampled.Sampling); the others draw nothing.
        """
        del sampling
        if not self.frozen and schedule.in_window(next_step, self.length()):
            self._watch()
        else:
            self.disarm()

    def disarm(self) -> None:
        """Remove probe, hooks and buffers."""
        self._unwatch()
        self.layer.probe = self.layer.probe_pattern = None
        self.clear()

    def _watch(self) -> None:
        """Make a probe if there is none, and hook it (again, where the layer renewed it)."""
        probe = self.layer.probe
        if probe is None:
            probe = self._make_probe()
        if probe is not self._probe:
            self._unwatch()
            self._probe = probe
            # Hooks on the leaves, not on the module: autograd runs them whatever compiled the
            # forward pass, and a gradient may be discarded between forward and backward.
            hooked = (probe, self.layer.values)
            self._handles = [t.register_hook(self._before_gradient) for t in hooked]

    def _make_probe(self) -> Tensor:
        probe: Tensor = self.layer.make_probe()
        return probe

    def _blocks_of(self, dense: Tensor) -> Tensor:
        """What the probe gathered as [blocks, bh, bw]."""
        return BlockGrid.of(self.layer).to_blocks(dense)

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._probe = [], None

    def _before_gradient(self, grad: Tensor) -> None:
        """Drop the probe's old gradient if values.grad was discarded (zero_grad) without a step.

        Autograd calls this before it accumulates into the probe and into `values`, in either
        order; only the first call of a backward pass sees both as they were before it.
        """
        del grad
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        if self._probe is not None and self.layer.values.grad is None:
            self._probe.grad = None

    def drawn(self) -> Any:
        """What this signal has drawn for the present window, None for all that draw nothing."""
        return None

    def take_drawn(self, drawn: Any) -> None:
        """Go on with what rank 0 has drawn, at the window's first step or after a checkpoint.

        Raises RuntimeError if this rank has gathered something else by then.
        """

    def clear(self) -> None:
        """Drop what was gathered."""
        self.buffers.clear()
        self.gathered = 0
        self._kept = None

    def drop_gradient(self) -> None:
        """Forget a dense gradient whose step the optimizer skipped."""
        self._kept = None
        if self.layer.probe is not None:
            self.layer.probe.grad = None

    def pending(self) -> Tensor | None:
        """The dense gradient [rows, cols] that waits in the probe, or None.

        Without values.grad the optimizer leaves this layer out of its step, so what the probe
        holds belongs to no step and is dropped.
        """
        probe = self.layer.probe
        if probe is None:
            return None
        if self.layer.values.grad is None or self.frozen:
            probe.grad = None
        elif self._probe is not None:
            self._watch()
        return probe.grad

    def comparison(self) -> Tensor:
        """Float64 [3]: sums of d*d, d*g and g*g over the stored blocks, d the waiting dense
        gradient and g values.grad.
        """
        raw, seen = self.gradients()
        return torch.stack([torch.dot(raw, raw), torch.dot(raw, seen), torch.dot(seen, seen)])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The waiting dense gradient and values.grad over the stored blocks, float64 [n] each."""
        dense, grad = self.layer.probe.grad, self.layer.values.grad
        pattern = self.layer.pattern
        raw = BlockGrid.of(self.layer).stored(dense, pattern).reshape(-1).double()
        return raw, self._compact(grad, pattern).reshape(-1).double()

    def observe(self, factor: float) -> None:
        """Take the waiting dense gradient times `factor` (see gradient_scale.py) from the probe.

        It is the signal's from then on: scaled in place, and kept as the first momentum.
        """
        dense = self.pending()
        if dense is None:
            return
        blocks = self._blocks_of(dense.detach())
        self.layer.probe.grad = None
        if factor != 1.0:
            blocks = blocks.mul_(factor)
        if self.gathers_momentum:
            fresh = not self.view.has_state() and self.gathered == 0
            self.view.accumulate(self.buffers, blocks, first=fresh)
        else:
            self.buffers[GRADIENT] = blocks
        self.gathered += 1
        self.since_update += 1

    def keep_gradient(self) -> None:
        """In the last step before an update: keep what else only `values.grad` tells, which
        zero_grad may have emptied by the update. That is M of an optimizer without momentum.
        """
        grad = self.layer.values.grad
        if self.kind == "random" and self.view.family == "none" and grad is not None:
            self._kept = self._compact(grad.detach(), self.layer.pattern).clone()

    # ---- at an update --------------------------------------------------------------------------

    def _compact(self, tensor: Tensor, pattern: Any) -> Tensor:
        """Stored blocks [nnzb, bh, bw] of a tensor shaped like values."""
        compact = tensor if self.layer.storage == "compressed" else pattern.compress(tensor)
        return compact[: pattern.nnzb]

    def collect(self) -> LayerState:
        """The layer before the update, with the optimizer's momentum at its stored blocks."""
        pattern, grid = self.layer.pattern, BlockGrid.of(self.layer)
        keys = pattern.keys()
        values = self._compact(self.layer.values.detach(), pattern)
        return LayerState(
            name=self.name,
            keys=keys,
            values=values,
            momentum=self._active_momentum(pattern, keys, values),
            counts=grid.counts(keys),
            blocks=grid.blocks,
            block_cols=grid.block_cols,
        )

    def _active_momentum(self, pattern: Any, keys: Tensor, values: Tensor) -> Tensor:
        if self.view.family != "none":
            if not self.view.has_state():
                return torch.zeros_like(values)
            return self.view.momentum(self._active_state(pattern))
        if GRADIENT in self.buffers:
            return self.buffers[GRADIENT][keys]
        if self._kept is not None:
            return self._kept
        grad = self.layer.values.grad
        return torch.zeros_like(values) if grad is None else self._compact(grad, pattern)

    def _active_state(self, pattern: Any) -> dict[str, Tensor]:
        state = self.view.state
        return {n: self._compact(state[n], pattern) for n in self.view.state_names}

    def complete(self, keys: Tensor) -> Any:
        """Scores [blocks] of every place, stored ones included; None for "random"; of "sampled"
        scores.SampledScores.

        The optimizer's state at the stored blocks `keys` is written into the buffers, so that they
        hold what a dense optimizer would (a pruned weight keeps its momentum in the "exact"
        signal).
        """
        if self.kind == "random":
            return None
        grid = BlockGrid.of(self.layer)
        if not self.gathers_momentum:
            if GRADIENT not in self.buffers:
                return self.layer.values.new_zeros(grid.blocks)
            return grid.means(self.buffers[GRADIENT])
        if self.view.has_state():
            for name, active in self._active_state(self.layer.pattern).items():
                if name not in self.buffers:
                    shape = (grid.blocks, *active.shape[1:])
                    self.buffers[name] = active.new_zeros(shape)
                factor = self._correction(name)
                self.buffers[name][keys] = active if _is_one(factor) else active / factor
        if not self.buffers:
            return self.layer.values.new_zeros(grid.blocks)
        return grid.means(self.view.momentum({n: self.state(n) for n in self.buffers}))

    def _correction(self, name: str) -> float | Tensor:
        """Factor from a buffer to the optimizer's scale.

        Only a second moment that was gathered from zero over a window has one other than 1. The
        buffer itself keeps its own scale, since an overlapping window goes on gathering into it.
        """
        if (
            self.kind not in ("window", "sampled")
            or self.view.family != "adam"
            or not self.gathered
        ):
            return 1.0
        moments = self.view.state_names[1:]
        return self.view.window_correction(self.gathered) if name in moments else 1.0

    def state(self, name: str, blocks: Tensor | slice = _EVERYWHERE) -> Tensor:
        """Gathered optimizer state `name` in the optimizer's scale, at `blocks`."""
        buffer, factor = self.buffers[name][blocks], self._correction(name)
        return buffer if _is_one(factor) else buffer * factor

    def grown_state(self, added: Tensor) -> dict[str, Tensor]:
        """Optimizer state of the added blocks (int64 [added]) as the signal gathered it.

        A single gradient gathers no momentum: those weights start at zero, as in RigL.
        """
        if not self.gathers_momentum or not self.view.has_state():
            return {}
        return {name: self.state(name, added) for name in self.view.state_names}

    def finish_update(self, schedule: UpdateSchedule, step: int) -> None:
        """After the update of `step`: start afresh, unless the next window has begun by then.

        It has for "exact", and for a "window" longer than the steps between two updates: its
        momentum would be short of the tolerance without what was gathered before this update.
        """
        self.since_update = 0
        goes_on = schedule.in_window(step + 1, self.length())
        if not (goes_on and self.gathers_momentum and self.gathered):
            self.clear()

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "gathered": self.gathered,
            "since_update": self.since_update,
            "buffers": {k: t.clone() for k, t in self.buffers.items()},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a buffer is unknown or has not this layer's [blocks, bh, bw]."""
        shape = self._buffer_shape(state)
        for name, tensor in state["buffers"].items():
            if name != GRADIENT and name not in self.view.state_names:
                raise ValueError(
                    f"layer {self.name!r}: signal buffer {name!r}, expected {GRADIENT!r} or one of "
                    f"{self.view.state_names}; the optimizer is another than when it was written"
                )
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"layer {self.name!r}: signal buffer {name!r} must be {shape}, the checkpoint "
                    f"has {tensor.dtype} {tuple(tensor.shape)}; it belongs to another model, or "
                    "'sampled' gathered it and this signal is another, or the other way round"
                )

    def _buffer_shape(self, state: dict[str, Any]) -> tuple[int, int, int]:
        """Shape of the buffers of `state`."""
        del state
        grid = BlockGrid.of(self.layer)
        return (grid.blocks, grid.bh, grid.bw)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `check_state` has found right."""
        values = self.layer.values
        self.gathered = state["gathered"]
        self.since_update = state.get("since_update", self.gathered)
        self.buffers = {
            k: t.to(values.device, values.dtype, copy=True) for k, t in state["buffers"].items()
        }


def _is_one(factor: float | Tensor) -> bool:
    """Whether a factor changes nothing; one on a GPU (a tensor) is not looked at."""
    return not isinstance(factor, Tensor) and factor == 1.0
