"""What sparsify refuses, with what to give instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_kernels.nn import sparsify


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 5)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsify(mlp(), density=0), r"\(0, 1\]"),
        (lambda: sparsify(mlp(), density=2), r"\(0, 1\]"),
        (lambda: sparsify(mlp(), density={"0": 1.5}), r"density\['0'\]"),
        (lambda: sparsify(mlp(), density={"0": 0.5}, distribution="erk"), "drop distribution"),
        (lambda: sparsify(mlp(), distribution="even"), "one of uniform, er, erk"),
        (lambda: sparsify(mlp(), keep="best"), "'random'"),
        (lambda: sparsify(mlp(), block=(0, 2)), "block must be"),
        (lambda: sparsify(nn.Linear(4, 4)), "SparseLinear.from_dense"),
        (lambda: sparsify([nn.Linear(4, 4)]), "nn.Module"),
    ],
)
def test_bad_arguments_say_what_to_give(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_failure_leaves_the_model_unchanged() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        sparsify(model, keep="magnitude")
    assert [type(m) for m in model] == [type(m) for m in mlp()]
