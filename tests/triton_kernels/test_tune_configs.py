"""``tune`` and the configurations of the Triton kernels: found, chosen, put to use, restored.

What the launchers make of a choice needs triton only (tensors of device "meta"); the rest runs
interpreted on the CPU or compiled on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from float64_parity import DEVICE
from interpreter_support import HOW, INTERPRETING
from test_launch import BLOCKS, CAPACITY, GEOMETRIES, index_of, launches
from torch import nn

from sparse_kernels import plan, sparsify, tune
from sparse_kernels.backends import triton as backend
from sparse_kernels.backends.triton import chosen
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.nn import tune as planning
from sparse_kernels.plan_measure import Measured
from sparse_kernels.plan_variants import RULE

__all__ = ["launches"]  # a fixture

pytestmark = pytest.mark.skipif(not backend.installed(), reason="triton is not installed")
runs = pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason=HOW)
on_device = runs if INTERPRETING else lambda test: pytest.mark.gpu(runs(test))
GPU = "triton,torch"
BATCH, SIZE = 512, (9, 7)


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    chosen.clear()
    yield
    chosen.clear()


def launch(op: str, g: Conv2dGeometry, block: tuple[int, int], launches: list[Any]) -> Any:
    """The product's launch as an operator's call makes it, on tensors without data."""
    launches.clear()
    index = index_of(g, block=block)
    values = torch.empty(CAPACITY, *block, device="meta")
    spatial = op.startswith("conv2d")
    size = SIZE if spatial else ()
    out = g.output_size(*SIZE) if spatial else ()
    x = torch.empty(BATCH, g.in_channels, *size, device="meta")
    grad = torch.empty(BATCH, g.out_channels, *out, device="meta")
    call, rest = getattr(backend, op), (list(g),) if spatial else ()
    if op.endswith("_wgrad"):
        call(grad, x, *index, *block, *rest)
    elif op.endswith("_dgrad"):
        call(grad, values, *index, *(SIZE if spatial else (g.in_channels,)), *rest)
    else:
        call(x, values, *index, None, *(rest or (g.out_channels,)), False)
    return next(one for one in launches if "TILE_M" in one.arguments)


def facts(config: Any) -> tuple[int, int, int]:
    return config.tile_m, config.num_warps, config.num_stages


OPERATORS = ["conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_launchers_take_default_and_choice(
    op: str, block: tuple[int, int], launches: list[Any]
) -> None:
    """The first candidate is what a call without choice uses; a choice reaches the kernel."""
    shapes = GEOMETRIES.values() if op.startswith("conv2d") else [GEOMETRIES["plain"]]
    for g in shapes:
        image = SIZE if op.startswith("conv2d") else (1, 1)
        site = chosen.site_of(op, torch.float32, block, BATCH, image, g, CAPACITY)
        found = chosen.candidates(site)
        assert len(found) > 1
        for config in found:
            chosen.use(site, chosen.name_of(config))
            made = launch(op, g, block, launches)
            tile = made.arguments["TILE_M"]
            assert (tile, made.num_warps, made.num_stages) == facts(config)
        assert chosen.used(site) == found[-1]
        chosen.use(site, RULE)
        assert chosen.used(site) is None
        made = launch(op, g, block, launches)
        assert (made.arguments["TILE_M"], made.num_warps, made.num_stages) == facts(found[0])


def test_a_choice_belongs_to_its_site(launches: list[Any]) -> None:
    """Another batch, precision or image goes by the default; so does an unknown name."""
    g = GEOMETRIES["3x3"]
    site = chosen.site_of("conv2d", torch.float32, (32, 16), BATCH, SIZE, g, CAPACITY)
    default, other = chosen.candidates(site)[:2]
    for changed in (
        site._replace(batch=BATCH - 1),
        site._replace(tf32=True),
        site._replace(image=(7, 9)),
        site._replace(stored=site.stored + 1),
    ):
        chosen.use(changed, chosen.name_of(chosen.candidates(changed)[1]))
    chosen.use(site, "1-2-3-4-5")
    made = launch("conv2d", g, (32, 16), launches)
    assert (made.arguments["TILE_M"], made.num_stages) == (default.tile_m, default.num_stages)
    chosen.use(site, chosen.name_of(other))
    made = launch("conv2d", g, (32, 16), launches)
    assert (made.arguments["TILE_M"], made.num_stages) == (other.tile_m, other.num_stages)


class Times:
    """Stands in for ``measure``: of several configurations the last one takes half of the time."""

    def __init__(self) -> None:
        self.races: list[list[str]] = []

    def __call__(self, candidates: dict[str, Any], *, seconds: float) -> Measured:
        names = list(candidates)
        self.races.append(names)
        for call in candidates.values():
            call()
        best = names[-1] if names[0] == RULE else names[0]
        times = {name: 0.5 if name == best else 1.0 for name in names}
        samples = {name: [time] * 7 for name, time in times.items()}
        return Measured(times, samples, best, "certain")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Times:
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSE_KERNELS_TUNE", raising=False)
    made = Times()
    monkeypatch.setattr(
        planning, "plan_layers", functools.partial(planning.plan_layers, measure=made)
    )
    return made


def net(block: tuple[int, int]) -> nn.Sequential:
    width = 32 if block[1] > 1 else 8  # the interpreter walks every stored block
    model = nn.Sequential(
        nn.Conv2d(width, width, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(width, width)
    )
    sparsify(model, density=0.3, block=block, generator=torch.Generator().manual_seed(0))
    return model.to(DEVICE)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))]


@on_device
@pytest.mark.parametrize("block", [(16, 16), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_pass_takes_its_winner(
    block: tuple[int, int], dtype: torch.dtype, times: Times
) -> None:
    model = net(block)
    x = torch.randn(33, model[0].in_channels, 2, 2, device=DEVICE)
    kind = torch.device(DEVICE).type
    with plan.use_backend(GPU), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        before = gradients(model, x)
        report = tune(model, x)
        assert set(report["0"].variants) <= {"forward", "wgrad"}  # no gradient of the input
        assert report["3"].variants and report["0"].variants
        assert all(row.chosen == "compressed" for row in report)
        table = dict(chosen._table)
        assert {site.dtype for site in table} == {dtype}
        for site, config in table.items():
            assert config != chosen.candidates(site)[0]
        for found, expected in zip(gradients(model, x), before, strict=True):
            bound = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
        # Another process: an empty table, facts on disk.
        chosen.clear()
        times.races.clear()
        again = tune(model, x)
    assert times.races == []
    assert chosen._table == table
    assert [row.variants for row in again] == [row.variants for row in report]


@on_device
def test_without_tuning_the_defaults_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_KERNELS_TUNE", "off")
    model, x = net((16, 16)), torch.randn(3, 32, 2, 2, device=DEVICE)
    with plan.use_backend(GPU):
        report = tune(model, x)
    assert all(row.source == "rule" for row in report) and not chosen._table


@on_device
def test_with_the_real_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No time is asserted: every candidate runs, and the facts make sense."""
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSE_KERNELS_TUNE", raising=False)
    model = nn.Sequential(nn.Linear(32, 32)).to(DEVICE)
    sparsify(model, density=0.5, block=(16, 16))
    with plan.use_backend(GPU):
        report = tune(model, torch.randn(4, 32, device=DEVICE), seconds=0.02)
    (row,) = report
    assert row.source == "measured" and row.compressed_ms and row.dense_ms
    assert 0 <= row.break_even <= 1


def test_a_configuration_that_the_chip_refuses_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A smaller chip has less shared memory; the default must run, the others may."""
    from sparse_kernels.nn import _tune_configs
    from sparse_kernels.pattern import SparsityPattern

    pattern = SparsityPattern.full((32, 32), block=(16, 16))
    site = chosen.site_of(
        "linear", torch.float32, (16, 16), 128, (1, 1), (32, 32, 1, 1), pattern.capacity
    )
    default, *others = chosen.candidates(site)

    def linear(*args: Any, config: Any) -> None:
        if config != default:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(backend, "linear", linear)
    assert others
    table = _tune_configs._Table(site, backend)
    assert list(_tune_configs._calls(table, pattern, torch.device("cpu"))) == [RULE]
