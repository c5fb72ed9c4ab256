"""Layers: sparse drop-ins for nn.Linear and nn.Conv2d, norms, poolings, dropout, sparsify."""

from __future__ import annotations

from sparse_kernels.nn.base import COMPRESSED, DENSE_MASKED, DENSE_MASKED_ABOVE, SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.dropout import Dropout
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.nn.norm import BatchNorm1d, BatchNorm2d
from sparse_kernels.nn.pooling import AvgPool2d, MaxPool2d
from sparse_kernels.nn.report import SparsifyReport, SparsifyRow
from sparse_kernels.nn.sparsify import densify, sparsify
from sparse_kernels.nn.tune_report import TuneReport, TuneRow

__all__ = [
    "COMPRESSED",
    "DENSE_MASKED",
    "DENSE_MASKED_ABOVE",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Dropout",
    "MaxPool2d",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SparsifyReport",
    "SparsifyRow",
    "TuneReport",
    "TuneRow",
    "densify",
    "sparsify",
]
