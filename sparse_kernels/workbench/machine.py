"""The header of every result: on what, with which versions, from which commit, when."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._load import native_or_none
from ..plan_cache import cpu_model

# Variables that decide how fast memory is allocated and how threads wait. torch, the C library and
# OpenMP read them when the process starts, so that they hold for every contender of a run alike.
# Not the number of threads, which headers and commands tell in words of their own.
_ENVIRONMENT = re.compile(
    r"SPARSE_KERNELS_(ISA|BACKEND)|ATEN_CPU_CAPABILITY|THP_MEM_ALLOC_ENABLE|LD_PRELOAD|GLIBC_TUNABLES|MALLOC_\w+"
    r"|MIMALLOC_\w+|TCMALLOC_\w+|JEMALLOC_\w+|_RJEM_MALLOC_CONF|(?!\w+_NUM_THREADS$)(OMP|GOMP|KMP|MKL|DNNL|ONEDNN)_\w+"
)
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def header() -> dict[str, Any]:
    """CPU, instruction set in use, cores, threads, memory, versions, commit and date (UTC).

    "environment" and "huge_pages": what allocator and threads were told (see ``environment``).
    """
    native = native_or_none()
    return {
        "cpu": cpu_name(),
        "isa": native.isa() if native is not None else "no native module",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "environment": environment(),
        "huge_pages": huge_pages(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_kernels": package_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_header(device: str) -> dict[str, Any]:
    """What a training's header tells beside `header`; of "cuda" how float32 is computed by torch.

    Dense convolutions are cuDNN's in TF32 unless torch is told otherwise.
    """
    if device != "cuda":
        return {"device": device}
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul = torch.backends.cuda.matmul
    return {
        "device": device,
        "float32": {"conv": conv.fp32_precision, "matmul": matmul.fp32_precision},
    }


def one_line(machine: dict[str, Any]) -> str:
    """The header as one line of text, for tables and figures."""
    tag = allocator_tag(machine.get("environment", {}))
    gpu = ""
    if machine.get("device") == "cuda":
        told = ", ".join(f"{what} {how}" for what, how in machine["float32"].items())
        gpu = f"{machine['gpu']} (float32 of torch: {told}), "
    return (
        f"{gpu}{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, "
        f"{f'allocator {tag}, ' if tag else ''}"
        f"torch {machine['torch']}, sparse_kernels {machine['sparse_kernels']} "
        f"({machine['commit']}), {machine['date'][:10]}"
    )


def several(headers: Sequence[dict[str, Any]]) -> str:
    """`one_line` of each machine that the headers name, with all its commits, on its last day."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in sorted(headers, key=lambda header: header["date"]):
        alike = {**found, "commit": "", "date": ""}
        groups.setdefault(one_line(alike), []).append(found)
    return "; ".join(
        one_line({**group[-1], "commit": ", ".join(dict.fromkeys(h["commit"] for h in group))})
        for group in groups.values()
    )


def environment() -> dict[str, str]:
    """The variables of this process that change what is measured: allocator, threads, kernels.

    Of preloaded libraries the names, without this machine's paths.
    """
    found = {name: os.environ[name] for name in sorted(os.environ) if _ENVIRONMENT.fullmatch(name)}
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = ":".join(map(os.path.basename, _preloaded(found)))
    return found


def _preloaded(variables: dict[str, str]) -> list[str]:
    return [path for path in re.split(r"[ :]+", variables.get("LD_PRELOAD", "")) if path]


def huge_pages() -> str | None:
    """The kernel's transparent huge pages: "always", "madvise" (on request) or "never"."""
    try:
        found = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return None
    return found[1] if found else None


def allocator_tag(variables: dict[str, str]) -> str:
    """What file names say of an allocator other than the C library's own; "" for that one.

    "thp" for torch's huge pages, the name of each preloaded library, "malloc" for settings of it.
    """
    tags = ["thp"] if variables.get("THP_MEM_ALLOC_ENABLE") == "1" else []
    for library in _preloaded(variables):
        tags += re.findall(r"^(?:lib)?([a-z0-9_]+)", os.path.basename(library).lower())
    if any(re.match(r"MALLOC_|GLIBC_|\w+MALLOC_", name) for name in variables):
        tags.append("malloc")
    return "-".join(tags)


def cpu_name() -> str:
    """The processor's name as the operating system tells it."""
    return cpu_model()


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Main memory in GiB, where the operating system tells it."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages * size / 2**30, 1)


def package_version() -> str:
    """The installed version, or that this is a source tree."""
    try:
        return metadata.version("sparse_kernels")
    except metadata.PackageNotFoundError:
        return f"{__version__} (source tree)"


def commit() -> str:
    """Short hash of the checkout this runs from, or else of that the native module was built from.

    "+" if there were changes, "unknown" if there is neither.
    """
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie below somebody else's checkout: only our own root counts.
    if not (root / ".git").exists():
        native = native_or_none()
        return "unknown" if native is None else str(native.build_info()["commit"])
    short = _git(root, "rev-parse", "--short=12", "HEAD")
    if short is None:
        return "unknown"
    return short + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
