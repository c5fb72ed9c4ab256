"""rewrite moves everything a parameter carries, in place where it can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.training import rewrite
from sparse_kernels.training.rewrite import added_mask, state_tensors

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
LAYERS = {
    "element": lambda: SparseLinear(11, 7, density=0.4, dtype=torch.float64),
    "blocks": lambda: SparseLinear(11, 7, density=0.4, block=(2, 3), dtype=torch.float64),
    "conv": lambda: SparseConv2d(6, 8, 3, groups=2, density=0.4, block=(3, 2), dtype=torch.float64),
}


def prepared(layer, optimizer):
    """Give values, gradient and every state tensor random content that is right for the storage."""
    pattern = layer.pattern
    mask = pattern.mask()
    optimizer_step(layer, optimizer)
    for tensor in (
        layer.values.data,
        layer.values.grad,
        *state_tensors(optimizer, layer.values).values(),
    ):
        dense = torch.rand(pattern.shape, dtype=torch.float64) * mask
        tensor.copy_(dense if layer.storage == "dense-masked" else pattern.compress(dense))


def optimizer_step(layer, optimizer):
    layer.values.grad = torch.zeros_like(layer.values)
    optimizer.step()


def dense_of(layer, tensor):
    return tensor.clone() if layer.storage == "dense-masked" else layer.pattern.expand(tensor)


def everything(layer, optimizer):
    tensors = {"values": layer.values.data, "grad": layer.values.grad}
    tensors |= state_tensors(optimizer, layer.values)
    return {name: dense_of(layer, t) for name, t in tensors.items()}


def pointers(layer, optimizer):
    tensors = [layer.values, layer.values.grad, *state_tensors(optimizer, layer.values).values()]
    return [t.data_ptr() for t in (*tensors, *layer.pattern.tensors())]


def random_keys(layer, count, seed):
    blocks = layer.pattern.block_rows * layer.pattern.block_cols
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(blocks, generator=generator)[:count].sort().values


def check_move(layer, optimizer, keys, storage=None):
    """Survivors keep all, the rest is zero, and torch's next step and backward work."""
    prepared(layer, optimizer)
    before, old_mask, parameter = everything(layer, optimizer), layer.pattern.mask(), layer.values
    rewrite(layer, optimizer, keys, storage=storage)
    assert layer.values is parameter and torch.equal(layer.pattern.keys(), keys)
    kept = old_mask & layer.pattern.mask()
    after = everything(layer, optimizer)
    assert after.keys() == before.keys() and len(after) > 2
    for name in before:
        assert torch.equal(after[name], before[name] * kept), name
    if layer.storage == "compressed":
        for t in (layer.values, *state_tensors(optimizer, layer.values).values()):
            assert t.shape[0] == layer.pattern.capacity and not t[layer.pattern.nnzb :].any()
    optimizer_step(layer, optimizer)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_random_moves(kind, name):
    layer = LAYERS[kind]()
    optimizer = OPTIMIZERS[name](layer.parameters())
    blocks = layer.pattern.block_rows * layer.pattern.block_cols
    for seed, share in enumerate((0.3, 0.5, 0.0, 0.2, 1.0, 0.4)):
        check_move(layer, optimizer, random_keys(layer, round(share * blocks), seed))
    layer.pattern.validate()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_moves_between_storages(kind, name):
    layer = LAYERS[kind]()
    optimizer = OPTIMIZERS[name](layer.parameters())
    blocks = layer.pattern.block_rows * layer.pattern.block_cols
    route = ("dense-masked", "dense-masked", "compressed", "compressed", "dense-masked", None)
    for seed, storage in enumerate(route):
        check_move(layer, optimizer, random_keys(layer, blocks // 2 + seed, seed), storage)
        assert layer.storage == (storage or "dense-masked")


def test_in_place_while_the_capacity_suffices_and_growth_keeps_the_parameter():
    layer = SparseLinear(20, 10, density=0.3, dtype=torch.float64)
    optimizer = OPTIMIZERS["adam"](layer.parameters())
    prepared(layer, optimizer)
    before = pointers(layer, optimizer)
    for seed, count in enumerate((60, 10, 0, 59, 60)):
        assert rewrite(layer, optimizer, random_keys(layer, count, seed)) is False
        assert pointers(layer, optimizer) == before
    assert layer.capacity_growths == 0
    assert rewrite(layer, optimizer, random_keys(layer, 61, 9)) is True
    assert layer.capacity_growths == 1 and layer.values.shape[0] == 75  # 60 * 1.25
    now = pointers(layer, optimizer)
    assert rewrite(layer, optimizer, random_keys(layer, 75, 10)) is False
    assert pointers(layer, optimizer) == now


def test_grown_blocks_get_what_is_given():
    layer = SparseLinear(10, 6, density=0.5, block=(2, 1), dtype=torch.float64)
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    prepared(layer, optimizer)
    keys = random_keys(layer, 15, 3)
    added = added_mask(layer.pattern.keys(), keys)
    count = int(added.sum())
    given = {
        "momentum_buffer": torch.rand(count, 2, 1, dtype=torch.float64),
        "values": torch.rand(count, 2, 1, dtype=torch.float64),
    }
    assert 0 < count < 15
    rewrite(layer, optimizer, keys, given)
    buffer = optimizer.state[layer.values]["momentum_buffer"]
    assert torch.equal(buffer[:15][added], given["momentum_buffer"])
    assert torch.equal(layer.values.data[:15][added], given["values"])


def test_errors_change_nothing():
    layer = SparseLinear(10, 6, density=0.5)
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    prepared(layer.double(), optimizer)
    before = everything(layer, optimizer)
    keys = torch.arange(5)
    with pytest.raises(ValueError, match="not strictly increasing"):
        rewrite(layer, optimizer, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"in \[0, 60\)"):
        rewrite(layer, optimizer, torch.tensor([1, 60]))
    with pytest.raises(ValueError, match=r"in \[0, 60\)"):
        rewrite(layer, optimizer, torch.tensor([-1, 6]))
    with pytest.raises(ValueError, match="int64"):
        rewrite(layer, optimizer, keys.int())
    with pytest.raises(ValueError, match="storage must be"):
        rewrite(layer, optimizer, keys, storage="coo")
    with pytest.raises(ValueError, match="'velocity', but the state tensors are"):
        rewrite(layer, optimizer, keys, {"velocity": torch.zeros(1, 1, 1)})
    with pytest.raises(ValueError, match=r"must be .*, got"):
        rewrite(layer, optimizer, keys, {"momentum_buffer": torch.zeros(99, 1, 1)})
    for name, tensor in everything(layer, optimizer).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_backward_after_a_change_of_shape_while_an_old_graph_lives(storage):
    """A kept loss keeps autograd's accumulator, which remembers the old shape of the parameter."""
    layer = SparseLinear(12, 9, density=0.3, dtype=torch.float64)
    calls = []
    layer.values.register_hook(lambda g: calls.append(g.shape))
    x = torch.randn(4, 12, dtype=torch.float64)
    held = layer(x).sum()
    held.backward()
    keys = random_keys(layer, 50, 0)
    assert rewrite(layer, None, keys, storage=storage)
    layer.values.grad = None
    layer(x).pow(2).sum().backward()
    dense = nn.Parameter(layer.dense_matrix().detach())
    (nn.functional.linear(x, dense, layer.bias.detach())).pow(2).sum().backward()
    mask = layer.pattern.mask()
    torch.testing.assert_close(dense_of(layer, layer.values.grad), dense.grad * mask)
    assert len(calls) == 2 and calls[1] == layer.values.shape
