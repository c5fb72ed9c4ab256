"""tune and the variants of the native products: measured per pass, kept, restored, reported."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from sparse_kernels import SparseConv2d, SparseLinear, plan_variants, sparsify, tune
from sparse_kernels._load import native
from sparse_kernels.nn import _tune_variants
from sparse_kernels.nn import tune as planning
from sparse_kernels.nn._tune_variants import PASSES, Site
from sparse_kernels.plan_measure import Measured
from sparse_kernels.plan_variants import RULE, Choice

X = torch.randn(32, 16, 8, 8, generator=torch.Generator().manual_seed(3))


class Times:
    """Stands in for ``measure``: by pass the variant that takes ``1 / gain`` of the rule's time."""

    def __init__(self) -> None:
        self.quick, self.gain, self.settled = "half-slab", 2.0, "certain"
        self.races: list[list[str]] = []

    def __call__(self, candidates, *, seconds):
        self.races.append(list(candidates))
        times = {}
        for name, call in candidates.items():
            call()
            times[name] = 1 / self.gain if name == self.quick else 1.0
        samples = {name: [time] * 7 for name, time in times.items()}
        best = min(times, key=times.get) if self.gain > 1.03 else next(iter(times))
        return Measured(times, samples, best, self.settled)

    @property
    def variant_races(self) -> int:
        return sum(RULE in names for names in self.races)


@pytest.fixture
def times(monkeypatch, tmp_path):
    """``tune`` on made-up times, with a cache and a table of variants of its own."""
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSE_KERNELS_TUNE", raising=False)
    made = Times()
    stood_in = functools.partial(planning.plan_layers, measure=made)
    monkeypatch.setattr(planning, "plan_layers", stood_in)
    plan_variants.clear()
    yield made
    plan_variants.clear()


def conv_net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, stride=2))
    sparsify(model, density=0.1, generator=torch.Generator().manual_seed(0))
    return model


def used(layer, shape) -> dict[str, str]:
    site = Site(layer, tuple(shape), layer.pattern.capacity)
    return {name: site.variants(name).used for name in PASSES}


def test_each_pass_takes_its_winner(times) -> None:
    model = conv_net()
    report = tune(model, X)
    # The input of the first layer wants no gradient, so its dgrad is not timed.
    assert report["0"].variants == {"forward": ("half-slab", 2.0)}
    assert report["1"].variants == {"forward": ("half-slab", 2.0), "dgrad": ("half-slab", 2.0)}
    assert used(model[0], X.shape) == {"forward": "half-slab", "dgrad": RULE, "wgrad": RULE}
    assert used(model[1], (32, 24, 8, 8))["dgrad"] == "half-slab"
    assert "forward half-slab, dgrad half-slab" in str(report)
    times.quick = "half-tiles"
    assert tune(model, X, cache=False)["1"].variants == {"wgrad": ("half-tiles", 2.0)}
    assert used(model[1], (32, 24, 8, 8)) == {**dict.fromkeys(PASSES, RULE), "wgrad": "half-tiles"}


@pytest.mark.parametrize(("gain", "settled"), [(1.02, "certain"), (2.0, "time"), (2.0, "equal")])
def test_what_is_not_certainly_faster_stays_by_the_rule(times, gain, settled) -> None:
    times.gain, times.settled = gain, settled
    assert [row.variants for row in tune(conv_net(), X)] == [{}, {}]
    assert native().count_variants() == 0


def test_inference_times_forward_only_and_leaves_the_other_passes(times) -> None:
    model = conv_net()
    tune(model, X)
    before = used(model[1], (32, 24, 8, 8))
    times.quick = "nothing"
    tune(model, X, training=False)
    assert used(model[1], (32, 24, 8, 8)) == {**before, "forward": RULE}


def test_a_full_cache_measures_nothing_and_restores_the_variants(times) -> None:
    first = tune(conv_net(), X)
    assert times.variant_races > 0
    times.races.clear()
    plan_variants.clear()
    model = conv_net()
    again = tune(model, X)
    assert not times.races and [row.source for row in again] == ["cache"] * 2
    assert [row.variants for row in again] == [row.variants for row in first]
    assert used(model[1], (32, 24, 8, 8))["dgrad"] == "half-slab"


