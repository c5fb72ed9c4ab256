"""Fixtures of all tests: fixed seeds, and uninitialised memory that shows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy
import pytest
import torch

# Filling torch.empty (below) needs torch's deterministic mode, which wants this of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    """Deterministic mode is on only for its NaN filling, so its other warnings are no news."""
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or in company."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled() -> Iterator[None]:
    """torch.empty and its kin hand out NaN (or the largest integer): unwritten outputs fail."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For layers of a few weights: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def strict_products() -> Iterator[None]:
    """Products of float32 on a GPU in float32, not in TF32."""
    holders = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "ieee"
    yield
    for holder, precision in zip(holders, before, strict=True):
        holder.fp32_precision = precision


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own, seeded, so that a test's draws do not depend on what torch draws."""
    return torch.Generator().manual_seed(20)
