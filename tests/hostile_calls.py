"""Hostile calls on patterns and layers: any order, right and wrong arguments, a dense model beside.

    PYTHONPATH=. python tests/hostile_calls.py --calls 1000000
    PYTHONPATH=. python tests/hostile_calls.py --game 1234

The first plays games of 40 rules each until so many calls were made with these sources (the games
before are in build/hostile/record.jsonl, their number is the seed), the second plays one of them
again, rule by rule.  tests/test_hostile.py lets Hypothesis play the same rules, a few hundred
calls, and shrink what it finds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hostile_layers import LayerRules
from hostile_model import COUNT, Draw, Plain
from hostile_patterns import PatternRules
from hostile_state import StateRules
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "hostile"
STEPS = 40
GAMES = 500  # in a round: one line of the record


class Rules(StateRules, PatternRules):
    """All rules; each takes its choices from a `Draw`."""


def _names(owner: type) -> list[str]:
    found = [name for name in vars(owner) if not name.startswith("_")]
    return [name for name in found if name not in ("make", "remember", "check", "layer", "model")]


#: Products come most often, for they meet whatever the other rules left.
NAMES = tuple(_names(LayerRules) + _names(StateRules) + _names(PatternRules))
TURNS = NAMES + ("forward",) * 6 + ("between",) * 3


# ---- Hypothesis --------------------------------------------------------------------------------


class FromHypothesis:
    """Choices that Hypothesis makes, and makes smaller when a rule fails."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def integer(self, low: int, high: int) -> int:
        return int(self.data.draw(st.integers(low, high)))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]


def _turn(name: str) -> Callable[..., None]:
    def turn(self: Any, data: Any) -> None:
        getattr(Rules, name)(self.rules, FromHypothesis(data))

    turn.__name__ = name
    return turn


class _Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rules = Rules()


def machine() -> type[RuleBasedStateMachine]:
    """A new machine with a rule for each of `NAMES`; a seed is written on the class."""
    turns = {name: rule(data=st.data())(_turn(name)) for name in NAMES}
    turns["make"] = initialize(data=st.data())(_turn("make"))
    return type("Layers", (_Machine,), turns)


def run(examples: int, steps: int, seed: int | None = None) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    factory = machine()
    run_state_machine_as_test(factory if seed is None else seeded(seed)(factory), settings=chosen)


# ---- the plain driver --------------------------------------------------------------------------


def play(game: int, show: Callable[[str], None] = lambda line: None) -> collections.Counter[str]:
    """One layer and its rules, all drawn from `game`; the calls of each rule.

    Raises RuntimeError naming game, step and rule where one fails.
    """
    draw: Draw = Plain(game)
    rules, made, step, name = Rules(), collections.Counter[str](), 0, "make"
    try:
        for step in range(STEPS + 1):
            name = draw.choice(TURNS) if step else "make"
            before = COUNT["calls"]
            getattr(rules, name)(draw)
            made[name] += COUNT["calls"] - before
            show(f"step {step}: {name}, {COUNT['calls'] - before} calls")
    except Exception as problem:
        raise RuntimeError(f"game {game}, step {step}, rule {name}: {problem!r}") from problem
    return made


def sources() -> str:
    """Digest of the package, the native module included, and of the rules."""
    package = ROOT / "sparse_kernels"
    found = sorted([*package.rglob("*.py"), *package.glob("_native*.so")])
    found += sorted((ROOT / "tests").glob("hostile_*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]


def recorded(record: Path) -> list[dict[str, Any]]:
    entries = []
    for line in record.read_text().splitlines() if record.exists() else ():
        with contextlib.suppress(ValueError):  # cut off by a kill: its calls do not count
            entries.append(json.loads(line))
    return entries


def one_round(first: int, record: Path, code: str) -> bool:
    """`GAMES` games from number `first`; whether nothing was found.

    The number of the game at play lies in build/hostile/playing, should the process die of it.
    """
    before, made, finding = dict(COUNT), collections.Counter[str](), None
    with (HOME / "playing").open("w") as playing:
        for game in range(first, first + GAMES):
            os.pwrite(playing.fileno(), f"{game}\n".encode(), 0)
            try:
                made += play(game)
            except RuntimeError as problem:
                traceback.print_exc()
                finding = str(problem)
                break
    counts = {name: COUNT[name] - before[name] for name in COUNT}
    line = {"time": time.strftime("%F %T"), "sources": code, "first": first, "last": game,
            **counts, "finding": finding, "rules": made}  # fmt: skip
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    (HOME / "playing").unlink()
    return finding is None


def note_end(record: Path, code: str) -> None:
    """Record the game in which the last process ended, killed or crashed: --game N tells which."""
    playing = HOME / "playing"
    game = playing.read_text().strip() if playing.exists() else ""
    if game:
        line = {"time": time.strftime("%F %T"), "sources": code, "first": int(game),
                "last": int(game), "calls": 0, "refused": 0,
                "finding": f"game {game}: the process ended", "rules": {}}  # fmt: skip
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        playing.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000, help="with these sources, in all")
    parser.add_argument("--minutes", type=float, default=600, help="but no new round after these")
    parser.add_argument("--game", type=int, help="play this one, showing each step")
    parser.add_argument("--record", type=Path, default=HOME / "record.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    HOME.mkdir(parents=True, exist_ok=True)
    if args.game is not None:
        play(args.game, show=print)
        return
    note_end(args.record, sources())
    code, end = sources(), time.monotonic() + 60 * args.minutes
    while True:
        entries = recorded(args.record)
        mine = [entry for entry in entries if entry["sources"] == code]
        calls, no = sum(e["calls"] for e in mine), sum(e["refused"] for e in mine)
        print(f"{calls} calls with these sources, {no} refused, "
              f"{sum(e['finding'] is not None for e in mine)} findings", flush=True)  # fmt: skip
        if calls >= args.calls or time.monotonic() > end:
            return
        first = max((entry["last"] for entry in entries), default=0) + 1
        if not one_round(first, args.record, code):
            sys.exit(1)


if __name__ == "__main__":
    main()
