"""Variants of the native products: each that can be chosen is held to the reference, and listed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import (
    CONV_CASES,
    LINEAR_CASES,
    ConvCase,
    LinearCase,
    make_conv,
    make_linear,
    random_conv_cases,
    random_linear_cases,
)
from parity import errors

from sparse_kernels import ops
from sparse_kernels._load import native
from sparse_kernels.geometry import Conv2dGeometry

PASSES = ("", "_dgrad", "_wgrad")


def _wide(name, batch, size, channels, kernel=3, density=0.05, block=(1, 1), **fields) -> ConvCase:
    """A convolution large enough that plans have something to choose."""
    stride, pad, dilation = fields.get("stride", 1), fields.get("pad", kernel // 2), 1
    outs, ins = channels
    g = Conv2dGeometry(
        *(outs, ins, kernel, kernel, stride, stride, pad, pad, pad, pad, dilation, dilation, 1)
    )
    return ConvCase(name, batch, size, size, g, density, block)


#: Between them every variant applies somewhere (asserted below).
WIDE_CASES = (
    _wide("first", 48, 12, (24, 3), density=0.3),
    _wide("vgg-like", 64, 8, (40, 48)),
    _wide("vgg-blocks", 64, 8, (64, 48), block=(4, 1)),
    _wide("blocks-odd", 37, 6, (64, 48), density=0.2, block=(4, 1)),
    _wide("wide-blocks", 33, 7, (48, 64), density=0.3, block=(8, 1), stride=2),
    _wide("pointwise", 32, 10, (64, 300), 1),
    _wide("pointwise-few", 16, 8, (64, 64), 1, density=0.02),
    _wide("pointwise-odd", 37, 7, (24, 200), 1, density=0.2),
    _wide("strided", 40, 9, (24, 40), 3, density=0.1, stride=2),
    _wide("seven", 20, 20, (16, 12), 7, density=0.05, stride=2),
    _wide("large-image", 32, 40, (12, 16), 3, density=0.1),
    _wide("large-image-few", 16, 40, (24, 3), 3, density=0.1),  # with 16 lanes too
    _wide("deep", 16, 4, (96, 512), 3, density=0.1),
)
WIDE_LINEAR = (
    LinearCase("lines", 100, 784, 300, 0.2),
    LinearCase("blocks", 64, 2048, 128, 0.2, (4, 1)),
    LinearCase("odd", 37, 301, 70, 0.3, (2, 1)),
    LinearCase("thin", 48, 512, 64, 0.05),
    LinearCase(
        "heavy", 33, 1000, 1100, 0.26
    ),  # more weights than its gathering dgrad takes by rule
)


def problem(case: LinearCase | ConvCase, suffix: str, capacity: int):
    """The native description of one pass of a case."""
    if isinstance(case, LinearCase):
        conv = (case.out_features, case.in_features, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        sizes, kind = [case.batch, 1, 1, 1, 1, *conv], "linear"
    else:
        out = case.geometry.output_size(case.height, case.width)
        sizes, kind = [case.batch, case.height, case.width, *out, *case.geometry], "conv2d"
    return native().ProductVariants(kind + suffix, sizes, *case.block, capacity)


def tensors(case, dtype=torch.float32, seed=0):
    make = make_linear if isinstance(case, LinearCase) else make_conv
    return make(case, dtype, torch.Generator().manual_seed(seed))


def rounds(case, capacity: int) -> Iterator[tuple[str, ...]]:
    """Uses every variant of every pass once; yields the names in use (forward, dgrad, wgrad)."""
    passes = [problem(case, suffix, capacity) for suffix in PASSES]
    for names in itertools.zip_longest(*(p.names for p in passes), fillvalue="rule"):
        for p, name in zip(passes, names, strict=True):
            p.use(name)
            assert p.used == name
        yield names
    native().clear_variants()


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    native().clear_variants()
    yield
    native().clear_variants()


@pytest.fixture(params=native().supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native().isa()
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


def check(cases, seen: set[str]) -> None:
    for i, case in enumerate(cases):
        capacity = tensors(case)["values"].shape[0]
        for names in rounds(case, capacity):
            seen.update(names)
            # Errors make the same pattern again: its seed is the case's.
            found = errors(case, torch.float32, ("contiguous", "feature_major")[i % 2], seed=0)
            assert max(found.values()) <= 1e-5, (case.id, names, found)


def test_every_variant_agrees_with_the_reference(isa: str) -> None:
    seen: set[str] = set()
    check([*WIDE_CASES, *WIDE_LINEAR], seen)
    expected = set(native().variant_names())
    if isa == "baseline":
        expected.discard("scatter-rows")  # it has too few registers for that kernel
    assert seen == expected, f"no case of this test chooses {expected - seen}"


def test_curated_and_random_problems() -> None:
    check([*LINEAR_CASES, *CONV_CASES], set())
    check([*random_linear_cases(10, 7), *random_conv_cases(30, 7)], set())


@pytest.mark.parametrize("case", [*WIDE_CASES, *WIDE_LINEAR], ids=lambda case: case.id)
def test_no_variant_depends_on_the_number_of_threads(case) -> None:
    t = tensors(case)
    x, values = t["x"].requires_grad_(), t["values"].requires_grad_()
    before = torch.get_num_threads()

    def run() -> list[torch.Tensor]:
        if isinstance(case, LinearCase):
            y = ops.linear(x, values, *t["indices"], None, out_features=case.out_features)
        else:
            y = ops.conv2d(x, values, *t["indices"], None, geometry=case.geometry)
        return [y.detach(), *torch.autograd.grad(y, (x, values), t["grad"])]

    try:
        for names in rounds(case, values.shape[0]):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(run())
            for other in results[1:]:
                equal = [torch.equal(a, b) for a, b in zip(results[0], other, strict=True)]
                assert all(equal), (names, equal)
    finally:
        torch.set_num_threads(before)


def test_a_variant_that_does_not_apply_is_refused() -> None:
    case = WIDE_LINEAR[2]
    p = problem(case, "_dgrad", 100)
    assert p.names[0] == "rule"
    with pytest.raises(ValueError, match="'scatter' does not apply to this linear_dgrad: choose"):
        p.use("scatter")
    with pytest.raises(ValueError, match="variant 'fastest' is unknown: choose one of rule"):
        p.use("fastest")
    assert native().count_variants() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv3d", [1] * 18, 1, 1, 1), "pass must be one of conv2d, "),
        (("conv2d", [1] * 17, 1, 1, 1), "18 integers"),
        (("linear", [1] * 18, 0, 1, 1), "bh must be at least 1"),
    ],
)
def test_bad_descriptions_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        native().ProductVariants(*arguments)


def test_the_nearest_capacity_counts() -> None:
    case = WIDE_CASES[1]
    p, other = problem(case, "_wgrad", 1000), problem(case, "_wgrad", 1100)
    name = next(n for n in p.names if n in other.names and n != "rule")
    p.use(name)
    assert native().count_variants() == 1
    assert [problem(case, "_wgrad", c).used for c in (790, 810, 1000, 1240, 1260)] == [
        *("rule", name, name, name, "rule")
    ]
    assert problem(case, "", 1000).used == problem(case, "_dgrad", 1000).used == "rule"
    other.use("rule")  # measured and left to the rule: no neighbour's variant
    assert (other.used, problem(case, "_wgrad", 1060).used) == ("rule", "rule")
    p.use("rule")
    assert native().count_variants() == 0


def test_a_problem_without_numbers_has_nothing_to_choose() -> None:
    case = WIDE_CASES[1]._replace(batch=0)
    assert problem(case, "", 10).names == ["rule"] == problem(WIDE_CASES[1], "", 0).names
