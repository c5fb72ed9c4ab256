"""Shows that the emulated tests fail when a kernel is wrong: each fault is planted into a copy of
csrc, which is built and tested; the tests must fail.

    python tests/cuda_emulation/planted_faults.py [NAME ...]
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Fault(NamedTuple):
    """`before` in `file` becomes `after`; `tests` is pytest's -k expression that must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str


FAULTS = (
    Fault("product: wrong lane", "product.cuh", "found.offset, k)", "found.offset, k ^ 1)",
          "product and primes"),
    Fault("product: last entry of a row left out", "product.cuh",
          "const int count = min(kWarp, end - chunk);",
          "const int count = min(kWarp, end - chunk - 1);", "product and primes"),
    Fault("product: one entry past the end", "product.cuh",
          "const bool stored = chunk + lane < end;", "const bool stored = chunk + lane <= end;",
          "product and full-blocks"),
    Fault("product: lanes past the batch read on", "product.cuh",
          "const bool mine = tile + lane * kWidth < points;", "const bool mine = true;",
          "product and primes"),
    Fault("product: bias lost", "product.cuh",
          "sum[v][i] += add;", "sum[v][i] += 0 * add;", "product and primes"),
    Fault("product: rows of a partial block stored", "product.cuh",
          "if (v >= rows.height) break;", "if (v >= bh) break;", "product and b3-batch33"),
    Fault("geometry: padding off by one", "geometry.cuh", "return y >= 0 && y < in_h_",
          "return y >= 0 && y <= in_h_", "product and pad-beyond-kernel"),
    Fault("geometry: stride forgotten in dgrad", "geometry.cuh", "y % stride_h_ != 0 ||", "",
          "dgrad and stride3"),
    Fault("dgrad: groups mixed", "dgrad.cuh", "if (channels != in_channels) {",
          "if (channels < 0) {", "dgrad and groups3"),
    Fault("dgrad: transposed order forgotten", "dgrad.cuh", "__ldg(t_perm + k)", "(k)",
          "dgrad and primes"),
    Fault("wgrad: wrong lane in the sum", "wgrad.cuh",
          "const bool upper = (lane & kBit) != 0;", "const bool upper = (lane & kBit) == 0;",
          "wgrad and primes"),
    Fault("wgrad: half of the lanes stay away from a shuffle", "wgrad.cuh",
          "sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);",
          "if (lane < 16) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);",
          "wgrad and primes-blocks"),
    Fault("wgrad: a part forgotten", "wgrad.cuh", "p < part_count", "p < part_count - 1",
          "wgrad and parts"),
    Fault("wgrad: tail not zeroed", "wgrad.cuh", "to_values[i] = 0.0f;", ";",
          "wgrad and primes-blocks"),
    Fault("wide loads of misaligned rows", "launchers.cu",
          "if (g.batch % 4 == 0 && addresses", "if (addresses", "product and wide-batch"),
)  # fmt: skip


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault in it, cut down to float32: a third of the time to build."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for path in csrc.glob("cuda/*f16.cu"):
        path.unlink()
    launchers = csrc / "cuda" / "launchers.cu"
    text = launchers.read_text()
    for other in (
        "if (element == Element::kFloat16) return run(__half());",
        "run(__nv_bfloat16());",
    ):
        if other not in text:
            raise SystemExit(f"expected {other!r} in {launchers}")
        text = text.replace(other, "")
    launchers.write_text(text)
    source = csrc / "cuda" / fault.file
    text = source.read_text()
    # clang-format may break a line anywhere.
    pattern = re.compile(r"\s+".join(map(re.escape, fault.before.split())))
    if len(pattern.findall(text)) != 1:
        found = len(pattern.findall(text))
        raise SystemExit(f"{fault.name}: expected {fault.before!r} once in {source}, found {found}")
    source.write_text(pattern.sub(lambda _: fault.after, text))
    return csrc


def is_found(fault: Fault) -> bool:
    """Whether the tests fail, by a failed assertion or a fault of the emulator, not otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(fault, Path(folder))
        # Objects that the fault does not touch are taken over.
        out = Path(folder) / "out"
        if (ROOT / "build" / "cuda-emulation" / "checked").is_dir():
            shutil.copytree(ROOT / "build" / "cuda-emulation" / "checked", out)
        environment = os.environ | {"SPARSE_KERNELS_EMULATION_CSRC": str(csrc)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k"]
        command += [f"float32 and {fault.tests}", str(HERE / "test_kernels.py")]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
    lines = [line for line in done.stdout.splitlines() if re.match(r"E   +\S", line)]
    print(f"{'found ' if done.returncode == 1 else 'MISSED'} {fault.name}")
    print("       " + (lines[0][1:].strip()[:160] if lines else done.stdout[-300:]), flush=True)
    return done.returncode == 1 and any(re.search("AssertionError|RuntimeError", x) for x in lines)


def main(names: list[str]) -> int:
    chosen = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    missed = [fault.name for fault in chosen if not is_found(fault)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted faults found")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
