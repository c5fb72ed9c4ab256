"""The contenders: the sparse net under sparse momentum, the dense net as torch trains it best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import SparseLayer, sparsify
from ..training import SparseMomentum, finite, flops_per_weight, time_per_weight
from ..training.layers import sparse_layers
from ..training.structured import arrange, is_structured
from . import account, models
from .config import DENSE_LAYOUTS, TrainConfig
from .errors import TrainingError, WorkbenchError
from .ranks import Ranks
from .timing import Timing, interleave

_PROBE_ROUNDS = 5  # steps of each dense layout when the best is chosen
GRADIENT_CHECK_EVERY = 8
"""Steps between looks at all gradients: 2 % of a step of LeNet-300-100 each, 0.1 % of VGG16's."""


@dataclass
class Contender:
    """A net in training. ``layout``: how a dense net keeps activations; "sparse" for the other."""

    name: str
    layout: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model, or its compiled form
    optimizer: torch.optim.Optimizer
    masking: SparseMomentum | None
    config: TrainConfig
    steps_done: int = 0
    report: Any = None  # sparsify's
    signal_peak: int = 0  # most bytes that the growth signal held so far
    ranks: Ranks = field(default_factory=Ranks)

    def step(
        self, images: Tensor, labels: Tensor, before_update: Callable[[], None] | None = None
    ) -> float:
        """One whole step; returns the loss. Raises TrainingError before a bad loss is learnt.

        before_update: called between the optimizer's step and a mask update, if one is due.
        Several ranks each take their share of the batch; the loss is the whole batch's.
        """
        self._set_learning_rate()
        size = labels.shape[0]
        images, labels = self.ranks.share(images, labels)
        images, labels = self.arrange(images), labels.to(self.config.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.forward(images), labels)
        share = labels.shape[0] / size  # of the batch; DDP divides the sum of gradients by world
        value = self.ranks.sum(loss.item() * share)
        if self.ranks.world > 1:
            loss = loss * (share * self.ranks.world)
        if not math.isfinite(value):
            # The loss is everybody's, what made it may lie in the share of one rank.
            where = self.ranks.of_each(finite.explain(self.model, lambda: self.model(images)))
            raise TrainingError(
                f"{self.name}: the loss of step {self.steps_done + 1} is {value}, expected a "
                f"finite number ({where}); training "
                "stopped with the last good weights: lower --lr, or look at the data"
            )
        loss.backward()
        self._check_gradients()
        self._note_signal()
        try:
            self.optimizer.step()
            self._note_signal()
            if self.masking is not None:
                if before_update is not None and self._update_is_due():
                    self.wait()
                    before_update()
                self.masking.step()
            self.wait()
        except torch.OutOfMemoryError:
            raise
        except (FloatingPointError, RuntimeError) as error:
            # What the growth signal or a mask update cannot use; its message says why.
            raise TrainingError(f"{self.name}: step {self.steps_done + 1}: {error}") from error
        self.steps_done += 1
        return value

    def wait(self) -> None:
        """For all that a GPU has been given to do: what follows is timed apart."""
        if self.config.device == "cuda":
            torch.cuda.synchronize()

    def _update_is_due(self) -> bool:
        assert self.masking is not None
        return self.masking.schedule.is_update(self.masking.steps + 1)

    def _check_gradients(self) -> None:
        """Every few steps: a bad gradient makes a bad loss one step later in all but odd cases."""
        if self.steps_done % GRADIENT_CHECK_EVERY or finite.gradients_finite(self.model):
            return
        raise TrainingError(
            f"{self.name}: step {self.steps_done + 1}: {finite.explain(self.model)}; training "
            "stopped before the optimizer used it: lower --lr, or look at the data"
        )

    def check_weights(self) -> None:
        """Raise TrainingError if a weight is not finite: such a state must not be saved."""
        if finite.bad_weights(self.model):
            raise TrainingError(
                f"{self.name}: after step {self.steps_done} {finite.explain(self.model)}; lower "
                "--lr, or look at the data"
            )

    def arrange(self, images: Tensor) -> Tensor:
        """The images on this contender's device, in the memory format of its layout."""
        images = images.to(self.config.device)
        if self.layout.endswith("channels_last"):
            return images.contiguous(memory_format=torch.channels_last)
        return images

    @property
    def compiled(self) -> bool:
        """Whether ``forward`` is torch.compile's."""
        return self.layout.startswith("compile")

    def _note_signal(self) -> None:
        """Twice a step: the dense gradients are gone after the optimizer, the buffers are there."""
        if self.masking is not None:
            self.signal_peak = max(self.signal_peak, account.signal_bytes(self.masking))

    def _set_learning_rate(self) -> None:
        rate = self.config.lr * 0.1 ** (self.steps_done // self.config.lr_decay_every)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def accuracy(self, batches: Any) -> float:
        """Share of right answers over a BatchLoader, in evaluation mode."""
        self.model.eval()
        right = total = 0
        for images, labels in batches:
            images = self.arrange(images)
            # Not the compiled form: another batch size would compile again.
            right += int((self.model(images).argmax(1) == labels.to(images.device)).sum())
            total += labels.shape[0]
        self.model.train()
        return right / total if total else float("nan")


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # fused: one pass over the parameters instead of five; both contenders get it.
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_sparse(
    config: TrainConfig,
    seed: int,
    steps: int,
    steps_per_epoch: int,
    ranks: Ranks | None = None,
    costs: Mapping[str, float] | None = None,
) -> Contender:
    """The net with sparse layers, its optimizer and SparseMomentum over ``steps`` steps.

    ``costs``: those of a checkpoint that it will be loaded from, instead of counting or measuring.
    """
    torch.manual_seed(seed)
    model = models.build(config.net, **config.net_options()).train()
    made = sparsify(
        model,
        density=config.start_density or config.density,
        distribution=cast(Literal["uniform", "er", "erk"], config.distribution),
        block=config.block_shape(),
        generator=torch.Generator().manual_seed(seed),
    )
    if not any(isinstance(module, SparseLayer) for module in model.modules()):
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in made.rows)
        raise WorkbenchError(
            f"no layer of {config.net} can be sparse with --block {config.block} ({reasons}); "
            "choose a smaller block"
        )
    if is_structured(config.growth):
        arrange(model, config.growth, torch.Generator().manual_seed(seed))
    if config.init == "scaled":
        _scale_to_fan_in(model)
    model = model.to(config.device)
    ranks = ranks or Ranks()
    forward = ranks.wrap(model)
    optimizer = _optimizer(model, config)
    contender = Contender(
        "sparse", "sparse", model, forward, optimizer, None, config, report=made, ranks=ranks
    )
    drive(contender, seed, steps, config.update_every or steps_per_epoch, costs)
    return contender


