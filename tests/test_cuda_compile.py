"""tools/cuda_compile.py reads what ptxas says: every kernel has a row, and every spill fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "cuda_compile.py"
OURS, CUBS = "_ZN2sk4cuda9OwnKernelE", "_ZN3cub17CUB_300001_SM_8006detail11EmptyKernelIvEEvv"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_compile", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_compile"] = module
    spec.loader.exec_module(module)
    return module


def entry(name: str, registers: int, spill: int = 0, arch: str = "sm_80") -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    0 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem, 404 bytes\n"
    )


def beside(spill: int) -> str:
    return (
        "ptxas info    : Function properties for __internal_slowpath\n"
        f"    8 bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads\n"
    )


def test_kernels_of_cub_are_counted_and_have_rows(tool: ModuleType) -> None:
    kernels = tool.parse_ptxas(entry(OURS, 40) + entry(CUBS, 56, 4))
    assert [(k.registers, k.shared_bytes, k.spill_bytes) for k in kernels] == [
        (40, 128, 0),
        (56, 128, 8),
    ]
    text = tool.table(kernels)
    assert "| 40 r, 128 B, 75% |" in text
    if tool.demangle([CUBS])[CUBS] != CUBS:  # with cu++filt or c++filt
        assert "| CUB's EmptyKernel | 1 of up to 56 r, 128 B, SPILLS 8 B |" in text


def test_a_spill_of_a_function_that_was_not_inlined_is_its_kernels(tool: ModuleType) -> None:
    log = entry(OURS, 40) + beside(12) + entry(CUBS, 20)
    assert [k.spill_bytes for k in tool.parse_ptxas(log)] == [12, 0]
    first, used = entry(OURS, 40).rsplit("ptxas", 1)
    log = first + beside(12) + "ptxas" + used
    assert [k.spill_bytes for k in tool.parse_ptxas(log)] == [12]


@pytest.mark.parametrize("name", [OURS, CUBS])
def test_a_spill_fails_whosever_kernel_it_is(
    tool: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tool.ROOT / "csrc" / "cuda" / "any.cu"
    monkeypatch.setattr(tool, "OUT", tmp_path)
    monkeypatch.setattr(tool, "architectures", lambda nvcc, wanted: wanted)
    for spill in (0, 16):
        done = (source, "sm_80", 0, entry(name, 255, spill))
        monkeypatch.setattr(tool, "compile_source", lambda nvcc, path, arch, done=done: done)
        assert tool.compile_all("nvcc", [source], ["sm_80"], None) == (spill > 0)
