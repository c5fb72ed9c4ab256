"""Element and V x 1 kernels against the float64 reference: interpreted, or compiled on a GPU.

With TRITON_INTERPRET=1 the kernels run line by line on tensors of the CPU; on a machine with a GPU,
and without that variable, the same tests run what the compiler made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vector_cases
from cases import ConvCase, LinearCase, _conv
from float64_parity import DEVICE, DTYPES, check, made, run
from interpreter_support import HOW, INTERPRETING

from sparse_kernels.backends import reference
from sparse_kernels.backends import triton as backend
from sparse_kernels.backends.triton import vector_config as tiles
from sparse_kernels.backends.triton.block_config import Problem

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not HAS_GPU, reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]


def parameters() -> Iterator[Any]:
    """Every case with every dtype; all but a few are slow."""
    for case in (*vector_cases.LINEAR, *vector_cases.CONV):
        linear = isinstance(case, LinearCase)
        core = case.id in (vector_cases.CORE_LINEAR if linear else vector_cases.CORE_CONV)
        for name in DTYPES:
            marks = () if core and name == "float32" else pytest.mark.slow
            kind = "linear" if linear else "conv2d"
            yield pytest.param(case, name, id=f"{kind}-{case.id}-{name}", marks=marks)


@pytest.mark.parametrize("case, dtype", list(parameters()))
def test_against_float64(case: LinearCase | ConvCase, dtype: str) -> None:
    run(case, DTYPES[dtype])


HALF_CASES = [
    LinearCase("half", 20, 17, 18, 0.4, (4, 1), relu=True),
    LinearCase("half", 20, 33, 40, 0.4, (16, 1)),
    ConvCase("half", 2, 4, 3, _conv((9, 20), (2, 2), pad=1), 0.4, (16, 1)),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALF_CASES, ids=["linear4", "linear16", "conv2d"])
def test_half_types(case: LinearCase | ConvCase, dtype: str) -> None:
    """16-bit activations take tl.dot where a block fills half of a tile."""
    run(case, DTYPES[dtype])


# -- configurations --------------------------------------------------------------------------------


def config_parameters() -> Iterator[Any]:
    for case in (
        LinearCase("config", 45, 50, 37, 0.5, (16, 1)),
        LinearCase("config", 45, 20, 19, 0.5),
        ConvCase("config", 2, 5, 4, _conv((11, 18), (2, 2), pad=1), 0.4, (4, 1)),
    ):
        op = "linear" if isinstance(case, LinearCase) else "conv2d"
        for suffix in ("", "_dgrad", "_wgrad"):
            found = {
                config
                for dtype in DTYPES.values()
                for config in tiles.vector_candidates(
                    Problem(op + suffix, dtype, case.block, 1 << 12)
                )
            }
            for config in sorted(found):
                name = "-".join(str(int(part)) for part in config)
                block = "x".join(map(str, case.block))
                yield pytest.param(case, op + suffix, config, id=f"{op}{suffix}-{block}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("case, op, config", list(config_parameters()))
def test_every_configuration(case: LinearCase | ConvCase, op: str, config: Any) -> None:
    """Tile sizes change the order of the sums, never what is summed."""
    run(case, torch.float32, **{op: config})


@pytest.mark.parametrize("case", HALF_CASES[1:], ids=["linear", "conv2d"])
def test_gathered_rows_in_float32(case: LinearCase | ConvCase) -> None:
    """The form for the tensor cores, where float32 shows every wrong index."""
    op = "linear" if isinstance(case, LinearCase) else "conv2d"
    forward = tiles.VectorConfig(32, 16, True, 4, 3)
    wgrad = tiles.VectorWgradConfig(16, 32, True, 4, 3)
    run(case, torch.float32, **{op: forward, f"{op}_wgrad": wgrad})


# -- parts, tails, layouts -------------------------------------------------------------------------


def test_the_parts_of_a_weight_gradient_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.backends.triton import vector_wgrad

    monkeypatch.setattr(vector_wgrad, "wgrad_parts", lambda *_: 3)
    case = LinearCase("parts", 150, 12, 9, 0.5, (4, 1))
    run(case, torch.float32, linear_wgrad=tiles.VectorWgradConfig(16, 2, False, 4, 1))


def test_what_lies_beyond_the_pattern_is_never_used() -> None:
    """NaN in the tail of values and in rows next to those that are read; a list's tail too."""
    case = LinearCase("tail", 5, 13, 18, 0.5, (4, 1), slack=4)
    t = made(case, torch.float32)
    values = t["values"].clone()
    values[t["pattern"].nnzb :] = float("nan")
    x = torch.full((17, 5), float("nan"), device=DEVICE)
    x[2:15] = t["x"].t()
    y = backend.linear(x[2:15].t(), values, *t["indices"], None, 18, False)
    exact = reference.linear(t["x64"], t["values64"], *t["indices64"], None, 18, False)
    check(y, exact, 13)
    grads = torch.full((22, 5), float("nan"), device=DEVICE)
    grads[2:20] = t["grad"].t()
    dx = backend.linear_dgrad(grads[2:20].t(), values, *t["indices"], 13)
    check(dx, reference.linear_dgrad(t["grad64"], t["values64"], *t["indices64"], 13), 18)


