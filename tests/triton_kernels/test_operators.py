"""The registered operators on the Triton backend: schemas, fake kernels, compiled graphs, autograd.

Interpreted on tensors of the CPU, or compiled on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import ConvCase, LinearCase, _conv, make_conv, make_linear
from float64_parity import DEVICE
from interpreter_support import HOW, INTERPRETING

from sparse_kernels import ops, plan
from sparse_kernels.backends import triton as backend

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not HAS_GPU, reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]
LIB = torch.ops.sparse_kernels
CASES = [
    LinearCase("operator", 3, 18, 20, 0.5, (16, 16)),
    LinearCase("operator", 3, 5, 6, 0.5, (2, 1)),
    ConvCase("operator", 2, 4, 3, _conv((17, 18), (2, 2), stride=2, pad=1), 0.5, (16, 16)),
    ConvCase("operator", 2, 4, 3, _conv((4, 6), (2, 2), stride=2, pad=1), 0.5, (2, 1)),
]
IDS = ["linear-block", "linear-vector", "conv2d-block", "conv2d-vector"]


@pytest.fixture(autouse=True)
def triton_serves() -> Iterator[None]:
    with plan.use_backend("triton"):
        yield


def made(case: LinearCase | ConvCase) -> dict[str, Any]:
    make: Any = make_linear if isinstance(case, LinearCase) else make_conv
    t = make(case, torch.float32, torch.Generator().manual_seed(8))
    t["indices"] = tuple(index.to(DEVICE) for index in t["indices"])
    for name in ("x", "grad", "values", "bias"):
        t[name] = t[name].to(DEVICE)
    return t


def calls(case: LinearCase | ConvCase) -> dict[str, tuple[Any, ...]]:
    """Arguments of forward and both gradients."""
    t = made(case)
    index = t["indices"]
    if isinstance(case, LinearCase):
        return {
            "linear": (t["x"], t["values"], *index, t["bias"], None, case.out_features, True),
            "linear_dgrad": (t["grad"], t["values"], *index, case.in_features),
            "linear_wgrad": (t["grad"], t["x"], *index, *case.block),
        }
    g = list(case.geometry)
    return {
        "conv2d": (t["x"], t["values"], *index, t["bias"], None, g, True),
        "conv2d_dgrad": (t["grad"], t["values"], *index, case.height, case.width, g),
        "conv2d_wgrad": (t["grad"], t["x"], *index, *case.block, g),
    }


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_fake_kernels_promise_what_the_kernels_return(case: LinearCase | ConvCase) -> None:
    """Shapes, dtypes and strides: opcheck compares them."""
    for name, arguments in calls(case).items():
        operator = getattr(LIB, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_compiled_graph_trains_as_eager_does(case: LinearCase | ConvCase) -> None:
    """Traced through the fake kernels, run by the real ones; gradients of all three operands."""
    t = made(case)

    def layer(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if isinstance(case, LinearCase):
            y = ops.linear(x, values, *t["indices"], bias, out_features=case.out_features)
        else:
            y = ops.conv2d(x, values, *t["indices"], bias, geometry=list(case.geometry))
        return (y * 2).relu()

    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [t[name].clone().requires_grad_() for name in ("x", "values", "bias")]
        y = function(*leaves)
        y.backward(t["grad"])
        found.append((y, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
        assert eager.stride() == compiled.stride()
