"""Many trainings: nets x methods x variants x densities x seeds, each in a process of one thread.

The results file has one JSON line per finished run. A sweep that is started again skips what is
done, and goes on inside a run that was cut off, from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import METHODS
from . import sweep_lines
from .config import FREE_SETTINGS, TrainConfig
from .errors import WorkbenchError
from .models import spec
from .report import RESULTS
from .stopping import ending_by_exception
from .sweep_children import STOPS, Children

Variant = tuple[tuple[str, str], ...]
"""Options of `train` and their values, "" for a flag; () is the method as it is."""
SettingsOf = Callable[[Sequence[str]], TrainConfig]
"""From words of `sparse-kernels train` to what they train with."""
NET_EXAMPLE = "wide-mlp width=256 hidden-layers=3"
_STOPPED = "stopped"
_OWN = frozenset({"net", "method", "density", "seed", "seeds", "threads", "name", "out", "preset",
                  "resume", "checkpoint-dir"})  # fmt: skip
"""Options of `train` that a sweep gives to each run, or that runs cannot share."""
_KEPT = ("test_accuracy", "seconds", "mean_step_seconds", "steps", "density", "flops_density")


@dataclass(frozen=True)
class Task:
    """One run of `sparse-kernels train`.

    net: its name, and its options if it has any, such as "wide-mlp width=256".
    options: further words, as on the command line.
    variant: what it has otherwise than the other runs of its method.
    """

    net: str
    method: str
    density: float
    seed: int
    options: tuple[str, ...] = ()
    variant: Variant = ()

    @property
    def name(self) -> str:
        """Of its directory, and the key of its line."""
        changed = "".join(f"-{text}" for text in self._changes())
        net = "-".join(self.net.split())
        whole = f"{net}-{self.method}-d{self.density:g}-s{self.seed}{changed}"
        return re.sub(r"[^\w.,+=-]", "_", whole)  # what `train --name` takes

    def line(self) -> dict[str, Any]:
        """What its line in the results file says of it before it is trained."""
        return {"name": self.name, "net": self.net, "method": self.method,
                "density_asked": self.density, "seed": self.seed, "options": list(self.options),
                "variant": " ".join(self._changes())}  # fmt: skip

    def words(self, out: Path) -> list[str]:
        """Arguments of `sparse-kernels`."""
        net, *shape = self.net.split()
        of_net = [_assignment(text, "--net", NET_EXAMPLE) for text in shape]
        fixed = {"net": net, "method": self.method, "density": repr(self.density),
                 "seeds": str(self.seed), "threads": "1", "name": self.name,
                 "out": str(out)}  # fmt: skip
        named = [word for key, value in fixed.items() for word in (f"--{key}", value)]
        changed = [word for option, value in (*of_net, *self.variant)
                   for word in (f"--{option}", *([value] if value else ()))]  # fmt: skip
        return ["train", *self.options, *changed, *named, "--resume"]

    def _changes(self) -> list[str]:
        return [f"{option}={value}" if value else option for option, value in self.variant]


_Outcome = tuple[Task, dict[str, Any] | None, str]
"""A run, its line, and why there is none."""


def tasks(
    nets: Sequence[str],
    methods: Sequence[str],
    densities: Sequence[float],
    seeds: Sequence[int],
    options: Sequence[str] = (),
    variants: Sequence[Variant] = ((),),
) -> list[Task]:
    """All combinations, seeds outermost: after each seed the table is whole, only wider of error.

    Raises WorkbenchError for an unknown net or method, for a density out of range, for options that
    are the sweep's own, and for runs that would share a directory or are asked for twice.
    """
    changed = [option for variant in variants for option, _ in variant]
    changed += [word[2:].partition("=")[0] for word in options if word.startswith("--")]
    changed += [text.lstrip("-").partition("=")[0] for net in nets for text in net.split()[1:]]
    taken = sorted(_OWN.intersection(changed))
    if taken:
        raise WorkbenchError(
            f"--{taken[0]} is not to be changed run by run; a sweep's own options are --net, "
            "--method, --density, --seeds, --jobs and --out"
        )
    for net in nets:
        spec(net.split(maxsplit=1)[0] if net.strip() else net)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise WorkbenchError(f"--method: expected some of {', '.join(METHODS)}, got {unknown}")
    if any(not 0 < density <= 1 for density in densities):
        raise WorkbenchError(f"--density: expected numbers above 0, at most 1, got {densities}")
    chosen = itertools.product(seeds, nets, densities, methods, variants)
    found = [Task(net, name, d, s, tuple(options), change) for s, net, d, name, change in chosen]
    by_name: dict[str, Task] = {}
    for task in found:
        held = by_name.setdefault(task.name, task)
        if held == task and held is not task:
            raise WorkbenchError(f"{task.name} is asked for twice")
        if held != task:
            raise WorkbenchError(
                f"{task.line()} and {held.line()} would both be called "
                f"{task.name!r}; make two sweeps, each with its own --out"
            )
    return found


def parse_variants(vary: Sequence[str], variants: Sequence[str]) -> list[Variant]:
    """From texts such as "prune-rate=0.2,0.5" (a variant per value) and "signal=window
    no-spare-dense" (one variant each, flags without a value; "" is the method as it is).

    Without any, the method as it is. Raises WorkbenchError for a text of another form.
    """
    found: list[Variant] = []
    for text in vary:
        option, values = _assignment(text, "--vary", "prune-rate=0.2,0.5")
        found += [((option, value),) for value in values.split(",")]
    for text in variants:
        found.append(tuple(_change(word) for word in text.split()))
    return found or [()]


def _change(word: str) -> tuple[str, str]:
    if "=" not in word and word.strip("-"):
        return word.lstrip("-"), ""
    return _assignment(word, "--variant", "signal=exact no-spare-dense")


def _assignment(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name.strip("-") or not equals or not value:
        raise WorkbenchError(f"{option}: expected text such as {example!r}, got {text!r}")
    return name.lstrip("-"), value


def reuse(folder: Path, wanted: Sequence[Task], other: Path, settings_of: SettingsOf) -> int:
    """Take over from the sweep in `other` the lines of runs with the very settings of those that
    are wanted and not done, whatever they are called there; returns their number.

    settings_of: the settings of words of `sparse-kernels train`. Raises WorkbenchError if `other`
    holds no finished run.
    """
    rows = sweep_lines.read(other)
    made = {json.dumps(_settings(_words_of(row), settings_of)): row for row in rows}
    with sweep_lines.locked(folder):
        done = {row["name"] for row in sweep_lines.held(folder)}
        taken = []
        for task in wanted:
            row = made.get(json.dumps(_settings(task.words(folder)[1:], settings_of)))
            if row is not None and task.name not in done:
                taken.append({**row, **task.line(), "made_in": str(other)})
        sweep_lines.rewrite(folder, taken)
    return len(taken)


def run(
    folder: Path,
    wanted: Sequence[Task],
    jobs: int,
    settings_of: SettingsOf,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Make what is not done, `jobs` at a time; returns why runs failed, one text per run.

    A run that a signal stopped has not failed. Ctrl-C and SIGTERM start no further run, stop those
    under way, each with a checkpoint, and are raised again once these have ended.
    Raises WorkbenchError if another sweep is at work in the folder, or if it holds runs of the same
    net, method, density and variant with other settings.
    """
    with sweep_lines.locked(folder):
        _check_alike(folder, wanted, settings_of)
        sweep_lines.rewrite(folder)
        done = {row["name"] for row in sweep_lines.held(folder)}
        left = [task for task in wanted if task.name not in done]
        say(f"{len(wanted) - len(left)} of {len(wanted)} runs are done")
        return _train_all(folder, left, jobs, settings_of, say)