INFINITE_CASES = {
    "plain": (LinearCase("infinite", 4, 9, 7, 0.4), None),
    "gathered": (
        LinearCase("infinite", 4, 9, 60, 0.3, (16, 1)),
        tiles.VectorConfig(32, 16, True, 4, 3),
    ),
}


@pytest.mark.parametrize("case, config", INFINITE_CASES.values(), ids=INFINITE_CASES)
def test_infinity_stays_where_it_is(case: LinearCase, config: Any) -> None:
    """A list's masked end must not read column 0: 0 times infinity would be NaN."""
    t = made(case, torch.float32)
    x = t["x"].clone()
    x[:, 0] = float("inf")
    out = case.out_features
    y = backend.linear(x, t["values"], *t["indices"], None, out, False, config=config)
    exact = reference.linear(x.cpu(), t["values"].cpu(), *t["indices64"], None, out, False)
    read = t["matrix"][:, 0] != 0  # rows that store column 0
    assert bool(read.any()) and not bool(read.all())
    assert bool(y[:, ~read.to(DEVICE)].isfinite().all())
    assert torch.equal(y.cpu().isinf(), exact.isinf() & read)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_any_strides_of_the_input(op: str) -> None:
    """Contiguous, channels_last and sliced inputs give what feature-major ones do."""
    if op == "linear":
        t = made(LinearCase("strides", 6, 20, 13, 0.5), torch.float32)
        plain = backend.linear(t["x"], t["values"], *t["indices"], None, 13, False)
        x = t["x"].t().contiguous().t()
        assert torch.equal(backend.linear(x, t["values"], *t["indices"], None, 13, False), plain)
        return
    t = made(ConvCase("strides", 2, 3, 4, _conv((5, 6), (1, 1)), 0.6, (2, 1)), torch.float32)
    rest = (t["values"], *t["indices"], None, t["geometry"], False)
    plain = backend.conv2d(t["x"], *rest)
    for x in (t["x"].to(memory_format=torch.channels_last), t["x"].repeat(2, 1, 1, 1)[::2]):
        wanted = plain if x.stride()[1] == 1 else backend.conv2d(x.contiguous(), *rest)
        assert torch.equal(backend.conv2d(x, *rest), wanted)


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variant computes the same; a tensor that needs it would not fit in this test."""
    from sparse_kernels.backends.triton import vector_products, vector_wgrad

    for module in (vector_products, vector_wgrad):
        monkeypatch.setattr(module, "needs_long", lambda *_: True)
    run(LinearCase("long", 20, 12, 14, 0.5, (4, 1)), torch.float32)
