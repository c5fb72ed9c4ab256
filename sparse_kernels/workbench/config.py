"""The settings of one experiment: checked once, written to its results, turned into a command."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..training import METHODS, SparseMomentumConfig, method
from ..training.rules import REDISTRIBUTION_RULES
from ..training.schedule import DECAYS
from ..training.signals import SIGNALS
from .errors import WorkbenchError
from .models import spec

REDISTRIBUTIONS = tuple(REDISTRIBUTION_RULES)
PRUNE_SCHEDULES = tuple(DECAYS)
DISTRIBUTIONS = ("uniform", "er", "erk")
INITS = ("dense", "scaled")
COSTS = ("flops", "time")
DEVICES = ("cpu", "cuda")
DENSE_LAYOUTS = ("contiguous", "channels_last", "compile", "compile_channels_last")
DENSE_BASELINES = ("auto", *DENSE_LAYOUTS)
FREE_SETTINGS = frozenset({"data_dir", "download", "out", "name", "checkpoint_dir",
                           "checkpoint_every", "keep", "tensorboard"})  # fmt: skip
"""Settings that change no weight: two runs that differ in these only are the same run."""
_MAX_THREADS = 1024
_CHOICES = {
    "signal": SIGNALS,
    "redistribution": REDISTRIBUTIONS,
    "prune_schedule": PRUNE_SCHEDULES,
    "distribution": DISTRIBUTIONS,
    "cost": COSTS,
    "method": tuple(METHODS),
    "init": INITS,
    "device": DEVICES,
    "compare": ("dense",),
    "dense_baseline": DENSE_BASELINES,
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``sparse-kernels train``; the defaults are those of the paper's MNIST script, but
    for ``signal``.

    Source of the defaults: the official code of Dettmers & Zettlemoyer 2019 (arXiv 1907.04840).
    """

    net: str = "lenet-300-100"
    data: str = "mnist"
    data_dir: str | None = None
    download: bool = False
    width: int | None = None  # of wide-mlp's hidden layers
    hidden_layers: int | None = None  # of wide-mlp
    density: float = 0.05
    block: str = "1x1"
    distribution: str = "uniform"
    init: str = "dense"  # the dense net's values; "scaled": divided by the root of the density
    compare: str | None = None  # "dense" trains the dense net beside the sparse one
    dense_baseline: str = "auto"
    epochs: int = 100
    batch_size: int = 100
    lr: float = 0.1
    lr_decay_every: int = 25_000  # steps; the rate is then multiplied by 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seeds: tuple[int, ...] = (0,)
    prune_rate: float = 0.5
    prune_schedule: str = "cosine"
    redistribution: str = "momentum"  # "none" holds the number of weights of each layer
    signal: str = "gradient"
    window_tolerance: float = 0.1  # share of the momentum that "window" may miss
    sample_share: float = 0.1  # of the free places, that "sampled" draws
    update_every: int | None = None  # steps between mask updates; None: once per epoch
    method: str | None = None  # whose settings (training/methods.py) those not given were taken
    prune: str = "magnitude"
    growth: str = "momentum"
    final_prune_rate: float = 0.005
    update_until: float = 1.0  # share of the training after which masks stay
    start_density: float | None = None  # gradual pruning from it to `density`
    cost_weight: float = 0.0  # power of a weight's cost that importance is divided by
    cost: str = "flops"  # of a weight; "time": measured before the first step
    flops_budget: str | None = None  # share of the dense layers' cost, or "start"; None: free
    spare_dense: bool = True  # nearly dense layers of importance are pruned at a lower rate
    holdout: float = 0.1
    augment: bool = False
    device: str = "cpu"
    threads: int | None = None  # None: torch's own choice
    max_steps: int | None = None  # stop early, for smoke tests
    out: str = "runs"
    name: str | None = None
    checkpoint_dir: str | None = None  # None: the run's own directory
    checkpoint_every: int | None = None  # steps; None: ends of epochs, at most once a minute
    keep: int = 3  # checkpoints
    tensorboard: bool = False  # a log of its kind beside the CSV

    def block_shape(self) -> tuple[int, int] | Literal["auto"]:
        """(bh, bw) from text such as "4x1", or "auto". Raises WorkbenchError."""
        return "auto" if self.block == "auto" else parse_block(self.block)

    def net_options(self) -> dict[str, Any]:
        """Keyword arguments of the net's builder."""
        options = {"width": self.width, "hidden_layers": self.hidden_layers}
        return {name: value for name, value in options.items() if value is not None}

    def run_name(self) -> str:
        """The directory below ``out``: ``name``, or one made of net, data and density."""
        return self.name or f"{self.net}-{self.data}-d{self.density:g}"

    def check(self) -> None:
        """Raise WorkbenchError with what was expected, what came, and the option to change."""
        spec(self.net)
        self.block_shape()
        _expect(0 < self.density <= 1, "--density", "a number above 0 and at most 1", self.density)
        _expect(
            0 <= self.prune_rate < 1, "--prune-rate", "a number from 0 to below 1", self.prune_rate
        )
        _expect(0 <= self.holdout < 1, "--holdout", "a fraction from 0 to below 1", self.holdout)
        _expect(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        _expect(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        _expect(0 < self.lr < float("inf"), "--lr", "a number above 0", self.lr)
        _expect(
            self.lr_decay_every >= 1, "--lr-decay-every", "at least 1 step", self.lr_decay_every
        )
        _expect(len(self.seeds) > 0, "--seed", "at least one seed", self.seeds)
        _expect(len(set(self.seeds)) == len(self.seeds), "--seed", "different seeds", self.seeds)
        _expect(self.threads is None or 1 <= self.threads <= _MAX_THREADS, "--threads",
                f"1 to {_MAX_THREADS}", self.threads)  # fmt: skip
        _expect(
            self.max_steps is None or self.max_steps >= 1,
            "--max-steps",
            "at least 1",
            self.max_steps,
        )
        _expect(self.update_every is None or self.update_every >= 1, "--update-every", "at least 1",
                self.update_every)  # fmt: skip
        _expect(self.checkpoint_every is None or self.checkpoint_every >= 1, "--checkpoint-every",
                "at least 1 step", self.checkpoint_every)  # fmt: skip
        _expect(self.keep >= 1, "--keep", "at least 1 checkpoint", self.keep)
        _expect(0 < self.window_tolerance < 1, "--window-tolerance", "more than 0, less than 1",
                self.window_tolerance)  # fmt: skip
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not (value is None and name in ("compare", "method")):
                option = "--" + name.replace("_", "-")
                _expect(value in choices, option, f"one of {', '.join(choices)}", value)
        self._check_masks()
        name = self.run_name()
        _expect(re.fullmatch(r"[\w.,+=-]+", name) is not None and name not in (".", ".."), "--name",
                "letters, digits and . , + = - _", name)  # fmt: skip

    def _check_masks(self) -> None:
        """What SparseMomentum would refuse, before the data is loaded."""
        start = self.start_density
        _expect(start is None or self.density <= start <= 1, "--start-density",
                "a number from --density to 1", start)  # fmt: skip
        _expect(0 < self.update_until <= 1, "--update-until", "above 0, at most 1",
                self.update_until)  # fmt: skip
        used = self.cost_weight != 0 or self.cost_budget() is not None
        _expect(self.cost == "flops" or used, "--cost", "--cost-weight or --cost-budget beside it",
                self.cost)  # fmt: skip
        try:
            SparseMomentumConfig(total_steps=10**6, update_every=1, **self.mask_options())
        except ValueError as error:
            raise WorkbenchError(f"mask settings: {error}") from error

    def mask_options(self) -> dict[str, Any]:
        """The arguments of SparseMomentum that these settings name, but for steps and costs."""
        return {
            "prune_rate": self.prune_rate,
            "final_prune_rate": self.final_prune_rate,
            "decay": self.prune_schedule,
            "prune": self.prune,
            "growth": self.growth,
            "redistribution": self.redistribution,
            "signal": self.signal,
            "window_tolerance": self.window_tolerance,
            "sample_share": self.sample_share,
            "update_until": self.update_until,
            "spare_dense": self.spare_dense,
            "final_density": None if self.start_density is None else self.density,
        }

    def cost_budget(self) -> float | str | None:
        """`flops_budget` as SparseMomentum takes it. Raises WorkbenchError."""
        if self.flops_budget in (None, "start"):
            return self.flops_budget
        try:
            share = float(self.flops_budget)
        except ValueError:
            share = 0.0
        _expect(0 < share <= 1, "--flops-budget", "'start' or a share of the dense layers' cost, "
                "above 0 and at most 1", self.flops_budget)  # fmt: skip
        return share

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def command(self) -> str:
        """The command line that repeats this experiment, every setting spelled out."""
        words = ["sparse-kernels", "train"]
        for field in fields(self):
            value = getattr(self, field.name)
            option = "--" + field.name.replace("_", "-")
            if field.name == "seeds":
                words += ["--seeds", ",".join(str(seed) for seed in value)]
            elif field.name in ("augment", "spare_dense"):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif value is True:
                words.append(option)
            elif value is not None and value is not False:
                words += [option, str(value)]
        return shlex.join(words)


def method_settings(name: str) -> dict[str, Any]:
    """Fields of TrainConfig for a method of training/methods.py."""
    chosen = method(name)
    options = dict(chosen.options)
    if "decay" in options:
        options["prune_schedule"] = options.pop("decay")
    return {
        **options,
        "method": name,
        "distribution": chosen.distribution,
        "update_every": chosen.update_every,
        "start_density": chosen.start_density,
    }


def parse_block(text: str) -> tuple[int, int]:
    """(bh, bw) from "BHxBW". Raises WorkbenchError."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise WorkbenchError(f"--block: expected rows x columns such as 1x1 or 4x1, got {text!r}")
    return int(match[1]), int(match[2])


def _expect(holds: bool, option: str, expected: str, came: object) -> None:
    if not holds:
        raise WorkbenchError(f"{option}: expected {expected}, got {came}")
