"""block="auto" of sparsify: the rule by its definition, the report, training over a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.nn import SparseLayer
from sparse_kernels.nn._auto_block import CPU_BLOCKS, GPU_BLOCKS, auto_block


@pytest.mark.parametrize(
    ("device", "segment", "taps", "density", "expected"),
    [
        ("cuda", (4096, 4096), 1, 0.125, (64, 64)),  # exactly 8 blocks a block row
        ("cuda", (4096, 4096), 1, 0.124, (32, 32)),
        ("cuda", (4096, 4096), 1, 0.05, (16, 16)),  # 6.4 of (32, 32), 12.8 of (16, 16)
        ("cuda", (512, 512), 9, 0.1, (32, 32)),
        ("cuda", (512, 512), 9, 0.05, (16, 16)),
        ("cuda", (300, 784), 1, 0.2, (16, 16)),
        ("cuda", (300, 784), 1, 0.1, (1, 1)),  # 4.9 blocks a block row
        ("cuda", (72, 4096), 1, 0.5, (16, 16)),  # 80 / 72 rows; (32, 32) covers 96 of 72
        ("cuda", (15, 4096), 1, 0.5, (1, 1)),  # 16 / 15 would do, but no block fits
        ("cuda", (64, 3), 49, 1.0, (1, 1)),
        ("cpu", (4096, 4096), 1, 0.05, (4, 1)),
        ("cpu", (300, 784), 1, 0.05, (4, 1)),
        ("cpu", (10, 100), 1, 0.5, (2, 1)),  # 4 does not divide 10
        ("cpu", (11, 100), 1, 0.5, (1, 1)),
        ("cpu", (8, 80), 1, 0.1, (4, 1)),  # exactly 8 blocks a block row
        ("cpu", (8, 79), 1, 0.1, (1, 1)),
        ("cpu", (64, 3), 9, 0.05, (1, 1)),
        ("cpu", (64, 3), 9, 0.3, (4, 1)),
        ("cpu", (1, 1), 1, 1.0, (1, 1)),
    ],
)
def test_the_rule_by_hand(device, segment, taps, density, expected) -> None:
    assert auto_block(device, segment, taps, density) == expected


@pytest.mark.parametrize("trial", range(200))
def test_the_rule_takes_the_largest_block_that_its_definition_allows(trial) -> None:
    draw = torch.Generator().manual_seed(trial)
    number = lambda high: int(torch.randint(1, high, (), generator=draw))  # noqa: E731
    segment, taps = (number(400), number(400)), (1, 9, 25)[number(4) - 1]
    density = number(101) / 100

    def allowed(block, gpu: bool) -> bool:
        (rows, cols), (bh, bw) = segment, block
        high, wide = -(-rows // bh), -(-cols // bw)
        enough = round(density * 100) * taps * wide >= 800
        if gpu:
            covers = high * bh * wide * bw * 8 <= rows * cols * 9
            return enough and covers and bh <= rows and bw <= cols
        return enough and rows % bh == 0

    for device, candidates in (("cuda", GPU_BLOCKS), ("cpu", CPU_BLOCKS)):
        sizes = [bh * bw for bh, bw in candidates]
        assert sizes == sorted(sizes, reverse=True)
        fitting = [block for block in candidates if allowed(block, device == "cuda")]
        expected = fitting[0] if fitting else (1, 1)
        assert auto_block(device, segment, taps, density) == expected


def mixed() -> nn.Sequential:
    """Layers that get (1, 1), (4, 1), (2, 1) and (1, 1) at 30 %."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),  # 2.7 blocks a row
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 16, 14),
        nn.ReLU(),
        nn.Linear(14, 10),
    )


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_sparsify_chooses_per_layer_and_the_report_says_what(distribution) -> None:
    model = mixed()
    report = sparsify(model, density=0.3, distribution=distribution, block="auto")
    blocks = {row.name: row.block for row in report if row.action == "sparsified"}
    assert blocks["2"] == (4, 1) and blocks["4"] == (2, 1)
    assert distribution == "erk" or (blocks["0"] == blocks["6"] == (1, 1))
    for row in report:
        module = model.get_submodule(row.name)
        assert row.block == (module.block if isinstance(module, SparseLayer) else None)
    header, *lines = str(report).splitlines()
    column = header.index("block")
    shown = {line.split()[0]: line[column:].split()[0] for line in lines[: len(report)]}
    assert shown["2"] == "4x1" and shown["4"] == "2x1"
    # Each layer has its own density to within half a block; with "erk" the elements add up, too.
    largest = sum(row.block[0] * row.block[1] for row in report if row.block)
    assert abs(report.nnz - 0.3 * report.numel) <= largest


def test_auto_with_a_density_per_layer() -> None:
    model = mixed()
    report = sparsify(model, density={"2": 0.3, "4": 0.05}, block="auto")
    assert report["2"].block == (4, 1)  # 43 a block row
    assert report["4"].block == (1, 1)  # 6.4 a block row
    assert report["6"].action == "skipped" and report["6"].block is None


def test_tiny_layers_fall_back_to_elements_and_nothing_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3), nn.Linear(3, 5))
    report = sparsify(model, density=0.5, block="auto")
    assert [row.block for row in report] == [(1, 1)] * 3
    assert all(row.action == "sparsified" for row in report)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'Auto'; .* sparsify also takes \"auto\""):
        sparsify(mixed(), density=0.5, block="Auto")


@pytest.mark.parametrize("signal", ["exact", "window", "random"])
def test_sparse_momentum_conserves_each_block_shape_of_an_auto_model(signal) -> None:
    torch.manual_seed(0)
    model = mixed()
    sparsify(model, density=0.3, block="auto")
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=24, update_every=3, signal=signal)

    def budgets() -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for layer in layers:
            found[layer.block] = found.get(layer.block, 0) + layer.pattern.nnzb
        return found

    before, patterns = budgets(), [layer.pattern.keys().clone() for layer in layers]
    assert len(before) == 3
    for _ in range(24):
        x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        masks.step()
    assert masks.updates == 7 and budgets() == before
    for layer, old in zip(layers, patterns, strict=True):
        assert not torch.equal(layer.pattern.keys(), old)
