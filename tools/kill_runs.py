"""Kill trainings by SIGKILL, resume them, compare every bit with the run that was left alone.

    python tools/kill_runs.py --kills 1000 --seed 0

Each run is killed and resumed several times in a row, at points that are drawn anew, then left to
end.  A run is LOST if a checkpoint that was good before is gone after, if it does not resume, or if
anything but its clock differs at the end.  SIGKILL leaves what the kernel holds: this says nothing
about a power failure (tests/test_checkpoint.py checks the order of syncs and renames).
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import kill_support as kills  # noqa: E402

CHAIN = 8  # kills of one run before it is left to end


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--kills", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    options.add_argument("--place", default=None, help="directory to work in (/dev/shm is fast)")
    chosen = options.parse_args()
    kills.prepare()
    draw, begun, hit, lost = random.Random(chosen.seed), time.monotonic(), Counter(), []
    unused = draw.sample(list(kills.POINTS), len(kills.POINTS))
    with tempfile.TemporaryDirectory(dir=chosen.place) as place:
        ends: dict[str, tuple[object, float]] = {}
        runs = 0
        while hit.total() < chosen.kills and time.monotonic() - begun < chosen.seconds:
            name = list(kills.EXPERIMENTS)[runs % len(kills.EXPERIMENTS)]
            folder = Path(place) / f"run-{runs}"
            if name not in ends:
                ends[name] = reference(name, folder.with_name(f"whole-{len(ends)}"))
            problem = kill_and_compare(name, folder, ends[name], draw, hit, unused)
            if problem:
                lost.append(problem)
                print(f"LOST: {name}: {problem}; {folder}", flush=True)
            else:
                shutil.rmtree(folder)
            runs += 1
            if runs % 10 == 0:
                print(f"{hit.total()} kills in {runs} runs, {len(lost)} lost", flush=True)
    for point in [*kills.POINTS, kills.RANDOM_TIME]:
        print(f"{hit[point]:6d}  {point}")
    print(
        f"kills {hit.total()} at {len(hit)} kinds of points in {runs} runs of {len(ends)} "
        f"experiments, {len(lost)} lost, {time.monotonic() - begun:.0f} s"
    )
    return 1 if lost else 0


def reference(name: str, folder: Path) -> tuple[object, float]:
    """(outcome, seconds) of the run that is left alone."""
    config = dataclasses.replace(kills.SMALL, **kills.EXPERIMENTS[name])
    start = time.monotonic()
    kills.run(config, folder)
    return kills.outcome(folder), time.monotonic() - start


def kill_and_compare(
    name: str,
    folder: Path,
    end: tuple[object, float],
    draw: random.Random,
    hit: Counter[str],
    unused: list[str],
) -> str | None:
    """Kill a run up to CHAIN times, let it end; None if all is as in the run left alone."""
    config = dataclasses.replace(kills.SMALL, **kills.EXPERIMENTS[name])
    newest = (0, 0)
    for attempt in range(CHAIN):
        point = draw.choice([*kills.POINTS, kills.RANDOM_TIME, kills.RANDOM_TIME])
        if unused and attempt % 2 == 0:  # first see to it that every point has its turn
            point = unused.pop(0)
        try:
            if point == kills.RANDOM_TIME:
                after = draw.uniform(0, 0.9 * end[1])
                killed = kills.run(config, folder, resume=attempt > 0, kill_after=after)
            else:
                strike = kills.strike_at(point, draw)
                killed = kills.run(config, folder, resume=attempt > 0, strike=strike)
        except RuntimeError as error:
            return f"did not resume: {error}"
        if not killed:
            break
        hit[point] += 1
        before, newest = newest, kills.newest_step(folder)
        if newest[0] < before[0]:
            return f"checkpoint {before} was good before a kill {point}, now {newest}"
    else:
        try:
            kills.run(config, folder, resume=True)
        except RuntimeError as error:
            return f"did not resume: {error}"
    different = kills.differences(end[0], kills.outcome(folder))
    return f"differs in {different[:5]}" if different else None


if __name__ == "__main__":
    sys.exit(main())
