"""Options of the benchmarks, and a path on which they find each other whichever folder pytest
starts in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="time the small shapes only (seconds)")
    parser.addoption("--device", default="cpu", help="device to time on: cpu, cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from problems import SHAPES, SMALL_SHAPES  # found through the path above

    if "shape" in metafunc.fixturenames:
        shapes = SMALL_SHAPES if metafunc.config.getoption("--small") else SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda shape: shape.name)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
