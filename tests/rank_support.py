"""A job of several processes on this machine: run one function of a test on every rank (gloo).

One Python process imports torch and this package once and forks the ranks, so that a job costs a
few seconds.  A rank's function gets (rank, world, folder); what it returns is saved for the test.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import sparse_kernels

PACKAGE = Path(sparse_kernels.__file__).resolve().parent.parent  # installed, or the source tree
TESTS = Path(__file__).resolve().parent
TIMEOUT = 240


def run_ranks(world: int, folder: Path, module: str, function: str) -> list[Any]:
    """What module.function(rank, world, folder) returned on each rank, 0 first.

    Raises AssertionError with the output if a rank failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, str(world), str(folder), module, function],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def environment() -> dict[str, str]:
    """The environment of a child: the package under test, one thread, no measurements."""
    paths = [str(PACKAGE), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "SPARSE_KERNELS_TUNE": "off",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _rank(rank: int, world: int, folder: Path, module: str, function: str) -> None:
    """The life of one rank; never returns."""
    code = 1
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
        result = getattr(importlib.import_module(module), function)(rank, world, folder)
        torch.save(result, folder / f"rank{rank}.pt")
        distributed.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    world, folder, module, function = (int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5])
    torch.set_num_threads(1)
    importlib.import_module(module)
    importlib.import_module("torch.nn.parallel.distributed")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _rank(rank, world, folder, module, function)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
