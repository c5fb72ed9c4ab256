"""The disk cache of measured plans, and the measurement itself on clocks of our own."""

from __future__ import annotations

import json
import multiprocessing
import random
import warnings
from pathlib import Path

import pytest

from sparse_kernels import plan_cache
from sparse_kernels.plan_cache import PlanCache, density_bucket, power_of_two, problem_key
from sparse_kernels.plan_measure import MAX_ROUNDS, measure, median_interval

nan = float("nan")
FACTS = {"cpu": "a", "isa": "avx2", "threads": "2"}


def test_directory_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path / "here"))
    assert plan_cache.directory() == tmp_path / "here"
    monkeypatch.delenv("SPARSE_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache.directory() == tmp_path / "sparse_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert plan_cache.directory() == Path.home() / ".cache" / "sparse_kernels"


def test_identity_tells_threads_and_versions_apart() -> None:
    import torch

    facts = plan_cache.identity()
    assert facts["torch"] == torch.__version__ and all(facts.values())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert plan_cache.identity()["threads"] == str(before + 1)
    finally:
        torch.set_num_threads(before)


def test_entries_outlive_the_process(tmp_path) -> None:
    PlanCache(tmp_path, FACTS).put("a", {"break_even": 0.25})
    PlanCache(tmp_path, FACTS).put("b", {"break_even": 0.5})
    again = PlanCache(tmp_path, FACTS)
    assert again.get("a") == {"break_even": 0.25} and again.get("b") == {"break_even": 0.5}
    assert again.get("c") is None
    assert [p.name for p in tmp_path.glob("*.tmp")] == []
    assert PlanCache(tmp_path, {**FACTS, "threads": "4"}).get("a") is None


def test_an_entry_that_was_given_out_cannot_change_the_cache(tmp_path) -> None:
    cache = PlanCache(tmp_path, FACTS)
    cache.put("a", {"points": {"5%": 1.0}})
    cache.get("a")["points"].clear()
    assert cache.get("a") == {"points": {"5%": 1.0}}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ('"x"', "no plan cache"),
        ("[1]", "no plan cache"),
        (json.dumps({"format": 99}), "no plan cache"),
        (json.dumps({"format": 1, "identity": {"cpu": "b"}, "entries": {}}), "another machine"),
        (json.dumps({"format": 1, "identity": FACTS, "entries": {"a": 3}}), "damaged"),
        (json.dumps({"format": 1, "identity": FACTS, "entries": {"a": {"x": nan}}}), "damaged"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(tmp_path, content, why) -> None:
    cache = PlanCache(tmp_path, FACTS)
    cache.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=why) as caught:
        assert cache.get("a") is None
        assert PlanCache(tmp_path, FACTS).get("a") is None
    assert len(caught) == 1 and str(cache.path) in str(caught[0].message)
    cache.put("a", {"x": 1})  # replaces the file
    assert PlanCache(tmp_path, FACTS).get("a") == {"x": 1}


def test_a_place_that_cannot_be_written_is_no_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    cache = PlanCache(tmp_path / "file" / "below", FACTS)  # for root too: a file is no folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # reading fails as well, and says so
        cache.put("a", {"x": 1})
        assert cache.get("a") == {"x": 1}
        assert PlanCache(tmp_path / "file" / "below", FACTS).get("a") is None


def test_what_json_cannot_hold_is_refused(tmp_path) -> None:
    cache = PlanCache(tmp_path, FACTS)
    with pytest.raises(ValueError):
        cache.put("a", {"x": float("nan")})
    assert cache.get("a") is None and not cache.path.exists()


def _write_many(folder: str, name: str) -> None:
    cache = PlanCache(Path(folder), FACTS)
    for i in range(20):
        cache.put(f"{name}{i}", {"x": i})


def test_processes_that_write_at_once_lose_nothing(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), n)) for n in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = PlanCache(tmp_path, FACTS)
    if plan_cache.fcntl is not None:
        assert all(cache.get(f"{name}{i}") == {"x": i} for name in "abc" for i in range(20))
    assert json.loads(cache.path.read_text())["format"] == plan_cache.FORMAT


