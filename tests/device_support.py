"""Small models, trained the way of the CPU or of queued devices, for the tests of that way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sparse_kernels import SparseMomentum
from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.training import device
from sparse_kernels.training.layers import sparse_layers
from sparse_kernels.training.rewrite import state_tensors

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
}


def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def queue(monkeypatch) -> None:
    monkeypatch.setattr(device, "queued", lambda tensor: True)


def make(block=(1, 1), density=0.3, dtype=torch.float64) -> nn.Sequential:
    """A convolution of partial blocks (but for (1, 1)), and two linear layers; two block shapes."""
    options = {"density": density, "dtype": dtype}
    options["generator"] = torch.Generator().manual_seed(0)
    return nn.Sequential(
        SparseConv2d(5, 7, 3, block=block, **options),
        nn.Tanh(),
        nn.Flatten(),
        SparseLinear(7 * 16, 17, block=block, **options),
        nn.Tanh(),
        SparseLinear(17, 10, block=(2, 1), **options),
    )


def step(model, optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 6, 6, generator=draw, dtype=torch.float64)
    optimizer.zero_grad()
    y = model(x)
    nn.functional.cross_entropy(y, torch.randint(10, (6,), generator=draw)).backward()
    optimizer.step()


def trained(name: str, block=(1, 1), steps=13, **options):
    model = make(block)
    optimizer = OPTIMIZERS[name](model.parameters())
    masks = SparseMomentum(
        model, optimizer, total_steps=16, update_every=3, **{"signal": "exact", **options}
    )
    for seed in range(steps):
        step(model, optimizer, seed)
        masks.step()
    return model, optimizer, masks


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in sparse_layers(model):
        found[f"{name} keys"] = layer.pattern.keys()
        tensors = {"values": layer.values.data, "grad": layer.values.grad}
        tensors |= state_tensors(optimizer, layer.values)
        found |= {f"{name} {what}": tensor for what, tensor in tensors.items()}
        buffers = ("mask",) if layer.storage == "dense-masked" else ("crow_indices", "t_perm")
        found |= {f"{name} {what}": getattr(layer, what) for what in buffers}
    return found
