"""Plants faults in a copy of the kernels, one at a time, and reports which the tests find.

    python tests/triton_kernels/planted_faults.py            # about half a minute per fault
    python tests/triton_kernels/planted_faults.py --only tap

Returns 1 if a fault goes unnoticed, or if the tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = "sparse_kernels/backends/triton/kernels"


class Fault(NamedTuple):
    """One change of a source, by exact text that occurs there once."""

    name: str
    path: str
    old: str
    new: str

    @property
    def tests(self) -> str:
        """The file of tests that must notice."""
        if self.path.endswith("/noise.py"):
            return "tests/triton_kernels/test_noise.py"
        kind = "vector" if "/vector_" in self.path else "block"
        return f"tests/triton_kernels/test_{kind}_interpret.py"


def product(name: str, old: str, new: str) -> Fault:
    """A fault in the block product."""
    return Fault(name, f"{KERNELS}/block_product.py", old, new)


def wgrad(name: str, old: str, new: str) -> Fault:
    """A fault in the weight gradient."""
    return Fault(name, f"{KERNELS}/block_wgrad.py", old, new)


def lists(name: str, old: str, new: str) -> Fault:
    """A fault in the lists of the input gradient."""
    return Fault(name, f"{KERNELS}/block_lists.py", old, new)


def vector(name: str, old: str, new: str) -> Fault:
    """A fault in the products of elements and V x 1 blocks."""
    return Fault(f"vector: {name}", f"{KERNELS}/vector_product.py", old, new)


def vector_wgrad(name: str, old: str, new: str) -> Fault:
    """A fault in their weight gradient."""
    return Fault(f"vector: {name}", f"{KERNELS}/vector_wgrad.py", old, new)


def noise(name: str, old: str, new: str) -> Fault:
    """A fault in dropout."""
    return Fault(f"dropout: {name}", f"{KERNELS}/noise.py", old, new)


FAULTS = (
    noise("words of a pair swapped", "tl.interleave(w0, w1)", "tl.interleave(w1, w0)"),
    noise("second half over the first", "at + 128, count", "at, count"),
    noise("a round too many", "none, none, 7)", "none, none, 8)"),
    noise("selection, not a product", "(found * noise)", "tl.where(noise > 0, found * scale, 0.0)"),
    product("list off by one", "tl.load(pointer + row + 1)", "(tl.load(pointer + row + 1) - 1)"),
    product("item ahead off by one", "step + STRIDE, last", "step + STRIDE + 1, last"),
    product("no channel mask", "k_inside & (channel < x_group),", "k_inside,"),
    product("no image mask", "(tall >= 0) & ", ""),
    product(
        "tap column off by one", "(tap % taps_w) * dilation_w - pad_w", "(tap % taps_w) - pad_w"
    ),
    product("phase swapped", "(phase[0] - down)", "(phase[1] - down)"),
    product("store beyond the channels", "(n < BLOCK_N) & (channel < y_group)", "n < BLOCK_N"),
    product(
        "block not transposed",
        "    if TRANSPOSED:\n        pointers",
        "    if False:\n        pointers",
    ),
    product("ReLU eats NaN", "tl.where(sums < 0, 0.0, sums)", "tl.where(sums > 0, sums, 0.0)"),
    product("odd step not masked", "tl.where(step + u < last, BLOCK_K, 0)", "BLOCK_K"),
    wgrad("slot off by one", "return before - 1", "return before - 2"),
    wgrad(
        "neighbour's block", "stored = (block < last) & (w < BLOCK_COLS)", "stored = w < BLOCK_COLS"
    ),
    wgrad("points not masked", "inside = point < total", "inside = point < total + TILE_M"),
    wgrad("last part lost", "tl.range(0, PARTS)", "tl.range(0, PARTS - 1)"),
    wgrad("tail not cleared", "step + i, mask=stored,", "step + i, mask=i < step,"),
    lists("search off by one", "open_ & below, middle + 1, low", "open_ & below, middle, low"),
    lists("phase of padding", "(stride_h - 1) * pad_h", "pad_h"),
    lists("group's rows not subtracted", " - group * row_blocks\n", "\n"),
    vector("no image mask", "(row >= 0) & ", ""),
    vector("batch not innermost", "(row * size[1] + column) * batch + image", "number"),
    vector(
        "list's end read", "mask=inside & (block < last), other=0.0)", "mask=inside, other=0.0)"
    ),
    vector("gathered list's end read", "mask=inside & (block < last)[None, :]", "mask=inside"),
    vector("items ahead off by one", "tl.load(col + block + UNROLL,", "tl.load(col + block,"),
    vector("points not masked", "& (point < total)[None, :]", "& (point < total + 1)[None, :]"),
    vector(
        "phase ignored",
        "meets = (tap_h == phase_h) & (tap_w",
        "meets = (tap_w == phase_w) & (tap_w",
    ),
    vector("last block's rows not cut", " & (row * BLOCK + r < grad_group)", ""),
    vector("group's rows not subtracted", "other=0) - group * row_blocks", "other=0)"),
    vector_wgrad("neighbour's block", "stored = block < last", "stored = block < last + 1"),
    vector_wgrad("rows not cut", "(r < BLOCK) & (y_channel < y_group)", "r < BLOCK"),
    vector_wgrad("part off by one", "(part * steps + step) * TILE_M", "(part + step) * TILE_M"),
)


def run_tests(root: Path, tests: Iterable[str]) -> tuple[bool, str, float]:
    """Whether the core tests pass in a checkout, their last line, and the seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "--rootdir", str(root), *sorted(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode < 0:  # killed by a signal: the fault wrote or read outside of its tensors
        return False, f"signal {-done.returncode}", time.monotonic() - start
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.M)
    return done.returncode == 0, failed[1] if failed else "", time.monotonic() - start


def copy_tree(target: Path) -> None:
    """The sources and tests that the run needs."""
    for name in ("sparse_kernels", "tests"):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", target)


def plant(root: Path, fault: Fault) -> None:
    """Apply a fault; its text must occur exactly once, or the list above has aged."""
    path = root / fault.path
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: expected {fault.old!r} once in {fault.path}, "
            f"found it {text.count(fault.old)} times; bring the list up to date"
        )
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression on a fault's name")
    only = parser.parse_args().only
    unnoticed = 0
    chosen = [fault for fault in FAULTS if re.search(only, fault.name)]
    for fault in (None, *chosen):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            copy_tree(root)
            if fault is not None:
                plant(root, fault)
            passed, failed, seconds = run_tests(
                root, {f.tests for f in ([fault] if fault else chosen)}
            )
        wrong = passed == (fault is not None)
        unnoticed += wrong
        name = fault.name if fault else "(no fault)"
        verdict = "passes" if passed else f"fails: {failed}"
        print(
            f"{'WRONG ' if wrong else 'right '}{name:30s} {seconds:4.0f} s  {verdict}", flush=True
        )
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
