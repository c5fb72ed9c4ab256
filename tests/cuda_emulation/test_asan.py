"""The emulated tests once more, built with AddressSanitizer and UndefinedBehaviorSanitizer: what
those see beside the emulator's own checks (every access to the byte, in launchers too).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulation_build
import pytest

HERE = Path(__file__).resolve().parent
FILES = (
    "test_emulator.py",
    "test_fragments.py",
    "test_mma_fragments.py",
    "test_streams.py",
    "test_kernels.py",
    "test_dense.py",
    "test_norm_pool.py",
    "test_staged_wgrad.py",
    "test_launchers.py",
    "test_mma_kernels.py",
    "test_pattern_change.py",
)


def _runtime(name: str) -> str:
    """Path of the compiler's sanitizer runtime, to be loaded before Python's own allocator."""
    command = [emulation_build._compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_kernels_under_address_and_undefined_behaviour_sanitizers() -> None:
    if os.environ.get("SPARSE_KERNELS_EMULATION") == "asan":
        pytest.skip("these are the sanitized tests already")
    emulation_build.build("asan")
    # libstdc++ too: ASan looks up the C++ exception functions when it starts.
    preload = " ".join(_runtime(n) for n in ("libasan.so", "libubsan.so", "libstdc++.so"))
    environment = os.environ | {
        "SPARSE_KERNELS_EMULATION": "asan",
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--capture=sys"]  # a report ends the process: it must not wait in pytest's files
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parent.parent,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
