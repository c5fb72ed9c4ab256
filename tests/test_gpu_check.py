"""tools/gpu_check.py runs a GPU machine's tests in parts that go on where they stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"
NAMES = [f"tests/test_x.py::test_{i}" for i in range(7)]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    specification = importlib.util.spec_from_file_location("gpu_check", TOOL)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "PASSED", tmp_path / "work" / "passed.txt")
    monkeypatch.setattr(module, "TESTS_AT_ONCE", 3)
    return module


def test_tests_go_on_where_they_stopped(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    clock = [0.0]

    def run_step(name: str, command: list[str], environment: dict[str, str]) -> int:
        ran.append(command[1:])
        clock[0] += 60
        return 0

    monkeypatch.setattr(tool, "run_step", run_step)
    monkeypatch.setattr(tool.time, "monotonic", lambda: clock[0])
    assert not tool.run_in_parts(["pytest"], NAMES, deadline=59)
    assert ran == [NAMES[:3]]
    assert tool.run_in_parts(["pytest"], NAMES, deadline=1000)
    assert ran == [NAMES[:3], NAMES[3:6], NAMES[6:]]
    assert tool.run_in_parts(["pytest"], NAMES, deadline=0)  # nothing is left to begin
    assert len(ran) == 3


def test_a_failure_is_an_error_and_runs_again(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status = [1]
    monkeypatch.setattr(tool, "run_step", lambda *_: status[0])
    with pytest.raises(tool.CheckError, match="exit status 1"):
        tool.run_in_parts(["pytest"], NAMES, deadline=float("inf"))
    assert not tool.PASSED.exists()
    status[0] = 0
    assert tool.run_in_parts(["pytest"], NAMES, deadline=float("inf"))
    assert tool.PASSED.read_text().splitlines() == NAMES
