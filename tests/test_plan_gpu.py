"""Which backend plan chooses on a GPU that has both the native kernels and Triton.

What decides is device, dtype, block and torch's flags, so neither GPU, nvcc nor triton is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_kernels import plan
from sparse_kernels.backends import _cuda_native, cuda, triton

BF16, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A faked GPU; {"why": ...} is what the native module says of it."""
    said = {"why": ""}
    native: Any = SimpleNamespace(
        build_info=lambda: {"cuda": True}, cuda_unusable=lambda device: said["why"]
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(plan, "_forced", None)
    monkeypatch.setattr(plan, "_cache", {})
    monkeypatch.setattr(triton, "installed", lambda: True)
    monkeypatch.setattr(_cuda_native, "native", lambda: native)
    monkeypatch.setattr(_cuda_native, "native_or_none", lambda: native)
    cuda._unusable.cache_clear()
    yield said
    cuda._unusable.cache_clear()


@pytest.fixture
def set_tf32(unusable: dict[str, str]) -> Iterator[Callable[[str], None]]:
    before = torch.backends.cuda.matmul.fp32_precision

    def change(precision: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = precision

    change("ieee")
    yield change
    change(before)


def chosen(op: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    if op.endswith("_wgrad"):
        return plan.choose(op, x, None, block).__name__.rpartition(".")[2]
    return plan.choose(op, x, torch.zeros(1, *block)).__name__.rpartition(".")[2]


@pytest.mark.parametrize("op", ["linear", "linear_wgrad", "conv2d"])
@pytest.mark.parametrize("block", [(8, 1), (32, 1), (16, 16), (32, 32)])
def test_what_tensor_cores_multiply_is_tritons(
    op: str, block: tuple[int, int], set_tf32: Callable[[str], None]
) -> None:
    assert chosen(op, BF16, block) == "triton"
    with plan.use_backend("cuda"):
        assert chosen(op, BF16, block) == "cuda"


@pytest.mark.parametrize("op", ["linear", "linear_dgrad", "linear_wgrad"])
def test_elements_and_strict_float32_vectors_are_the_native_kernels(
    op: str, set_tf32: Callable[[str], None]
) -> None:
    assert chosen(op, BF16, (1, 1)) == chosen(op, FLOAT, (1, 1)) == "cuda"
    assert chosen(op, FLOAT, (32, 1)) == "cuda"
    assert chosen("linear_dgrad", BF16, (32, 1)) == "cuda"  # Triton has no tensor cores there
    assert chosen(op, FLOAT, (16, 16)) == "triton"  # the native ones would round to TF32


def test_the_choice_follows_torchs_flag(set_tf32: Callable[[str], None]) -> None:
    assert chosen("linear", FLOAT, (16, 1)) == "cuda"
    set_tf32("tf32")
    assert chosen("linear", FLOAT, (16, 1)) == "triton"
    set_tf32("ieee")
    assert chosen("linear", FLOAT, (16, 1)) == "cuda"


def test_without_triton_the_native_kernels_serve(
    monkeypatch: pytest.MonkeyPatch, unusable: dict[str, str]
) -> None:
    monkeypatch.setattr(triton, "installed", lambda: False)
    assert chosen("linear", BF16, (32, 1)) == chosen("linear", BF16, (16, 16)) == "cuda"


def test_a_device_that_cannot_run_them_is_left_to_triton(unusable: dict[str, str]) -> None:
    unusable["why"] = "no kernel image is available"
    assert chosen("linear", FLOAT, (1, 1)) == "triton"
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=FLOAT)
    why = plan.reasons("linear", x, None, (1, 1))["cuda"]
    assert why == "cannot run here: no kernel image is available"
