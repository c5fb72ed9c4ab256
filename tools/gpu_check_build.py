"""The build part of tools/gpu_check.py, and the environment in which the built package is used."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

from gpu_journal import BUILT, ROOT, fingerprint

WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
STAMP = ".gpu-check.json"  # in SITE: of what it was built
PACKED = "site.tar.gz"  # in the state folder
MOST_BYTES = 15 * 2**20  # of a file that a lent machine sends back
# `python -c` and `-m` put the working directory, here the source tree, first on sys.path: the
# built package counts.
DROP_SOURCE_TREE = "import sys; sys.path[:] = [path for path in sys.path if path]; "


# process_group is of Python 3.11.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)


class CheckError(RuntimeError):
    """A step of the check failed; the message says which and what to do."""


def has_nvcc() -> bool:
    return bool(shutil.which("nvcc") or os.environ.get("CUDACXX"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def check_environment() -> dict[str, str]:
    """Environment in which the built package is imported, and nothing of the source tree."""
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_step(
    name: str, line: list[str], environment: dict[str, str], timeout: float | None = None
) -> int:
    """Run one command from the repository's root, its output shown; returns the exit status.

    After ``timeout`` seconds it is killed, and the processes that it has started: -9. They are a
    process group, not a session of their own: a lent machine ends what a call leaves running,
    except other sessions.
    """
    shown = " ".join(line)
    print(f"\n=== {name}: {shown[:500]}{' ...' if len(shown) > 500 else ''}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(line, cwd=ROOT, env=environment, **OWN_GROUP)
    try:
        status = process.wait(timeout)
    except BaseException as error:  # ^C goes to this group alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    print(f"=== {name}: exit status {status}, {time.monotonic() - start:.0f} s", flush=True)
    return status


def build(device: str, state: Path) -> None:
    """Install the package into SITE: no isolation, no dependencies, no network. Raises
    CheckError.

    A package of the same sources, Python and machine is taken as it is: from SITE, or packed by an
    earlier call in ``state``.
    """
    wanted = _stamp(device)
    packed = state / PACKED
    if _found(SITE / STAMP) != wanted and packed.is_file():
        _unpack(packed)
    if _found(SITE / STAMP) == wanted:
        print(f"\n=== build: {SITE} holds the package of these sources already", flush=True)
        _show()
        return
    _install(device)
    _show()
    (SITE / STAMP).write_text(json.dumps(wanted), encoding="utf-8")
    _pack(packed)


def _stamp(device: str) -> dict[str, str]:
    """What a built package must agree with."""
    cuda = os.environ.get("SPARSE_KERNELS_CUDA", "AUTO")
    if device.startswith("cuda"):
        cuda = "ON" if has_nvcc() else "OFF"
    return {
        "sources": fingerprint(*BUILT),
        "python": sys.implementation.cache_tag or "",
        "machine": platform.machine(),
        "cuda": cuda,
        "flags": os.environ.get("CMAKE_ARGS", ""),
    }


def _found(path: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _install(device: str) -> None:
    # build/lib*: setuptools would pack modules that the sources no longer have.
    for folder in [SITE, *(ROOT / "build").glob("lib*")]:
        shutil.rmtree(folder, ignore_errors=True)
    line = command(
        "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "--no-compile"
    )
    line += ["--disable-pip-version-check", "--target", str(SITE), "."]
    environment = dict(os.environ)
    if device.startswith("cuda"):
        environment["SPARSE_KERNELS_CUDA"] = "ON" if has_nvcc() else "OFF"
    if run_step("build", line, environment):
        raise CheckError("the build failed: its output above says why")


def _show() -> None:
    """`sparse-kernels info` of what was just built. Raises CheckError."""
    launcher = DROP_SOURCE_TREE + "from sparse_kernels.cli import main; sys.exit(main())"
    if run_step("info", command("-c", launcher, "info"), check_environment()):
        raise CheckError("`sparse-kernels info` failed: the built package does not import")


def _pack(packed: Path) -> None:
    """Leave the package where the next call finds it, if it may travel."""
    partial = packed.with_suffix(".part")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        archive.add(SITE, arcname="site", filter=lambda m: None if "__pycache__" in m.name else m)
    size = partial.stat().st_size
    print(f"=== build: the package has {size / 2**20:.1f} MiB, packed", flush=True)
    if size > MOST_BYTES:
        partial.unlink()
        packed.unlink(missing_ok=True)
    else:
        partial.replace(packed)


def _unpack(packed: Path) -> None:
    """Put the packed package into SITE: all of it, or nothing where the archive is damaged.

    The stamp comes first in the archive: what was unpacked by half would be taken for a package.
    """
    partial = SITE.with_name("site.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with gzip.open(packed) as file:
            while file.read(2**20):  # to its end, where the checksum is; tarfile may stop before
                pass
        with tarfile.open(packed) as archive:
            archive.extractall(partial, filter="data")
        shutil.rmtree(SITE, ignore_errors=True)
        (partial / "site").rename(SITE)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        # Cut off while it was written, or on its way.
        print(f"=== build: {packed} is not used: {error}", flush=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
