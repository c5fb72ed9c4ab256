"""Growth signals: how much momentum a weight that does not exist would have.

Each signal takes the dense weight gradient from a layer's probe (`layer.make_probe()`: a
never-read tensor [rows, cols] whose gradient it is) just before the optimizer steps, and frees it
at once:

- "exact": dense momentum in every step while updates are left, the official code of arXiv
  1907.04840 to the letter.
- "window": only the last L steps before an update, beta**L <= tolerance; what is missing of the
  momentum is beta**L.
- "gradient": the one dense gradient of the step before the update (RigL, Evci et al. 2020).
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

SIGNALS = ("exact", "window", "gradient", "random")
GRADIENT = "gradient"
ADAM_MIN_WINDOW = 10
"""Adam divides by a second moment: over fewer steps |M| is near 1 everywhere and says nothing."""
SCALE_SNAP = 1e-4
"""A gradient scale this close to 1 is rounding of two kernels, not clipping."""
SCALE_MISMATCH = 0.1
"""Largest relative distance between values.grad and scale * dense gradient that is taken as
rounding.
"""


class LayerSignal:
    """The growth signal of one layer: buffers [blocks, bh, bw] that live only inside the window.

    kind: one of SIGNALS; tolerance: of "window". For an optimizer without momentum M is the
    gradient, so "exact" and "window" both need one step only.
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
        self.gathered = 0

    @property
    def gathers_momentum(self) -> bool:
        """False where the signal is a single gradient (or nothing)."""
        return self.kind in ("exact", "window") and self.view.family != "none"

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

    def arm(self, schedule: UpdateSchedule, next_step: int) -> None:
        """Make the probe if `next_step` lies in the window; else remove probe and buffers."""
        if schedule.in_window(next_step, self.length()):
            if self.layer.probe is None:
                self.layer.make_probe()
            return
        self.layer.probe = None
        self.clear()

    def clear(self) -> None:
        """Drop what was gathered."""
        self.buffers.clear()
        self.gathered = 0

    def drop_gradient(self) -> None:
        """Forget a dense gradient whose step the optimizer skipped."""
        if self.layer.probe is not None:
            self.layer.probe.grad = None

    def observe(self, scale: float | None, extra: float = 1.0) -> None:
        """Take the dense gradient of this step, scaled as the optimizer sees it, and free it.

        scale: factor from the probe's gradient to the optimizer's; None compares with values.grad,
            which
        finds loss scaling, unscaling and clipping by norm. extra: a further factor (a fused
        optimizer unscales inside its step).
        """
        probe = self.layer.probe
        if probe is None or probe.grad is None:
            return
        blocks = BlockGrid.of(self.layer).to_blocks(probe.grad)
        probe.grad = None
        factor = extra * (self._inferred_scale(blocks) if scale is None else scale)
        if factor != 1.0:
            blocks = blocks * factor
        if self.gathers_momentum:
            fresh = not self.view.has_state() and self.gathered == 0
            self.view.accumulate(self.buffers, blocks, first=fresh)
        else:
            self.buffers[GRADIENT] = blocks
        self.gathered += 1

    def _inferred_scale(self, blocks: Tensor) -> float:
        """Least-squares factor from the dense gradient at stored blocks to values.grad."""
        seen = self.layer.values.grad
        if seen is None:
            return 1.0
        pattern = self.layer.pattern
        keys = pattern.keys()
        seen = (pattern.compress(seen) if self.layer.storage != "compressed" else seen)[
            : keys.numel()
        ]
        raw, seen = blocks[keys].double(), seen.double()
        square, product, seen_square = torch.stack(
            [(raw * raw).sum(), (raw * seen).sum(), (seen * seen).sum()]
        ).tolist()
        finite = square + seen_square < float(
            "inf"
        )  # False for NaN too; the update's check names the layer
        if square == 0.0 or not finite:
            return 1.0
        if seen_square == 0.0:
            return 0.0
        factor = product / square
        missed = max(0.0, 1.0 - product * product / (square * seen_square)) ** 0.5
        if missed > SCALE_MISMATCH:
            raise RuntimeError(
                f"layer {self.name!r}: values.grad is not a multiple of the dense weight gradient "
                f"(relative distance {missed:.2g}); something changed it element by element or "
                "averaged it over ranks (clip_grad_value_, a hook, DDP), which the growth signal "
                "cannot follow. Use clip_grad_norm_, signal='random', or pass grad_scale=1.0 to "
                "SparseMomentum to take the dense gradient as it is"
            )
        return 1.0 if abs(factor - 1.0) <= SCALE_SNAP else factor

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
        )

    def _active_momentum(self, pattern: Any, keys: Tensor, values: Tensor) -> Tensor:
        if self.view.family != "none":
            if not self.view.has_state():
                return torch.zeros_like(values)
            return self.view.momentum(self._active_state(pattern))
        if GRADIENT in self.buffers:
            return self.buffers[GRADIENT][keys]
        grad = self.layer.values.grad
        return torch.zeros_like(values) if grad is None else self._compact(grad, pattern)

    def _active_state(self, pattern: Any) -> dict[str, Tensor]:
        state = self.view.state
        return {n: self._compact(state[n], pattern) for n in self.view.state_names}

    def complete(self, keys: Tensor) -> Tensor | None:
        """Scores [blocks] of every place, stored ones included; None for "random".

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
        self._correct_second_moment()
        if self.view.has_state():
            for name, active in self._active_state(self.layer.pattern).items():
                if name not in self.buffers:
                    shape = (grid.blocks, *active.shape[1:])
                    self.buffers[name] = active.new_zeros(shape)
                self.buffers[name][keys] = active
        if not self.buffers:
            return self.layer.values.new_zeros(grid.blocks)
        return grid.means(self.view.momentum(self.buffers))

    def _correct_second_moment(self) -> None:
        if self.kind != "window" or self.view.family != "adam" or not self.gathered:
            return
        factor = self.view.window_correction(self.gathered)
        for name in self.view.state_names[1:]:
            self.buffers[name].mul_(factor)

    def grown_state(self, added: Tensor) -> dict[str, Tensor]:
        """Optimizer state of the added blocks (int64 [added]) as the signal gathered it.

        A single gradient gathers no momentum: those weights start at zero, as in RigL.
        """
        if not self.gathers_momentum or not self.view.has_state():
            return {}
        return {name: self.buffers[name][added] for name in self.view.state_names}

    def finish_update(self) -> None:
        """After the update: "exact" goes on gathering, every other signal starts afresh."""
        if self.kind != "exact" or not self.gathers_momentum:
            self.clear()

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "gathered": self.gathered,
            "buffers": {k: t.clone() for k, t in self.buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if a buffer has another shape than this layer's [blocks, bh, bw]."""
        grid = BlockGrid.of(self.layer)
        shape = (grid.blocks, grid.bh, grid.bw)
        for name, tensor in state["buffers"].items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"layer {self.name!r}: signal buffer {name!r} must be {shape}, the checkpoint "
                    f"has {tuple(tensor.shape)}; it belongs to another model"
                )
        values = self.layer.values
        self.gathered = int(state["gathered"])
        self.buffers = {
            k: t.to(values.device, values.dtype, copy=True) for k, t in state["buffers"].items()
        }
