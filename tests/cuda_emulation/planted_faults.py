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


KERNELS = "test_kernels.py"  # and test_dense.py


class Fault(NamedTuple):
    """`before` in `file` becomes `after`; `tests` is pytest's -k expression that must fail, or
    pass where `harmless`.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str
    # Two rows of thread blocks: what each does several tiles for, as in grids above kMaxGridY.
    small_grid: bool = False
    harmless: bool = False
    suite: str = KERNELS


CHANGE = "test_pattern_change.py"
PATTERN_FAULTS = (
    Fault("select: one tie too many", "pattern_select.cuh",
          "rank == Rank::kTied && my_tied < ties",
          "rank == Rank::kTied && my_tied <= ties", "test_select and small-ties", suite=CHANGE),
    Fault("select: -0 below 0", "pattern_select.cuh", "const float plain = score + 0.0f;",
          "const float plain = score;", "test_select and small-ties", suite=CHANGE),
    Fault("select: a leader counts itself only", "pattern_select.cuh",
          "static_cast<unsigned>(__popc(same)));", "1u);", "test_select and small", suite=CHANGE),
    Fault("select: barrier before the digit is found dropped", "pattern_select.cuh",
          "__syncthreads();  // also:", "//", "test_select and small", suite=CHANGE),
    Fault("select: tiles before the layer's counted", "pattern_select.cuh",
          "tiles_before[tile] - tiles_before[first]", "tiles_before[tile]",
          "test_select and small", suite=CHANGE),
    Fault("select: CUB's storage cut short", "pattern_select.cu",
          "parts.Take<unsigned char>(static_cast<int64_t>(scan_bytes));",
          "parts.Take<unsigned char>(static_cast<int64_t>(scan_bytes / 2));",
          "test_keep_and_merge", suite=CHANGE),
    Fault("select: CUB's storage not asked for", "pattern_select.cu",
          "if (tiles > 0) Scan(what, nullptr, scan_bytes, tiles, nullptr);",
          "scan_bytes = 1 << 16;",
          "test_keep_and_merge", suite=CHANGE),
    Fault("merge: a key before its place", "pattern_index.cuh", "layer.keys[mine + others] = key;",
          "layer.keys[mine] = key;", "test_keep_and_merge", suite=CHANGE),
    Fault("index: columns of two layers mixed", "pattern_index.cuh",
          "static_cast<uint32_t>(placed.first_column + column);", "static_cast<uint32_t>(column);",
          "test_index", suite=CHANGE),
    Fault("index: sorted by one bit too few", "pattern_index.cu", "most >> bits != 0",
          "most >> (bits + 1) != 0", "test_index", suite=CHANGE),
    Fault("index: tail not zeroed", "pattern_index.cuh", "layer.t_row[i] = 0;", ";", "test_index",
          suite=CHANGE),
    Fault("locate: one key past the end", "pattern_index.cuh", "at < old_count && ", "",
          "test_values", suite=CHANGE),
    Fault("move: new blocks not zeroed", "pattern_move.cu", "Unit content = 0;",
          "Unit content = from[0];", "test_values", suite=CHANGE),
    Fault("move: tail not zeroed", "pattern_move.cu",
          "const int64_t end = min(tensor.capacity * units",
          "const int64_t end = min(filled", "test_values", suite=CHANGE),
)  # fmt: skip
STAGED_WGRAD, NORM_POOL = "test_staged_wgrad.py", "test_norm_pool.py"
LAYER_FAULTS = (
    Fault("staged wgrad: barrier before a tile is overwritten dropped", "staged_wgrad.cuh",
          "__syncthreads();  // and all are done with it before it is overwritten", "",
          "float32 and parts", suite=STAGED_WGRAD),
    Fault("staged wgrad: waits for one copy too few", "staged_wgrad.cuh",
          "WaitCopies<kWgradStages - 1>();", "WaitCopies<kWgradStages>();", "float32 and parts",
          suite=STAGED_WGRAD),
    Fault("staged wgrad: the first row's gradients kept for all", "staged_wgrad.cuh",
          "if (line != at >> 16) {", "if (j == 0) {", "float32 and primes", suite=STAGED_WGRAD),
    Fault("staged wgrad: passes after the first forgotten", "staged_wgrad.cuh",
          "pass < total; pass += kWarpsPerBlock * kSlots", "pass < min(total, 1); pass += 1",
          "float32 and several-passes", suite=STAGED_WGRAD),
    Fault("staged wgrad: rows below a partial block stored", "staged_wgrad.cuh",
          "row < source.RowsPerGroup() ? sum : 0.0f", "sum", "whatever", suite=STAGED_WGRAD),
    Fault("staged wgrad: wide copies of any address", "launchers.cu",
          "a.geometry.batch * size % bytes == 0 && addresses % bytes == 0",
          "a.geometry.batch * size % bytes == 0", "misaligned", suite=STAGED_WGRAD),
    Fault("norm with pooling: ties go to the last", "norm_pool.cu", "normed > best[j]",
          "normed >= best[j] && normed > 0.0f", "ties", suite=NORM_POOL),
    Fault("norm with pooling: an odd image's last row is in a window", "norm_pool.cu",
          "py / kSide < size.rows && ", "", "float32 and matches", suite=NORM_POOL),
    Fault("norm with pooling: rounding of the mean forgotten", "norm_pool.cu",
          "add - lost * scale", "add - 0 * lost * scale", "float32 and matches", suite=NORM_POOL),
    Fault("norm with pooling: the mean's rounding lost in gradients", "norm.cuh",
          "const double given = lost != nullptr ? lost[channel] : 0.0;",
          "const double given = 0.0;", "float32 and matches", suite=NORM_POOL),
)  # fmt: skip
FAULTS = (
    Fault("product: wrong lane", "product.cuh", "found.offset, k - chunk)",
          "found.offset, (k - chunk) ^ 1)", "product and dilation3x1-stride2"),
    Fault("product: last entry of a row left out", "product.cuh",
          "const int last = min(end, chunk + kWarp);",
          "const int last = min(end - 1, chunk + kWarp);", "product and primes"),
    Fault("product: one entry past the end", "product.cuh",
          "if (k < begin || k >= end) continue;", "if (k < begin || k > end) continue;",
          "product and primes"),
    Fault("product: lanes past the batch read on", "product.cuh",
          "mine[s] = point < points;", "mine[s] = true;", "product and primes"),
    Fault("product: bias lost", "values.cuh",
          "sum[i] += add;", "sum[i] += 0 * add;", "product and primes"),
    Fault("product: rows of a partial block stored", "product.cuh",
          "if (v >= rows.height) break;", "if (v >= bh) break;", "product and b3-batch33"),
    Fault("geometry: padding off by one", "geometry.cuh", "return y >= 0 && y < in_h_",
          "return y >= 0 && y <= in_h_", "product and pad-beyond-kernel"),
    Fault("geometry: stride forgotten in dgrad", "geometry.cuh", "y % stride_h_ != 0 ||", "",
          "dgrad and stride3"),
    Fault("dgrad: groups mixed", "dgrad.cuh", "if (channels != in_channels) {",
          "if (channels < 0) {", "dgrad and groups3"),
    Fault("dgrad: transposed order forgotten", "dgrad.cuh",
          "LoadEntries(place, t_perm, four,", "LoadEntries(place, t_row, four,",
          "dgrad and primes"),
    Fault("wgrad: wrong lane in the sum", "wgrad.cuh",
          "const bool upper = (lane & kBit) != 0;", "const bool upper = (lane & kBit) == 0;",
          "wgrad and primes"),
    Fault("wgrad: half of the lanes stay away from a shuffle", "wgrad.cuh",
          "sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);",
          "if (lane < 16) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kBit);",
          "wgrad and primes"),  # blocks of 4 and 8 have 32 sums and never come here
    Fault("wgrad: a part forgotten", "wgrad.cuh", "p < part_count", "p < part_count - 1",
          "wgrad and parts"),
    Fault("wgrad: tail not zeroed", "wgrad.cuh", "to_values[i] = 0.0f;", ";",
          "wgrad and primes-blocks"),
    Fault("wide loads of misaligned rows", "launchers.cu",
          "if (g.batch % 4 == 0 && addresses", "if (addresses", "product and wide-batch"),
    Fault("wide loads of misaligned addresses", "launchers.cu",
          "g.batch % 4 == 0 && addresses % (4 * bytes) == 0", "g.batch % 4 == 0", "misaligned"),
    Fault("wgrad: an infinite gradient times padding", "wgrad.cuh",
          "if (Source::kImage && !inside[j]) continue;", "", "infinite"),
    Fault("staged: first barrier dropped", "staged.cuh", "is filled next. __syncthreads();",
          "is filled next.\n", "staged and staged-wide"),
    Fault("staged: barrier between tiles dropped", "staged.cuh",
          "WaitCopies<0>(); __syncthreads();", "WaitCopies<0>();", "staged and long-rows", True),
    Fault("staged: waits for one copy too few", "staged.cuh", "WaitCopies<kStages - 2>();",
          "WaitCopies<kStages - 1>();", "staged and staged-wide"),
    Fault("staged: wrong lane keeps a row's place", "staged.cuh", "if (lane == i) next",
          "if (lane == i + 1) next", "staged and staged-wide"),
    Fault("staged: chunk off by one column", "staged.cuh", "column - first_column < kStageColumns",
          "column - first_column <= kStageColumns", "staged and staged-dense"),
    Fault("product: tiles beyond the grid forgotten", "product.cuh", "tile += step)",
          "tile = points)", "product and conv-wide", True),
    Fault("dgrad: tiles beyond the grid forgotten", "dgrad.cuh", "tile += step)",
          "tile = in_points)", "dgrad and conv-wide", True),
    Fault("walk: entries of the row before are added", "product.cuh",
          "if (k < begin || k >= end) continue;", "if (k >= end) continue;", "product and primes"),
    Fault("walk: groups of four past the last stored entry", "product.cuh",
          "wide_index && group + kEntries <= stored", "wide_index", "product and smallest"),
    Fault("walk: a step of single elements forgotten", "walk.cuh", "step * kWarp", "0 * kWarp",
          "product and odd-b1-batch131"),
    Fault("order: rows in natural order stored by order", "staged.cuh",
          "has_row ? crow[row_of_lane] : 0", "has_row ? crow[first_slot + lane] : 0",
          "staged and staged-dense"),
    Fault("staged dgrad: place in a column kept from the tap before", "staged_dgrad.cuh",
          "if (chunk.first_block == 0 && has_channel)", "if (c == 0 && has_channel)",
          "staged_dgrad and staged-conv-3x3"),
    Fault("staged dgrad: padding not zeroed", "staged_dgrad.cuh",
          "const bool inside = used && first + line < rows;",
          "const bool inside = mine && first + line < rows;", "staged_dgrad and staged-conv-3x3"),
    Fault("small: entries skipped", "small.cuh", "k += step)", "k += step + 1)",
          "small and small-b1-batch9"),
    Fault("small: half of the lanes left out of the sum", "small.cuh", "if (kBit >= stop) {",
          "if (kBit > stop) {", "small and small-b1-batch9"),
    Fault("small: rows below a partial block read", "small.cuh",
          "if (v >= rows.height) continue;", "", "dgrad and small-b13-batch8"),
    Fault("norm: barrier between two sums dropped", "norm.cuh",
          "__syncthreads(); // the next sums", "// the next sums", "batch_norm"),
    Fault("norm: a part forgotten", "norm.cuh", "for (int p = 0; p < parts; ++p) {",
          "for (int p = 0; p < parts - 1; ++p) {", "batch_norm"),
    Fault("norm: rounding of the mean forgotten", "norm.cuh", "add - lost *",
          "add - 0 * lost *", "batch_norm"),
    Fault("max pooling: ties go to the last", "pooling.cu", "v[j] > best[j]", "v[j] >= best[j]",
          "max_pooling"),
    Fault("pooling: one window too many", "pooling.cu", "from / stride < windows",
          "from / stride <= windows", "pooling"),
    Fault("shorter parts", "launchers.cu", "kShortestPart = 2048", "kShortestPart = 1024",
          "wgrad and parts", harmless=True),
    *PATTERN_FAULTS,
    *LAYER_FAULTS,
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
    replace_once(csrc / "cuda" / fault.file, fault.before, fault.after)
    return csrc


def replace_once(source: Path, before: str, after: str) -> None:
    """SystemExit unless `before` is in `source` once, its words on however many lines."""
    text = source.read_text()
    pattern = re.compile(r"\s+".join(map(re.escape, before.split())))
    if len(pattern.findall(text)) != 1:
        found = len(pattern.findall(text))
        raise SystemExit(f"expected {before!r} once in {source}, found {found}")
    source.write_text(pattern.sub(lambda _: after, text))


def is_found(fault: Fault) -> bool:
    """Whether the tests fail, by a failed assertion or a fault of the emulator, not otherwise; of
    a harmless change, whether they pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(fault, Path(folder))
        # Objects that the fault does not touch are taken over.
        out = Path(folder) / "out"
        if (ROOT / "build" / "cuda-emulation" / "checked").is_dir():
            shutil.copytree(ROOT / "build" / "cuda-emulation" / "checked", out)
        environment = os.environ | {"SPARSE_KERNELS_EMULATION_CSRC": str(csrc)}
        if fault.small_grid:
            environment["SPARSE_KERNELS_EMULATION_GRID"] = "2"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k"]
        chosen = f"float32 and {fault.tests}" if fault.suite == KERNELS else fault.tests
        suites = ["test_kernels.py", "test_dense.py"] if fault.suite == KERNELS else [fault.suite]
        command += [chosen, *(str(HERE / suite) for suite in suites)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )
    if fault.harmless:
        passed = done.returncode == 0
        print(f"{'passed' if passed else 'FAILED'} {fault.name}: no fault, tests have to pass")
        print("       " + done.stdout.strip().splitlines()[-1], flush=True)
        return passed
    lines = [line for line in done.stdout.splitlines() if re.match(r"E   +\S", line)]
    # An error of the compiler or of collection is no finding.
    findings = re.compile(r"AssertionError|E +assert |launch failed|cub::\w+::\w+ failed")
    told = any(findings.search(line) for line in lines)
    found = done.returncode == 1 and told
    print(f"{'found ' if found else 'MISSED'} {fault.name}")
    print("       " + (lines[0][1:].strip()[:160] if lines else done.stdout[-300:]), flush=True)
    return found


def main(names: list[str]) -> int:
    chosen = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    missed = [fault.name for fault in chosen if not is_found(fault)]
    faults = [fault for fault in chosen if not fault.harmless]
    found = sum(fault.name not in missed for fault in faults)
    print(f"{found} of {len(faults)} planted faults found")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
