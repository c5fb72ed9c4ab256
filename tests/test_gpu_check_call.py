"""tools/gpu_check.py: a whole call, its processes, and the package that it builds once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check_support import check_modules


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    return check_modules(monkeypatch)


def test_what_is_told_in_the_end(
    tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    found = {"smoke": tools.parts.Outcome(["smoke: wrong"], True)}
    deadlines: dict[str, float] = {}

    def check(part: str, options: Any, deadline: float) -> Any:
        deadlines[part] = deadline - time.monotonic()
        return found.get(part, tools.parts.Outcome([], part != "tests"))

    monkeypatch.setattr(tools.check, "check", check)
    monkeypatch.setattr(tools.check, "describe_machine", lambda device: None)
    common = ["--device", "cpu", "--state", str(tmp_path), "--total", "2"]
    assert tools.check.main(common) == 1
    out = capsys.readouterr().out
    assert "FAILED smoke: wrong" in out and "left in: tests" in out
    assert list(deadlines) == list(tools.check.PARTS)
    assert max(deadlines.values()) <= 120
    found.clear()
    assert tools.check.main(common) == tools.check.LEFT
    found["tests"] = tools.parts.Outcome([], True)
    assert tools.check.main(common) == 0
    assert "passed on cpu" in capsys.readouterr().out


def test_an_error_of_a_part_ends_that_part_alone(
    tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    wrong = {"tests"}
    ran: list[str] = []

    def check(part: str, options: Any, deadline: float) -> Any:
        ran.append(part)
        if part in wrong:
            raise tools.build.CheckError("it cannot run")
        return tools.parts.Outcome([], True)

    monkeypatch.setattr(tools.check, "check", check)
    monkeypatch.setattr(tools.check, "describe_machine", lambda device: None)
    common = ["--device", "cpu", "--state", str(tmp_path)]
    assert tools.check.main(common) == 1
    assert ran == list(tools.check.PARTS)
    assert "FAILED tests: it cannot run" in capsys.readouterr().out
    wrong.add("build")
    ran.clear()
    assert tools.check.main(common) == 1 and ran == ["build"], "nothing runs without the package"


def test_no_part_begins_after_the_whole_call_s_time(
    tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    ran: list[str] = []
    clock = [0.0]

    def check(part: str, options: Any, deadline: float) -> Any:
        ran.append(part)
        clock[0] += 60
        return tools.parts.Outcome([], True)

    monkeypatch.setattr(tools.check, "check", check)
    monkeypatch.setattr(tools.check, "describe_machine", lambda device: None)
    monkeypatch.setattr(tools.check.time, "monotonic", lambda: clock[0])
    line = ["--device", "cpu", "--state", str(tmp_path), "--total", "2"]
    assert tools.check.main(line) == tools.check.LEFT
    assert ran == ["build", "smoke"]
    assert "left in: targets, tests, sanitizer, bench, ops" in capsys.readouterr().out


def test_a_step_that_is_ended_takes_its_own_processes_along(tools: Any, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    line = ["bash", "-c", f"sleep 1000 & echo $! > {file}.part && mv {file}.part {file}; wait"]
    for seconds in (1, 10, 60):  # on a busy machine the first may be too short to begin
        assert tools.build.run_step("made", line, dict(os.environ), seconds) == -signal.SIGKILL
        if file.is_file():
            break
    state = Path("/proc", file.read_text().strip(), "stat")
    end = time.monotonic() + 60
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.02)
    assert not state.exists() or state.read_text().split()[2] == "Z"


class Package:
    """A package to build, and how often it was built."""

    def __init__(self, tools: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.built = 0
        self.build, self.folder = tools.build, folder
        self.packed = folder / tools.build.PACKED
        monkeypatch.setattr(tools.build, "WORK", folder / "work")
        monkeypatch.setattr(tools.build, "SITE", folder / "work" / "site")
        monkeypatch.setattr(tools.build, "_install", self.install)
        monkeypatch.setattr(tools.build, "_show", lambda: None)

    def install(self, device: str) -> None:
        self.built += 1
        shutil.rmtree(self.build.SITE, ignore_errors=True)
        self.build.SITE.mkdir(parents=True)
        (self.build.SITE / "module.bin").write_bytes(random.Random(1).randbytes(200_000))

    def call(self) -> None:
        """As on a bare machine."""
        shutil.rmtree(self.build.WORK, ignore_errors=True)
        self.build.build("cpu", self.folder)
        assert (self.build.SITE / "module.bin").stat().st_size == 200_000
        assert [path.name for path in self.build.WORK.iterdir()] == ["site"]


@pytest.fixture
def package(tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Package:
    return Package(tools, monkeypatch, tmp_path)


def test_the_built_package_travels(package: Package) -> None:
    """Built once, packed, unpacked on a machine without it; other sources build again."""
    for _ in range(3):
        package.call()
    package.build.build("cpu", package.folder)
    assert package.built == 1
    stamp = package.build.SITE / package.build.STAMP
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "sources": "other"}))
    package.packed.write_bytes(b"cut off")
    package.build.build("cpu", package.folder)
    assert package.built == 2


def test_a_damaged_package_is_built_again(package: Package) -> None:
    """The stamp comes first in the archive: half of it must not be taken for a package."""
    package.call()
    whole = package.packed.read_bytes()
    middle = len(whole) // 2
    damaged = [whole[:end] for end in (0, 20, middle, len(whole) - 4)]
    damaged += [whole[:middle] + bytes(64) + whole[middle + 64 :]]
    damaged += [whole[:middle] + b"\xff" * 64 + whole[middle + 64 :]]
    for count, data in enumerate(damaged, 2):
        package.packed.write_bytes(data)
        package.call()
        assert package.built == count
    package.packed.write_bytes(whole)
    package.call()
    assert package.built == len(damaged) + 1
