"""Parity of a device's linear operator with float64: on the GPU under the mark `gpu`, and the same
on the CPU.

The CPU parameter keeps this file honest where there is no GPU: the test that a GPU machine will
run is run here.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from sparse_kernels import ops, plan
from sparse_kernels.backends import triton
from sparse_kernels.pattern import SparsityPattern

HAS_GPU = torch.cuda.is_available()
HAS_NVCC = bool(shutil.which("nvcc") or os.environ.get("CUDACXX"))  # as tools/gpu_check.py has it
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine"),
        ],
    ),
]
# (batch, in, out, density): odd sizes, one row, more columns than a thread block, an empty
# pattern, a full one.
CASES = [
    (1, 1, 1, 1.0),
    (3, 17, 5, 0.3),
    (33, 70, 129, 0.05),
    (128, 784, 300, 0.05),
    (257, 31, 64, 1.0),
    (16, 48, 40, 0.0),
    (0, 12, 9, 0.5),
]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = got.detach().double().cpu() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_linear_matches_float64(case: tuple[int, int, int, float], relu: bool, device: str) -> None:
    batch, inputs, outputs, density = case
    generator = torch.Generator().manual_seed(sum(case[:3]))
    pattern = SparsityPattern.random((outputs, inputs), density=density, generator=generator)
    dense = torch.randn(outputs, inputs, generator=generator) * pattern.mask()
    x = torch.randn(batch, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    grad = torch.randn(batch, outputs, generator=generator)

    exact = [t.double().requires_grad_() for t in (x, dense, bias)]
    expected = torch.nn.functional.linear(*exact)
    expected = expected.relu() if relu else expected
    expected.backward(grad.double())
    expected_values = pattern.compress(exact[1].grad)

    on_device = pattern.to(device)
    leaves = [t.to(device).requires_grad_() for t in (x, pattern.compress(dense), bias)]
    # The native CUDA kernels have no weight gradient; Triton has.
    served = device == "cpu" or triton.installed()
    leaves[1].requires_grad_(served)
    y = ops.linear(
        leaves[0], leaves[1], *on_device.tensors(), leaves[2], out_features=outputs, relu=relu
    )
    y.backward(grad.to(device))

    assert y.device.type == device
    assert relative_error(y, expected) <= 1e-5
    assert relative_error(leaves[0].grad, exact[0].grad) <= 1e-5
    if served:
        assert relative_error(leaves[1].grad, expected_values) <= 1e-5
    assert relative_error(leaves[2].grad, exact[2].grad) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine")
@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc on this machine: Triton serves the GPU alone")
def test_the_native_module_was_built_with_cuda() -> None:
    from sparse_kernels._load import native

    assert native().build_info()["cuda"], native().build_info()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine")
@pytest.mark.skipif(triton.installed(), reason="triton computes the weight gradient")
def test_the_weight_gradient_without_triton_is_refused() -> None:
    """What the CUDA backend cannot compute is an error with reasons, never a dense computation."""
    pattern = SparsityPattern.full((8, 6)).to("cuda")
    values = torch.ones(pattern.capacity, 1, 1, device="cuda", requires_grad=True)
    y = ops.linear(torch.ones(4, 6, device="cuda"), values, *pattern.tensors(), out_features=8)
    with pytest.raises(plan.BackendError, match="linear_wgrad.*cuda: has"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine")
def test_the_kernel_runs_on_the_current_stream() -> None:
    pattern = SparsityPattern.full((64, 64)).to("cuda")
    values = torch.ones(pattern.capacity, 1, 1, device="cuda")
    x = torch.zeros(4096, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            50_000_000
        )  # x is written late: a kernel on another stream would read zeros
        x.fill_(1.0)
        y = ops.linear(x, values, *pattern.tensors(), out_features=64)
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 64.0))
