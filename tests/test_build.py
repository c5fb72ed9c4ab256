"""The native build: what it says of itself, instruction sets and their separation, OpenMP, CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_kernels import info
from sparse_kernels._load import native

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("baseline", "avx2", "avx512-emulated", "avx512")
# Mangled beginnings of namespace sk::<isa>, also of local entities and constants in it.
WIDE_NAMESPACE = re.compile(r"N?K?2sk(4avx2|6avx512|11emulated512)")
AVX512_NAMESPACE = re.compile(r"N?K?2sk6avx512")


def python(code: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter (after `command`, if given); SPARSE_KERNELS_ISA is unset."""
    env = {k: v for k, v in os.environ.items() if k != "SPARSE_KERNELS_ISA"} | environment
    # The same package as here, installed or not: both -c and -m look into the working directory.
    cwd = Path(info.__file__).parents[1]
    arguments = [*command, sys.executable, "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


PRINT_ISA = "from sparse_kernels._load import native; print(native().isa())"


def test_build_info() -> None:
    found = native().build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["version"])
    assert found["compiler"] and found["openmp"]
    assert found["isas"][0] == "baseline" and set(found["isas"]) <= set(NAMES)
    assert isinstance(found["cuda"], bool)
    assert found["cuda"] == (not found["why_no_cuda"])
    assert found["cuda"] == bool(found["cuda_version"]) == bool(found["cuda_architectures"])
    supported = native().supported_isas()
    assert supported[0] == "baseline" and set(supported) <= set(found["isas"])


def test_the_highest_supported_instruction_set_is_chosen() -> None:
    automatic = [name for name in native().supported_isas() if name != "avx512-emulated"]
    for environment in ({}, {"SPARSE_KERNELS_ISA": ""}):
        assert python(PRINT_ISA, **environment).stdout.strip() == automatic[-1]


@pytest.mark.parametrize("name", native().supported_isas())
def test_environment_forces_an_instruction_set(name: str) -> None:
    assert python(PRINT_ISA, SPARSE_KERNELS_ISA=name).stdout.strip() == name


# Sorted: two test workers must collect the same list, and a set's order differs between processes.
@pytest.mark.parametrize("name", ["sse9", *sorted(set(NAMES) - set(native().supported_isas()))])
def test_an_instruction_set_that_is_not_there_is_an_error(name: str) -> None:
    choice = ", ".join(native().supported_isas())
    with pytest.raises(ValueError, match=f"set_isa .*'{name}'.* use one of: {choice}"):
        native().set_isa(name)
    failed = python(PRINT_ISA, SPARSE_KERNELS_ISA=name)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1
    assert last.startswith("ValueError: the environment variable SPARSE_KERNELS_ISA ")
    assert f"'{name}'" in last and last.endswith(f"use one of: {choice}")


def test_a_missing_module_says_what_to_do() -> None:
    hide = "import sys; sys.modules['sparse_kernels._native'] = None\n"
    failed = python(hide + PRINT_ISA)
    assert "NativeMissingError" in failed.stderr and "pip install ." in failed.stderr
    code = "from sparse_kernels import info; print(info.describe())"
    assert "missing: it was not built" in python(hide + code).stdout


