"""tools/gpu_check.py: parts that are killed go on where they were, and nothing is run twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check_support import TOOLS, check_modules
from stream_support import NO_CACHE, lane_on, still_busy


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    return check_modules(monkeypatch)


# -- the journal -----------------------------------------------------------------------------------


def test_a_journal_takes_over_what_was_finished(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = tools.journal.Journal(path, {"gpu": "a", "sources": "1"})
    first.begin("x")
    first.finish("x", "passed", ms=(1, 2))
    first.begin("y")
    with path.open("a") as file:
        file.write('{"key": "z", "outc')  # cut off while writing
    again = tools.journal.Journal(path, {"gpu": "a", "sources": "1"})
    assert again.entries["x"].row == first.entries["x"].row == {"ms": [1, 2]}
    assert tools.journal.left(again, ["x", "y", "z"]) == ["y", "z"]
    again.finish("z", "skipped", why="none")
    assert tools.journal.Journal(path, {"gpu": "a", "sources": "1"}).settled("z")


def test_another_machine_or_other_sources_start_anew_and_lose_nothing(
    tools: Any, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"
    one, two = {"gpu": "a", "sources": "1"}, {"gpu": "a", "sources": "2"}
    tools.journal.Journal(path, one).finish("x", "passed")
    changed = tools.journal.Journal(path, two)
    assert not changed.settled("x")
    changed.finish("y", "passed")
    assert tools.journal.left(tools.journal.Journal(path, one), ["x", "y"]) == ["y"]
    both = tools.journal.Journal(path, two, ("sources",))
    assert {key: entry.sources for key, entry in both.entries.items()} == {"x": "1", "y": "2"}
    assert not tools.journal.Journal(path, {"gpu": "b", "sources": "2"}).settled("y")


def test_a_case_that_breaks_its_process_is_given_up(tools: Any, tmp_path: Path) -> None:
    for attempt in range(tools.journal.ATTEMPTS):
        journal = tools.journal.Journal(tmp_path / "j.jsonl", {})
        assert not journal.settled("x"), attempt
        journal.begin("x")
    journal = tools.journal.Journal(tmp_path / "j.jsonl", {})
    assert journal.settled("x")
    assert journal.failures() == ["x: the process ended 2 times before this case did"]
    journal.forget_failures()
    assert not tools.journal.Journal(tmp_path / "j.jsonl", {}).settled("x")


def test_shares_are_disjoint_and_complete(tools: Any) -> None:
    names = [f"test_{i}" for i in range(50)]
    shares = [tools.journal.share(names, index, 3) for index in range(3)]
    assert sorted(name for part in shares for name in part) == sorted(names)
    assert all(shares)


def test_the_fingerprint_follows_the_sources(tools: Any, tmp_path: Path) -> None:
    source = tmp_path / "csrc" / "a.cu"
    source.parent.mkdir()
    source.write_text("1")
    before = tools.journal.fingerprint("csrc", root=tmp_path)
    (source.parent / "notes.md").write_text("no source")
    assert tools.journal.fingerprint("csrc", root=tmp_path) == before
    source.write_text("2")
    assert tools.journal.fingerprint("csrc", root=tmp_path) != before


# -- tests in parts --------------------------------------------------------------------------------

BODY = """
import pathlib, time
import pytest
LOG, HOLD = pathlib.Path({log!r}), pathlib.Path({hold!r})

@pytest.mark.parametrize("i", range({count}))
def test_one(i):
    with LOG.open("a") as file:
        file.write(f"{{i}}\\n")
    while i >= 8 and HOLD.exists():
        time.sleep(0.05)
    assert i != {wrong}
