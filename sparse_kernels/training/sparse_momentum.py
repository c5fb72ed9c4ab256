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
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from . import device, update_on_device
from .apply_change import apply_changes
from .config import SparseMomentumConfig
from .data_parallel import Attachment, driven_model
from .distributed import RankAgreement
from .driver_state import check_state, described, records, warn_of_changes
from .layers import make_signals
from .optimizers import check_optimizer, closure_of, found_overflow
from .ownership import check_free, claim, weak_hook
from .rules import GrowthRule, LayerState, PruneRule, RedistributionRule
from .sampled import Sampling
from .schedule import Decay
from .signals import LayerSignal
from .unfinished import Unfinished
from .update import LayerChange, UpdateRecord, plan_update
from .windows import Windows

logger = logging.getLogger(__name__)

MAX_SKIPPED = 100
"""So many step() calls in a row without an optimizer step are a mistake, not a loss scaler that
searches.
"""


class SparseMomentum:
    """Prune, redistribute and grow the weights of a sparse model while it trains.

    Call `step()` after every `optimizer.step()`. After steps update_every, 2 * update_every, ...
    that come before total_steps, each layer loses ceil(prune_rate * nnz) blocks and the model
    grows as many elsewhere: the number of stored blocks is conserved exactly (per block shape).

    Arguments after the optimizer are keyword-only; the defaults are the paper's but for `signal`.
        total_steps, update_every: in optimizer steps; batches per epoch gives one update per epoch.
        prune_rate, final_prune_rate, decay: rate at step 0 and at total_steps; "cosine", "linear"
            (to 0), "constant" or a callable (initial, final, progress) -> rate.
        prune: "magnitude", "set", "global_magnitude", "fan_in", "groups:M" or a rules.PruneRule.
        growth: "momentum" (largest signal), "gradient" (RigL), "random" (SET), "neuron",
            "fan_in", "groups:M" (structured.py) or a rules.GrowthRule.
        redistribution: "momentum", "magnitude", "nonzero" (what layers held), "survivors" (what
            pruning left), "none" or a rules.RedistributionRule.
        signal: "exact" (momentum from every step: the paper to the letter), "window" (from the
            last steps before an update), "sampled" (as "window", of a random sample of the places:
            no dense tensor), "gradient" (the last gradient alone: the fastest that was measured to
            lose under 0.1 points against "exact") or "random" (none: grows at random); see
            training/signals.py. Growth "gradient" and "random" bring their own. An optimizer
            without momentum (SGD with momentum 0, RMSprop, Adagrad, ...) has M = gradient, so
            that "exact" and "window" are "gradient".
        window_tolerance: share of the momentum that a window may miss; sets its length.
        sample_share: share of each layer's free places that "sampled" draws for an update.
        dense_above: layers denser than this are stored dense with a mask, and compressed again
            below 0.8 of it; 1 keeps every layer compressed, None goes by each layer's own
            `dense_above`, which `tune` measures (0.5 before).
        update_until: share of total_steps after which masks stay (RigL: 0.75); rates decay to it.
        final_density: gradual pruning: by a cubic, all layers together (per block shape) shrink to
            it until the last update; without redistribution they keep the start's proportions.
        cost: by layer, what a weight costs (training.flops_per_weight); cost_weight: the power of
            it that importance is divided by; cost_budget: share of the dense layers' cost that is
            never exceeded, "start": that of the first pattern. Without redistribution unused. All
            ranks of a job use rank 0's costs, a resumed training its checkpoint's.
        spare_dense: a layer of sparsity under 0.2 and importance above the mean is pruned by at
            most its sparsity, as in the official code; False: every layer by the prune rate.
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

    Under DistributedDataParallel give the wrapped model or the model itself; make it on every rank,
    after init_process_group. Masks are equal on all ranks (training/distributed.py).

    Averaged models (torch.optim.swa_utils.AveragedModel: EMA, SWA) average `values` slot by slot,
    and an update gives a slot to another weight: give on_update training.follow, which moves an
    average to the new pattern, or average once `finished` is True.

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
        signal: str = "gradient",
        window_tolerance: float = 0.1,
        sample_share: float = 0.1,
        dense_above: float | None = None,
        update_until: float = 1.0,
        final_density: float | None = None,
        cost: Mapping[str, float] | None = None,
        cost_weight: float = 0.0,
        cost_budget: float | str | None = None,
        spare_dense: bool = True,
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
            sample_share=sample_share,
            dense_above=dense_above,
            update_until=update_until,
            final_density=final_density,
            cost_weight=cost_weight,
            cost_budget=cost_budget,
            spare_dense=spare_dense,
        )
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.schedule = self.config.schedule()
        self.generator = generator or torch.Generator().manual_seed(0)
        self.grad_scale = grad_scale
        self.on_update = on_update
        self.steps = self.updates = 0
        self.history: list[UpdateRecord] = []
        self._rules = self.config.rule_set()
        kind, tolerance = self.config.effective_signal, window_tolerance
        self._signals, self._fixed = make_signals(driven_model(model), optimizer, kind, tolerance)
        check_free(self._signals)
        self._ranks = RankAgreement(model, self._signals, self.generator)
        self._stepped, self._skipped = False, 0
        self._logged: tuple[str, ...] = ()
        self._warned = False
        self._unfinished = Unfinished()
        self._limits = self._ranks.limits(self.config, cost)
        self._attach(optimizer)

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        sampling = Sampling(self.config.sample_share, self.generator)
        self._windows = Windows(self._signals, self.schedule, sampling)
        hooks = (
            optimizer.register_step_pre_hook(weak_hook(self._before_optimizer)),
            optimizer.register_step_post_hook(weak_hook(self._after_optimizer)),
            self._ranks,
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
    def attachment(self) -> Attachment | None:
        """The job under DistributedDataParallel; None without, or before its first forward."""
        return self._ranks.attachment

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
        signal at an update, RuntimeError if the optimizer has not stepped in the last 100 calls,
        after close(), or after an update that was interrupted. Warns once if an update needs
        gradients and a layer had none.
        """
        if not self._release.alive:
            raise RuntimeError(
                "step() of a closed SparseMomentum: expected one that still drives the model; "
                "leave the call out, or make a new SparseMomentum"
            )
        self._unfinished.check()
        skipped = not self._stepped if skipped is None else skipped
        self._stepped = False
        if skipped:
            self._skip()
            return None
        self._skipped = 0
        self.steps += 1
        record = None
        if self.schedule.is_update(self.steps):
            with self._unfinished.update(self.steps):
                record = self._update()
        if record is not None or self._windows.due(self.steps + 1):
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
        if found_overflow(optimizer):
            return
        self._stepped = True
        if closure_of(args, kwargs) is None:
            self._observe(self.grad_scale)

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """With a closure the gradients come into being inside the optimizer's step."""
        if closure_of(args, kwargs) is not None:
            self._observe(1.0 if self.grad_scale is None else self.grad_scale)

    def _observe(self, scale: float | None) -> None:
        # GradScaler sets this while a fused step unscales.
        fused = getattr(self.optimizer, "grad_scale", None)
        self._ranks.gather(scale, 1.0 if fused is None else 1.0 / float(fused))
        self._windows.keep_gradients(self.steps + 1)

    def _arm(self) -> None:
        """Probes for the next step."""
        self._windows.arm(self.steps + 1)

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
        self._rules = self._limits.at(self.steps)
        self._log_frozen()
        signals = [s for s in self._signals if not s.frozen]
        self._warn_starved(signals)
        self._ranks.reduce()
        states = [signal.collect() for signal in signals]
        rate = self.prune_rate
        changes = self._plan(signals, states, rate)
        nnz_before = {s.name: s.nnz for s in states}
        del states  # views of the old values
        above = self.config.dense_above
        self._unfinished.changes()
        done = apply_changes(signals, changes, self.optimizer, above, self.schedule, self.steps)
        device.count_elements(s.layer.pattern for s in signals)
        self.updates += 1
        record = UpdateRecord(
            step=self.steps,
            prune_rate=rate,
            removed=sum(c.removed for c in changes),
            nnz_before=nnz_before,
            nnz_after={s.name: c.keys.numel() for s, c in zip(signals, changes, strict=True)},
            density_after={s.name: s.layer.density for s in signals},
            storage_changes=done.moved,
            reallocated=tuple(done.reallocated),
            seconds=time.perf_counter() - start,
        )
        self.history.append(record)
        return record

    def _plan(
        self, signals: list[LayerSignal], states: list[LayerState], rate: float
    ) -> Sequence[LayerChange]:
        scores = [
            lambda s=signal, k=state.keys: s.complete(k)
            for signal, state in zip(signals, states, strict=True)
        ]
        queued = any(device.queued(state.values) for state in states)
        plan = update_on_device.plan_update if queued else plan_update
        planned = plan(states, scores, self._rules, rate, self.generator, self.steps)
        return self._ranks.agree(states, planned)

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, history, hyper-parameters, costs, random state and signal buffers; masks and
        momentum are the model's and optimizer's. On several ranks call `synchronize` first."""
        self._unfinished.check()
        self._ranks.check_reduced()
        return {
            "steps": self.steps,
            "updates": self.updates,
            "history": [asdict(record) for record in self.history],
            "config": described(self.config),
            "generator": self.generator.get_state(),
            "signals": {s.name: s.state_dict() for s in self._signals},
            **self._limits.state_dict(),
        }

    def synchronize(self) -> None:
        """Average over the ranks what the growth signal gathered; call it on every rank."""
        self._ranks.reduce()

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` cannot be loaded; nothing is changed."""
        check_state(state, self._signals, self._limits, self.generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load model and optimizer first.

        Raises ValueError, before anything is changed, if the checkpoint's layers are not this
        model's or an entry is broken. Warns (RuntimeWarning) if hyper-parameters differ: the new
        ones are used from here on. Costs of weights, which may be measured, are the checkpoint's
        where it has any; if others were given here, that is logged.
        """
        self.check_state_dict(state)
        warn_of_changes(state, self.config)
        warning = self._limits.load_state(state)
        for signal in self._signals:
            signal.load_state_dict(state["signals"][signal.name])
        self.steps, self.updates = state["steps"], state["updates"]
        self.history = records(state["history"])
        self.generator.set_state(state["generator"])
        self._stepped, self._skipped = False, 0
        self._unfinished.forget()
        self._arm()
        if warning is not None:  # last: where warnings are errors, all was loaded
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
