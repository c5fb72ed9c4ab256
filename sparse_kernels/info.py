"""What is installed, what serves on this machine, and why not something else."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path
from typing import Any

import torch

from . import __version__, plan
from ._load import native_or_none, why_missing

_ISA_VARIABLE = "SPARSE_KERNELS_ISA"
_WEIGHTED = ("linear", "linear_dgrad", "linear_wgrad", "conv2d", "conv2d_dgrad", "conv2d_wgrad")
_SHOWN = (*_WEIGHTED, "batch_norm", "max_pool2d", "avg_pool2d", "dropout")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes loaded in this process; more than one fight for the cores.

    Empty where the operating system does not tell (no /proc).
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    names = ("libgomp", "libomp", "libiomp")
    return sorted(path for path in paths if Path(path).name.startswith(names))


def collect() -> dict[str, Any]:
    """Everything ``describe`` tells, as a dict of plain values.

    Keys: version, package, torch, threads, native (None, or build_info() with the instruction sets
    in use and supported), why_no_native, forced_isa, openmp_runtimes, gpu, why_no_gpu, triton,
    serving (device and dtype -> operator -> backend, or why none).
    Raises ValueError if SPARSE_KERNELS_ISA names an instruction set that cannot be used.
    """
    module = native_or_none()
    native: dict[str, Any] | None = None
    if module is not None:
        native = dict(module.build_info())
        native["file"] = module.__file__
        native["isa"] = module.isa()
        native["supported_isas"] = module.supported_isas()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "version": __version__,
        "package": str(Path(__file__).parent),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": native,
        "why_no_native": why_missing(),
        "forced_isa": os.environ.get(_ISA_VARIABLE, ""),
        "openmp_runtimes": openmp_runtimes(),
        "gpu": gpu,
        "why_no_gpu": "" if gpu else _why_no_gpu(),
        "triton": util.find_spec("triton") is not None,
        "serving": _serving(),
    }


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch finds no usable GPU (driver, CUDA_VISIBLE_DEVICES)"


def describe() -> str:
    """The installation as text of several lines: built, chosen, and why not another."""
    found = collect()
    rows = [
        ("sparse_kernels", f"{found['version']} in {found['package']}"),
        ("torch", f"{found['torch']}, {found['threads']} threads"),
        *_native_rows(found),
        ("OpenMP runtime", _openmp(found["openmp_runtimes"])),
        ("GPU", found["gpu"] or f"none: {found['why_no_gpu']}"),
        ("triton", "installed" if found["triton"] else "not installed (extra: triton)"),
        *_serving_rows(found),
    ]
    return "\n".join(f"{name:<18} {text}" for name, text in rows)


def _native_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    native = found["native"]
    if native is None:
        return [("native module", f"missing: {found['why_no_native']}")]
    built = f"{native['version']}, {native['compiler']}, OpenMP {native['openmp']}"
    if native["cuda"]:
        architectures = native["cuda_architectures"].replace(",", ", ")
        cuda = f"built by nvcc {native['cuda_version']} for {architectures}"
    else:
        cuda = f"not built: {native['why_no_cuda']}"
    return [
        ("native module", f"{built}, {native['file']}"),
        ("instruction sets", _isas(native)),
        ("  in use", _chosen(native, found["forced_isa"])),
        ("CUDA kernels", cuda),
    ]


def _isas(native: dict[str, Any]) -> str:
    """Each built instruction set, with why it cannot be used where that is so."""
    return ", ".join(
        name if name in native["supported_isas"] else f"{name} (not supported by this CPU or OS)"
        for name in native["isas"]
    )


def _chosen(native: dict[str, Any], forced: str) -> str:
    if forced:
        return f"{native['isa']} (forced by {_ISA_VARIABLE}={forced})"
    return (
        f"{native['isa']} (the highest that this CPU supports; "
        f"{_ISA_VARIABLE}={'|'.join(native['supported_isas'])} forces another)"
    )


def _openmp(paths: list[str]) -> str:
    if not paths:
        return "none found in this process"
    warning = "" if len(paths) == 1 else " (MORE THAN ONE: import torch before other packages)"
    return ", ".join(paths) + warning


def _serving_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Which backend computes what on which device, and why not the others."""
    rows = [
        (device_dtype, _join(per_device)) for device_dtype, per_device in found["serving"].items()
    ]
    return rows if found["gpu"] else [*rows, ("float32 on cuda", "nothing: no GPU")]


def _join(serving: dict[str, str]) -> str:
    """Operators that have the same answer, together."""
    groups: dict[str, list[str]] = {}
    for op, answer in serving.items():
        groups.setdefault(answer, []).append(op)
    return "; ".join(f"{', '.join(ops)}: {answer}" for answer, ops in groups.items())


def _serving() -> dict[str, dict[str, str]]:
    """For each device and dtype: operator -> the backend that serves it, or why none does."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    kinds = [(device, dtype) for device in devices for dtype in (torch.float32, torch.float64)]
    return {
        f"{str(dtype).removeprefix('torch.')} on {device}": {
            op: _serves(op, torch.empty(0, 0, dtype=dtype, device=device)) for op in _SHOWN
        }
        for device, dtype in kinds
    }


def _serves(op: str, x: torch.Tensor) -> str:
    values = x.new_empty(0, 1, 1) if op in _WEIGHTED else None
    try:
        backend = plan.choose(op, x, values).__name__.removeprefix("sparse_kernels.backends.")
    except plan.BackendError:
        why = plan.reasons(op, x, values)
        return "none (" + "; ".join(f"{name} {text}" for name, text in why.items()) + ")"
    return f"backend {backend}"
