"""Densities per layer: Erdos-Renyi-kernel as the literature has it, exact totals."""

from __future__ import annotations

import random

import pytest

from sparse_kernels.nn.distribution import LayerSize, erk_counts, erk_densities, uniform_counts


def test_erk_densities_follow_the_literature() -> None:
    layers = [LayerSize((300, 784), 300 * 784), LayerSize((100, 300), 30000)]
    first, second = erk_densities(layers, 0.05)
    assert second / first == pytest.approx((400 / 30000) / (1084 / (300 * 784)))
    assert first * layers[0].blocks + second * layers[1].blocks == pytest.approx(0.05 * 265200)


def test_erk_caps_small_layers_and_gives_the_rest_to_others() -> None:
    layers = [LayerSize((10, 4), 40), LayerSize((1000, 1000), 1_000_000)]
    counts = erk_counts(layers, 0.3)
    assert counts == [40, round(0.3 * 1_000_040) - 40]
    assert erk_counts(layers, 1.0) == [40, 1_000_000]
    assert erk_counts(layers, 1e-9) == [1, 1]
    assert uniform_counts(layers, 0.3) == [12, 300_000]


def test_erk_total_is_exact_for_random_models() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        layers = [
            LayerSize((rows, cols), rows * cols)
            for rows, cols in [
                (draw.randint(1, 60), draw.randint(1, 60)) for _ in range(draw.randint(1, 8))
            ]
        ]
        density = draw.choice([0.001, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0])
        counts = erk_counts(layers, density)
        total = sum(layer.blocks for layer in layers)
        assert sum(counts) == max(len(layers), round(density * total))
        assert all(1 <= c <= layer.blocks for c, layer in zip(counts, layers, strict=True))
