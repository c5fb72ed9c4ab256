"""The variants of the native CUDA products: chosen by rule, by name and by ``tune``, on the
emulated backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from cases import LinearCase, make_conv, make_linear, relative_error
from emulator import load
from problems import EXTRA

from sparse_kernels import plan
from sparse_kernels.backends import _cuda_native, _cuda_variants, cuda, reference
from sparse_kernels.backends.triton.chosen import Site, site_of
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn import SparseLinear, _tune_configs, _tune_problem
from sparse_kernels.plan_measure import Measured


class Recorder:
    """The emulated module, and the variant and order of each product that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(load(), name)

    def cuda_product(self, *arguments: Any) -> None:
        self.asked.append((arguments[10], arguments[14] != 0))
        load().cuda_product(*arguments)

    def cuda_dgrad(self, *arguments: Any) -> None:
        self.asked.append((arguments[12], arguments[13] != 0))
        load().cuda_dgrad(*arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    module = Recorder()
    monkeypatch.setattr(plan, "_cache", {})
    monkeypatch.setattr(_cuda_native, "native", lambda: module)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda, "supports", lambda op, x, values=None, block=None: None)
    load().forget_memory()
    load().set_strict(False)
    _cuda_variants.clear()
    with contextlib.ExitStack() as stack:
        stack.callback(_cuda_variants.clear)
        stack.callback(load().set_strict, True)
        stack.enter_context(plan.use_backend("cuda"))
        yield module


def compute(name: str, which: str, module: Any, dtype: torch.dtype, **more: Any) -> torch.Tensor:
    """Forward or input gradient of a case by a backend."""
    case = next(c for c in EXTRA if c.id == name)
    generator, rest = torch.Generator().manual_seed(5), ()
    if isinstance(case, LinearCase):
        op, t, size = "linear", make_linear(case, torch.float32, generator), (case.in_features,)
        rows: Any = case.out_features
    else:
        op, t = "conv2d", make_conv(case, torch.float32, generator)
        size, rows, rest = (case.height, case.width), case.geometry, (case.geometry,)  # type: ignore[assignment]
    x, grad, values = (t[name].to(dtype) for name in ("x", "grad", "values"))
    if which == "forward":
        return getattr(module, op)(x, values, *t["indices"], None, rows, False, **more)  # type: ignore[no-any-return]
    call = getattr(module, f"{op}_dgrad")
    return call(grad, values, *t["indices"], *size, *rest, **more)  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", ["forward", "dgrad"])
@pytest.mark.parametrize("name", ["staged-wide", "staged-conv-3x3"])
def test_both_variants_by_name(name: str, which: str, recorder: Recorder) -> None:
    want = compute(name, which, reference, torch.float64)
    for variant in ("direct", "staged"):
        got = compute(name, which, cuda, torch.float32, variant=variant)
        assert relative_error(got, want) < 1e-5
    assert recorder.asked == [(1, True), (2, True)]


@pytest.mark.parametrize("variant", ["staged", "tall"])
def test_a_variant_that_does_not_serve_is_refused(variant: str, recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=rf"expected a variant of direct for .*, got '{variant}'"):
        compute("odd-b1-batch131", "forward", cuda, torch.float32, variant=variant)


def linear_site(op: str, batch: int, side: int, density: float, block: int = 1) -> Site:
    capacity = int(density * side * side / block)
    geometry = (side, side, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    return site_of(op, torch.float32, (block, 1), batch, (1, 1), geometry, capacity)


def test_the_rule_goes_by_reuse_and_by_size() -> None:
    def rule(*facts: Any, **more: Any) -> str:
        return _cuda_variants.default(linear_site(*facts, **more))

    for op in ("linear", "linear_dgrad"):
        assert rule(op, 1024, 4096, 0.1) == "staged"
        assert rule(op, 1024, 4096, 0.005) == "direct"  # a staged row is used less than once
        assert rule(op, 64, 4096, 0.1) == "direct"  # 32 thread blocks
        assert rule(op, 1023, 4096, 0.1) == "direct"  # rows of x that no cp.async can copy
        assert rule(op, 16, 4096, 0.1) == "direct"  # small batches have their own kernel
    assert rule("linear", 1024, 4096, 0.1, block=16) == "direct"  # 8 block rows in a thread block
    assert rule("linear_dgrad", 1024, 4096, 0.1, block=16) == "staged"


def test_the_table_comes_before_the_rule(recorder: Recorder) -> None:
    case = next(c for c in EXTRA if c.id == "staged-wide")
    assert isinstance(case, LinearCase)
    compute("staged-wide", "forward", cuda, torch.float32)
    made = make_linear(case, torch.float32, torch.Generator().manual_seed(5))
    geometry = (case.out_features, case.in_features, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    place = (case.batch, (1, 1), geometry, made["values"].shape[0])
    _cuda_variants.use(site_of("linear", torch.float32, case.block, *place), "staged")
    compute("staged-wide", "forward", cuda, torch.float32)
    assert [variant for variant, _ in recorder.asked] == [1, 2]


def test_tune_takes_the_variant_that_is_faster(recorder: Recorder) -> None:
    """A stand-in clock says that staged is: the next calls are staged, and give the same."""

    def clock(calls: Mapping[str, Callable[[], object]], **_: Any) -> Measured:
        for call in calls.values():
            call()
        seconds = {name: 1.0 if name == "staged" else 2.0 for name in calls}
        samples = {name: [value] * 8 for name, value in seconds.items()}
        return Measured(seconds, samples, min(seconds, key=lambda n: seconds[n]), "certain")

    layer = SparseLinear(96, 80, density=0.2)
    x = to_feature_major(torch.randn(64, 96))
    before = layer(x).detach().clone()
    problem = next(iter(_tune_problem.problems(layer, x, True, "own").values()))
    choices = _tune_configs.measured(problem, layer.pattern, 0.1, clock)
    assert choices["forward"].name == choices["wgrad"].name == "staged"
    recorder.asked.clear()
    assert relative_error(layer(x), before) < 1e-6
    assert recorder.asked == [(2, True)]
    _cuda_variants.clear()
    _tune_configs.use(layer, problem.shape, torch.float32, choices)
    layer(x)
    assert recorder.asked[1:] == [(2, True)]
