"""SparseLinear and SparseConv2d against torch's dense layers: outputs, gradients, arguments."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparse_kernels.nn import SparseConv2d, SparseLayer, SparseLinear
from sparse_kernels.pattern import SparsityPattern

# float64 is served by the reference backend, float32 by the native one.
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

LINEAR: list[dict[str, Any]] = [
    {"sizes": (7, 5), "density": 0.3},
    {"sizes": (64, 33), "density": 0.05, "bias": False},
    {"sizes": (13, 11), "density": 0.4, "block": (4, 1)},
    {"sizes": (13, 11), "density": 0.4, "block": (3, 4)},
    {"sizes": (9, 6), "density": 1.0},
]
CONV: list[dict[str, Any]] = [
    {"sizes": (5, 7, 3), "density": 0.2},
    {"sizes": (5, 7, 3), "density": 0.2, "padding": 1, "bias": False},
    {"sizes": (4, 6, (2, 3)), "density": 0.5, "stride": (2, 1), "padding": (1, 0)},
    {"sizes": (6, 9, 3), "density": 0.4, "groups": 3, "dilation": 2, "padding": 2},
    {"sizes": (4, 6, (2, 4)), "density": 0.4, "padding": "same"},
    {"sizes": (4, 6, 3), "density": 0.4, "padding": "valid"},
    {"sizes": (4, 6, 3), "density": 0.4, "padding": 2, "padding_mode": "reflect"},
    {"sizes": (4, 6, 4), "density": 0.4, "padding": "same", "padding_mode": "circular"},
    {"sizes": (4, 6, 3), "density": 0.4, "padding": (1, 2), "padding_mode": "replicate"},
    {"sizes": (5, 7, 3), "density": 0.4, "block": (4, 1)},
    {"sizes": (6, 10, 3), "density": 0.4, "block": (3, 2), "groups": 2, "stride": 3},
]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    scale = float(expected.double().norm()) or 1.0
    return float((got.double() - expected.double()).norm()) / scale


def check_against_dense(layer: SparseLayer, x: torch.Tensor) -> None:
    """Output and every gradient of ``layer`` equal those of ``to_dense()`` at the pattern."""
    dense = layer.to_dense()
    mask = layer.matrix_to_weight(layer.pattern.mask())
    assert torch.equal(dense.weight != 0, mask & (dense.weight != 0))
    assert int(mask.sum()) == layer.nnz
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), dense(theirs)
    grad = torch.randn(expected.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected.backward(grad)
    pairs = [(y, expected), (ours.grad, theirs.grad)]
    dense_grad = layer.weight_to_matrix(dense.weight.grad * mask)
    if layer.storage == "compressed":
        pairs.append((layer.values.grad, layer.pattern.compress(dense_grad)))
    else:
        pairs.append((layer.values.grad, dense_grad))
    if layer.bias is not None:
        pairs.append((layer.bias.grad, dense.bias.grad))
    for got, want in pairs:
        assert got.shape == want.shape and got.dtype == want.dtype
        assert relative_error(got, want) <= TOLERANCE[x.dtype]


def make_linear(case: dict[str, Any], dtype: torch.dtype) -> SparseLinear:
    options = {k: v for k, v in case.items() if k != "sizes"}
    generator = torch.Generator().manual_seed(3)
    return SparseLinear(*case["sizes"], dtype=dtype, generator=generator, **options)


def make_conv(case: dict[str, Any], dtype: torch.dtype) -> SparseConv2d:
    options = {k: v for k, v in case.items() if k != "sizes"}
    generator = torch.Generator().manual_seed(3)
    return SparseConv2d(*case["sizes"], dtype=dtype, generator=generator, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("leading", [(4,), (2, 3), (), (0,)])
@pytest.mark.parametrize("case", LINEAR)
def test_linear_equals_masked_dense(case, leading, storage, dtype) -> None:
    layer = make_linear(case, dtype).to_storage_(storage)
    check_against_dense(layer, torch.randn(*leading, case["sizes"][0], dtype=dtype))


# torch's dense module says so where an even kernel is padded to "same".
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("case", CONV)
def test_conv_equals_masked_dense(case, storage, dtype) -> None:
    layer = make_conv(case, dtype).to_storage_(storage)
    for shape in ((2, case["sizes"][0], 9, 10), (case["sizes"][0], 9, 10)):
        layer.zero_grad()
        check_against_dense(layer, torch.randn(*shape, dtype=dtype))


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("case", CONV[:7])
def test_probe_gathers_the_dense_gradient(case, storage) -> None:
    layer = make_conv(case, torch.float64).to_storage_(storage)
    dense = layer.to_dense()
    x = torch.randn(2, case["sizes"][0], 9, 9, dtype=torch.float64)
    probe = layer.make_probe()
    assert probe is layer.probe and probe.untyped_storage().nbytes() == 8
    for _ in range(2):  # accumulates over micro-batches
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
    assert relative_error(probe.grad, layer.weight_to_matrix(dense.weight.grad)) < 1e-12
    layer.probe = None
    layer(x).sum().backward()
    assert layer.probe is None


def test_count_is_exact_and_reported() -> None:
    layer = SparseLinear(30, 20, density=0.05)
    assert layer.nnz == 30 and layer.density == 0.05
    assert layer.values.shape == (30, 1, 1)
    assert SparseLinear(30, 20, density=1e-9).nnz == 1
    assert SparseLinear(30, 20, density=1.0).nnz == 600
    assert "nnz=30" in repr(layer) and "density=0.05" in repr(layer)


def test_generator_fixes_pattern_and_values() -> None:
    def make(seed: int) -> SparseLinear:
        return SparseLinear(40, 30, density=0.2, generator=torch.Generator().manual_seed(seed))

    first, again, other = make(1), make(1), make(2)
    assert first.pattern == again.pattern and torch.equal(first.values, again.values)
    assert first.pattern != other.pattern


def test_initialisation_has_the_dense_layers_bound() -> None:
    layer = SparseConv2d(16, 64, 3, density=0.3, block=(8, 4))
    bound = (16 * 9) ** -0.5
    assert layer.values.abs().max() <= bound and layer.bias.abs().max() <= bound
    assert layer.values.abs().max() > 0.99 * bound
    assert abs(float(layer.values.detach().std()) - bound / 3**0.5) < 0.05 * bound


def test_given_pattern_is_copied() -> None:
    pattern = SparsityPattern.random((6, 8), density=0.5, block=(2, 2))
    layer = SparseLinear(8, 6, pattern=pattern)
    assert layer.pattern == pattern and layer.block == (2, 2)
    assert layer.crow_indices.data_ptr() != pattern.crow_indices.data_ptr()
    roomy = SparseLinear(8, 6, pattern=pattern, capacity=11)
    assert roomy.values.shape == (11, 2, 2) and roomy.pattern == pattern
    assert torch.count_nonzero(roomy.values[pattern.nnzb :]) == 0


def test_conv_attributes_are_those_of_torch() -> None:
    for case in CONV:
        ours, theirs = make_conv(case, torch.float32), None
        options = {k: v for k, v in case.items() if k not in ("sizes", "density", "block")}
        theirs = nn.Conv2d(*case["sizes"], **options)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("dilation", "groups", "padding_mode"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.weight.shape == theirs.weight.shape == ours.weight_shape
        assert repr(ours.to_dense()) == repr(theirs)


def test_parameters_are_values_and_bias_only() -> None:
    layer = SparseConv2d(3, 4, 3)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert set(layer.state_dict()) == {"values", "bias", "crow_indices", "col_indices"}
    bare = SparseConv2d(3, 4, 3, bias=False)
    assert bare.bias is None and set(bare.state_dict()) == {
        "values",
        "crow_indices",
        "col_indices",
    }


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_weight_reads_like_a_tensor_and_refuses_writing(storage) -> None:
    layer = SparseConv2d(4, 6, 3, density=0.4, block=(2, 2)).to_storage_(storage)
    assert hasattr(layer, "weight") and layer.weight.shape == (6, 4, 3, 3)
    assert torch.equal(layer.weight, layer.to_dense().weight)
    assert type(layer.weight * 2) is type(layer.weight.clone()) is torch.Tensor
    saved = pickle.loads(pickle.dumps(layer.weight.detach()))
    assert type(saved) is torch.Tensor and torch.equal(saved, layer.weight)
    before = layer.weight.clone()
    for write in (
        lambda w: w.zero_(),
        lambda w: nn.init.normal_(w),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__imul__(2),
        lambda w: torch.add(w, 1, out=w),
        lambda w: w.data.fill_(1.0),
        lambda w: w.detach()[0].mul_(2.0),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"values.*to_dense\(\)"):
            write(layer.weight)
    with pytest.raises(AttributeError, match=r"values.*to_dense\(\)"):
        layer.weight = torch.zeros(6, 4, 3, 3)
    with pytest.raises(AttributeError, match="values"):
        layer.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_penalty_on_weight_reaches_values(storage) -> None:
    layer = SparseLinear(8, 6, density=0.5, block=(4, 3)).to_storage_(storage)
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.values.grad, 2 * layer.values.detach())


def test_from_dense_keeps_the_largest_blocks() -> None:
    dense = nn.Linear(6, 4)
    with torch.no_grad():
        dense.weight.copy_(torch.arange(24.0).reshape(4, 6) * torch.tensor([1.0, -1.0] * 3))
    sparse = SparseLinear.from_dense(dense, density=0.25)
    kept = dense.weight.abs() >= 18
    assert torch.equal(sparse.pattern.mask(), kept)
    assert torch.equal(sparse.weight, dense.weight * kept)
    assert torch.equal(sparse.bias, dense.bias) and sparse.bias is not dense.bias


def test_from_dense_ranks_partial_blocks_by_their_mean() -> None:
    dense = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        dense.weight.fill_(1.0)
        dense.weight[2, 2] = 1.5  # the corner block has one element only
    sparse = SparseLinear.from_dense(dense, density=0.25, block=(2, 2))
    assert sparse.pattern.keys().tolist() == [3] and sparse.nnz == 1


def test_from_dense_breaks_ties_by_index() -> None:
    dense = nn.Linear(50, 40)
    nn.init.ones_(dense.weight)
    assert SparseLinear.from_dense(dense, density=0.01).pattern.keys().tolist() == list(range(20))


@pytest.mark.parametrize("keep", ["magnitude", "random"])
def test_dense_round_trip(keep) -> None:
    dense = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    sparse = SparseConv2d.from_dense(dense, density=0.3, keep=keep, block=(3, 2))
    mask = sparse.matrix_to_weight(sparse.pattern.mask())
    back = sparse.to_dense()
    assert torch.equal(back.weight, dense.weight * mask) and torch.equal(back.bias, dense.bias)
    assert not sparse.training and not back.training
    assert not sparse.values.requires_grad and not back.weight.requires_grad
    full = SparseConv2d.from_dense(dense, density=1.0)
    assert torch.equal(full.to_dense().weight, dense.weight)


def test_storage_conversion_keeps_values_object_and_gradient() -> None:
    layer = SparseLinear(9, 7, density=0.4, block=(2, 2), dtype=torch.float64)
    values, pattern, weight = layer.values, layer.pattern.clone(), layer.weight.clone()
    x = torch.randn(3, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    gradient = layer.pattern.expand(layer.values.grad)
    layer.to_storage_("dense-masked")
    assert layer.values is values and layer.values.shape == (7, 9)
    assert torch.equal(layer.values.grad, gradient)
    assert layer.pattern == pattern and torch.equal(layer.weight, weight)
    assert set(layer.state_dict()) == {"values", "bias", "mask"}
    layer.to_storage_("compressed")
    assert layer.values is values and layer.pattern == pattern
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.pattern.expand(layer.values.grad), gradient)


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_set_pattern_rewrites_in_place_and_counts_growth(storage, caplog) -> None:
    layer = SparseLinear(10, 10, density=0.2).to_storage_(storage)
    buffers = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    keys = torch.arange(5, 25)
    layer.set_pattern_(keys)
    assert torch.equal(layer.pattern.keys(), keys)
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == buffers
    assert layer.capacity_growths == 0
    with caplog.at_level(logging.INFO, logger="sparse_kernels"):
        layer.set_pattern_(torch.arange(40))
    assert torch.equal(layer.pattern.keys(), torch.arange(40)) and layer.nnz == 40
    if storage == "compressed":
        assert layer.capacity_growths == 1 and layer.pattern.capacity >= 40
        assert layer.col_indices.numel() == layer.pattern.capacity
        assert "capacity of 20" in caplog.text


def test_sixteen_bit_activations_beside_float32_values() -> None:
    for storage in ("compressed", "dense-masked"):
        layer = SparseConv2d(4, 6, 3, density=0.4).to_storage_(storage)
        x = torch.randn(2, 4, 6, 6)
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert relative_error(y.float(), layer(x)) < 2e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_numpy_integers_are_sizes() -> None:
    layer = SparseLinear(np.prod((4, 5)), np.int64(3), density=0.5)
    assert layer(torch.randn(2, 20)).shape == (2, 3)
    conv = SparseConv2d(np.int64(2), 4, np.int64(3), padding=(np.int32(1), 1), density=0.5)
    assert conv(torch.randn(1, 2, 5, 5)).shape == (1, 4, 5, 5)
    with pytest.raises(ValueError, match="in_features must be an integer of at least 1, got 2.5"):
        SparseLinear(2.5, 3)
