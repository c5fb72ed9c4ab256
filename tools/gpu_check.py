"""Check this checkout on a GPU machine without network: build, tests, sanitizer, benchmarks.

On a machine with a GPU and a CUDA build of torch:         python tools/gpu_check.py
The rehearsal, the same steps on the CPU with small sizes: ... --device cpu --size small
One part, where a machine is lent for minutes only:        ... --part bench   (parts: below)

  build      install into build/gpu-check/site; with nvcc its CUDA part too
  tests      pytest -m gpu, some tests after the other, at most 8 minutes; the same command goes on
             behind the tests that have passed, and exit status 3 says that tests are left
  sanitizer  compute-sanitizer (memcheck, racecheck) on the small cases, where the tool is found
  ops        `sparse-kernels bench ops`: single operators against dense
  bench      tools/gpu_bench: layers and whole steps inside CUDA graphs, at most 8 minutes; the
             same command goes on where it stopped, and exit status 3 says that rows are left

Without nvcc the CUDA part is left out and Triton serves. In the rehearsal Triton, where it is
installed, is interpreted.

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
PASSED = WORK / "tests-passed.txt"  # names of tests, one a line; a new build deletes it
TESTS_AT_ONCE = 40  # each process compiles its kernels, or finds them in Triton's cache
REQUIRED = ("torch", "setuptools", "pybind11", "cmake", "ninja", "pytest")
# `python -c` and `-m` put the working directory, here the source tree, first on sys.path: the
# built package counts.
DROP_SOURCE_TREE = "import sys; sys.path[:] = [path for path in sys.path if path]; "
PARTS = ("build", "tests", "sanitizer", "ops", "bench")
OPTIONAL = ("triton", "hypothesis", "rich", "matplotlib", "pytest_benchmark")


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
    if not has_nvcc():
        if importlib.util.find_spec("triton") is None:
            raise CheckError(
                "expected nvcc on PATH (or CUDACXX), or triton, to compute on a GPU; found neither"
            )
        print("no nvcc: the CUDA part is not built, Triton serves alone")
    print(f"gpu: {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}")


def has_nvcc() -> bool:
    return bool(shutil.which("nvcc") or os.environ.get("CUDACXX"))


def run_step(name: str, command: list[str], environment: dict[str, str]) -> int:
    """Run one command from the repository's root, its output shown; returns the exit status."""
    shown = " ".join(command)
    print(f"\n=== {name}: {shown[:500]}{' ...' if len(shown) > 500 else ''}", flush=True)
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
    PASSED.unlink(missing_ok=True)  # by another build
    line = command(
        "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "--no-compile"
    )
    line += ["--disable-pip-version-check", "--target", str(SITE), "."]
    environment = dict(os.environ)
    if device.startswith("cuda"):
        environment["SPARSE_KERNELS_CUDA"] = "ON" if has_nvcc() else "OFF"
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


def run_tests(device: str, minutes: float) -> bool:
    """Tests marked `gpu`; False if time was over before the last. Raises CheckError.

    A rehearsal, where they skip, also runs the operators' core tests.
    """
    launcher = DROP_SOURCE_TREE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    common = command("-c", launcher, "-p", "no:cacheprovider", "-rs", "-q")
    if device.startswith("cuda"):
        return run_in_parts(common, gpu_tests(common), time.monotonic() + 60 * minutes)
    for name, chosen in (
        ("tests marked gpu", ["-m", "gpu", "tests"]),
        ("rehearsal on the CPU", ["-m", "not slow and not gpu", "tests/test_gpu.py"]),
    ):
        status = run_step(name, [*common, *chosen], check_environment())
        if status:
            raise CheckError(f"{name}: pytest's exit status is {status}")
    return True


def gpu_tests(pytest: Sequence[str]) -> list[str]:
    """Names of the tests marked `gpu`, in pytest's order. Raises CheckError if there are none."""
    line = [*pytest, "--collect-only", "-m", "gpu", "tests"]
    done = subprocess.run(
        line, cwd=ROOT, env=check_environment(), check=False, capture_output=True, text=True
    )
    names = [name for name in done.stdout.splitlines() if name.startswith("tests/")]
    if done.returncode or not names:
        raise CheckError(f"pytest collects no tests marked gpu: {done.stdout}{done.stderr}")
    return names


