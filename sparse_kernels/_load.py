"""Loads the native module, once and late, so that the package imports without it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

# Before _native: both link an OpenMP runtime named libgomp.so.1, and the one that is loaded first
# serves both.  torch ships its own, so torch must come first, or two runtimes fight for the cores.
import torch  # noqa: F401

HOW_TO_BUILD = (
    "build it with `pip install .` in the source tree (needs a C++17 compiler; cmake, ninja and "
    "pybind11 are fetched by pip), or `make native` to work from the source tree itself"
)


class NativeMissingError(ImportError):
    """The native module is not there or cannot be loaded; the message says what to do."""


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason.  A forced instruction set that does not exist raises."""
    try:
        return importlib.import_module("sparse_kernels._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "sparse_kernels._native":
            raise
        return None, "it was not built for this interpreter"
    except ImportError as error:
        # The module checks SPARSE_KERNELS_ISA while it is imported; that is the user's error, not a
        # missing module, and going on without the kernels would hide it.
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        return None, f"it is there, but could not be loaded: {error}"


def native() -> Any:
    """The module ``sparse_kernels._native``.

    Raises NativeMissingError if it was not built, and ValueError if the environment variable
    SPARSE_KERNELS_ISA names an instruction set that this build or this CPU does not have.
    """
    module, why = _load()
    if module is None:
        raise NativeMissingError(
            f"the native module sparse_kernels._native is not usable: {why}; {HOW_TO_BUILD}"
        )
    return module


def native_or_none() -> Any:
    """The module ``sparse_kernels._native``, or None if it was not built.

    Raises ValueError as ``native`` does.
    """
    return _load()[0]


def why_missing() -> str:
    """Why ``native_or_none`` gives None; empty if it does not."""
    return _load()[1]
