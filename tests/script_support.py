"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def benchmark_script(name: str) -> ModuleType:
    """benchmarks/<name>.py, imported; skips the test where there is no checkout around it."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    if not path.is_file():
        pytest.skip("benchmarks/ lies in a checkout only, not beside an installed package")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