def test_a_new_process_finds_the_variants(times, tmp_path) -> None:
    tune(conv_net(), X)
    script = """
        import torch
        from test_tune_variants import X, conv_net, used
        from sparse_kernels import tune
        model = conv_net()
        report = tune(model, X)
        assert [row.source for row in report] == ["cache"] * 2, report
        print(used(model[1], (32, 24, 8, 8)))
    """
    # This process's own path: the installed package where that is what is tested.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = {"forward": "half-slab", "dgrad": "half-slab", "wgrad": RULE}
    assert result.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda point: point.pop("variants"),
        lambda point: point.update(variants=[1, 2]),
        lambda point: point["variants"].update(forward=["warp-speed", 2.0]),
        lambda point: point["variants"].update(sideways=["rule", 1.0]),
        lambda point: point["variants"].update(forward=["half-slab"]),
        lambda point: point["variants"].update(forward=["half-slab", -1.0]),
    ],
    ids=["missing", "list", "foreign name", "foreign pass", "no gain", "negative gain"],
)
def test_a_damaged_entry_is_measured_again(times, tmp_path, damage) -> None:
    tune(conv_net(), X)
    (file,) = tmp_path.glob("plan-*.json")
    content = json.loads(file.read_text())
    for entry in content["entries"].values():
        for point in entry["points"].values():
            damage(point)
    file.write_text(json.dumps(content))
    times.races.clear()
    report = tune(conv_net(), X)
    assert [row.source for row in report] == ["measured"] * 2 and times.variant_races
    assert report["0"].variants == {"forward": ("half-slab", 2.0)}


def test_without_tuning_every_pass_goes_by_the_rule(times, monkeypatch) -> None:
    model = conv_net()
    tune(model, X)
    assert native().count_variants() > 0
    monkeypatch.setenv("SPARSE_KERNELS_TUNE", "off")
    assert [row.variants for row in tune(model, X)] == [{}, {}]
    assert native().count_variants() == 0


def test_a_choice_that_does_not_apply_here_leaves_the_pass_to_the_rule() -> None:
    plan_variants.clear()
    layer = SparseLinear(32, 16, density=0.5)
    _tune_variants.use(layer, (8, 32), {"forward": Choice("long-rows", 2.0)})
    assert used(layer, (8, 32))["forward"] == RULE and native().count_variants() == 0


@pytest.mark.parametrize("batch", [1, 33])
def test_padded_images_flat_inputs_and_linear_layers(times, batch) -> None:
    """The problem described to the native core is the one that the layer computes."""
    reflecting = SparseConv2d(8, 12, 3, padding=2, padding_mode="reflect", density=0.3)
    for layer, shape in (
        (reflecting, (batch, 8, 9, 7)),
        (SparseConv2d(8, 12, (3, 1), stride=(1, 2), density=0.3), (8, 9, 7)),
        (SparseLinear(96, 64, density=0.4, block=(4, 1)), (batch, 3, 96)),
        (SparseLinear(96, 64, density=0.4), (96,)),
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        plain = layer(x)
        expected = torch.autograd.grad(plain.square().sum(), (x, layer.values))
        for name in PASSES:
            variants = Site(layer, shape, layer.pattern.capacity).variants(name)
            variants.use(variants.names[-1])
        assert used(layer, shape)["forward"] != RULE
        before = native().list_cache_bytes()
        y = layer(x)
        # The forward product has made the lists of its variant: it looked the same problem up.
        assert native().list_cache_bytes() > before
        results = torch.autograd.grad(y.square().sum(), (x, layer.values))
        plan_variants.clear()
        torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_64_bit_layers_have_no_variants(times) -> None:
    layer = SparseLinear(16, 8, density=0.5, dtype=torch.float64)
    assert not _tune_variants.serves(layer)
    report = tune(layer, torch.randn(4, 16, dtype=torch.float64))
    assert report[""].variants == {} and times.variant_races == 0