def _settings(words: Sequence[str], settings_of: SettingsOf) -> dict[str, Any]:
    """What decides the weights of a run of `sparse-kernels train` with these words."""
    found = settings_of(words).as_dict()
    return {name: found[name] for name in sorted(found.keys() - FREE_SETTINGS)}


def _words_of(made: dict[str, Any]) -> list[str]:
    """Those of `train` in the "command" of a line or of results: it spells out every setting."""
    return shlex.split(made["command"])[2:]


def _difference(asked: dict[str, Any], made: dict[str, Any]) -> str:
    """In words, of the first setting that differs; "" if none does."""
    for name, value in asked.items():
        if value != made[name]:
            return f"{name}={made[name]!r}, not {value!r}"
    return ""


def _check_alike(folder: Path, wanted: Sequence[Task], settings_of: SettingsOf) -> None:
    """What is one line of the table may differ by its seed only, or its mean is of nothing.

    By settings, not by words: a default that has changed since is a difference, another spelling
    or another --data-dir is none.
    """

    def cell(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line.get(key, "") for key in ("net", "method", "density_asked", "variant"))

    asked = {cell(task.line()): task for task in wanted}
    for row in sweep_lines.held(folder):
        task = asked.get(cell(row))
        if task is None:
            continue
        made = _settings(_words_of(row), settings_of)
        now = _settings(task.words(folder)[1:], settings_of)
        other = _difference({**now, "seeds": made["seeds"]}, made)
        if other:
            raise WorkbenchError(
                f"{folder / sweep_lines.LINES}: {row['name']} was made with {other} as is asked "
                "for; give another --out"
            )


