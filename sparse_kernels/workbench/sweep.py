"""Many trainings: nets x methods x variants x densities x seeds, each in a process of one thread.

The results file has one JSON line per finished run. A sweep that is started again skips what is
done, and goes on inside a run that was cut off, from its checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..training import METHODS
from .config import FREE_SETTINGS, TrainConfig
from .errors import WorkbenchError
from .fetch import write_atomically
from .models import spec
from .report import RESULTS, read_run
from .stopping import ending_by_exception

LINES = "sweep.jsonl"
# Without the working directory: in a checkout, the sources there are not the package in use.
_PROGRAM = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "from sparse_kernels.cli import main; main()"
)
Variant = tuple[tuple[str, str], ...]
"""Options of `train` and their values; () is the method as it is."""
NET_EXAMPLE = "wide-mlp width=256 hidden-layers=3"
_STOPPED = "stopped"
_OWN = frozenset({"net", "method", "density", "seed", "seeds", "threads", "name", "out", "preset",
                  "resume", "checkpoint-dir"})  # fmt: skip
"""Options of `train` that a sweep gives to each run, or that runs cannot share."""
_STOPS = (130, 143, -signal.SIGINT, -signal.SIGTERM)
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
        changed = "".join(f"-{option}={value}" for option, value in self.variant)
        net = "-".join(self.net.split())
        whole = f"{net}-{self.method}-d{self.density:g}-s{self.seed}{changed}"
        return re.sub(r"[^\w.,+=-]", "_", whole)  # what `train --name` takes

    def line(self) -> dict[str, Any]:
        """What its line in the results file says of it before it is trained."""
        variant = " ".join(f"{option}={value}" for option, value in self.variant)
        return {"name": self.name, "net": self.net, "method": self.method,
                "density_asked": self.density, "seed": self.seed, "options": list(self.options),
                "variant": variant}  # fmt: skip

    def words(self, out: Path) -> list[str]:
        """Arguments of `sparse-kernels`."""
        net, *shape = self.net.split()
        of_net = [_assignment(text, "--net", NET_EXAMPLE) for text in shape]
        fixed = {"net": net, "method": self.method, "density": f"{self.density:g}",
                 "seeds": str(self.seed), "threads": "1", "name": self.name,
                 "out": str(out)}  # fmt: skip
        named = [word for key, value in fixed.items() for word in (f"--{key}", value)]
        changed = [word for option, value in (*of_net, *self.variant)
                   for word in (f"--{option}", value)]  # fmt: skip
        return ["train", *self.options, *changed, *named, "--resume"]


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
    are the sweep's own, and for runs that would share a directory.
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
        if by_name.setdefault(task.name, task) != task:
            raise WorkbenchError(
                f"{task.line()} and {by_name[task.name].line()} would both be called "
                f"{task.name!r}; make two sweeps, each with its own --out"
            )
    return found


def parse_variants(vary: Sequence[str], variants: Sequence[str]) -> list[Variant]:
    """From texts such as "prune-rate=0.2,0.5" (a variant per value) and "signal=window
    window-tolerance=0.1" (one variant each; "" is the method as it is).

    Without any, the method as it is. Raises WorkbenchError for a text of another form.
    """
    found: list[Variant] = []
    for text in vary:
        option, values = _assignment(text, "--vary", "prune-rate=0.2,0.5")
        found += [((option, value),) for value in values.split(",")]
    for text in variants:
        pairs = [_assignment(w, "--variant", "signal=exact momentum=0.9") for w in text.split()]
        found.append(tuple(pairs))
    return found or [()]


def _assignment(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name.strip("-") or not equals or not value:
        raise WorkbenchError(f"{option}: expected text such as {example!r}, got {text!r}")
    return name.lstrip("-"), value


def read(folder: Path) -> list[dict[str, Any]]:
    """The finished runs in the order in which they ended. Raises WorkbenchError if none are there.

    A line that was being written when the sweep was cut off is left out.
    """
    try:
        rows = list(_parsed((folder / LINES).read_text(encoding="utf-8")))
    except OSError as error:
        raise WorkbenchError(f"{folder / LINES}: {error.strerror}; expected a sweep") from error
    if not rows:
        raise WorkbenchError(f"{folder / LINES}: no finished run yet; let the sweep go on")
    return rows


def sparse_run(folder: Path, row: dict[str, Any]) -> dict[str, Any] | None:
    """The whole results of the run of a line: from the sweep, wherever it lies now, or from where
    the command wrote them, as of a run taken over; None if they are gone or broken.
    """
    words = shlex.split(row["command"])
    out, name = (words[words.index(option) + 1] for option in ("--out", "--name"))
    for place in (folder / "runs" / row["name"], Path(out) / name):
        with contextlib.suppress(WorkbenchError):
            runs = read_run(place)["runs"]
            return next((run for run in runs if run["contender"] == "sparse"), None)
    return None


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "name" in row:
            yield row


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _append_whole(path: Path, more: Sequence[dict[str, Any]]) -> None:
    """Append lines, and drop one that was cut off: nothing is appended to a broken line."""
    held = _text(path)
    rows = [*_parsed(held), *more]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text != held or not path.exists():
        write_atomically(path, partial(_fill, text))


def _fill(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def run(
    folder: Path, wanted: Sequence[Task], jobs: int, say: Callable[[str], None] = print
) -> list[str]:
    """Make what is not done, `jobs` at a time; returns why runs failed, one text per run.

    A run that a signal stopped has not failed. Ctrl-C and SIGTERM start no further run, stop those
    under way, each with a checkpoint, and are raised again once these have ended.
    Raises WorkbenchError if the folder holds a run of the same name with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LINES
    done = {row["name"]: row["options"] for row in _parsed(_text(path))}
    for task in wanted:
        if done.get(task.name, list(task.options)) != list(task.options):
            raise WorkbenchError(
                f"{path}: {task.name} was made with {done[task.name]}, now {list(task.options)} "
                "is asked for; give another --out"
            )
    _append_whole(path, [])
    left = [task for task in wanted if task.name not in done]
    say(f"{len(wanted) - len(left)} of {len(wanted)} runs are done")
    return _train_all(path, left, jobs, say)