"""


class Suite:
    """A folder of tests that say when they ran, and the part of gpu_check that runs them."""

    def __init__(self, tools: Any, folder: Path, wrong: int = -1) -> None:
        self.log, self.file = folder / "ran.txt", folder / "test_made.py"
        self.hold = folder / "hold"  # while it is there the last four tests do not end
        self.file.write_text(
            BODY.format(log=str(self.log), hold=str(self.hold), count=12, wrong=wrong)
        )
        self.tools, self.folder = tools, folder

    def line(self, minutes: float) -> list[str]:
        """A process that runs what is left."""
        code = (
            f"import sys, time; sys.path.insert(0, {str(TOOLS)!r})\n"
            "import argparse, pathlib, gpu_check_parts as parts, gpu_journal\n"
            f"journal = gpu_journal.Journal(pathlib.Path({str(self.folder / 't.jsonl')!r}), {{}})\n"
            "options = argparse.Namespace(jobs=2)\n"
            f"folder = {str(self.folder)!r}\n"
            "chosen = [folder, '--rootdir', folder, '-c', '/dev/null']\n"
            f"deadline = time.monotonic() + 60 * {minutes}\n"
            "print(parts._recorded('gpu ', chosen, journal, options, deadline))"
        )
        return [sys.executable, "-c", code]

    def run(self, minutes: float = 5.0) -> str:
        done = subprocess.run(
            self.line(minutes), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ran(self) -> Counter[str]:
        return Counter(self.log.read_text().split()) if self.log.is_file() else Counter()


def test_tests_that_were_killed_go_on_and_lose_one_case_each(tools: Any, tmp_path: Path) -> None:
    suite = Suite(tools, tmp_path)
    suite.hold.touch()  # so that it is not done before it is killed, however slow this process is
    process = subprocess.Popen(suite.line(5.0), start_new_session=True)
    end = time.monotonic() + 120
    while len(suite.ran()) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # as a lent machine ends a call
    process.wait()
    suite.hold.unlink()
    assert 4 <= len(suite.ran()) < 12
    out = suite.run()
    assert "Outcome(failures=[], complete=True)" in out
    ran = suite.ran()
    assert set(ran) == {str(i) for i in range(12)}
    twice = [name for name, count in ran.items() if count > 1]
    assert len(twice) <= 2, "two processes ran: at most one case each may be lost"
    assert "complete=True" in suite.run() and suite.ran() == ran, "a third run repeats nothing"


def test_tests_stop_when_time_is_up_and_say_what_is_left(tools: Any, tmp_path: Path) -> None:
    suite = Suite(tools, tmp_path)
    out = suite.run(minutes=0.0)
    assert "0 of 12 gpu tests are done" in out and "complete=False" in out
    assert not suite.ran()


def test_a_failed_test_is_told_and_hides_no_other(tools: Any, tmp_path: Path) -> None:
    suite = Suite(tools, tmp_path, wrong=3)
    for _ in range(2):
        out = suite.run()
        assert "test_one[3]: assert 3 != 3" in out and "complete=True" in out
        assert suite.ran() == Counter({str(i): 1 for i in range(12)})


def test_a_file_that_cannot_be_collected_is_a_failure_and_hides_no_test(
    tools: Any, tmp_path: Path
) -> None:
    suite = Suite(tools, tmp_path)
    other = tmp_path / "test_absent.py"
    other.write_text("import a_module_that_is_absent")
    for _ in range(2):
        out = suite.run()
        assert "13 of 13 gpu tests are done" in out and "complete=True" in out
        assert "a_module_that_is_absent" in out and "collection of test_absent.py" in out
        assert suite.ran() == Counter({str(i): 1 for i in range(12)})
    other.write_text("def test_there():\n    pass\n")
    out = suite.run()
    assert "13 of 13 gpu tests are done" in out and "Outcome(failures=[], complete=True)" in out


# -- compute-sanitizer -----------------------------------------------------------------------------


@pytest.fixture
def sanitizer(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs cases with a stand-in for the processes; returns (run, what ran)."""
    ran: list[tuple[str, str]] = []
    clock = [0.0]
    status: dict[str, int] = {}

    def run_step(name: str, line: list[str], environment: Any, timeout: float) -> int:
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and timeout > 0
        assert line[line.index("--error-exitcode") + 1] == "9"
        ran.append((line[2], line[-1]))
        clock[0] += 60
        if status.get(line[-1]):
            Path(line[line.index("--log-file") + 1]).write_text("========= Invalid write")
        return status.get(line[-1], 0)

    monkeypatch.setattr(tools.parts, "run_step", run_step)
    monkeypatch.setattr(tools.parts.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tools.parts, "WORK", tmp_path)

    def run(deadline: float) -> Any:
        journal = tools.journal.Journal(tmp_path / "s.jsonl", {})
        return tools.parts.run_sanitizer("tool", journal, [["a"], ["b"], ["c"]], deadline)

    return run, ran, status


def test_the_sanitizer_goes_on_where_it_stopped(sanitizer: Any) -> None:
    run, ran, _ = sanitizer
    assert run(deadline=119) == ([], False)
    assert ran == [("memcheck", "a"), ("memcheck", "b")]
    assert run(deadline=1e9) == ([], True)
    assert ran[2:] == [("memcheck", "c"), *(("racecheck", name) for name in "abc")]
    assert run(deadline=0) == ([], True) and len(ran) == 6


