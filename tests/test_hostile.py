"""Some hostile calls in every run, thousands in `make test-full`.

``python tests/hostile_calls.py --calls N`` makes as many as wanted.
"""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is a test dependency")
from hostile_calls import COUNT, run


def test_layers_under_any_order_of_calls() -> None:
    run(examples=10, steps=25)
    assert COUNT["calls"] > 150 and COUNT["refused"] > 40


@pytest.mark.slow
def test_layers_under_many_more_calls() -> None:
    run(examples=1500, steps=50, seed=1)