def reuse(
    folder: Path,
    wanted: Sequence[Task],
    other: Path,
    settings_of: Callable[[Sequence[str]], TrainConfig],
) -> int:
    """Take over from the sweep in `other` the lines of runs with the very settings of those that
    are wanted and not done, whatever they are called there; returns their number.

    settings_of: the settings of words of `sparse-kernels train`. Raises WorkbenchError if `other`
    holds no finished run.
    """

    def key(words: Sequence[str]) -> dict[str, Any]:
        settings = settings_of(words).as_dict()
        return {name: settings[name] for name in sorted(settings.keys() - FREE_SETTINGS)}

    made = {json.dumps(key(shlex.split(row["command"])[2:])): row for row in read(other)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LINES
    done = {row["name"] for row in _parsed(_text(path))}
    taken = []
    for task in wanted:
        row = made.get(json.dumps(key(task.words(folder)[1:])))
        if row is not None and task.name not in done:
            taken.append({**row, **task.line(), "made_in": str(other)})
    _append_whole(path, taken)
    return len(taken)


def _train_all(
    path: Path, left: Sequence[Task], jobs: int, say: Callable[[str], None]
) -> list[str]:
    """Train and write lines as they come; after Ctrl-C or SIGTERM those that still ended."""
    failures: list[str] = []

    def note(future: Future[_Outcome]) -> None:
        task, row, failure = future.result()
        if row is None:
            stopped = failure.startswith(_STOPPED)
            if not stopped:
                failures.append(f"{task.name}: {failure}")
            say(f"{task.name}: {failure}" if stopped else f"failed: {failures[-1]}")
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{task.name}: test {100 * row['test_accuracy']:.2f} %, {row['seconds']:.1f} s")

    children = _Children()
    pool = ThreadPoolExecutor(max(1, jobs))
    waiting = {pool.submit(_train, path.parent / "runs", t, children) for t in left}
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


class _Children:
    """The processes under way. After `terminate` none is started."""

    def __init__(self) -> None:
        self._lock, self._running, self._ended = (
            threading.Lock(),
            set[subprocess.Popen[str]](),
            False,
        )

    def run(self, words: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        """Exit code, and the last line that the process said."""
        with self._lock:
            if self._ended:
                return -signal.SIGTERM, ""
            # A session of its own: Ctrl-C reaches a child once, from here. It lets a first signal
            # write a checkpoint and a second one end it.
            child = subprocess.Popen(
                words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(child)
        try:
            out, error = child.communicate()
        finally:
            with self._lock:
                self._running.discard(child)
        return child.returncode, ((error.strip() or out.strip()).splitlines() or ["no output"])[-1]

    def terminate(self) -> None:
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        self._end(subprocess.Popen.kill)

    def _end(self, how: Callable[[subprocess.Popen[str]], None]) -> None:
        with self._lock:
            self._ended = True
            for child in self._running:
                how(child)


def _train(out: Path, task: Task, children: _Children) -> _Outcome:
    """One run in a process of its own; its line, or the last line of what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in paths if part)
    code, said = children.run([sys.executable, "-c", _PROGRAM, *task.words(out)], environment)
    if code in _STOPS:
        return task, None, f"{_STOPPED}; the same command goes on with it"
    results = out / task.name / RESULTS
    if code or not results.is_file():
        return task, None, f"exit code {code}: {said}"
    found = json.loads(results.read_text(encoding="utf-8"))
    sparse = next(entry for entry in found["runs"] if entry["contender"] == "sparse")
    row = {**task.line(), **{key: sparse[key] for key in _KEPT}}
    return task, {**row, "command": found["command"], "machine": found["machine"]}, ""