def disassembly() -> dict[str, set[str]]:
    """Mangled function name -> names of its vector instructions and of their widest registers."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils)")
    command = ["objdump", "-d", "--no-show-raw-insn", native().__file__]
    functions: dict[str, set[str]] = {}
    found: set[str] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(">:\n"):
                found = functions.setdefault(line[line.index("<") + 1 : -3], set())
            elif "\tv" in line:  # every AVX instruction's name begins with v, and no SSE one's
                found.add("zmm" if "%zmm" in line else "avx")
    return functions


def test_no_avx_outside_its_namespaces() -> None:
    """Inline functions and std:: templates compiled for several sets merge when linked; a merged
    copy with AVX is an illegal instruction on an old CPU. No such copy may have been kept.
    """
    functions = disassembly()
    baseline = [name for name in functions if "2sk8baseline" in name]
    assert len(baseline) > 20, "the symbols were stripped: nothing could be seen"
    if "avx2" in native().build_info()["isas"]:
        avx2 = [name for name in functions if "2sk4avx2" in name and functions[name]]
        assert len(avx2) > 20, "no AVX found where it must be: the test sees nothing"
    leaked = {
        name for name, kinds in functions.items() if kinds and not WIDE_NAMESPACE.search(name)
    }
    assert not leaked
    wide = {name for name, kinds in functions.items() if "zmm" in kinds}
    assert not [name for name in wide if not AVX512_NAMESPACE.search(name)]


def test_one_openmp_runtime() -> None:
    code = (
        "from sparse_kernels._load import native; native().openmp_max_threads()\n"
        "from sparse_kernels.info import openmp_runtimes; print(*openmp_runtimes(), sep='\\n')"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


def test_info_tells_what_is_built_and_chosen_and_why() -> None:
    text = info.describe()
    for part in (torch.__version__, native().isa(), "instruction sets", "CUDA kernels", "libgomp"):
        assert part in text
    for name in set(native().build_info()["isas"]) - set(native().supported_isas()):
        assert f"{name} (not supported by this CPU or OS)" in text
    assert re.search(r"float32 on cpu +linear, .*: backend cpu", text)
    code = "from sparse_kernels import info; print(info.describe())"
    forced = python(code, SPARSE_KERNELS_ISA="baseline").stdout
    assert "baseline (forced by SPARSE_KERNELS_ISA=baseline)" in forced


def test_cuda_launch_without_a_gpu_is_a_clean_error() -> None:
    """Device 99 exists nowhere, so this also holds where there is a GPU."""
    with pytest.raises(RuntimeError, match="^linear") as caught:
        native().cuda_product("linear", 64, 64, 64, 0, 64, 64, [7, 5, 3], 1, False, 0, 0, 99, 0)
    if native().build_info()["cuda"]:
        assert "(rows 7, cols 5, batch 3, block 1x1, float32, device 99): cuda" in str(caught.value)
    else:
        assert native().build_info()["why_no_cuda"] in str(caught.value)


@pytest.mark.slow
def test_cuda_on_without_nvcc_says_what_to_set(tmp_path: Path) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    without = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++", path=without) is None:
        pytest.skip("needs cmake, and a C++ compiler in a folder without nvcc")
    hidden = ("CUDACXX", "CUDA_PATH", "CUDA_HOME")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": without}
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DSPARSE_KERNELS_CUDA=ON"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    message = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "SPARSE_KERNELS_CUDA=ON, but no working nvcc was found" in message
    assert "CUDACXX=/path/to/nvcc" in message and "SPARSE_KERNELS_CUDA=OFF" in message


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_build_tools_of_an_environment_that_is_not_activated_are_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`venv/bin/python -m pip install --no-build-isolation .` without the venv on PATH."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the Python package {name} (make dev-tools)")
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    tool = runpy.run_path(str(ROOT / "setup.py"))["tool"]
    assert Path(tool(name)).name == name and os.access(tool(name), os.X_OK)
    with pytest.raises(SystemExit, match="needs no-such-tool"):
        tool("no-such-tool")


# Runs every kernel family once without torch (which may itself need AVX under emulation).
DIGEST = r"""
import array, hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", FILE)
n = importlib.util.module_from_spec(spec); spec.loader.exec_module(n)
state = 1
def floats(count):
    global state
    out = array.array("f")
    for _ in range(count):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        out.append(state / 2**30 - 1)
    return out
digest = hashlib.sha256()
def p(a): return a.buffer_info()[0]
def show(*arrays):
    for a in arrays: digest.update(a.tobytes())
N, F, O = 19, 24, 16
x, v, b, g = floats(N * 4 * F), floats(F * O), floats(O), floats(N * O * 6)
crow = array.array("i", [i * 6 for i in range(O + 1)])
col = array.array("i", [(4 * k + r) % F for r in range(O) for k in range(6)])
col = array.array("i", [c for r in range(O) for c in sorted(col[r * 6 : r * 6 + 6])])
order = sorted(range(O * 6), key=lambda k: (col[k], k))
t_row, t_perm = array.array("i", [k // 6 for k in order]), array.array("i", order)
t_crow = array.array("i", [sum(c < j for c in col) for j in range(F + 1)])
y, dx, dv = floats(N * O * 6), floats(N * F * 4), floats(O * 6)
n.linear(p(y), p(x), p(v), p(b), p(crow), p(col), O, F, 1, 1, O * 6, N, True, 2)
n.linear_dgrad(p(dx), p(g), p(v), p(t_crow), p(t_row), p(t_perm), O, F, 1, 1, O * 6, N, 2)
n.linear_wgrad(p(dv), p(g), p(x), p(crow), p(col), O, F, 1, 1, O * 6, N, 2)
show(y, dx, dv)
geom = [N, 2, 2, 3, 2, O, F, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1]
n.conv2d(p(y), p(x), p(v), p(b), p(crow), p(col), geom, 1, 1, O * 6, True, 2)
n.conv2d_dgrad(p(dx), p(g), p(v), p(t_crow), p(t_row), p(t_perm), geom, 1, 1, O * 6, 2)
n.conv2d_wgrad(p(dv), p(g), p(x), p(crow), p(col), geom, 1, 1, O * 6, 2)
show(y, dx, dv)
mean, var = floats(F), floats(F)
n.batch_norm_forward(p(dx), p(x), 0, 0, p(mean), p(var), 0, 0, N, F, 4, True, 1e-5, True, 2)
show(dx, mean, var)
n.max_pool2d(p(y), p(bytes_ := array.array("B", bytes(N * F))), p(x),
             [N, F, 2, 2, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1], 2)
show(y, bytes_)
n.to_feature_major(p(dx), p(x), N, 4 * F, 2)
show(dx)
print(n.isa(), ",".join(n.supported_isas()), digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian package qemu-user)"
)
def test_baseline_runs_on_an_old_cpu() -> None:
    """A CPU of 2008 (SSE4.2, no AVX), emulated: any AVX instruction on the way is a SIGILL."""
    code = f"FILE = {native().__file__!r}\n{DIGEST}"
    here = python(code, SPARSE_KERNELS_ISA="baseline")
    assert here.returncode == 0, here.stderr
    there = python(code, "qemu-x86_64", "-cpu", "Nehalem")
    assert there.returncode == 0, there.stderr
    isa, supported, digest = there.stdout.split()
    assert (isa, supported) == ("baseline", "baseline")
    assert digest == here.stdout.split()[2]
