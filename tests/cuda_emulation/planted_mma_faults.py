"""Shows that the emulated tests of the tensor-core kernels fail when a kernel is wrong: each fault
is planted into a copy of csrc, which is built for one dtype and tested; the tests must fail.

    python tests/cuda_emulation/planted_mma_faults.py [NAME ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from planted_faults import HERE, ROOT, replace_once

# Of each dtype the source that holds its kernels.
SOURCES = {"bfloat16": "mma_bfloat.cu", "float16": "mma_half.cu", "float32": "mma_tf32.cu"}


class Fault(NamedTuple):
    """`before` in `file` becomes `after`; `tests` is pytest's -k expression that must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    dtype: str = "bfloat16"


FAULTS = (
    Fault("tile: wrong lane's row of ldmatrix", "mma_tile.cuh",
          "tile.Place(m + lane % 8 + low * 8, k / kChunk<T> + high)",
          "tile.Place(m + (lane ^ 1) % 8 + low * 8, k / kChunk<T> + high)", "b16-even and product"),
    Fault("tile: matrices of A swapped", "mma_tile.cuh",
          "LoadMatrices<true>(a, tile.Place(k + lane % 8 + high * 8, m / kChunk<T> + low));",
          "LoadMatrices<true>(a, tile.Place(k + lane % 8 + low * 8, m / kChunk<T> + high));",
          "b16-even and wgrad"),
    Fault("tile: wrong lane of a TF32 fragment", "mma_tile.cuh",
          "words[i] = tile.Word(k + lane % 4 + i % 2 * 4,",
          "words[i] = tile.Word(k + lane / 8 + i % 2 * 4,", "b16-even and dgrad", "float32"),
    Fault("tile: TF32 operand not rounded", "mma_tile.cuh",
          "if constexpr (sizeof(T) == 4) word = RoundToTf32(word);", "", "b16-even and product",
          "float32"),
    Fault("tile: chunk of B off by one", "mma_tile.cuh",
          "tile.Place(n + lane % 8 + high * 8, k / kChunk<T> + low)",
          "tile.Place(n + lane % 8 + high * 8, k / kChunk<T> + low + 1)", "b16-even and product"),
    Fault("tile: a partial chunk copied in whole", "mma_tile.cuh",
          "count = count < 0 ? 0 : count < kChunk<T> ? count : kChunk<T>;",
          "count = count <= 0 ? 0 : kChunk<T>;", "b16-primes and product"),
    Fault("product: barrier dropped", "mma_product.cuh", "is filled next. __syncthreads();",
          "is filled next.\n", "b16-wide-rows and product"),
    Fault("product: waits for one copy too few", "mma_product.cuh",
          "WaitCopies<kMmaStages - 2>();", "WaitCopies<kMmaStages - 1>();",
          "b16-wide-rows and product"),
    Fault("product: fills the stage that is multiplied", "mma_product.cuh",
          "const int free = slot == 0 ? kMmaStages - 1 : slot - 1;", "const int free = slot;",
          "b16-wide-rows and product"),
    Fault("product: last block of a stage left out", "mma_product.cuh",
          "if (walk.Next(entries[j])) ++count;",
          "if (walk.Next(entries[j]) && j < P::kItems - 1) ++count;",
          "b16-wide-rows and product"),
    Fault("product: rows of a partial block stored", "mma_product.cuh",
          "if (o.pairs && channel < target.count) {", "if (o.pairs) {", "b16-narrow and product"),
    Fault("product: points past the batch stored", "mma_product.cuh",
          "point < o.points ? lattice.Pixel(point) : -1", "lattice.Pixel(point)",
          "b16-narrow and product"),
    Fault("product: bias of the neighbour", "mma_product.cuh",
          "__ldg(o.bias + column + channel)", "__ldg(o.bias + column + (channel ^ 1))",
          "b16-even and product"),
    Fault("walk: one entry past the end", "mma_walk.cuh", "if (next_ >= end_) return false;",
          "if (next_ > end_) return false;", "b16-even and product"),
    Fault("walk: transposed order forgotten", "mma_walk.cuh", "__ldg(index_.t_perm + next_)",
          "next_", "b16-even and dgrad"),
    Fault("walk: groups mixed", "mma_walk.cuh", "if (w_.groups == 1) continue;",
          "if (w_.groups > 0) continue;", "b16-conv-groups and dgrad"),
    Fault("window: padding off by one", "mma_window.cuh", "y >= 0 && y < w.src_h",
          "y >= 0 && y <= w.src_h", "b16-conv3x3 and product"),
    Fault("window: phase of the stride forgotten", "mma_window.cuh",
          "return Rest(tap).y % w_.stride_h == 0 && Rest(tap).x % w_.stride_w == 0;",
          "return true;", "b16-conv-stride2 and dgrad"),
    Fault("wgrad: barrier dropped", "mma_wgrad.cuh", "is filled next. __syncthreads();",
          "is filled next.\n", "b16-parts and wgrad"),
    Fault("wgrad: a part ends one point early", "mma_wgrad.cuh",
          "begin + min(o.points - begin, o.part);", "begin + min(o.points - begin, o.part - 1);",
          "b16-parts and wgrad"),
    Fault("wgrad: outside of a partial block not zero", "mma_wgrad.cuh",
          "const bool there = n.row + row < w.dst_group;", "const bool there = true;",
          "infinities"),
    Fault("wgrad: tail not zeroed", "mma_wgrad.cuh", "out[i] = 0.0f;", ";",
          "b16-long-tail and wgrad"),
)  # fmt: skip


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault in it, cut down to one dtype's block kernels."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for dtype, source in SOURCES.items():
        if dtype != fault.dtype:
            (csrc / "cuda" / source).unlink()
    launchers = csrc / "cuda" / "mma_launchers.cu"
    calls = {
        "float32": "if (element == Element::kFloat32) return of(float());",
        "float16": "if (element == Element::kFloat16) return of(__half());",
        "bfloat16": "of(__nv_bfloat16());",
    }
    for dtype, call in calls.items():
        if dtype != fault.dtype:
            replace_once(launchers, call, "")
    replace_once(csrc / "cuda" / fault.file, fault.before, fault.after)
    return csrc


def is_found(fault: Fault) -> bool:
    """Whether the tests fail, by a failed assertion or a fault of the emulator, not otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(fault, Path(folder))
        # Objects that the fault does not touch are taken over.
        built = ROOT / "build" / "cuda-emulation" / "checked"
        if built.is_dir():
            shutil.copytree(built, Path(folder) / "out")
        environment = os.environ | {"SPARSE_KERNELS_EMULATION_CSRC": str(csrc)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k"]
        command += [f"{fault.dtype} and {fault.tests}", str(HERE / "test_mma_kernels.py")]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
    lines = [line for line in done.stdout.splitlines() if re.match(r"E   +\S", line)]
    # An error of the compiler or of collection is no finding.
    found = done.returncode == 1 and any(
        "launch failed" in line or re.match(r"E +(AssertionError|assert )", line) for line in lines
    )
    print(f"{'found' if found else 'MISSED'} {fault.name}")
    for line in lines[:1] or [(done.stdout + done.stderr).strip()[-300:]]:
        print(f"       {line[:200]}", flush=True)
    return found


def main() -> int:
    """Returns the exit status: 1 if a fault was missed."""
    wanted = sys.argv[1:]
    unknown = set(wanted) - {fault.name for fault in FAULTS}
    if unknown:
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not wanted or fault.name in wanted]
    missed = [fault.name for fault in chosen if not is_found(fault)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