def test_buckets() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 5, 6, 100, 128)] == [0, 1, 2, 4, 4, 8, 128, 128]
    assert density_bucket(0.05) == density_bucket(0.0505) != density_bucket(0.06)
    assert density_bucket(1.0) == "100%"
    assert problem_key("linear", shape=(3, 4), batch=8) == "linear shape=3x4 batch=8"


class Machine:
    """A clock that runs only while calls run, each for its time and some noise."""

    def __init__(self, noise, seed=0) -> None:
        self.now, self.noise, self.random = 0.0, noise, random.Random(seed)

    def call(self, seconds):
        def run() -> None:
            self.now += seconds * self.noise(self.random, self.now)

        return run

    def clock(self) -> float:
        return self.now


def one_sided(rng, now):
    return 1 + rng.expovariate(4) + (3 if rng.random() < 0.1 else 0)


def slow_spells(rng, now):
    return (4 if int(now * 7) % 2 else 1) * rng.uniform(1, 1.1)


@pytest.mark.parametrize("noise", [lambda rng, now: 1.0, one_sided, slow_spells])
@pytest.mark.parametrize("seed", range(5))
def test_the_faster_one_is_found_through_noise(noise, seed) -> None:
    machine = Machine(noise, seed)
    calls = {"slow": machine.call(1.25e-3), "fast": machine.call(1e-3)}
    result = measure(calls, seconds=5.0, clock=machine.clock)
    assert (result.best, result.settled) == ("fast", "certain")
    assert 1 < result.ratio("slow", "fast") < 1.6


def test_what_does_not_matter_goes_to_the_first() -> None:
    machine = Machine(lambda rng, now: rng.uniform(1, 1.02))
    calls = {"first": machine.call(1.01e-3), "second": machine.call(1e-3)}
    result = measure(calls, seconds=20.0, clock=machine.clock)
    assert (result.best, result.settled) == ("first", "equal")


def test_the_cap_ends_an_undecided_race() -> None:
    machine = Machine(lambda rng, now: rng.uniform(1, 30))
    calls = {"first": machine.call(1.04e-3), "second": machine.call(1e-3)}
    result = measure(calls, seconds=0.5, clock=machine.clock)
    assert result.settled == "time" and 3 <= result.rounds < MAX_ROUNDS
    assert machine.now < 2


def test_an_undecided_race_is_judged_by_its_fast_samples() -> None:
    """Noise hits one contender in most rounds: its median lies, its quartile does not."""
    machine = Machine(lambda rng, now: 1.0)
    count = iter(range(10**6))

    def unlucky() -> None:
        machine.now += 1e-3 * (9 if next(count) % 3 else 1)

    result = measure(
        {"unlucky": unlucky, "steady": machine.call(2e-3)}, seconds=0.3, clock=machine.clock
    )
    assert result.settled == "time" and result.best == "unlucky"
    assert result.seconds["unlucky"] > result.seconds["steady"]


def test_calls_too_fast_for_the_clock_are_repeated() -> None:
    machine = Machine(lambda rng, now: 1.0)
    made = [0]
    tick = machine.call(1e-6)

    def call() -> None:
        made[0] += 1
        tick()

    result = measure({"only": call}, seconds=1.0, clock=machine.clock)
    assert result.best == "only" and result.settled == "certain"
    assert made[0] >= 1000 * result.rounds
    assert result.seconds["only"] == pytest.approx(1e-6)


def test_median_interval_holds_what_it_promises() -> None:
    rng = random.Random(1)
    outside = 0
    for _ in range(2000):
        low, high = median_interval([rng.expovariate(1) for _ in range(21)], 0.05)
        outside += not low <= 0.6931 <= high
    assert outside / 2000 <= 0.1
    assert median_interval([1.0, 2.0]) == (float("-inf"), float("inf"))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        measure({})
    with pytest.raises(ValueError, match="seconds must be positive"):
        measure({"a": lambda: None}, seconds=0)
