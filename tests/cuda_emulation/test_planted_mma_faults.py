"""Every planted fault of the tensor-core kernels still fits the sources; that the tests find them
takes minutes and is shown by `python tests/cuda_emulation/planted_mma_faults.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_mma_faults import FAULTS, Fault, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted(fault: Fault, tmp_path: Path) -> None:
    plant(fault, tmp_path)  # SystemExit where its text is not in the source exactly once
