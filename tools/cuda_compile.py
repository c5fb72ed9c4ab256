"""Compile every csrc/cuda/*.cu for each architecture, print what the kernels use, and fail on
register spills.

    python tools/cuda_compile.py [--write docs/cuda.md]

With --write the table also replaces the one between the markers of that file. Needs nvcc, neither a
GPU nor a CUDA torch. Objects go to build/cuda-compile/. Without nvcc the
script says so and succeeds, unless SPARSE_KERNELS_CUDA=ON asks for CUDA: then it fails.
"""

from __future__ import annotations

import argparse
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
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Of a multiprocessor, by architecture: registers, threads, blocks, shared memory in bytes, and what
# of it the system keeps per block (programming guide, "technical specifications per compute
# capability"). Registers are given to a warp in units of 256, so 8 per thread.
LIMITS = {
    "sm_80": (65536, 2048, 32, 164 << 10, 1 << 10),
    "sm_90a": (65536, 2048, 32, 228 << 10, 1 << 10),
    "sm_100": (65536, 2048, 32, 228 << 10, 1 << 10),
}
CUB = "_ZN3cub"  # how the mangled names of the kernels begin that CUB's templates bring
THREADS = 256  # of most kernels' blocks (kWarp * kWarpsPerBlock in csrc/cuda/product.cuh)
# The tensor-core kernels: BlockProductKernel<type, block, warps, tiles of 16 points, ...> and
# BlockWgradKernel<type, block>.
BLOCK_PRODUCT = re.compile(r"BlockProductKernel<\w+, (\d+), (\d+), (\d+),")
BLOCK_WGRAD = re.compile(r"BlockWgradKernel<(\w+), (\d+)>")
ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'")
SPILL = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+)"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel on one architecture."""

    arch: str
    name: str
    registers: int
    shared_bytes: int  # static
    spill_bytes: int
    threads: int = THREADS
    dynamic_bytes: int = 0  # shared memory that the launch asks for

    @property
    def occupancy(self) -> float:
        """Part of a multiprocessor's threads that can be resident."""
        registers, threads, blocks, shared, kept = LIMITS[self.arch]
        per_thread = -(-self.registers // 8) * 8
        resident = min(
            registers // (per_thread * self.threads),
            threads // self.threads,
            blocks,
            shared // (self.shared_bytes + self.dynamic_bytes + kept),
        )
        return resident * self.threads / threads

    def launched(self, form: str) -> Kernel:
        """With the threads and dynamic shared memory of its launches; `form` is the name in words.

        The sizes are those of ProductTile and WgradTile in csrc/cuda/mma_*.cuh: three stages of
        rows of 128 bytes, or of 1 + kPer tiles of 128 * block bytes.
        """
        if found := BLOCK_PRODUCT.search(form):
            block, warps, tiles = map(int, found.groups())
            rows = warps * tiles * 16 + block
            return self._replace(threads=warps * 32, dynamic_bytes=3 * rows * 128)
        if found := BLOCK_WGRAD.search(form):
            block = int(found[2])
            per = (64 if found[1] == "float" else 128) // block
            return self._replace(threads=128, dynamic_bytes=3 * (1 + per) * 128 * block)
        return self


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, then PATH, then CUDA_HOME; None where there is none."""
    candidates = [os.environ.get("CUDACXX"), "nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(str(Path(home) / "bin" / "nvcc"))
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def parse_ptxas(log: str) -> list[Kernel]:
    """Kernels in the log of `nvcc -Xptxas -v`. Device functions that ptxas lists beside a kernel,
    where it does not inline them, are no kernels, but their spills are the kernel's.
    """
    kernels: list[Kernel] = []
    arch = name = ""
    spill = 0
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            arch, name, spill = entry["arch"], entry["name"], 0
        elif found := SPILL.search(line):
            spilled = int(found["stores"]) + int(found["loads"])
            spill += spilled
            if not name and kernels:  # listed after its kernel
                kernels[-1] = kernels[-1]._replace(spill_bytes=kernels[-1].spill_bytes + spilled)
        elif name and (used := USED.search(line)):
            shared = int(used["shared"] or 0)
            kernels.append(Kernel(arch, name, int(used["registers"]), shared, spill))
            name = ""
    return kernels


def compile_source(nvcc: str, source: Path, arch: str) -> tuple[Path, str, int, str]:
    """Compile one source for one architecture; returns (source, arch, exit status, log).

    Machine code only: the host side is the same for all and is compiled when the package is built.
    """
    target = OUT / f"{source.stem}.{arch}.cubin"
    command = [nvcc, "-cubin", str(source), "-o", str(target), "-std=c++17", "-O3"]
    command += [f"-arch={arch}", "-I", str(ROOT / "csrc"), "-Xptxas", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return source, arch, done.returncode, done.stdout + done.stderr


def demangle(names: list[str]) -> dict[str, str]:
    """Readable forms, cut to the kernel and its template arguments, by cu++filt or c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    forms = {}
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        plain = re.sub(r"sk::cuda::|\(anonymous namespace\)::|\(int\)|^void ", "", line)
        head, template, _ = plain.partition(">(")
        forms[name] = head + ">" if template else plain.partition("(")[0]
    return forms


def cub_rows(kernels: list[Kernel]) -> list[str]:
    """One line per kind of CUB's kernels: how many, their registers, shared memory and spills.

    By kind, since the names hold the architecture (CUB_300001_SM_800) and its tuning; without
    occupancy, since the sizes of their blocks are CUB's.
    """
    forms = demangle([kernel.name for kernel in kernels])
    rows: dict[str, dict[str, list[Kernel]]] = {}
    for kernel in kernels:
        kind = forms[kernel.name].partition("<")[0].split("::")[-1]
        rows.setdefault(kind, {}).setdefault(kernel.arch, []).append(kernel)
    lines = []
    for kind in sorted(rows):
        cells = []
        for arch in ARCHITECTURES:
            there = rows[kind].get(arch, [])
            most = max((k.registers for k in there), default=0)
            shared = max((k.shared_bytes for k in there), default=0)
            spilled = sum(k.spill_bytes for k in there)
            text = f"{len(there)} of up to {most} r, {shared} B" if there else ""
            cells.append(text + (f", SPILLS {spilled} B" if spilled else ""))
        lines.append(f"| CUB's {kind} | " + " | ".join(cells) + " |")
    return lines


def table(kernels: list[Kernel]) -> str:
    """One line per kernel: registers, shared memory, occupancy and spills per architecture."""
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        if not kernel.name.startswith(CUB):
            rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    forms = demangle(list(rows))
    lines = [
        "| kernel | " + " | ".join(ARCHITECTURES) + " |",
        "|---|" + "---|" * len(ARCHITECTURES),
    ]
    for name in sorted(rows, key=lambda name: forms[name]):
        cells = []
        for arch in ARCHITECTURES:
            k = rows[name].get(arch)
            if k is not None:
                k = k.launched(forms[name])
            shared = 0 if k is None else k.shared_bytes + k.dynamic_bytes
            text = "" if k is None else f"{k.registers} r, {shared} B, {k.occupancy:.0%}"
            cells.append(text + (f", SPILLS {k.spill_bytes} B" if k and k.spill_bytes else ""))
        lines.append(f"| {forms[name]} | " + " | ".join(cells) + " |")
    lines += cub_rows([kernel for kernel in kernels if kernel.name.startswith(CUB)])
    return "\n".join(lines) + "\n"


def write_table(path: Path, text: str) -> None:
    """Put the table between the markers of a document; ValueError where they are not."""
    begin, end = "<!-- cuda-table: begin -->\n", "<!-- cuda-table: end -->"
    document = path.read_text(encoding="utf-8")
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"{path}: expected the lines {begin.strip()} and {end}, once each")
    before, rest = document.split(begin)
    path.write_text(before + begin + text + end + rest.split(end)[1], encoding="utf-8")


