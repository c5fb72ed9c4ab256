"""The state of a whole experiment (every contender of a seed, what is done, where the data stand)
and its checkpoints: saved between two steps, found again by ``--resume``.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..training import CheckpointError, checkpoint_files, generators, training_state
from ..training.checkpoint import newest_good
from . import account
from .config import FREE_SETTINGS, TrainConfig
from .contenders import Contender
from .datasets import BatchLoader
from .errors import TrainingError, TrainingStopped, WorkbenchError
from .ranks import Ranks
from .stopping import StopSignals

CHECKPOINT_FOLDER = "checkpoints"
PATIENCE = 60.0
"""Seconds between checkpoints where --checkpoint-every is not given: at the ends of epochs."""


@dataclass
class Run:
    """One contender with one seed: its batches and what was logged."""

    contender: Contender
    seed: int
    train: BatchLoader
    validation: BatchLoader | None
    test: BatchLoader
    positions: dict[str, int]
    log: Path
    initial_layers: dict[str, float]  # density of each layer before the first step
    epochs: list[dict[str, Any]] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    in_epoch: bool = False  # from an epoch's first batch until its record is complete
    losses: list[float] = field(default_factory=list)  # of the present epoch, as elapsed
    elapsed: float = 0.0
    looked: dict[str, float] = field(default_factory=dict)
    """Accuracies at this epoch's end, "watched" and "test", where a mask update came after them."""
    saved_memory: dict[str, int] | None = None  # the checkpoint's, until a step is taken

    @property
    def watched(self) -> BatchLoader:
        """What is looked at after every epoch: held-out data, without any the test set."""
        return self.test if self.validation is None else self.validation

    def memory(self) -> dict[str, int]:
        """account.memory after the last step: the lists of the kernels exist only after one."""
        if self.saved_memory is not None:
            return self.saved_memory
        return account.memory(self.contender.model, self.contender.optimizer)

    def state(self) -> dict[str, Any]:
        """Counters and logs as plain data."""
        return {
            "steps_done": self.contender.steps_done,
            "signal_peak": self.contender.signal_peak,
            "epochs": self.epochs,
            "step_times": torch.tensor(self.step_times, dtype=torch.float64),
            "seconds": self.seconds,
            "in_epoch": self.in_epoch,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "elapsed": self.elapsed,
            "looked": dict(self.looked),
            "loader": self.train.state_dict(self.in_epoch),
            "initial_layers": self.initial_layers,
            "memory": self.memory(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.train.load_state_dict(state["loader"])
        self.contender.steps_done = int(state["steps_done"])
        self.contender.signal_peak = int(state["signal_peak"])
        self.epochs = list(state["epochs"])
        self.step_times, self.losses = state["step_times"].tolist(), state["losses"].tolist()
        self.seconds, self.elapsed = float(state["seconds"]), float(state["elapsed"])
        self.in_epoch = bool(state["in_epoch"])
        self.looked = dict(state.get("looked", {}))  # not in checkpoints of earlier versions
        self.initial_layers = dict(state["initial_layers"])
        self.saved_memory = dict(state["memory"]) if self.contender.steps_done else None


@dataclass
class Session:
    """Where an experiment stands. ``turn``: index of the run whose epoch is under way."""

    config: TrainConfig
    folder: Path
    stop: StopSignals
    ranks: Ranks = field(default_factory=Ranks)
    baseline: dict[str, Any] | None = None
    finished: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    seed: int | None = None  # of `runs`
    epoch: int = 1
    turn: int = 0
    begun: dict[str, Any] | None = None  # the checkpoint's state until its runs have been built
    last: Path | None = None
    _saved: float = field(default_factory=time.monotonic)

    @property
    def directory(self) -> Path:
        """Where the checkpoints lie."""
        given = self.config.checkpoint_dir
        return Path(given) if given is not None else self.folder / CHECKPOINT_FOLDER

    # ---- writing -------------------------------------------------------------------------------

    def after_step(self, run: Run, last_of_epoch: bool) -> None:
        """Save if it is time; stop, with a checkpoint, if a signal has come."""
        every = self.config.checkpoint_every
        if every is not None:
            due = run.contender.steps_done % every == 0
        else:
            due = last_of_epoch and time.monotonic() - self._saved >= PATIENCE
        # Together: no rank may wait for one that has stopped, or save alone.
        save, signum = self.ranks.largest(int(due), self.stop.signum or 0)
        self.stop.signum = signum or None
        if save or signum:
            self.save()
        if signum:
            self.stopped()

    def stopped(self) -> None:
        """Raise TrainingStopped, which says where the checkpoint is and how to go on."""
        assert self.stop.signum is not None
        raise TrainingStopped(
            f"stopped at step {self.step()}; the checkpoint is {self.last}; the same command with "
            f"--resume goes on from it: {self.config.command()} --resume",
            self.stop.signum,
        )

    def step(self) -> int:
        """Steps of the run under way."""
        return self.runs[self.turn].contender.steps_done if self.runs else 0

    def save(self) -> Path:
        """Write a checkpoint. Raises TrainingError rather than save weights that are no numbers."""
        for run in self.runs:
            run.contender.check_weights()
            if run.contender.masking is not None:
                run.contender.masking.synchronize()
        state = self._state()
        self.last = self.ranks.on_rank_0(
            lambda: checkpoint_files.write(self.directory, self.step(), state, self.config.keep)
        )
        self._saved = time.monotonic()
        return self.last

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "experiment": {
                "config": self.config.as_dict(),
                "folder": str(self.folder),
                "baseline": self.baseline,
                "finished": self.finished,
                "seed": self.seed,
                "epoch": self.epoch,
                "turn": self.turn,
            },
            **generators.of_all_ranks(self.ranks.group),
        }
        for run in self.runs:
            made, name = run.contender, run.contender.name
            parts = training_state.pack(made.model, made.optimizer, made.masking)
            state |= {f"{name}-{part}": content for part, content in parts.items()}
            state[f"{name}-run"] = run.state()
        return state

    def explain_failure(self, error: TrainingError) -> TrainingError:
        """The same error, with the way back to the last good checkpoint."""
        if self.last is None:
            return error
        return TrainingError(f"{error}; the last good checkpoint is {self.last}")

    # ---- reading -------------------------------------------------------------------------------

    def start_afresh(self) -> None:
        """Make sure that no checkpoints of an earlier run lie where this one writes."""
        found = checkpoint_files.checkpoint_folders(self.directory)
        if not found:
            return
        if self.config.checkpoint_dir is not None:
            raise WorkbenchError(
                f"--checkpoint-dir {self.directory} holds {len(found)} checkpoints of an earlier "
                "run; add --resume to go on with it, or choose another directory"
            )
        for folder in found:  # of a run that is being overwritten, as was said
            shutil.rmtree(folder)

    def resume(self) -> bool:
        """Find the newest good checkpoint; False (and a line that says so) if there is none."""
        found, rejected = newest_good(self.directory)
        for reason in rejected:
            print(f"note: passed over a newer checkpoint: {reason}", flush=True)
        if found is None and rejected:
            raise WorkbenchError(
                f"--resume: none of the {len(rejected)} checkpoints in {self.directory} is good; "
                "restore one, or remove the directory to start from the beginning"
            )
        if found is None:
            print(f"note: no checkpoint in {self.directory}: starting from the beginning")
            return False
        self.begun, self.last = found.state, found.path
        try:
            self._read_experiment(found.state["experiment"])
        except (KeyError, TypeError) as error:
            raise self._foreign(error) from error
        now = checkpoint_files.versions()
        other = [f"{k} {v} -> {now.get(k)}" for k, v in found.versions.items() if now.get(k) != v]
        if other:
            print(f"note: other versions than the checkpoint's ({', '.join(other)}): the last bits "
                  "may differ from a run that was never stopped")  # fmt: skip
        print(f"resuming from {found.path} (step {found.step})", flush=True)
        return True

    def _read_experiment(self, held: dict[str, Any]) -> None:
        # A setting that is younger than the checkpoint had its default's effect.
        then, now = TrainConfig().as_dict() | held["config"], self.config.as_dict()
        changed = [
            f"--{name.replace('_', '-')} {then[name]} -> {now[name]}"
            for name in now
            if name not in FREE_SETTINGS and then[name] != now[name]
        ]
        if changed:
            raise WorkbenchError(
                f"--resume: {self.last} was made with other settings ({', '.join(changed)}); give "
                "the same options, or start a new run without --resume"
            )
        self.baseline, self.finished = held["baseline"], list(held["finished"])
        self.seed, self.epoch, self.turn = held["seed"], int(held["epoch"]), int(held["turn"])

    def _foreign(self, error: Exception) -> WorkbenchError:
        return WorkbenchError(
            f"--resume: {self.last} is no checkpoint of `sparse-kernels train` "
            f"({type(error).__name__}: {error}); it was perhaps written by save_checkpoint"
        )

    def known_costs(self, seed: int) -> Any:
        """A weight's cost by layer in the checkpoint of `seed`, if there is one that has it.

        Times measured anew are others by noise, and could put the pattern above a budget. What is
        found is not checked yet.
        """
        if self.begun is None or self.seed != seed:
            return None
        masks = self.begun.get("sparse-masks")
        return masks.get("costs") if isinstance(masks, dict) else None

    def restore_runs(self) -> None:
        """Load the checkpoint into the runs that were built for its seed, all of it or nothing."""
        state, self.begun = self.begun, None
        if state is None:
            return
        try:
            parts = {run.contender.name: _parts(state, run.contender.name) for run in self.runs}
            for run in self.runs:
                made = run.contender
                training_state.check(parts[made.name], made.model, made.optimizer, made.masking)
            drawn = generators.of_rank(
                state["generators"],
                state.get("rank_generators"),
                self.ranks.rank,
                self.ranks.world,
            )
            generators.check(drawn)
            for run in self.runs:
                made = run.contender
                training_state.unpack(parts[made.name], made.model, made.optimizer, made.masking)
                run.load(state[f"{made.name}-run"])
            generators.restore(drawn)
        except CheckpointError as error:
            raise WorkbenchError(f"--resume: {self.last}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise self._foreign(error) from error


def _parts(state: dict[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}-"
    return {key.removeprefix(start): part for key, part in state.items() if key.startswith(start)}


def folder_to_resume(config: TrainConfig) -> Path | None:
    """The directory of the run that ``--resume`` goes on with: the checkpoint's own, or the newest
    of <name>, <name>-2, ... that has checkpoints; None if there is none.
    """
    if config.checkpoint_dir is not None:
        found, _ = newest_good(config.checkpoint_dir)
        held = {} if found is None else found.state.get("experiment", {})
        folder = held.get("folder") if isinstance(held, dict) else None
        return Path(folder) if isinstance(folder, str) else None
    base, newest, number = Path(config.out) / config.run_name(), None, 1
    folder = base
    while folder.is_dir():
        if checkpoint_files.checkpoint_folders(folder / CHECKPOINT_FOLDER):
            newest = folder
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return newest


def only_begun(folder: Path) -> bool:
    """Whether `folder` has nothing but what a run writes up to its first whole checkpoint."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    begun = ("tensorboard", CHECKPOINT_FOLDER)
    return not checkpoint_files.checkpoint_folders(folder / CHECKPOINT_FOLDER) and all(
        name.startswith("log-") or name in begun for name in names
    )
