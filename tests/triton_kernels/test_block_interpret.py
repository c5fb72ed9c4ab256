"""Block kernels against the float64 reference: interpreted on the CPU, or compiled on a GPU.

With TRITON_INTERPRET=1 the kernels run line by line on tensors of the CPU; on a machine with a GPU,
and without that variable, the same tests run what the compiler made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import block_cases
import pytest
import torch
from cases import ConvCase, LinearCase, make_linear
from float64_parity import DEVICE, DTYPES, check, made, run
from interpreter_support import HOW, INTERPRETING

from sparse_kernels.backends import reference
from sparse_kernels.backends import triton as backend
from sparse_kernels.backends.triton import block_config as tiles
from sparse_kernels.geometry import Conv2dGeometry

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not HAS_GPU, reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]


def parameters() -> Iterator[Any]:
    """Every case with every dtype; all but a few are slow."""
    for case in (*block_cases.LINEAR, *block_cases.CONV):
        linear = isinstance(case, LinearCase)
        core = case.id in (block_cases.CORE_LINEAR if linear else block_cases.CORE_CONV)
        for name in DTYPES:
            marks = () if core and name == "float32" else pytest.mark.slow
            kind = "linear" if linear else "conv2d"
            yield pytest.param(case, name, id=f"{kind}-{case.id}-{name}", marks=marks)


@pytest.mark.parametrize("case, dtype", list(parameters()))
def test_against_float64(case: LinearCase | ConvCase, dtype: str) -> None:
    run(case, DTYPES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("case", block_cases.random_conv_cases(16, seed=5), ids=lambda c: c.id)
def test_random_convolutions(case: ConvCase) -> None:
    run(case, torch.float32)


HALF_CASES = [
    LinearCase("half", 20, 40, 50, 0.4, (16, 16), relu=True),
    ConvCase("half", 1, 4, 3, Conv2dGeometry(36, 24, 2, 2, 1, 1, 1, 1), 0.4, (16, 16)),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALF_CASES, ids=["linear", "conv2d"])
def test_half_types(case: LinearCase | ConvCase, dtype: str) -> None:
    run(case, DTYPES[dtype])


# -- configurations --------------------------------------------------------------------------------

CONFIG_CASES = [
    LinearCase("config", 45, 90, 70, 0.6, (32, 16), bias=True),
    ConvCase("config", 2, 5, 4, Conv2dGeometry(50, 40, 2, 2, 1, 1, 1, 1), 0.5, (16, 32)),
]


def config_parameters() -> Iterator[Any]:
    for case in CONFIG_CASES:
        op = "linear" if isinstance(case, LinearCase) else "conv2d"
        for suffix in ("", "_dgrad", "_wgrad"):
            problem = tiles.Problem(op + suffix, torch.bfloat16, case.block, 1 << 12)
            for config in tiles.candidates(problem):
                name = "-".join(str(int(part)) for part in config)
                yield pytest.param(case, op + suffix, config, id=f"{op}{suffix}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("case, op, config", list(config_parameters()))
def test_every_configuration(case: LinearCase | ConvCase, op: str, config: Any) -> None:
    """Tile sizes change the order of the sums, never what is summed."""
    run(case, torch.float32, **{op: config})


# -- weight gradient: parts, order of rows, what is not read ---------------------------------------


def test_the_parts_of_a_weight_gradient_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.backends.triton import block_wgrad

    monkeypatch.setattr(block_wgrad, "wgrad_parts", lambda *_: 3)
    case = LinearCase("parts", 150, 40, 36, 0.5, (16, 16))
    config = tiles.WgradConfig(16, 2, 4, 2)
    run(case, torch.float32, linear_wgrad=config)


def test_equal_inputs_give_equal_bits() -> None:
    t = made(block_cases.LINEAR[1], torch.float32)
    block = block_cases.LINEAR[1].block
    first, second = (backend.linear_wgrad(t["grad"], t["x"], *t["indices"], *block) for _ in "ab")
    assert torch.equal(first, second)


def test_the_order_of_rows_follows_a_pattern_rewritten_in_place() -> None:
    """Same tensors, new pattern: results are right, and the kept order is brought up to date."""
    from sparse_kernels.backends.triton.operands import row_order

    case = LinearCase("rewrite", 9, 64, 64, 0.3, (16, 16), slack=6)
    t = make_linear(case, torch.float32, torch.Generator().manual_seed(3))
    pattern = t["pattern"].to(DEVICE)
    crow = pattern.tensors()[0]
    order = row_order(crow, "rows", crow.diff)
    x, values = t["x"].to(DEVICE), torch.randn_like(t["values"]).to(DEVICE)
    keys = torch.tensor([0, 5, 12, 13, 14, 15], device=pattern.device)  # the last row is longest
    assert not pattern.rewrite_(keys), "the case leaves room for these blocks"
    crow, col, *rest = pattern.tensors()
    y = backend.linear(x, values, crow, col, *rest, None, 64, False)
    exact = reference.linear(x.double(), values.double(), crow, col, *rest, None, 64, False)
    check(y, exact.cpu(), 64)
    again = row_order(crow, "rows", crow.diff)
    assert again is order, "a captured graph reads this memory"
    assert again.tolist() == [3, 0, 1, 2]


def test_what_lies_beyond_the_pattern_is_never_used() -> None:
    """NaN in the tail of values, and in rows and channels next to those that are read."""
    case = LinearCase("tail", 5, 40, 50, 0.5, (16, 32), slack=4)
    t = made(case, torch.float32)
    values = t["values"].clone()
    values[t["pattern"].nnzb :] = float("nan")
    wide = torch.full((9, 40), float("nan"), device=DEVICE)
    wide[2:7] = t["x"]
    y = backend.linear(wide[2:7], values, *t["indices"], None, 50, False)
    exact = reference.linear(t["x64"], t["values64"], *t["indices64"], None, 50, False)
    check(y, exact, 40)
    grads = torch.full((9, 50), float("nan"), device=DEVICE)
    grads[2:7] = t["grad"]
    dx = backend.linear_dgrad(grads[2:7], values, *t["indices"], 40)
    check(dx, reference.linear_dgrad(t["grad64"], t["values64"], *t["indices64"], 40), 50)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_any_strides_of_the_input(op: str) -> None:
    """Feature-major, contiguous and sliced inputs give what batch-major ones do."""
    if op == "linear":
        t = made(LinearCase("strides", 6, 40, 33, 0.5, (16, 16)), torch.float32)
        plain = backend.linear(t["x"], t["values"], *t["indices"], None, 33, False)
        x = t["x"].t().contiguous().t()
        assert torch.equal(backend.linear(x, t["values"], *t["indices"], None, 33, False), plain)
        return
    case = ConvCase("strides", 2, 3, 4, Conv2dGeometry(20, 20, 1, 1), 1.0, (16, 16))
    t = made(case, torch.float32)
    rest = (t["values"], *t["indices"], None, t["geometry"], False)
    plain = backend.conv2d(t["x"].to(memory_format=torch.channels_last), *rest)
    for x in (t["x"], t["x"].movedim(0, -1).contiguous().movedim(-1, 0)):
        assert torch.equal(backend.conv2d(x, *rest), plain)


def test_relu_keeps_nan_and_infinity() -> None:
    case = LinearCase("nan", 4, 16, 16, block=(16, 16), fill="full")
    t = made(case, torch.float32)
    x = t["x"].clone()
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = backend.linear(x, t["values"], *t["indices"], t["bias"], 16, True)
    exact = reference.linear(x, t["values"], *t["indices"], t["bias"], 16, True)
    assert torch.equal(y.isnan(), exact.isnan()) and bool(y[1].isnan().all())
    assert torch.equal(y.isinf(), exact.isinf())


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variant computes the same; a tensor that needs it would not fit in this test."""
    from sparse_kernels.backends.triton import block_products, block_wgrad

    for module in (block_products, block_wgrad):
        monkeypatch.setattr(module, "needs_long", lambda *_: True)
    run(LinearCase("long", 20, 40, 40, 0.5, (16, 16)), torch.float32)
