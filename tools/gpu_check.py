"""Check this checkout on a GPU machine without network: build, gpu tests, operator benchmark.

On a machine with a GPU, nvcc and a CUDA build of torch:   python tools/gpu_check.py
The rehearsal, the same steps on the CPU with small sizes: ... --device cpu --size small

Needs in the Python that runs it: torch (>= 2.11), setuptools, pybind11, cmake, ninja, pytest.
hypothesis, rich and matplotlib are optional. The package goes to build/gpu-check/site: the
environment itself is not changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
REQUIRED = ("torch", "setuptools", "pybind11", "cmake", "ninja", "pytest")
# `python -c` and `-m` put the working directory, here the source tree, first on sys.path: the
# built package counts.
DROP_SOURCE_TREE = "import sys; sys.path[:] = [path for path in sys.path if path]; "
OPTIONAL = ("hypothesis", "rich", "matplotlib", "pytest_benchmark")


class CheckError(RuntimeError):
    """A step of the check failed; the message says which and what to do."""


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def describe_machine(device: str) -> None:
    """Print what is here; raises CheckError when something needed is missing."""
    absent = missing(REQUIRED)
    if absent:
        raise CheckError(
            f"expected {', '.join(REQUIRED)} in {sys.executable}, missing: {', '.join(absent)}"
        )
    import torch

    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, device {device}")
    print(f"optional packages missing: {', '.join(missing(OPTIONAL)) or 'none'}")
    print(f"nvcc: {shutil.which('nvcc') or 'not found'}")
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise CheckError(
            f"torch {torch.__version__} sees no GPU: install a CUDA build of torch, "
            "or rehearse with --device cpu"
        )
    if shutil.which("nvcc") is None and not os.environ.get("CUDACXX"):
        raise CheckError("expected nvcc on PATH (or CUDACXX) to build the CUDA kernels, found none")
    print(f"gpu: {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}")


def run_step(name: str, command: list[str], environment: dict[str, str]) -> int:
    """Run one command from the repository's root, its output shown; returns the exit status."""
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(f"=== {name}: exit status {status}, {time.monotonic() - start:.0f} s", flush=True)
    return status


def build(device: str) -> None:
    """Install the package into SITE: no isolation, no dependencies, no network. Raises
    CheckError.
    """
    # build/lib*: setuptools would pack modules that the sources no longer have.
    for folder in [SITE, *(ROOT / "build").glob("lib*")]:
        shutil.rmtree(folder, ignore_errors=True)
    line = command(
        "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "--no-compile"
    )
    line += ["--disable-pip-version-check", "--target", str(SITE), "."]
    environment = dict(os.environ)
    if device.startswith("cuda"):
        environment["SPARSE_KERNELS_CUDA"] = "ON"
    if run_step("build", line, environment):
        raise CheckError("the build failed: its output above says why")


def check_environment() -> dict[str, str]:
    """Environment in which the built package is imported, and nothing of the source tree."""
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def show_build() -> None:
    """`sparse-kernels info` of what was just built. Raises CheckError."""
    launcher = DROP_SOURCE_TREE + "from sparse_kernels.cli import main; sys.exit(main())"
    if run_step("info", command("-c", launcher, "info"), check_environment()):
        raise CheckError("`sparse-kernels info` failed: the built package does not import")


def run_tests(device: str) -> None:
    """Tests marked `gpu`; a rehearsal, where they skip, also runs the operators' core tests.
    Raises CheckError.
    """
    launcher = DROP_SOURCE_TREE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    common = ["-c", launcher, "-p", "no:cacheprovider", "-rs", "-q"]
    status = run_step(
        "tests marked gpu", command(*common, "-m", "gpu", "tests"), check_environment()
    )
    if status:
        raise CheckError(f"tests marked gpu ended with pytest's exit status {status}")
    if device.startswith("cuda"):
        return
    rehearsed = ["-m", "not slow and not gpu", "tests/test_gpu.py"]
    if run_step("rehearsal on the CPU", command(*common, *rehearsed), check_environment()):
        raise CheckError("the rehearsal of tests/test_gpu.py on the CPU failed")


def benchmark(device: str, size: str, results: Path | None) -> None:
    """Operator benchmark into `results` (default benchmarks/results/<machine>). Raises
    CheckError.
    """
    launcher = DROP_SOURCE_TREE + "from sparse_kernels.cli import main; sys.exit(main())"
    chosen = "core" if size == "full" else size
    line = command("-c", launcher, "bench", "ops", "--device", device, "--size", chosen)
    if results is not None:
        line += ["--out", str(results)]
    if run_step("operator benchmark", line, check_environment()):
        raise CheckError("the operator benchmark failed: its output above says why")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only if every step passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu for a rehearsal")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--results", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        describe_machine(options.device)
        build(options.device)
        show_build()
        run_tests(options.device)
        benchmark(options.device, options.size, options.results)
    except CheckError as error:
        print(f"\ngpu-check FAILED: {error}")
        return 1
    print(f"\ngpu-check passed on {options.device} in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
