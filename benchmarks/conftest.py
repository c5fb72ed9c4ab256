"""Options of the benchmarks under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels.workbench.bench import ops, shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="time the small shapes only (seconds)")
    parser.addoption("--device", default="cpu", help="device to time on: cpu, cuda")
    parser.addoption("--density", type=float, default=0.05, help="share of the weights stored")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "task" not in metafunc.fixturenames:
        return
    size = "small" if metafunc.config.getoption("--small") else "core"
    device = torch.device(metafunc.config.getoption("--device"))
    density = metafunc.config.getoption("--density")
    tasks = list(ops.tasks(shapes.SETS[size], size, density, ("1x1", "4x1"), 128, device))
    metafunc.parametrize("task", [make for _, make in tasks], ids=[key for key, _ in tasks])