def architectures(nvcc: str, wanted: list[str]) -> list[str]:
    """Those of `wanted` that this nvcc knows: sm_100 needs 12.8."""
    command = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [arch for arch in wanted if arch.rstrip("a").replace("sm", "compute") in known]


def compile_all(nvcc: str, sources: list[Path], wanted: list[str], document: Path | None) -> int:
    """Compile all sources for the wanted architectures, print a table and put it into `document`;
    returns the number of failures.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sources for arch in architectures(nvcc, wanted)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda job: compile_source(nvcc, *job), jobs))
    failures = 0
    kernels: list[Kernel] = []
    for source, arch, status, log in results:
        found = parse_ptxas(log)
        kernels += found
        spilled = sum(bool(kernel.spill_bytes) for kernel in found)
        print(f"{source.relative_to(ROOT)} {arch}: {len(found)} kernels, {spilled} spill")
        failures += bool(status) + spilled
        if status:
            print(f"nvcc exit status {status}\n{log}")
    if not kernels:
        print("no kernel was found in ptxas's output")
        failures += 1
    text = table(kernels)
    print(f"\n{text}(r: registers per thread; B: shared memory; %: threads resident of 2048)\n")
    if document is not None:
        write_table(document, text)
    return failures


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="document that gets the table")
    parser.add_argument(
        "--arch", action="append", choices=ARCHITECTURES, help="repeatable; default: all of them"
    )
    options = parser.parse_args()
    document: Path | None = options.write
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
    wanted = options.arch or list(ARCHITECTURES)
    failures = compile_all(nvcc, sources, wanted, document)
    print(
        f"{len(sources)} CUDA sources x {len(architectures(nvcc, wanted))} architectures, "
        f"{failures} failures, {time.monotonic() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
