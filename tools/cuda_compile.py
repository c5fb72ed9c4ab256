"""Compile every csrc/cuda/*.cu for each architecture, print what the kernels use, and fail on
register spills.

Needs nvcc, neither a GPU nor a CUDA torch. Objects go to build/cuda-compile/. Without nvcc the
script says so and succeeds, unless SPARSE_KERNELS_CUDA=ON asks for CUDA: then it fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "cuda-compile"
ARCHITECTURES = ("sm_80", "sm_90a")
ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'")
SPILL = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+)"
)
USED = re.compile(r"Used (?P<registers>\d+) registers")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel on one architecture."""

    arch: str
    name: str
    registers: int
    spill_bytes: int


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, then PATH, then CUDA_HOME; None where there is none."""
    candidates = [os.environ.get("CUDACXX"), "nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(str(Path(home) / "bin" / "nvcc"))
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def parse_ptxas(log: str) -> list[Kernel]:
    """Kernels in the log of `nvcc -Xptxas -v`; device functions that ptxas lists beside them are
    left out.
    """
    kernels: list[Kernel] = []
    arch = name = ""
    spill = 0
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            arch, name, spill = entry["arch"], entry["name"], 0
        elif found := SPILL.search(line):
            spill = int(found["stores"]) + int(found["loads"])
        elif name and (used := USED.search(line)):
            kernels.append(Kernel(arch, name, int(used["registers"]), spill))
            name = ""
    return kernels


def compile_source(nvcc: str, source: Path, arch: str) -> tuple[Path, str, int, str]:
    """Compile one source for one architecture; returns (source, arch, exit status, log)."""
    target = OUT / f"{source.stem}.{arch}.o"
    command = [nvcc, "-c", str(source), "-o", str(target), "-std=c++17", "-O3", f"-arch={arch}"]
    command += ["-I", str(ROOT / "csrc"), "-Xptxas", "-v", "-Xcompiler", "-fPIC,-Wall"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return source, arch, done.returncode, done.stdout + done.stderr


def compile_all(nvcc: str, sources: list[Path]) -> int:
    """Compile all sources for all architectures, print a table; returns the number of failures."""
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda job: compile_source(nvcc, *job), jobs))
    failures = 0
    for source, arch, status, log in results:
        kernels = parse_ptxas(log)
        print(f"{source.relative_to(ROOT)} {arch}: {len(kernels)} kernels, exit status {status}")
        if status or not kernels:
            failures += 1
            print(log if status else "no kernel was found in ptxas's output:\n" + log)
        for kernel in kernels:
            verdict = f"SPILLS {kernel.spill_bytes} bytes" if kernel.spill_bytes else "no spill"
            failures += bool(kernel.spill_bytes)
            print(f"  {kernel.registers:4d} registers  {verdict:18s} {kernel.name}")
    return failures


def main() -> int:
    """Returns the exit status."""
    start = time.monotonic()
    nvcc = find_nvcc()
    if nvcc is None:
        required = os.environ.get("SPARSE_KERNELS_CUDA", "").upper() == "ON"
        print(
            "nvcc not found: CUDA sources were NOT compiled. "
            "Put nvcc on PATH, or set CUDACXX or CUDA_HOME."
        )
        return 1 if required else 0
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources:
        print("expected CUDA sources in csrc/cuda/*.cu, found none")
        return 1
    failures = compile_all(nvcc, sources)
    print(
        f"{len(sources)} CUDA sources x {len(ARCHITECTURES)} architectures, {failures} failures, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
