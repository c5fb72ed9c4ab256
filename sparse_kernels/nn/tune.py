"""plan_layers(model, example): which storage serves each sparse layer, by measurement.

A compressed layer never forms a dense weight, so what a layer falls back to where sparsity does not
pay is the storage "dense-masked".  Measured are whole calls (forward, and backward if training) at
the shapes that an example gives, at the layer's density, and at a few more densities with random
patterns to find the break-even, which mask updates go by later on.  ``training.tune`` is the public
function: it moves optimizer state along.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparse_kernels import plan_cache, plan_measure, plan_variants
from sparse_kernels.nn import _tune_configs, _tune_problem, _tune_variants
from sparse_kernels.nn._tune_problem import Layout, Problem
from sparse_kernels.nn.base import COMPRESSED, DENSE_MASKED, DENSE_MASKED_ABOVE, SparseLayer
from sparse_kernels.nn.tune_report import Source, TuneReport, TuneRow
from sparse_kernels.plan_measure import INDIFFERENT, Measured

#: A break-even density is known well enough if it lies between two that differ by this factor.
PRECISION = 1.15
MAX_PROBES = 5
#: Below this density compressed storage is not looked for any more.
LEAST_DENSITY = 0.005

Measure = Callable[..., Measured]


@dataclass(frozen=True)
class Decision:
    """What is known about one problem at one density; times in seconds."""

    storage: str
    image_format: str
    break_even: float
    compressed: float | None = None
    dense_masked: float | None = None
    dense: float | None = None
    source: Source = "rule"
    settled: str = ""
    input_shape: tuple[int, ...] = ()
    variants: _tune_variants.Choices = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the activations inside of the operators


def enabled() -> bool:
    """Whether layers are timed: not if SPARSE_KERNELS_TUNE is 0 or off; then the rule decides."""
    return os.environ.get("SPARSE_KERNELS_TUNE", "").lower() not in ("0", "off")


def by_rule(
    density: float, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Decision:
    """The decision without measurement: dense-masked above ``DENSE_MASKED_ABOVE``."""
    storage = DENSE_MASKED if density > DENSE_MASKED_ABOVE else COMPRESSED
    variants = _tune_variants.all_by_rule()
    return Decision(
        storage,
        "channels_last",
        DENSE_MASKED_ABOVE,
        input_shape=input_shape,
        variants=variants,
        dtype=dtype,
    )


def plan_layers(
    model: nn.Module,
    example: Any,
    *,
    training: bool,
    layout: Layout,
    seconds: float,
    cache: plan_cache.PlanCache | None,
    measure: Measure = plan_measure.measure,
) -> dict[SparseLayer, Decision]:
    """A decision for every sparse layer of ``model`` that a run on ``example`` calls.

    Nothing is changed but the table of variants (``plan_variants``).  Equal problems at equal
    densities (to the bucket) are measured once.
    Arguments are those of ``training.tune``; ``measure`` is ``plan_measure.measure`` or a stand-in.
    """
    found = _tune_problem.problems(model, example, training, layout)
    if not enabled():
        return {
            layer: by_rule(layer.density, problem.shape, problem.compute_dtype)
            for layer, problem in found.items()
        }
    known: dict[str, dict[str, Any]] = {}
    # Random contents must not move the user's seed.
    with torch.random.fork_rng(devices=_tune_problem.cuda_devices(model)):
        return {
            layer: _decide(problem, known, cache, seconds, _timed_on(problem.device, measure))
            for layer, problem in found.items()
        }


def _timed_on(device: torch.device, measure: Measure) -> Measure:
    """``measure`` with the clock of a GPU; a stand-in brings its own times."""
    if device.type != "cuda" or measure is not plan_measure.measure:
        return measure
    return functools.partial(measure, clock=plan_measure.clock_of(device))


def report(model: nn.Module, decisions: dict[SparseLayer, Decision]) -> TuneReport:
    """The rows of all sparse layers, after the decisions were carried out."""
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLayer):
            continue
        made = decisions.get(layer)
        rows.append(
            TuneRow(
                name=name,
                kind=type(layer).__name__,
                shape=tuple(layer.weight_shape),
                input_shape=() if made is None else made.input_shape,
                density=layer.density,
                compressed_ms=None if made is None else _milliseconds(made.compressed),
                dense_masked_ms=None if made is None else _milliseconds(made.dense_masked),
                dense_ms=None if made is None else _milliseconds(made.dense),
                chosen=layer.storage,
                image_format=layer.image_format,
                break_even=layer.dense_above,
                source="not called" if made is None else made.source,
                settled="" if made is None else made.settled,
                variants={} if made is None else _others(made),
            )
        )
    return TuneReport(rows)


def _others(made: Decision) -> dict[str, tuple[str, float]]:
    """The passes that do not go by the built-in rule."""
    choices = made.variants.items()
    return {name: (c.name, c.gain) for name, c in choices if c.name != plan_variants.RULE}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _decide(
    problem: Problem,
    known: dict[str, dict[str, Any]],
    cache: plan_cache.PlanCache | None,
    seconds: float,
    measure: Measure,
) -> Decision:
    """From what this run or the cache knows, else by measurement, which is noted in both.

    A comparison that ran out of time serves this run; the next one measures again.
    """
    key, density = problem.key(), problem.layer.density
    bucket = plan_cache.density_bucket(max(density, 1e-6))
    entry = known.get(key) or _checked(None if cache is None else cache.get(key))
    source: Source = "cache"
    if entry is None or bucket not in entry["points"]:
        source = "measured"
        entry = known[key] = _measured(problem, entry, bucket, seconds, measure)
        settled = entry["settled"] and entry["points"][bucket]["settled"] != "time"
        if cache is not None and settled:
            cache.put(key, entry)
    point = entry["points"][bucket]
    compressed_wins = point["ratio"] <= 1 + INDIFFERENT
    # Of the densities of one bucket some lie on either side: the measured point goes first.
    break_even = entry["break_even"]
    break_even = max(break_even, density) if compressed_wins else min(break_even, density * 0.999)
    return Decision(
        COMPRESSED if compressed_wins else DENSE_MASKED,
        entry["image_format"],
        break_even,
        point["compressed"],
        point["dense_masked"],
        entry["dense"],
        source,
        point["settled"],
        problem.shape,
        _tune_variants.from_entry(point["variants"]),
        problem.compute_dtype,
    )


def _checked(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entry if it has what one must have, else None: then it is made anew."""
    try:
        assert entry is not None and entry["image_format"] in _tune_problem.FORMATS
        assert 0 <= float(entry["break_even"]) <= 1 and float(entry["dense"]) > 0
        assert entry["settled"] is True
        for point in entry["points"].values():
            assert min(float(point[k]) for k in ("ratio", "compressed", "dense_masked")) > 0
            assert isinstance(point["settled"], str)
            _tune_variants.from_entry(point["variants"])
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return entry