def test_what_the_sanitizer_finds_is_told_again_and_not_run_again(sanitizer: Any) -> None:
    run, ran, status = sanitizer
    status["b"] = 9
    for _ in range(2):
        outcome = run(deadline=1e9)
        assert outcome.complete and len(ran) == 6
        assert [line.split(":")[1] for line in outcome.failures] == [" memcheck b", " racecheck b"]
        assert "Invalid write" in outcome.failures[0]


def test_a_case_that_dies_by_a_signal_is_a_failure(sanitizer: Any) -> None:
    """A tool that cannot start on any case must not look like one that found nothing."""
    run, ran, status = sanitizer
    status.update(dict.fromkeys("abc", -11))
    for _ in range(2):
        outcome = run(deadline=1e9)
        assert outcome.complete and len(outcome.failures) == len(ran) == 6
        assert "exit status -11" in outcome.failures[0]


def test_a_case_killed_for_its_time_is_tried_once_more(sanitizer: Any) -> None:
    run, ran, status = sanitizer
    status["a"] = -9
    assert not run(deadline=59).complete
    status["a"] = 0
    assert run(deadline=1e9) == ([], True)
    assert Counter(ran)["memcheck", "a"] == 2 and sum(Counter(ran).values()) == 7


def test_a_case_killed_for_its_time_twice_is_given_up(sanitizer: Any) -> None:
    run, ran, status = sanitizer
    status["a"] = -9
    for count in (1, 2):
        assert not run(deadline=60 * len(ran) + 59).complete and len(ran) == count
    outcome = run(deadline=1e9)
    assert outcome.complete and outcome.failures[0].startswith("sanitizer: memcheck a: the process")
    assert Counter(ran)["memcheck", "a"] == 2


def test_a_stream_is_asked_for_its_work_unless_every_free_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lane = lane_on(torch.device("cpu"))
    monkeypatch.delenv(NO_CACHE, raising=False)
    assert not still_busy(lane)
    lane.submit(lambda: None)
    assert still_busy(lane)
    lane.wait()
    assert not still_busy(lane)
    monkeypatch.setenv(NO_CACHE, "1")
    assert still_busy(lane)


# -- benchmarks ------------------------------------------------------------------------------------


class Bench:
    """Exit statuses of tools/gpu_bench, one after the other; it writes a line or none."""

    def __init__(self, tools: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.statuses: list[tuple[int, bool]] = []
        self.lines: list[list[str]] = []
        self.part = "bench"
        self.options = tools.check.parsed(["--state", str(folder), "--device", "cpu", "--again"])
        self.parts = tools.parts
        monkeypatch.setattr(tools.parts, "run_step", self.step)

    def step(self, name: str, line: list[str], environment: Any, timeout: float) -> int:
        self.lines.append(line)
        status, writes = self.statuses.pop(0)
        if writes:
            with (self.options.state / "bench.jsonl").open("a") as file:
                file.write("{}\n")
        return status

    def run(self, *statuses: tuple[int, bool]) -> Any:
        self.statuses = list(statuses)
        return self.parts.benchmark(self.part, self.options, time.monotonic() + 1000)


@pytest.fixture
def bench(tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(tools, monkeypatch, tmp_path)


def test_a_broken_context_costs_one_case(bench: Bench) -> None:
    assert bench.run((4, True), (-11, True), (0, True)) == ([], True)
    assert ["--again" in line for line in bench.lines] == [True, False, False]
    assert bench.run((4, True), (3, True)) == ([], False)


def test_rows_that_are_left_hide_no_failed_row(bench: Bench, tools: Any) -> None:
    journal = tools.journal.Journal(bench.options.state / "bench.jsonl", {"gpu": "a"})
    journal.finish("vgg: a", "failed", why="wrong")
    journal.finish("vgg: b", "passed")
    journal.finish("ops: c", "failed", why="wrong too")
    journal.finish(f"{tools.journal.FAULT}vgg: b: dense", "failed", why="its row goes on")
    assert bench.run((3, False)) == (["vgg: a: wrong"], False)
    assert bench.run((1, False)).failures[1:] == ["vgg: a: wrong"]
    bench.part = "ops"
    assert bench.run((3, False)) == (["ops: c: wrong too"], False)
    bench.part = "smoke"
    assert bench.run((3, False)) == ([], False)


def test_a_benchmark_that_cannot_start_is_no_endless_loop(bench: Bench) -> None:
    outcome = bench.run((-11, False))
    assert outcome.complete and "exit status -11" in outcome.failures[0]
    assert "exit status 1" in bench.run((1, True)).failures[0]
