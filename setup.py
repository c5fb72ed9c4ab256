"""Drives CMake, which alone knows how the kernels are compiled (see CMakeLists.txt).

Environment: SPARSE_KERNELS_CUDA=AUTO|ON|OFF (default AUTO: CUDA kernels if nvcc is found),
CUDACXX=/path/to/nvcc, SPARSE_KERNELS_EMULATE_AVX512=ON (tests), CMAKE_ARGS (anything else).
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the native module, then puts it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (Path(self.build_temp) / "cmake").resolve()
        build.mkdir(parents=True, exist_ok=True)
        # An earlier isolated build left paths to tools that are gone with its environment.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPARSE_KERNELS_VERSION={self.distribution.get_version()}",
            f"-DSPARSE_KERNELS_CUDA={os.environ.get('SPARSE_KERNELS_CUDA') or 'AUTO'}",
            "-DSPARSE_KERNELS_EMULATE_AVX512="
            + (os.environ.get("SPARSE_KERNELS_EMULATE_AVX512") or "OFF"),
        ]  # fmt: skip
        run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
        run([tool("cmake"), "--build", str(build), *self.jobs()])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)

    def jobs(self) -> list[str]:
        return ["--parallel", str(self.parallel)] if self.parallel else []


def run(command: list[str]) -> None:
    """Runs a command whose own message says what went wrong: no traceback of ours below it."""
    status = subprocess.run(command).returncode
    if status != 0:
        raise SystemExit(
            f"sparse_kernels: `{shlex.join(command[:5])} ...` failed with status {status}; "
            "the reason is in its output above"
        )


def tool(name: str) -> str:
    """Path of cmake or ninja: an isolated build has them on its PATH; without isolation they may be
    in an environment that nobody activated, beside its Python or inside their packages.
    """
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), bin_dir(name)]
    found = shutil.which(name, path=os.pathsep.join(folder for folder in folders if folder))
    if found is None:
        raise SystemExit(
            f"building sparse_kernels needs {name}, and none was found on PATH or in the "
            f"environment of {sys.executable}: run `{sys.executable} -m pip install cmake ninja "
            "pybind11`, or leave out --no-build-isolation"
        )
    return found


def bin_dir(name: str) -> str:
    """Where the Python package cmake or ninja keeps its program; empty without the package."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        return ""
    return str(getattr(package, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", ""))


setup(
    ext_modules=[Extension("sparse_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