def _measured(
    problem: Problem, entry: dict[str, Any] | None, bucket: str, seconds: float, measure: Measure
) -> dict[str, Any]:
    """``entry`` (or a new one) with the point of the layer's present pattern."""
    layer = problem.layer
    masked = _tune_problem.dense_masked_calls(problem)
    if entry is not None:
        masked = {entry["image_format"]: masked[entry["image_format"]]}
    # First, so that the storages are compared with the variants in use.
    choices = _tune_variants.measured(problem, layer.pattern, seconds / 2, measure)
    choices |= _tune_configs.measured(problem, layer.pattern, seconds / 2, measure)
    here = _tune_problem.compressed_call(problem, layer.pattern.clone())
    result = measure({COMPRESSED: here, **masked}, seconds=seconds)
    image_format = min(masked, key=lambda name: result.ratio(name, COMPRESSED))
    ratio = result.ratio(COMPRESSED, image_format)
    point = {
        "ratio": ratio,
        "compressed": result.seconds[COMPRESSED],
        "dense_masked": result.seconds[image_format],
        "settled": result.settled,
        "variants": _tune_variants.to_entry(choices),
    }
    if entry is not None:
        return {**entry, "points": {**entry["points"], bucket: point}}
    dense = measure(_tune_problem.dense_calls(problem), seconds=seconds / 2)
    verdicts = [result.settled]

    def ratio_at(density: float) -> float:
        pattern = _tune_problem.random_pattern(layer, density)
        probe = _tune_problem.compressed_call(problem, pattern)
        contenders = {COMPRESSED: probe, image_format: masked[image_format]}
        probed = measure(contenders, seconds=seconds / 2)
        verdicts.append(probed.settled)
        return probed.ratio(COMPRESSED, image_format)

    return {
        "image_format": image_format,
        "dense": min(dense.seconds.values()),
        "break_even": break_even_density(ratio_at, {layer.density: ratio}),
        "settled": "time" not in verdicts,
        "points": {bucket: point},
    }


