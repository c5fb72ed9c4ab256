"""The journal of a benchmark: what it must agree with, and how a case is carried out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_kernels.backends import triton
from sparse_kernels.workbench import machine
from tools.gpu_bench.measure import Broken, reason, still_works

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools"))  # gpu_check.py and pytest's plugin import it by this name
import gpu_journal  # type: ignore[import-not-found]  # noqa: E402

# What a row depends on: the tests' table of cases too, which smoke runs.
SOURCES = (
    *gpu_journal.BUILT,
    "tools/gpu_bench",
    "tools/gpu_journal.py",
    "tools/gpu_roofline.py",
    "tests/cases.py",
)
HEADER = "machine"  # key of the entry that holds the machine's header


def open_journal(options: argparse.Namespace, device: torch.device, name: str) -> Any:
    """<state>/<name>.jsonl, with the machine's header in it."""
    header = machine.header()
    version = "none"
    if triton.installed():
        import triton as package

        version = str(package.__version__)
    identity = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": header["cpu"] if device.type != "cuda" else None,
        "torch": header["torch"],
        "triton": version,
        "size": options.size,
        "rounds": options.rounds,
        "sources": gpu_journal.fingerprint(*SOURCES),
    }
    ignoring = ("sources",) if options.any_sources else ()
    journal = gpu_journal.Journal(options.state / f"{name}.jsonl", identity, ignoring)
    if options.again:
        journal.forget_failures()
    if name == "bench" and HEADER not in journal.entries:
        journal.finish(HEADER, "passed", **header, triton=version)
    return journal


def fault_key(key: str, contender: str) -> str:
    return f"{gpu_journal.FAULT}{key}: {contender}"


def faults(journal: Any, key: str) -> dict[str, str]:
    """Contenders of a row that broke the CUDA context before, and how."""
    begin = fault_key(key, "")
    return {
        k.removeprefix(begin): entry.row["why"]
        for k, entry in journal.entries.items()
        if k.startswith(begin)
    }


def carry_out(
    journal: Any, key: str, make: Callable[[], Any], absent: type[Exception] | None = None
) -> bool:
    """Run a case and note its result; False if the CUDA context is broken now.

    ``absent``: the exception of a case that is not there, noted as skipped.
    """
    journal.begin(key)
    try:
        row = make()
    except Broken as error:
        journal.finish(fault_key(key, error.contender), "failed", why=error.why)
        journal.forget(key)  # another try, without that contender
        print(f"{key}: {error} broke the CUDA context", flush=True)
        return False
    except Exception as error:  # a case that fails must not hide the others
        why = reason(error)
        if absent is not None and isinstance(error, absent):
            journal.finish(key, "skipped", why=why)
            return True
        journal.finish(key, "failed", why=why)
        try:
            still_works(key, error)
        except Broken:
            print(f"{key}: {why} broke the CUDA context", flush=True)
            return False
        return True
    journal.finish(key, "passed", **row)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # rows differ in size: what one keeps, another lacks
    return True
