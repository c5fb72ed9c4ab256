"""The modules of tools/gpu_check.py for its tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def check_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imported as gpu_check.py imports them, from its own folder."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(TOOLS)])
    import gpu_check
    import gpu_check_build
    import gpu_check_parts
    import gpu_journal

    return SimpleNamespace(
        check=gpu_check, build=gpu_check_build, parts=gpu_check_parts, journal=gpu_journal
    )
