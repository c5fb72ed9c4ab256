"""Sparse training that is fast by the clock: compressed weights, forward and backward."""

from __future__ import annotations

__version__ = "0.1.0"
