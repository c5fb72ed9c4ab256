"""A few hundred hostile calls in every run; ``python tests/hostile_calls.py`` makes millions."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is a test dependency")
from hostile_calls import COUNT, run


def test_layers_under_any_order_of_calls() -> None:
    run(examples=40, steps=25)
    assert COUNT["calls"] > 300 and COUNT["refused"] > 30


@pytest.mark.slow
def test_layers_under_many_more_calls() -> None:
    run(examples=1500, steps=50, seed=1)