def _train_all(
    folder: Path,
    left: Sequence[Task],
    jobs: int,
    settings_of: SettingsOf,
    say: Callable[[str], None],
) -> list[str]:
    """Train and write lines as they come; after Ctrl-C or SIGTERM those that still ended."""
    failures: list[str] = []

    def note(future: Future[_Outcome]) -> None:
        task, row, failure = future.result()
        if row is not None:
            sweep_lines.add(folder, row)
            say(f"{task.name}: test {100 * row['test_accuracy']:.2f} %, {row['seconds']:.1f} s")
        elif failure.startswith(_STOPPED):
            say(f"{task.name}: {failure}")
        else:
            sweep_lines.add_failure(folder, {**task.line(), "reason": failure})
            failures.append(f"{task.name}: {failure}")
            say(f"failed: {failures[-1]}")

    children = Children()
    pool = ThreadPoolExecutor(max(1, jobs))
    waiting = {pool.submit(_train, folder / "runs", t, children, settings_of) for t in left}
    try:
        with ending_by_exception():
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    waiting.discard(future)
                    note(future)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        children.terminate()
        for future in as_completed([f for f in waiting if not f.cancelled()]):
            note(future)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        children.kill()  # a second Ctrl-C does not wait for them
    return failures


def _train(out: Path, task: Task, children: Children, settings_of: SettingsOf) -> _Outcome:
    """One run in a process of its own; its line, or the last line of what it said."""
    path, words = out / task.name / RESULTS, task.words(out)
    if not path.is_file():  # it is written last: a run that has it only lost its line
        code, said = children.run(words)
        if code in STOPS:
            return task, None, f"{_STOPPED}; the same command goes on with it"
        if code or not path.is_file():
            return task, None, f"exit code {code}: {said}"
    found = json.loads(path.read_text(encoding="utf-8"))
    asked = _settings(words[1:], settings_of)
    other = _difference(asked, _settings(_words_of(found), settings_of))
    if other:
        return task, None, f"{path} is of a run with {other} as is asked for; move it away"
    sparse = next(entry for entry in found["runs"] if entry["contender"] == "sparse")
    row = {**task.line(), **{key: sparse[key] for key in _KEPT}}
    return task, {**row, "command": found["command"], "machine": found["machine"]}, ""