def drive(
    contender: Contender,
    seed: int,
    steps: int,
    update_every: int,
    costs: Mapping[str, float] | None = None,
) -> None:
    """Give a sparse contender a new SparseMomentum over the next ``steps`` steps; the old closes.

    The masks stay; what the old one had gathered for its next update is dropped.
    """
    if contender.masking is not None:
        contender.masking.close()
    config = contender.config
    contender.masking = SparseMomentum(
        contender.model if contender.ranks.world == 1 else cast(nn.Module, contender.forward),
        contender.optimizer,
        total_steps=steps,
        update_every=update_every,
        **config.mask_options(),
        **_costs(contender, costs),
        grad_scale=1.0,  # nothing here clips or scales gradients: no comparison in every step
        generator=torch.Generator().manual_seed(seed),
    )


def _costs(contender: Contender, known: Mapping[str, float] | None) -> dict[str, Any]:
    """What a weight costs in each layer, where the settings ask for it."""
    config = contender.config
    if not config.cost_weight and config.flops_budget is None:
        return {}
    options = {"cost_weight": config.cost_weight, "cost_budget": config.cost_budget()}
    if _usable(known, contender.model):
        return {"cost": known, **options}
    timed = config.cost == "time"
    count, drawn = config.batch_size if timed else 1, torch.Generator().manual_seed(0)
    example = torch.randn(count, *models.spec(config.net).input_shape, generator=drawn)
    example = example.to(config.device)
    if timed:  # as many examples as a step of this rank has
        (example,) = contender.ranks.share(example)
    measure = time_per_weight if timed else flops_per_weight
    return {"cost": measure(contender.model, example), **options}


