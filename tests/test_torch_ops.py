"""The torch room (norm, pooling, dense weight gradients) against the reference, and its choice.

Run here on CPU tensors; with a GPU the same comparison runs there under the mark `gpu`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_kernels import ops, plan
from sparse_kernels.backends import reference, torch_ops
from sparse_kernels.backends import triton as triton_backend
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import is_feature_major, to_feature_major

LIB = torch.ops.sparse_kernels
assert ops.OPERATORS  # importing them defines them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(7, 5), (16, 1), (4, 3, 5, 2), (1, 3, 6, 6), (3, 1, 4, 4), (1, 1, 4, 4), (0, 3, 4, 4)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "feature-major": to_feature_major,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
}
# shape, kernel, stride, padding, dilation, ceil_mode
WINDOWS: list[tuple[Any, ...]] = [
    ((2, 3, 7, 9), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 3, 7, 9), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3, 7, 9), (3, 2), (2, 3), (1, 0), (1, 2), True),
    ((1, 1, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), True),
    ((5, 1, 5, 5), (5, 5), (5, 5), (0, 0), (1, 1), False),
    ((1, 4, 6, 6), (3, 3), (1, 1), (1, 1), (2, 2), False),
    ((2, 3, 6, 6), (3, 3), (4, 4), (1, 1), (1, 1), True),
]
GEOMETRIES = [
    Conv2dGeometry(6, 4, 3, 3, 2, 1, 1, 1, 0, 2, 1, 2, groups=2),
    Conv2dGeometry(4, 4, 3, 3, 1, 1, 1, 1, 1, 1),
    Conv2dGeometry(4, 8, 1, 1),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="torch sees no GPU on this machine"
            ),
        ],
    ),
]


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def compare(op: str, device: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Both backends' results agree in numbers, dtypes and strides; returns the reference's."""
    results = []
    for backend, place in ((torch_ops, device), (reference, "cpu")):
        found = getattr(backend, op)(*(moved(a, place) for a in arguments))
        results.append(found if isinstance(found, tuple) else (found,))
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor))
    bound = TOLERANCE[dtype]
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        if got.dim() == 4:
            assert got.stride() == expected.stride()
        assert got.device.type == device
        torch.testing.assert_close(got.cpu(), expected, rtol=bound, atol=3 * bound, equal_nan=True)
    return results[1]


def optional(wanted: bool, tensor: Tensor) -> Tensor | None:
    return tensor if wanted else None


@pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom:UserWarning")  # the reference's
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(sum(shape))
    channels = shape[1]
    for training, relu, residual, affine in itertools.product((True, False), repeat=4):
        for arrange in LAYOUTS.values():
            x, added, grad = (arrange(torch.randn(shape).to(dtype)) for _ in range(3))
            weight, bias, mean = (torch.randn(channels) for _ in range(3))
            y, mean, var, offset = compare(
                "batch_norm", device, x, optional(affine, weight), optional(affine, bias),
                optional(not training, mean), optional(not training, torch.rand(channels)),
                training, 1e-5, relu, optional(residual, added),
            )  # fmt: skip
            if x.numel() == 0:
                continue
            # A mask from x: at bfloat16's precision a sum near 0 may fall either way.
            masks = [y] if residual or dtype != torch.float32 else [y, None]
            for mask in masks:
                compare(
                    "batch_norm_backward", device, grad, x, mask, optional(affine, weight), mean,
                    var, offset, training, 1e-5, relu, residual,
                )  # fmt: skip


def test_batch_norm_says_what_it_misses() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="expected mean and var outside of training, got None"):
        torch_ops.batch_norm(x, None, None, None, None, False, 1e-5, False, None)
    stat = torch.ones(2)
    with pytest.raises(ValueError, match="expected y or offset, got neither"):
        torch_ops.batch_norm_backward(x, x, None, None, stat, stat, None, True, 1e-5, True, False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 3, 5, 7), (1, 1, 2, 2), (0, 2, 4, 4)], ids=str)
