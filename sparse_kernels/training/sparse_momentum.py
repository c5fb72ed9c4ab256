"""SparseMomentum: drives the mask updates of a sparse model while any optimizer trains it.

    sparsify(model, density=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    steps = len(loader)
    masks = SparseMomentum(model, optimizer, total_steps=epochs * steps, update_every=steps)
    for each batch:
        optimizer.zero_grad(); loss.backward(); optimizer.step(); masks.step()

Source: Dettmers & Zettlemoyer 2019, Sparse Networks from Scratch (arXiv 1907.04840) and its
official code.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn.base import SparseLayer

from . import device
from .blocks import BlockGrid
from .config import SparseMomentumConfig
from .driver_state import check_state, described, records, warn_of_changes
from .gradient_scale import gather
from .layers import make_signals
from .optimizers import check_optimizer
from .ownership import check_free, claim, weak_hook
from .rewrite import COMPRESSED, DENSE_MASKED, rewrite, rewrite_queued
from .rewrite_together import rewrite_together
from .rules import GrowthRule, PruneRule, RedistributionRule
from .schedule import Decay, UpdateSchedule
from .signals import LayerSignal
from .update import LayerChange, UpdateRecord, plan_update

logger = logging.getLogger(__name__)

STORAGE_HYSTERESIS = 0.8
"""A dense-masked layer is compressed again below this share of dense_above."""
MAX_SKIPPED = 100
"""So many step() calls in a row without an optimizer step are a mistake, not a loss scaler that
searches.
"""


class SparseMomentum:
    """Prune, redistribute and grow the weights of a sparse model while it trains.

    Call `step()` after every `optimizer.step()`. After steps update_every, 2 * update_every, ...
    that come before total_steps, each layer loses ceil(prune_rate * nnz) blocks and the model
    grows as many elsewhere: the number of stored blocks is conserved exactly (per block shape).

    Arguments after the optimizer are keyword-only; the defaults are the paper's.
        total_steps, update_every: in optimizer steps; batches per epoch gives one update per epoch.
        prune_rate, final_prune_rate, decay: rate at step 0 and at total_steps; "cosine", "linear"
            (to 0; final_prune_rate is not used) or a callable (initial, final, progress) -> rate.
        prune: "magnitude", "set", "global_magnitude" or a rules.PruneRule.
        growth: "momentum" (largest signal), "gradient" (RigL), "random" (SET) or a
            rules.GrowthRule.
        redistribution: "momentum", "magnitude", "nonzero", "none" or a rules.RedistributionRule.
        signal: "exact" (momentum from every step), "window" (from the last steps before an
            update), "gradient" (the last gradient alone) or "random" (none: grows at random); see
            training/signals.py. Growth "gradient" and "random" bring their own. An optimizer
            without momentum (SGD with momentum 0, RMSprop, Adagrad, ...) has M = gradient, so
            that "exact" and "window" are "gradient".
        window_tolerance: share of the momentum that "window" may miss; sets its length.
        dense_above: layers denser than this are stored dense with a mask, and compressed again
            below 0.8 of it; 1 keeps every layer compressed, None goes by each layer's own
            `dense_above`, which `tune` measures (0.5 before).
        generator: for random growth; None makes one on the CPU with seed 0.
        grad_scale: factor from the loss gradient to the gradient that the optimizer uses; None
            finds loss scaling and clipping by norm from values.grad.
        on_update: called with the UpdateRecord after each update.

    The dense gradients are taken in a pre-hook of `optimizer.step()`, that is after unscaling and
    clipping; steps that a GradScaler skips are noticed and count for nothing. A batch may be
    discarded by zero_grad() without a step; with zero_grad(set_to_none=False) that leaves no
    trace, so tell it by step(skipped=True).

    Layers whose `values` do not require a gradient are frozen: they keep their pattern, take no
    part in redistribution and are listed in `frozen`. A layer frozen later is left out as long as
    it is. To train a layer that was frozen at construction, close() this object and make another.

    A layer has one SparseMomentum at a time: close() the old one before making another.

    Averaged models (torch.optim.swa_utils.AveragedModel: EMA, SWA) average `values` slot by slot,
    and an update gives a slot to another weight: an average over an update is meaningless. Average
    once `finished` is True, or make the average anew in on_update:

        def on_update(record): average.model = AveragedModel(model, multi_avg_fn=...)

    Raises ValueError: no sparse layer or only frozen ones, a layer whose values the optimizer does
    not hold, values shared by two layers, a layer driven by another SparseMomentum, a
    hyper-parameter out of range. TypeError: an optimizer that depends on parameter shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        update_every: int,
        prune_rate: float = 0.5,
        final_prune_rate: float = 0.005,
        decay: str | Decay = "cosine",
        prune: str | PruneRule = "magnitude",
        growth: str | GrowthRule = "momentum",
        redistribution: str | RedistributionRule = "momentum",
        signal: str = "exact",
        window_tolerance: float = 0.1,
        dense_above: float | None = None,
        generator: torch.Generator | None = None,
        grad_scale: float | None = None,
        on_update: Callable[[UpdateRecord], None] | None = None,
    ) -> None:
        self.config = SparseMomentumConfig(
            total_steps=total_steps,
            update_every=update_every,
            prune_rate=prune_rate,
            final_prune_rate=final_prune_rate,
            decay=decay,
            prune=prune,
            growth=growth,
            redistribution=redistribution,
            signal=signal,
            window_tolerance=window_tolerance,
            dense_above=dense_above,
        )
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.schedule = UpdateSchedule(total_steps, update_every)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.grad_scale = grad_scale
        self.on_update = on_update
        self.steps = 0
        self.updates = 0
        self.history: list[UpdateRecord] = []
        self._rules = self.config.rule_set()
        kind, tolerance = self.config.effective_signal, window_tolerance
        self._signals, self._fixed = make_signals(model, optimizer, kind, tolerance)
        check_free(self._signals)
        self._stepped = False
        self._skipped = 0
        self._logged: tuple[str, ...] = ()
        self._warned = False
        self._needs_momentum = self.config.effective_signal in ("exact", "window")
        self._groups = sorted({s.view.group_index for s in self._signals})
        hooks = (
            optimizer.register_step_pre_hook(weak_hook(self._before_optimizer)),
            optimizer.register_step_post_hook(weak_hook(self._after_optimizer)),
        )
        self._release = claim(self, self._signals, hooks)
        self._log_frozen()
        self._arm()

    # ---- the training loop's side --------------------------------------------------------------

    @property
    def prune_rate(self) -> float:
        """Prune rate after `steps` steps; stepped once per batch."""
        return self.config.decayed_rate(self.steps)

    @property
    def finished(self) -> bool:
        """True once no update is left: from here on the masks stay as they are."""
        return self.schedule.next_update(self.steps + 1) is None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the sparse layers that keep their pattern because `values` is not trained."""
        return (*self._fixed, *(s.name for s in self._signals if s.frozen))

    def step(self, skipped: bool | None = None) -> UpdateRecord | None:
        """Count one optimizer step; update the masks if it is time.

        skipped: True if the optimizer did not step (a GradScaler that found an overflow, a batch
            that was discarded): the step is not counted and its gradient is dropped. None finds
            out by itself.
        Returns the record of the update, or None.
        Raises FloatingPointError (naming layer and step) for non-finite weights, momentum or
        signal at an update, RuntimeError if the optimizer has not stepped in the last 100 calls or
        after close(). Warns once if an update needs gradients and a layer had none.
        """
        if not self._release.alive:
            raise RuntimeError(
                "step() of a closed SparseMomentum: expected one that still drives the model; "
                "leave the call out, or make a new SparseMomentum"
            )
        skipped = not self._stepped if skipped is None else skipped
        self._stepped = False
        if skipped:
            self._skip()
            return None
        self._skipped = 0
        self.steps += 1
        record = self._update() if self.schedule.is_update(self.steps) else None
        if record is not None or self.steps + 1 >= self._arm_at or self._momenta() != self._armed:
            self._arm()
        if record is not None and self.on_update is not None:
            self.on_update(record)
        return record

    def close(self) -> None:
        """Take hooks and probes off optimizer and layers, for good; the model stays as it is."""
        self._release()

    def _skip(self) -> None:
        for signal in self._signals:
            signal.drop_gradient()
        self._skipped += 1
        if self._skipped >= MAX_SKIPPED:
            raise RuntimeError(
                f"SparseMomentum.step() was called {MAX_SKIPPED} times without a step of its "
                "optimizer; call optimizer.step() first, on the very optimizer that SparseMomentum "
                "was given"
            )

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Gradients as the optimizer sees them; it may change them in its step (foreach Nesterov
        does).
        """
        if _found_overflow(optimizer):
            return
        self._stepped = True
        if _closure_of(args, kwargs) is None:
            self._observe(self.grad_scale)

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """With a closure the gradients come into being inside the optimizer's step."""
        if _closure_of(args, kwargs) is not None:
            self._observe(1.0 if self.grad_scale is None else self.grad_scale)

    def _observe(self, scale: float | None) -> None:
        # GradScaler sets this while a fused step unscales.
        fused = getattr(self.optimizer, "grad_scale", None)
        gather(self._signals, scale, 1.0 if fused is None else 1.0 / float(fused))

    def _arm(self) -> None:
        """Make or remove probes for the next step, and find the step when that changes again.

        Closing of a window needs no step of its own: it closes at an update, which arms anew.
        """
        step = self.steps + 1
        for signal in self._signals:
            signal.arm(self.schedule, step)
        openings = [self.schedule.next_opening(step, s.length()) for s in self._signals]
        self._arm_at = min((o for o in openings if o is not None), default=sys.maxsize)
        self._armed = self._momenta()

    def _momenta(self) -> list[Any]:
        """What window lengths depend on (schedulers such as OneCycleLR change it every step)."""
        if not self._needs_momentum:
            return []
        groups = self.optimizer.param_groups
        return [(groups[i].get("momentum"), groups[i].get("betas")) for i in self._groups]

    def _log_frozen(self) -> None:
        if self.frozen and self.frozen != self._logged:
            logger.info("frozen sparse layers keep their pattern: %s", ", ".join(self.frozen))
        self._logged = self.frozen

    def _warn_starved(self, signals: list[LayerSignal]) -> None:
        names = [s.name for s in signals if s.starved]
        if names and not self._warned:
            self._warned = True
            warnings.warn(
                f"mask update after step {self.steps}: no gradient reached the growth signal of "
                f"{', '.join(map(repr, names))}, so nothing ranks their new weights; are the "
                "layers used in the loss, and their probes left alone?",
                RuntimeWarning,
                stacklevel=4,
            )

    # ---- the update ----------------------------------------------------------------------------

    def _update(self) -> UpdateRecord:
        start = time.perf_counter()
        self._log_frozen()
        signals = [s for s in self._signals if not s.frozen]
        self._warn_starved(signals)
        states = [signal.collect() for signal in signals]
        scores = [
            lambda s=signal, k=state.keys: s.complete(k)
            for signal, state in zip(signals, states, strict=True)
        ]
        rate = self.prune_rate
        changes = plan_update(states, scores, self._rules, rate, self.generator, self.steps)
        nnz_before = {s.name: s.nnz for s in states}
        del states, scores  # views of the old values
        moved: dict[str, str] = {}
        reallocated = []
        done = rewrite_together(signals, changes, self._storage_for, self.optimizer)
        for signal, change in zip(signals, changes, strict=True):
            if signal.name not in done and self._apply(signal, change, moved):
                reallocated.append(signal.name)
            signal.finish_update(self.schedule, self.steps)
        device.count_elements(s.layer.pattern for s in signals)
        self.updates += 1
        record = UpdateRecord(
            step=self.steps,
            prune_rate=rate,
            removed=sum(c.removed for c in changes),
            nnz_before=nnz_before,
            nnz_after={s.name: c.keys.numel() for s, c in zip(signals, changes, strict=True)},
            density_after={s.name: s.layer.density for s in signals},
            storage_changes=moved,
            reallocated=tuple(reallocated),
            seconds=time.perf_counter() - start,
        )
        self.history.append(record)
        return record

    def _apply(self, signal: LayerSignal, change: LayerChange, moved: dict[str, str]) -> bool:
        layer = signal.layer
        storage = self._storage_for(layer, change.keys)
        if storage != layer.storage:
            moved[signal.name] = storage
        if change.added is None:
            there = signal.grown_state(change.keys)
            reallocated = rewrite_queued(layer, self.optimizer, change.keys, there, storage)
        else:
            grown = signal.grown_state(change.added)
            reallocated = rewrite(layer, self.optimizer, change.keys, grown, storage)
        return reallocated

    def _storage_for(self, layer: SparseLayer, keys: Tensor) -> str:
        # Of the blocks: their number is known without a look at the device.
        density = keys.numel() / BlockGrid.of(layer).blocks
        above = self.config.dense_above
        above = layer.dense_above if above is None else above
        if density > above:
            return DENSE_MASKED
        if density < STORAGE_HYSTERESIS * above:
            return COMPRESSED
        return layer.storage

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, history, hyper-parameters, random state and signal buffers; masks and momentum
        are the model's and optimizer's.
        """
        return {
            "steps": self.steps,
            "updates": self.updates,
            "history": [asdict(record) for record in self.history],
            "config": described(self.config),
            "generator": self.generator.get_state(),
            "signals": {s.name: s.state_dict() for s in self._signals},
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` cannot be loaded; nothing is changed."""
        check_state(state, self._signals, self.generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load model and optimizer first.

        Raises ValueError, before anything is changed, if the checkpoint's layers are not this
        model's or an entry is broken. Warns (RuntimeWarning) if hyper-parameters differ: the new
        ones are used from here on.
        """
        self.check_state_dict(state)
        warn_of_changes(state, self.config)
        for signal in self._signals:
            signal.load_state_dict(state["signals"][signal.name])
        self.steps, self.updates = state["steps"], state["updates"]
        self.history = records(state["history"])
        self.generator.set_state(state["generator"])
        self._stepped, self._skipped = False, 0
        self._arm()


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure in a call of Optimizer.step (args[0] is the optimizer)."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _found_overflow(optimizer: Any) -> bool:
    """True if a GradScaler tells a fused optimizer to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(float(found))
