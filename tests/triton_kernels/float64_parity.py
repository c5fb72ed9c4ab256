"""What the interpreted kernels are held against: every operator of a case in float64."""

from __future__ import annotations

import functools
from typing import Any

import torch
from cases import ConvCase, LinearCase, make_conv, make_linear, relative_error, tolerance
from interpreter_support import INTERPRETING

from sparse_kernels.backends import reference
from sparse_kernels.backends import triton as backend
from sparse_kernels.layout import is_feature_major
from sparse_kernels.pattern import SparsityPattern

DEVICE = "cpu" if INTERPRETING else "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(out: torch.Tensor, exact: torch.Tensor, length: int) -> None:
    """`out` agrees with the float64 result of sums of `length` products."""
    assert relative_error(out, exact) <= tolerance(out.dtype, length)


def check_layout(out: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """The layout of the block's family, and the dtype of the input."""
    assert out.dtype == dtype
    if not backend.writes_batch_major(block):
        assert is_feature_major(out)
    elif out.dim() == 2:
        assert out.is_contiguous()
    else:
        assert out.is_contiguous(memory_format=torch.channels_last)


def check_gradient(dvalues: torch.Tensor, exact: torch.Tensor, t: dict[str, Any], n: int) -> None:
    """float32 whatever the activations were; nothing in the tail or outside of the matrix."""
    pattern: SparsityPattern = t["pattern"]
    assert dvalues.dtype == torch.float32
    check(dvalues, exact, n)
    assert not dvalues[pattern.nnzb :].any()
    inside = pattern.inside_mask()
    assert inside is None or not dvalues[: pattern.nnzb].cpu()[~inside].any()


@functools.lru_cache(maxsize=1)
def made(case: LinearCase | ConvCase, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of a case on the device, and their float64 twins with the values as they are used."""
    generator = torch.Generator().manual_seed(20)
    make: Any = make_linear if isinstance(case, LinearCase) else make_conv
    t = make(case, torch.float32, generator)
    for name in ("x", "grad"):
        t[name] = t[name].to(dtype)
        t[name + "64"] = t[name].double()
    t["values64"] = t["values"].to(dtype).double()
    t["bias64"] = None if t["bias"] is None else t["bias"].double()
    t["indices64"] = t["indices"]
    t["indices"] = tuple(index.to(DEVICE) for index in t["indices"])
    for name in ("x", "grad", "values", "bias"):
        t[name] = None if t[name] is None else t[name].to(DEVICE)
    return t


def run_linear(case: LinearCase, dtype: torch.dtype, configs: dict[str, Any]) -> None:
    t = made(case, dtype)
    index, exact = t["indices"], t["indices64"]
    y = backend.linear(
        t["x"], t["values"], *index, t["bias"], case.out_features, case.relu,
        config=configs.get("linear"),
    )  # fmt: skip
    check_layout(y, dtype, case.block)
    wanted = reference.linear(
        t["x64"], t["values64"], *exact, t["bias64"], case.out_features, case.relu
    )
    check(y, wanted, case.in_features + 1)
    dx = backend.linear_dgrad(
        t["grad"], t["values"], *index, case.in_features, config=configs.get("linear_dgrad")
    )
    check_layout(dx, dtype, case.block)
    wanted = reference.linear_dgrad(t["grad64"], t["values64"], *exact, case.in_features)
    check(dx, wanted, case.out_features)
    dv = backend.linear_wgrad(
        t["grad"], t["x"], *index, *case.block, config=configs.get("linear_wgrad")
    )
    wanted = reference.linear_wgrad(t["grad64"], t["x64"], *exact, *case.block)
    check_gradient(dv, wanted, t, case.batch)


def run_conv(case: ConvCase, dtype: torch.dtype, configs: dict[str, Any]) -> None:
    t = made(case, dtype)
    index, exact, g = t["indices"], t["indices64"], t["geometry"]
    y = backend.conv2d(
        t["x"], t["values"], *index, t["bias"], g, case.relu, config=configs.get("conv2d")
    )
    check_layout(y, dtype, case.block)
    wanted = reference.conv2d(t["x64"], t["values64"], *exact, t["bias64"], g, case.relu)
    check(y, wanted, t["matrix"].shape[1] + 1)
    size = (case.height, case.width)
    dx = backend.conv2d_dgrad(
        t["grad"], t["values"], *index, *size, g, config=configs.get("conv2d_dgrad")
    )
    check_layout(dx, dtype, case.block)
    wanted = reference.conv2d_dgrad(t["grad64"], t["values64"], *exact, *size, g)
    check(dx, wanted, case.geometry.taps * case.geometry.out_channels)
    dv = backend.conv2d_wgrad(
        t["grad"], t["x"], *index, *case.block, g, config=configs.get("conv2d_wgrad")
    )
    wanted = reference.conv2d_wgrad(t["grad64"], t["x64"], *exact, *case.block, g)
    check_gradient(dv, wanted, t, t["grad"].numel() // max(1, case.geometry.out_channels))


def run(case: LinearCase | ConvCase, dtype: torch.dtype, **configs: Any) -> None:
    if isinstance(case, LinearCase):
        run_linear(case, dtype, configs)
    else:
        run_conv(case, dtype, configs)
