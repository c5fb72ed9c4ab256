"""Loads the native module, once and late, so that the package imports without it."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

# Before _native: both link an OpenMP runtime named libgomp.so.1, and the one that is loaded first
# serves both.  torch ships its own, so torch must come first, or two runtimes fight for the cores.
import torch

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
        module = importlib.import_module("sparse_kernels._native")
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_one_thread)
        return module, ""
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


def _one_thread() -> None:
    """In a forked child: compute on one thread, as DataLoader's workers do.

    The threads of libgomp's pool do not survive a fork, and the next parallel region would wait for
    them for ever, torch's as well as ours.  Results do not depend on the number of threads.
    """
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


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
