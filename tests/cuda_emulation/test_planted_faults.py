"""Every planted fault still fits the sources; that the tests find them takes minutes and is shown
by planted_faults.py and planted_mma_faults.py in this folder.
"""

from __future__ import annotations

from pathlib import Path

import planted_faults
import planted_mma_faults
import pytest
from planting import HERE, Fault, includes, plant

FAULTS = (*planted_faults.FAULTS, *planted_mma_faults.FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted(fault: Fault, tmp_path: Path) -> None:
    plant(fault, tmp_path)  # SystemExit where its text is not in the source exactly once
    assert fault.file in includes(fault.unit), "the unit is not made of the file with the fault"
    assert (HERE / fault.suite).exists()


def test_the_names_are_told_apart() -> None:
    assert len({(fault.name, fault.suite) for fault in FAULTS}) == len(FAULTS)