def break_even_density(ratio_at: Callable[[float], float], known: dict[float, float]) -> float:
    """The density at which compressed and dense-masked take the same time, by a few probes.

    Args:
        ratio_at: compressed time / dense-masked time at a density; grows with it, noise aside.
        known: ratios known already, by density; at least one.

    Returns:
        A density in [0, 1]; 1 if compressed is never slower, 0 if it is slower even at
        ``LEAST_DENSITY``.  The time of a compressed layer is close to a line over the density, so
        the next probe is where the line would cross.
    """
    points, even = dict(known), 1 + INDIFFERENT
    for _ in range(MAX_PROBES):
        below = max((d for d, r in points.items() if r <= even), default=None)
        above = min((d for d, r in points.items() if r > even), default=None)
        if below is None and above is not None:
            if above <= LEAST_DENSITY:
                return 0.0
            guess = min(max(above * even / points[above], above / 8), above / 1.25)
            probe = max(guess, LEAST_DENSITY)
        elif above is None and below is not None:
            if below >= 1:
                return 1.0
            probe = min(max(_further(points, below, even), below * 1.25), 1.0)
        else:
            assert below is not None and above is not None
            if above <= below * PRECISION:
                break
            share = _crossing(points[below], points[above], even)
            probe = below + (above - below) * min(max(share, 0.1), 0.9)  # well inside
        points[probe] = ratio_at(probe)
    return _estimate(points, even)


def _further(points: dict[float, float], below: float, even: float) -> float:
    """The next density to try where compressed has won everywhere so far."""
    least = min(points)
    if least == below or points[below] <= points[least]:
        # One ratio does not tell the fixed cost from the slope.
        return below * 8
    slope = (points[below] - points[least]) / (below - least)
    return below + 1.1 * (even - points[below]) / slope


def _crossing(low: float, high: float, even: float) -> float:
    """Where between two points the line through their ratios reaches ``even``: 0 to 1."""
    return min(max((even - low) / max(high - low, 1e-9), 0.0), 1.0)


def _estimate(points: dict[float, float], even: float) -> float:
    below = max((d for d, r in points.items() if r <= even), default=None)
    above = min((d for d, r in points.items() if r > even), default=None)
    if above is None:
        assert below is not None
        return min(1.0, below)
    if below is None:
        return 0.0 if above <= LEAST_DENSITY else above * 0.8
    if above <= below:  # noise: the ratio did not grow in between
        return (above * below) ** 0.5
    return below + (above - below) * _crossing(points[below], points[above], even)


def agreed(
    model: nn.Module, plan: Callable[[], dict[SparseLayer, Decision]]
) -> dict[SparseLayer, Decision]:
    """The decisions of ``plan``; in a distributed job those of rank 0, which alone measures.

    Ranks that store differently could not reduce their gradients, and ranks of one machine would
    disturb each other's times.

    Raises:
        RuntimeError: rank 0 failed (there its own error is raised).
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return plan()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
    box: list[Any] = [None]
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            made = plan()
            box = [{name: made[layer] for name, layer in layers.items() if layer in made}]
        except Exception as problem:  # the others wait for an answer, whatever happened
            failure, box = problem, [repr(problem)]
    distributed.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if isinstance(box[0], str):
        raise RuntimeError(f"tune failed on rank 0 of this job: {box[0]}")
    return {layers[name]: made for name, made in box[0].items()}


def apply(layer: SparseLayer, made: Decision) -> None:
    """Give the layer the facts of a decision, and its variants to the native core or to Triton;
    moving it to its storage is the caller's part.
    """
    _tune_variants.use(layer, made.input_shape, made.variants)
    _tune_configs.use(layer, made.input_shape, made.dtype, made.variants)
    layer.dense_above, layer.image_format = made.break_even, made.image_format
