"""Builds the CUDA kernels for the host: csrc/cuda/*.cu, their bindings and the emulator, by g++.

Two variants: "checked" sees every access of the kernels (runtime/hooks.cpp), "asan" is the same
under AddressSanitizer and UndefinedBehaviorSanitizer. Objects are kept by the hash of what they
are made of.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "cuda-emulation"
VARIANTS = ("checked", "asan")

# FMA contraction stays off here: nvcc contracts, and the tests' tolerances cover both.
COMMON = ["-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
COMMON += ["-DSK_MAX_GRID_Y=emulation::max_grid_y"]  # so that one build serves small grids too
# The front end's checks that hooks.cpp answers; -fsanitize=thread only to have every access called.
WATCHED = [
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,null",
]
# Kernels get neither the class layout checks (vptr) nor -O0: the first needs the runtime's RTTI.
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


def module_name(variant: str) -> str:
    """Name of the extension module: two variants can be on one path."""
    return f"cuda_emulation_{variant}"


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _sources(csrc: Path) -> list[tuple[Path, bool]]:
    """Every source with whether it holds kernels (and is to be watched)."""
    found = [(path, True) for path in sorted((csrc / "cuda").glob("*.cu"))]
    found += [(path, True) for path in sorted(HERE.glob("selftest*.cu"))]
    found += [(path, False) for path in sorted(csrc.glob("bind_cuda*.cpp"))]
    found += [(csrc / "bind_mma.cpp", False)]
    return found + [(path, False) for path in sorted((HERE / "runtime").glob("*.cpp"))]


def _command(source: Path, watched: bool, variant: str, csrc: Path, config: Path) -> list[str]:
    import pybind11

    command = [_compiler(), *COMMON, f"-DSK_EMULATION_MODULE={module_name(variant)}"]
    command += ["-O1"]
    if variant == "asan":
        command += ASAN
    elif watched:
        command += WATCHED
    # The emulator's include folder first: its cuda/intrinsics.cuh and CUDA headers are found there.
    for folder in (HERE / "include", csrc, config):
        command += ["-I", str(folder)]
    for folder in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        command += ["-isystem", folder]
    return [*command, "-x", "c++", "-c", str(source)]


def _headers(csrc: Path) -> bytes:
    """Of every header of ours that a source may include."""
    digest = hashlib.sha256(sys.version.encode())
    for folder in (csrc, HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".cuh", ".h"):
                digest.update(str(path).encode() + path.read_bytes())
    return digest.digest()


def _digest(source: Path, command: list[str], headers: bytes, out: Path) -> str:
    """Of all that the compiler reads: the preprocessed source, and the options.

    Remembered by the files as they are, since the preprocessor takes a second for each source.
    """
    key = hashlib.sha256(headers + source.read_bytes() + repr(command).encode()).hexdigest()
    known = out / "digests" / key
    if known.exists():
        return known.read_text()
    done = subprocess.run([*command, "-E", "-P"], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} -E\n{done.stderr.decode()}")
    options = " ".join(word for word in command if not word.startswith("/"))
    digest = hashlib.sha256(done.stdout + options.encode()).hexdigest()[:16]
    known.parent.mkdir(exist_ok=True)
    partial = known.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(digest)
    partial.replace(known)
    return digest


def _compile(source: Path, command: list[str], headers: bytes, out: Path) -> Path:
    target = out / f"{source.stem}-{_digest(source, command, headers, out)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        line = [*command, "-o", str(partial)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        partial.replace(target)
    return target


def build(variant: str = "checked", csrc: Path = ROOT / "csrc", out: Path | None = None) -> Path:
    """Build one variant of the kernels in `csrc`; returns the extension module's path.

    Raises RuntimeError with the compiler's output.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    out = out or OUT / variant
    out.mkdir(parents=True, exist_ok=True)
    config = out / "build_config.h"
    if not config.exists():
        config.write_text('#pragma once\n#define SK_CUDA 1\n#define SK_CUDA_WHY ""\n')
    jobs = [(source, _command(source, kind, variant, csrc, out)) for source, kind in _sources(csrc)]
    headers = _headers(csrc)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda job: _compile(*job, headers, out), jobs))
    module = out / (module_name(variant) + str(sysconfig.get_config_var("EXT_SUFFIX")))
    stamp = out / "objects"
    names = "\n".join(path.name for path in objects)
    if not module.exists() or not stamp.exists() or stamp.read_text() != names:
        link = [_compiler(), "-shared", "-Wl,-Bsymbolic", *map(str, objects)]
        link += ASAN if variant == "asan" else []
        partial = module.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*link, "-o", str(partial)], check=True)
        partial.replace(module)
        stamp.write_text(names)
    return module


def build_planted(csrc: Path, unit: str, out: Path) -> Path:
    """The checked variant with one source, csrc/cuda/`unit`, compiled from another folder; the
    other objects are those of the last build(). Returns the extension module's path.

    The new object is linked first: of functions that several objects have, its copies count.
    Raises RuntimeError with the compiler's output.
    """
    clean = OUT / "checked"
    others = [clean / name for name in (clean / "objects").read_text().splitlines()]
    kept = [path for path in others if path.stem.rpartition("-")[0] != Path(unit).stem]
    if len(kept) != len(others) - 1:
        raise RuntimeError(
            f"expected one object of {unit} in {clean}, found {len(others) - len(kept)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    source, target = csrc / "cuda" / unit, out / "planted.o"
    command = [*_command(source, True, "checked", csrc, clean), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    module = out / (module_name("checked") + str(sysconfig.get_config_var("EXT_SUFFIX")))
    link = [_compiler(), "-shared", "-Wl,-Bsymbolic", str(target), *map(str, kept)]
    subprocess.run([*link, "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        print(build(name))