def test_batch_norm_pool(shape: tuple[int, ...], training: bool, device: str) -> None:
    torch.manual_seed(sum(shape))
    x, channels = torch.randn(shape), shape[1]
    weight, bias, mean = (torch.randn(channels) for _ in range(3))
    if x.numel() == 0:
        y, argmax, *_ = torch_ops.batch_norm_pool(x, weight, bias, mean, mean.abs(), False, 1e-5)
        assert y.shape == argmax.shape == (0, 2, 2, 2) and argmax.dtype == torch.uint8
        return
    y, argmax, mean, var, rounding = compare(
        "batch_norm_pool", device, x, weight, bias, optional(not training, mean),
        optional(not training, torch.rand(channels)), training, 1e-5,
    )  # fmt: skip
    grad = torch.randn(y.shape)
    statistics = (weight, mean, var, rounding)
    compare("batch_norm_pool_backward", device, grad, argmax, x, *statistics, training, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pooling(window: tuple[Any, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    shape, *rest = window
    for arrange in LAYOUTS.values():
        x = arrange(torch.randn(shape).to(dtype))
        y, argmax = compare("max_pool2d", device, x, *rest)
        grad = arrange(torch.randn(y.shape).to(dtype))
        compare("max_pool2d_backward", device, grad, argmax, *shape[2:], *rest[:4])
        if rest[3] != (1, 1):  # avg_pool2d knows no dilation
            continue
        for include, divisor in ((True, None), (False, None), (True, 3)):
            averaged = (*rest[:3], rest[4], include, divisor)
            compare("avg_pool2d", device, x, *averaged)
            compare("avg_pool2d_backward", device, grad, *shape[2:], *averaged)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["odd", "3x3", "1x1"])
def test_dense_weight_gradients(geometry: Conv2dGeometry, dtype: torch.dtype, device: str) -> None:
    """Asymmetric padding, stride, dilation and groups among them; results are float32."""
    torch.manual_seed(2)
    for batch, arrange in itertools.product((3, 0), LAYOUTS.values()):
        x = arrange(torch.randn(batch, geometry.in_channels, 7, 9).to(dtype))
        grad = arrange(
            torch.randn(batch, geometry.out_channels, *geometry.output_size(7, 9)).to(dtype)
        )
        (found,) = compare("conv2d_wgrad_dense", device, grad, x, list(geometry))
        assert found.dtype == torch.float32
    for arrange in LAYOUTS.values():
        x, grad = (arrange(torch.randn(5, n).to(dtype)) for n in (7, 3))
        compare("linear_wgrad_dense", device, grad, x)


# -- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_and_torch_serve_every_operator_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A GPU without nvcc: products and dropout by triton, what is dense by nature by torch."""
    monkeypatch.setattr(plan, "_forced", None)
    monkeypatch.setattr(plan, "_cache", {})  # the fake device must not stay in the real one
    monkeypatch.setattr(triton_backend, "installed", lambda: True)
    products = ("linear", "conv2d")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 4, device="cuda", dtype=dtype)
        values = torch.empty(3, 16, 16, device="cuda")
        for op in ops.OPERATORS:
            if op.endswith("_wgrad"):
                chosen = plan.choose(op, x, None, (16, 16))
            elif op.removesuffix("_dgrad") in products:
                chosen = plan.choose(op, x, values)
            else:
                chosen = plan.choose(op, x)
            sparse = op == "dropout" or op.removesuffix("_dgrad").removesuffix("_wgrad") in products
            assert chosen is plan.BACKENDS["triton" if sparse else "torch"], op


def test_the_cpu_is_served_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_forced", None)
    x = torch.ones(2, 3)
    why = plan.reasons("batch_norm", x)
    assert "only where SPARSE_KERNELS_BACKEND names it" in str(why["torch"])
    with plan.use_backend("triton,torch"):
        assert plan.choose("batch_norm", x) is torch_ops
    assert "computes float32, bfloat16" in str(torch_ops.supports("batch_norm", x.double()))
    assert "serves CUDA tensors" in str(torch_ops.supports("batch_norm", x.to("meta")))


def test_a_wrong_name_in_a_list_of_backends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(plan.BackendError, match="'gpu' is no backend"), plan.use_backend("cpu,gpu"):
        pass
    monkeypatch.setattr(plan, "_forced", "triton,gpu")
    monkeypatch.setattr(plan, "_cache", {})
    with pytest.raises(plan.BackendError, match="'triton,gpu': 'gpu' is no backend"):
        plan.choose("batch_norm", torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (1, 1, 4, 4)], ids=str)
def test_fake_kernels_promise_what_torch_returns(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    stat = torch.rand(shape[1])
    y_grad = torch.randn(shape[0], shape[1], shape[2] // 2, shape[3] // 2)
    window = [[2, 2], [2, 2], [0, 0]]
    average = [False, True, None]
    calls = {
        "batch_norm": (x, stat, stat, None, None, True, 1e-5, True, x),
        "batch_norm_pool": (x, stat, stat, None, None, True, 1e-5),
        "max_pool2d": (x, *window, [1, 1], False),
        "avg_pool2d": (x, *window, *average),
        "avg_pool2d_backward": (y_grad, *shape[2:], *window, *average),
    }
    with plan.use_backend("torch"):
        for name, arguments in calls.items():
            operator = getattr(LIB, name).default
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(operator, arguments, test_utils=tests)
        assert is_feature_major(LIB.avg_pool2d(*calls["avg_pool2d"]))