def run_in_parts(pytest: Sequence[str], names: Sequence[str], deadline: float) -> bool:
    """Run the tests that have not passed yet, as many as begin before ``deadline``, noting those
    that pass in PASSED; whether none is left. Raises CheckError.
    """
    passed = set(PASSED.read_text().splitlines()) if PASSED.is_file() else set()
    left = [name for name in names if name not in passed]
    while left:
        if time.monotonic() > deadline:
            print(f"\n=== tests: time is up, {len(left)} of {len(names)} are left", flush=True)
            return False
        chunk, left = left[:TESTS_AT_ONCE], left[TESTS_AT_ONCE:]
        status = run_step("tests marked gpu", [*pytest, *chunk], check_environment())
        if status:
            raise CheckError(f"tests marked gpu ended with pytest's exit status {status}")
        PASSED.parent.mkdir(parents=True, exist_ok=True)
        with PASSED.open("a") as file:
            file.writelines(f"{name}\n" for name in chunk)
    return True


# Small launches of every kind of kernel, native and Triton; under the tool each takes seconds.
SANITIZED = (
    "tests/test_gpu.py",
    "tests/test_torch_ops.py",
    "tests/triton_kernels/test_operators.py",
    "tests/triton_kernels/test_training_step.py",
)


def sanitize(device: str) -> None:
    """compute-sanitizer over the small GPU cases, if there is one. Raises CheckError."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not device.startswith("cuda"):
        why = "is not on PATH (it comes with the CUDA toolkit)" if tool is None else "needs a GPU"
        print(f"\n=== sanitizer: left out, compute-sanitizer {why}", flush=True)
        return
    launcher = DROP_SOURCE_TREE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    tests = command("-c", launcher, "-p", "no:cacheprovider", "-q", "-m", "gpu", *SANITIZED)
    # torch's caching allocator would hide a kernel that reads past the end of its tensor.
    environment = {**check_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        line = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "9", *tests]
        status = run_step(f"compute-sanitizer {check}", line, environment)
        if status:
            raise CheckError(f"compute-sanitizer {check} ended with exit status {status}")


LEFT = 3  # exit status of tools/gpu_bench when its time was up


def graph_benchmark(device: str, size: str, results: Path | None, minutes: float) -> bool:
    """Layers and whole steps inside CUDA graphs; False if rows are left. Raises CheckError."""
    environment = check_environment()
    if not device.startswith("cuda") and importlib.util.find_spec("triton") is not None:
        environment |= {"TRITON_INTERPRET": "1", "SPARSE_KERNELS_BACKEND": "triton,torch"}
    launcher = DROP_SOURCE_TREE + (
        f"sys.path.append({str(ROOT)!r}); from tools.gpu_bench.__main__ import main; "
        "sys.exit(main())"
    )
    line = command("-c", launcher, "--device", device, "--size", size, "--minutes", str(minutes))
    if results is not None:
        line += ["--results", str(results)]
    status = run_step("layers and steps in CUDA graphs", line, environment)
    if status not in (0, LEFT):
        raise CheckError(f"tools/gpu_bench ended with exit status {status}: see its output above")
    return status == 0


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


def check(part: str, options: argparse.Namespace) -> bool:
    """Run one part; False if tests or rows of the benchmark are left. Raises CheckError."""
    device = options.device
    if part != "build" and not SITE.is_dir():
        raise CheckError(f"expected the built package in {SITE}, found none: run --part build")
    if part == "build":
        build(device)
        show_build()
    elif part == "tests":
        return run_tests(device, options.minutes)
    elif part == "sanitizer":
        sanitize(device)
    elif part == "ops":
        benchmark(device, options.size, options.results)
    else:
        return graph_benchmark(device, options.size, options.results, options.minutes)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only if every step passed, 3 if tests or rows are left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu for a rehearsal")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--part", choices=PARTS, help="one part only; default all, in order")
    parser.add_argument("--minutes", type=float, default=8.0, help="of tests, and of the benchmark")
    parser.add_argument("--results", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    complete = True
    try:
        describe_machine(options.device)
        for part in [options.part] if options.part else PARTS:
            complete = check(part, options) and complete
    except CheckError as error:
        print(f"\ngpu-check FAILED: {error}")
        return 1
    seconds = time.monotonic() - start
    if not complete:
        print(f"\ngpu-check on {options.device}, {seconds:.0f} s: no failure, but tests or rows")
        print("are left: run PART=tests and PART=bench again until this line no longer comes")
        return LEFT
    print(f"\ngpu-check passed on {options.device} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