def _usable(costs: Any, model: nn.Module) -> bool:
    """Whether a checkpoint's costs can be taken; of others its check tells what is wrong."""
    names = {name for name, _ in sparse_layers(model)}
    return (
        isinstance(costs, dict)
        and costs.keys() == names
        and all(isinstance(cost, float) and 0.0 < cost < math.inf for cost in costs.values())
    )


@torch.no_grad()
def _scale_to_fan_in(model: nn.Module) -> None:
    """Divide by the root of the density: a unit with fewer inputs keeps the variance of its sum.

    The paper starts from the dense net's values as they are, and loses a factor of the density in
    the variance of each layer, which costs the first epochs of a short training.
    """
    for module in model.modules():
        if isinstance(module, SparseLayer) and module.nnz:
            module.values.div_(module.density**0.5)


def build_dense(
    config: TrainConfig, seed: int, layout: str, ranks: Ranks | None = None
) -> Contender:
    """The dense net from the same seed in a layout, one of DENSE_LAYOUTS (several ranks: one that
    is not compiled).

    Call ``forget_compiled`` before a new round of compiled nets.
    """
    torch.manual_seed(seed)
    model = models.build(config.net, **config.net_options()).train().to(config.device)
    forward: Callable[[Tensor], Tensor] = model
    if layout.endswith("channels_last"):
        # torch's stubs know no memory_format overload of Module.to with that keyword alone.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = model
    if layout.startswith("compile"):
        forward = torch.compile(model, dynamic=False)  # static shapes, as in every measured step
    ranks = ranks or Ranks()
    if ranks.world > 1:
        forward = ranks.wrap(model)
    made = _optimizer(model, config)
    return Contender("dense", layout, model, forward, made, None, config, ranks=ranks)


def forget_compiled() -> None:
    """Start torch.compile afresh: earlier nets must not count against its recompilation limit.

    Once per round and not per net: it would throw away what the net before has just compiled.
    """
    torch._dynamo.reset()


def dense_layouts(config: TrainConfig) -> list[str]:
    """The layouts worth a trial: channels_last means nothing to a net without convolutions."""
    if config.dense_baseline != "auto":
        return [config.dense_baseline]
    model = models.build(config.net, **config.net_options())
    has_conv = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return [name for name in DENSE_LAYOUTS if has_conv or not name.endswith("channels_last")]


def start_dense(
    config: TrainConfig, batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Dense contenders after a first step on ``batch``, and why another layout does not run here.

    Raises WorkbenchError if none runs, TrainingError if the first loss is no number.
    """
    started: dict[str, Contender] = {}
    rejected: dict[str, str] = {}
    forget_compiled()
    for layout in dense_layouts(config):
        try:
            contender = build_dense(config, config.seeds[0], layout)
            contender.step(*batch)
        except TrainingError:
            raise
        except Exception as error:  # torch.compile fails in many ways, none of them ours
            first_line = (str(error).splitlines() or [""])[0]
            rejected[layout] = f"{type(error).__name__}: {first_line}"
        else:
            started[layout] = contender
    if not started:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise WorkbenchError(f"no dense baseline runs ({reasons}); try --dense-baseline contiguous")
    return started, rejected


def choose_dense(
    config: TrainConfig, batch: tuple[Tensor, Tensor]
) -> tuple[str, dict[str, Timing], dict[str, str]]:
    """(best layout, step time by layout, why a layout was not timed), on one batch of this net."""
    started, rejected = start_dense(config, batch)
    calls = {name: partial(contender.step, *batch) for name, contender in started.items()}
    # The first step compiled; one more settles allocator and caches before the clock runs.
    timings = interleave(calls, rounds=_PROBE_ROUNDS, warmup=1)
    return min(timings, key=lambda name: timings[name].median), timings, rejected
