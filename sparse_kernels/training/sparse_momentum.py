"""SparseMomentum: drives the mask updates of a sparse model while any optimizer trains it.

    sparsify(model, density=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    masks = SparseMomentum(model, optimizer, total_steps=epochs * len(loader),
    update_every=len(loader)) for each batch: loss.backward(); optimizer.step(); masks.step();
    optimizer.zero_grad()

Source: Dettmers & Zettlemoyer 2019, Sparse Networks from Scratch (arXiv 1907.04840) and its
official code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn.base import SparseLayer

from .blocks import BlockGrid
from .optimizers import OptimizerView, check_optimizer
from .rewrite import COMPRESSED, DENSE_MASKED, rewrite
from .rules import (
    GROWTH_RULES,
    PRUNE_RULES,
    REDISTRIBUTION_RULES,
    GrowthRule,
    PruneRule,
    RedistributionRule,
    grow_random,
)
from .schedule import DECAYS, Decay, UpdateSchedule
from .signals import SIGNALS, LayerSignal
from .update import LayerChange, RuleSet, UpdateRecord, plan_update

STORAGE_HYSTERESIS = 0.8
"""A dense-masked layer is compressed again below this share of dense_above."""
MAX_SKIPPED = 100
"""So many step() calls in a row without an optimizer step are a mistake, not a loss scaler that
searches.
"""


@dataclass(frozen=True)
class SparseMomentumConfig:
    """Hyper-parameters (see SparseMomentum); checked when made."""

    total_steps: int
    update_every: int
    prune_rate: float = 0.5
    final_prune_rate: float = 0.005
    decay: str | Decay = "cosine"
    prune: str | PruneRule = "magnitude"
    growth: str | GrowthRule = "momentum"
    redistribution: str | RedistributionRule = "momentum"
    signal: str = "exact"
    window_tolerance: float = 0.1
    dense_above: float = 0.5

    def __post_init__(self) -> None:
        UpdateSchedule(self.total_steps, self.update_every)
        for name in ("prune_rate", "final_prune_rate", "dense_above"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 < self.window_tolerance < 1.0:
            raise ValueError(f"window_tolerance must be in (0, 1), got {self.window_tolerance!r}")
        tables = (("decay", DECAYS), ("prune", PRUNE_RULES), ("growth", GROWTH_RULES))
        for name, table in (*tables, ("redistribution", REDISTRIBUTION_RULES)):
            _look_up(name, getattr(self, name), table)
        if self.signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {self.signal!r}")

    @property
    def effective_signal(self) -> str:
        """The signal in use: growth "random" needs none and growth "gradient" is the signal
        "gradient".
        """
        return self.growth if self.growth in ("random", "gradient") else self.signal

    def rule_set(self) -> RuleSet:
        """The rules behind the names; the signal "random" always grows at random."""
        growth = _look_up("growth", self.growth, GROWTH_RULES)
        random = self.signal == "random" and isinstance(self.growth, str)
        return RuleSet(
            prune=_look_up("prune", self.prune, PRUNE_RULES),
            growth=grow_random if random else growth,
            redistribution=_look_up("redistribution", self.redistribution, REDISTRIBUTION_RULES),
        )


def _look_up(name: str, value: Any, table: dict[str, Any]) -> Any:
    if callable(value):
        return value
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)} or a callable, got {value!r}")
    return table[value]


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """(name, layer) of every sparse layer of `model`, each once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module


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
        signal: "exact", "window", "gradient", "random" (see training/signals.py). An optimizer
            without momentum (SGD with momentum 0, RMSprop, Adagrad, ...) has M = gradient, so that
            "exact" is "gradient".
        window_tolerance: share of the momentum that "window" may miss; sets its length.
        dense_above: layers denser than this are stored dense with a mask, and compressed again
            below 0.8 of it; 1 keeps every layer compressed.
        generator: for random growth; None makes one on the CPU with seed 0.
        grad_scale: factor from the loss gradient to the gradient that the optimizer uses; None
            finds loss scaling and clipping by norm from values.grad.
        on_update: called with the UpdateRecord after each update.

    The dense gradients are taken in a pre-hook of `optimizer.step()`, that is after unscaling and
    clipping; steps that a GradScaler skips are noticed and count for nothing.

    Raises ValueError: no sparse layer, a layer whose values the optimizer does not hold, values
    shared by two layers, a hyper-parameter out of range. TypeError: an optimizer that depends on
    parameter shapes.
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
        dense_above: float = 0.5,
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
        self._signals = self._make_signals(model)
        self._stepped = False
        self._skipped = 0
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_optimizer),
            optimizer.register_step_post_hook(self._after_optimizer),
        )
        self._arm()

    def _make_signals(self, model: nn.Module) -> list[LayerSignal]:
        signals: list[LayerSignal] = []
        owners: dict[int, str] = {}
        for name, layer in sparse_layers(model):
            if id(layer.values) in owners:
                raise ValueError(
                    f"layers {owners[id(layer.values)]!r} and {name!r} share one `values` "
                    "parameter; tied sparse weights cannot be pruned apart: give each layer its own"
                )
            owners[id(layer.values)] = name
            view = OptimizerView(self.optimizer, layer.values, name)
            kind, tolerance = self.config.effective_signal, self.config.window_tolerance
            signals.append(LayerSignal(name, layer, view, kind, tolerance))
        if not signals:
            raise ValueError(
                f"{type(model).__name__} has no sparse layer; call sparsify(model, density=...) "
                "before building the optimizer and SparseMomentum"
            )
        return signals

    # ---- the training loop's side --------------------------------------------------------------

    @property
    def prune_rate(self) -> float:
        """Prune rate after `steps` steps; stepped once per batch."""
        config = self.config
        decay: Decay = _look_up("decay", config.decay, DECAYS)
        progress = min(1.0, self.steps / config.total_steps)
        return decay(config.prune_rate, config.final_prune_rate, progress)

    def step(self, skipped: bool | None = None) -> UpdateRecord | None:
        """Count one optimizer step; update the masks if it is time. Returns the record of the
        update.

        skipped: True if the optimizer did not step (a GradScaler that found an overflow): the step
            is not
        counted and its gradient is dropped. None finds out by itself.
        Raises FloatingPointError (naming layer and step) for non-finite weights, momentum or
        signal at an update, RuntimeError if the optimizer has not stepped in the last 100 calls.
        """
        skipped = not self._stepped if skipped is None else skipped
        self._stepped = False
        if skipped:
            self._skip()
            return None
        self._skipped = 0
        self.steps += 1
        record = self._update() if self.schedule.is_update(self.steps) else None
        self._arm()
        if record is not None and self.on_update is not None:
            self.on_update(record)
        return record

    def close(self) -> None:
        """Take hooks and probes off optimizer and layers; the model stays as it is."""
        for hook in self._hooks:
            hook.remove()
        for signal in self._signals:
            signal.layer.probe = None
            signal.clear()

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
        fused = getattr(
            self.optimizer, "grad_scale", None
        )  # set by GradScaler while a fused step unscales
        for signal in self._signals:
            signal.observe(scale, 1.0 if fused is None else 1.0 / float(fused))

    def _arm(self) -> None:
        for signal in self._signals:
            signal.arm(self.schedule, self.steps + 1)

    # ---- the update ----------------------------------------------------------------------------

    def _update(self) -> UpdateRecord:
        start = time.perf_counter()
        states = [signal.collect() for signal in self._signals]
        scores = [
            lambda s=signal, k=state.keys: s.complete(k)
            for signal, state in zip(self._signals, states, strict=True)
        ]
        rate = self.prune_rate
        changes = plan_update(states, scores, self._rules, rate, self.generator, self.steps)
        nnz_before = {s.name: s.nnz for s in states}
        del states, scores  # views of the old values
        moved: dict[str, str] = {}
        reallocated = []
        for signal, change in zip(self._signals, changes, strict=True):
            if self._apply(signal, change, moved):
                reallocated.append(signal.name)
        self.updates += 1
        record = UpdateRecord(
            step=self.steps,
            prune_rate=rate,
            removed=sum(c.removed for c in changes),
            nnz_before=nnz_before,
            nnz_after={s.name: c.keys.numel() for s, c in zip(self._signals, changes, strict=True)},
            density_after={s.name: s.layer.density for s in self._signals},
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
        grown = signal.grown_state(change.added)
        reallocated = rewrite(layer, self.optimizer, change.keys, grown, storage)
        signal.finish_update()
        return reallocated

    def _storage_for(self, layer: SparseLayer, keys: Tensor) -> str:
        grid = BlockGrid.of(layer)
        density = int(grid.counts(keys).sum()) / (grid.rows * grid.cols)
        if density > self.config.dense_above:
            return DENSE_MASKED
        if density < STORAGE_HYSTERESIS * self.config.dense_above:
            return COMPRESSED
        return layer.storage

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, history, random state and signal buffers; masks and momentum are the model's
        and optimizer's.
        """
        return {
            "steps": self.steps,
            "updates": self.updates,
            "history": [asdict(record) for record in self.history],
            "generator": self.generator.get_state(),
            "signals": {s.name: s.state_dict() for s in self._signals},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load model and optimizer first.

        Raises ValueError if the checkpoint's layers are not this model's.
        """
        names = [s.name for s in self._signals]
        if sorted(state["signals"]) != sorted(names):
            raise ValueError(
                f"checkpoint has the sparse layers {sorted(state['signals'])}, the model has "
                f"{sorted(names)}; sparsify the model as it was when the checkpoint was written"
            )
        for signal in self._signals:
            signal.load_state_dict(state["signals"][signal.name])
        self.steps, self.updates = int(state["steps"]), int(state["updates"])
        self.history = [
            UpdateRecord(**{**r, "reallocated": tuple(r["reallocated"])}) for r in state["history"]
        ]
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
