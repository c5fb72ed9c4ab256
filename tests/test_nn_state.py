"""Copies, moves and checkpoints of sparse layers; bad input that must be refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparse_kernels.nn import SparseConv2d, SparseLayer, SparseLinear
from sparse_kernels.pattern import SparsityPattern

STORAGES = ["compressed", "dense-masked"]


def make(density: float = 0.3, storage: str = "compressed", **options: Any) -> SparseLinear:
    block = options.pop("block", (2, 3))
    layer = SparseLinear(11, 9, density=density, block=block, dtype=torch.float64, **options)
    return layer.to_storage_(storage)


def same(first: SparseLayer, second: SparseLayer) -> bool:
    """Equal weights, pattern and output, after checking the second layer's indices."""
    if second.storage == "compressed":
        second.pattern.validate()
    x = torch.randn(3, 11, dtype=torch.float64)
    return (
        first.pattern == second.pattern
        and torch.equal(first.weight, second.weight)
        and torch.equal(first(x), second(x))
    )


def through_file(layer: SparseLayer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("target", STORAGES)
@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("densities", [(0.3, 0.3), (0.1, 0.6), (0.6, 0.1)])
def test_checkpoint_of_any_density_and_storage_loads(densities, source, target) -> None:
    saved, layer = make(densities[0], source), make(densities[1], target)
    values, bias = layer.values, layer.bias
    missing, unexpected = layer.load_state_dict(through_file(saved))
    assert not missing and not unexpected
    assert layer.values is values and layer.bias is bias
    assert layer.storage == source and same(saved, layer)
    layer(torch.randn(2, 11, dtype=torch.float64)).sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    state = saved.state_dict()
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    # The checkpoint's tensors are not the layer's.
    saved.values.data.zero_()
    assert torch.count_nonzero(layer.values) > 0


def test_checkpoint_inside_a_model_and_capacity() -> None:
    saved = nn.Sequential(make(0.2, capacity=17), nn.ReLU())
    model = nn.Sequential(make(0.5), nn.ReLU())
    model.load_state_dict(saved.state_dict())
    assert model[0].values.shape == (17, 2, 3) and model[0].pattern.capacity == 17
    assert same(saved[0], model[0])


def test_loading_same_shapes_keeps_values_memory() -> None:
    saved, layer = make(0.3), make(0.3)
    pointer = layer.values.data_ptr()
    layer.load_state_dict(saved.state_dict())
    assert layer.values.data_ptr() == pointer and same(saved, layer)


@pytest.mark.parametrize("storage", STORAGES)
def test_assign_keeps_the_parameter_and_adopts_the_dtype(storage) -> None:
    saved, layer = make(0.2, storage).float(), make(0.5)
    values = layer.values
    layer.load_state_dict(saved.state_dict(), assign=True)
    assert layer.values is values and layer.values.dtype == torch.float32
    assert torch.equal(layer.weight, saved.weight)


@pytest.mark.parametrize("storage", STORAGES)
def test_meta_layer_is_filled_by_assign(storage) -> None:
    layer = make(0.5, device="meta")
    assert layer.values.is_meta and layer.weight.is_meta and "meta" in repr(layer)
    with pytest.raises(ValueError, match="meta device"):
        _ = layer.pattern
    saved = make(0.2, storage)
    layer.load_state_dict(saved.state_dict(), assign=True)
    assert same(saved, layer)


def test_to_empty_never_leaves_garbage_indices() -> None:
    layer = make(0.5, device="meta").to_empty(device="cpu")
    layer.pattern.validate()
    saved = make(0.2)
    layer.load_state_dict(saved.state_dict())
    assert same(saved, layer)


def test_tail_and_outside_entries_of_a_checkpoint_are_zeroed() -> None:
    saved, layer = make(0.3, capacity=20), make(0.3)
    state = saved.state_dict()
    state["values"] = torch.ones_like(state["values"])
    layer.load_state_dict(state)
    assert int(layer.values.detach().sum()) == layer.nnz


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unsorted": (lambda s: s["col_indices"].copy_(s["col_indices"].flip(0)), "col"),
    "range": (lambda s: s["col_indices"].fill_(99), "col"),
    "negative": (lambda s: s["col_indices"].fill_(-1), "col"),
    "decreasing": (lambda s: s["crow_indices"][1:3].copy_(torch.tensor([5, 1])), "crow"),
    "too many": (lambda s: s["crow_indices"][-1:].fill_(10_000), "crow"),
    "negative end": (lambda s: s["crow_indices"][-1:].fill_(-4), "crow"),
    "start": (lambda s: s["crow_indices"][:1].fill_(1), "crow"),
    "dtype": (lambda s: s.update(col_indices=s["col_indices"].float()), "col"),
    "rows": (lambda s: s.update(crow_indices=s["crow_indices"][:-1]), "crow"),
    "empty": (lambda s: s.update(crow_indices=s["crow_indices"][:0]), "crow"),
    "short": (lambda s: s.update(col_indices=s["col_indices"][:-1]), "one column index per block"),
    "block": (lambda s: s.update(values=s["values"][:, :1]), "checkpoint's block"),
    "partial": (lambda s: s.pop("col_indices"), "whole state_dicts"),
    "indices only": (lambda s: s.pop("values"), "whole state_dicts"),
    "dense": (lambda s: s.update(weight=torch.zeros(9, 11)), "sparsify"),
    "no tensor": (lambda s: s.update(values="text"), "values"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("strict", [True, False])
def test_broken_checkpoint_is_refused_and_changes_nothing(name, strict) -> None:
    breaking, message = BROKEN[name]
    layer, saved = make(0.4), make(0.3)
    before = copy.deepcopy(layer)
    state = {key: value.clone() for key, value in saved.state_dict().items()}
    breaking(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=strict)
    assert same(before, layer)


def test_broken_mask_is_refused() -> None:
    state = make(0.3, "dense-masked").state_dict()
    for mask in (state["mask"][:-1], state["mask"].int(), torch.eye(9, 11).bool()):
        layer = make(0.4)
        before = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match="mask"):
            layer.load_state_dict({**state, "mask": mask})
        assert same(before, layer)


def test_dense_state_dict_names_the_way() -> None:
    with pytest.raises(RuntimeError, match="sparsify"):
        make().load_state_dict(nn.Linear(11, 9).state_dict())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(clone, storage) -> None:
    layer = make(0.3, storage)
    layer.make_probe()
    _ = layer.pattern
    twin = clone(layer)
    assert same(layer, twin) and twin.probe is None and layer.probe is not None
    twin.values.data.add_(1)
    twin.set_pattern_(torch.arange(3))
    assert layer.pattern.nnzb == make(0.3).pattern.nnzb
    assert not torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize("storage", STORAGES)
def test_moves_keep_indices_and_values_object(storage) -> None:
    layer = make(0.3, storage)
    values, pattern = layer.values, layer.pattern.clone()
    for move in ("float", "half", "double"):
        getattr(layer, move)()
        assert layer.values is values
        assert all(not buffer.is_floating_point() for buffer in layer.buffers())
        assert layer.pattern == pattern
    assert layer.values.dtype == layer.bias.dtype == torch.float64
    layer.share_memory()
    assert layer.values.is_shared() and all(buffer.is_shared() for buffer in layer.buffers())
    assert layer.pattern == pattern


def test_probe_follows_the_dtype() -> None:
    layer = make()
    layer.make_probe()
    layer.double()
    layer(torch.randn(2, 11, dtype=torch.float64)).sum().backward()
    assert layer.probe.grad.abs().sum() > 0
    assert layer.float().probe.dtype == torch.float32


def test_optimizer_step_touches_stored_values_only() -> None:
    layer = make(0.3, capacity=30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    mask = layer.pattern.mask()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 11, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert torch.count_nonzero(layer.values[layer.pattern.nnzb :]) == 0
    assert torch.count_nonzero(layer.weight[~mask]) == 0
    assert torch.equal(layer.pattern.compress(layer.weight.detach()), layer.values)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseLinear(4, 4, density=0), r"\(0, 1\]"),
        (lambda: SparseLinear(4, 4, density=2), r"\(0, 1\]"),
        (lambda: SparseLinear(4, 4, density=float("nan")), r"\(0, 1\]"),
        (lambda: SparseLinear(4, 4, density="half"), r"\(0, 1\]"),
        (lambda: SparseLinear(4, 4, density=True), r"\(0, 1\]"),
        (lambda: SparseLinear(4, 4, block=(8, 1)), "larger than the layer.*4 output rows"),
        (lambda: SparseConv2d(4, 4, 3, block=(1, 3), groups=2), "larger than the layer.*2 input"),
        (lambda: SparseLinear(4, 4, block=(0, 1)), "block must be"),
        (lambda: SparseLinear(4, 4, block=(1, 1, 1)), "block must be"),
        (lambda: SparseLinear(4, 4, block="big"), "block must be"),
        (lambda: SparseLinear(0, 4), "in_features must be"),
        (lambda: SparseLinear(4, 4, dtype=torch.int32), "floating point"),
        (lambda: SparseLinear(4, 4, pattern=SparsityPattern.full((4, 5))), r"\(4, 4\)"),
        (lambda: SparseConv2d(4, 4, 3, pattern=SparsityPattern.full((4, 36))), "col_parts"),
        (
            lambda: SparseLinear(4, 4, block=(2, 1), pattern=SparsityPattern.full((4, 4))),
            "give only pattern",
        ),
        (lambda: SparseConv2d(4, 6, 3, groups=4), "divisible by groups"),
        (lambda: SparseConv2d(4, 6, 0), "kernel_height"),
        (lambda: SparseConv2d(4, 6, 3, stride=2, padding="same"), "stride 1"),
        (lambda: SparseConv2d(4, 6, 3, padding="full"), "'same' or 'valid'"),
        (lambda: SparseConv2d(4, 6, 3, padding=-1), "pad_top"),
        (lambda: SparseConv2d(4, 6, (3, 3, 3)), "kernel_size"),
        (lambda: SparseConv2d(4, 6, 3, padding_mode="wrap"), "padding_mode"),
        (lambda: SparseLinear.from_dense(nn.Linear(4, 4), keep="best"), "'magnitude'"),
        (lambda: SparseLinear.from_dense(nn.Linear(4, 4, device="meta")), "meta"),
        (lambda: SparseLinear(4, 4).to_storage_("sparse"), "'dense-masked'"),
    ],
)
def test_bad_arguments_say_what_to_give(build, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_from_dense_refuses_nan() -> None:
    dense = nn.Linear(4, 4)
    with torch.no_grad():
        dense.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        SparseLinear.from_dense(dense)


@pytest.mark.parametrize("storage", STORAGES)
def test_bad_inputs_name_both_sides(storage) -> None:
    linear = SparseLinear(4, 5).to_storage_(storage)
    conv = SparseConv2d(4, 5, 3).to_storage_(storage)
    for x in (torch.zeros(2, 3), torch.zeros(())):
        with pytest.raises(ValueError, match=r"\[\.\.\., 4\]"):
            linear(x)
    for x in (torch.zeros(2, 3, 8, 8), torch.zeros(4, 8), torch.zeros(1, 2, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"\[4, H, W\]"):
            conv(x)
    for x in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.float64)):
        with pytest.raises(TypeError, match=str(x.dtype)):
            linear(x)
    with pytest.raises(ValueError, match="on cpu, got meta"):
        linear(torch.zeros(2, 4, device="meta"))


def test_another_shape_while_an_old_loss_is_referenced() -> None:
    """A loss that a training loop still holds must not make the next backward refuse."""
    layer = SparseLinear(6, 5, density=0.5)
    loss = layer(torch.randn(4, 6)).sum()
    loss.backward()
    for storage in ("dense-masked", "compressed"):
        layer.to_storage_(storage)
        layer.values.grad = None
        layer(torch.randn(4, 6)).sum().backward()
        assert layer.values.grad.shape == layer.values.shape
    layer.load_state_dict(SparseLinear(6, 5, density=0.9).state_dict())
    layer(torch.randn(4, 6)).sum().backward()
    assert layer.values.grad.shape == layer.values.shape and loss.isfinite()
