"""What can be computed: schema, checks, fake kernel, derivative, function of every operator."""

from __future__ import annotations

from sparse_kernels.ops._library import OPERATORS
from sparse_kernels.ops.conv2d import SparseConv2dFunction, conv2d, short_conv2d
from sparse_kernels.ops.dropout import dropout
from sparse_kernels.ops.linear import SparseLinearFunction, linear, short_linear
from sparse_kernels.ops.masked import (
    MaskedWeightFunction,
    clear_outside,
    clearing_hook,
    masked_linear,
    masked_weight,
)
from sparse_kernels.ops.masked_conv2d import masked_conv2d
from sparse_kernels.ops.norm import batch_norm
from sparse_kernels.ops.norm_pool import batch_norm_pool
from sparse_kernels.ops.pooling import avg_pool2d, max_pool2d
from sparse_kernels.ops.sampled import SampledGradientFunction, sampled_gradient

__all__ = [
    "OPERATORS",
    "MaskedWeightFunction",
    "SampledGradientFunction",
    "SparseConv2dFunction",
    "SparseLinearFunction",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_pool",
    "clear_outside",
    "clearing_hook",
    "conv2d",
    "dropout",
    "linear",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "max_pool2d",
    "sampled_gradient",
    "short_conv2d",
    "short_linear",
]
