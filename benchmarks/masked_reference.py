"""Sparse momentum on dense tensors under masks: a reference of whole trainings.

Plain torch operators and none of this package's layers, rules or kernels, written from the
description of the method (arXiv 1907.04840, with the details of its official code): dense momentum,
masks applied after every step, one update of the masks after each epoch but the last.  First
weights, first masks and the order of the images are those of `sparse-kernels train` at the same
seed, so that the first epoch must give the same losses up to rounding, and the epochs after it a
training of the same kind.

    python benchmarks/masked_reference.py --net lenet-5-caffe --density 0.02 --data-dir DIR

Slow: every step is a dense one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.training.layers import sparse_layers
from sparse_kernels.workbench import models
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.contenders import build_sparse
from sparse_kernels.workbench.datasets import BatchLoader, hold_out, load

FREE_SHARE, NEARLY_DENSE, LAST_RATE = 0.99, 0.2, 0.005


@dataclass
class Masked:
    """A dense layer's weight and the mask of those that exist, both of the weight's shape."""

    weight: nn.Parameter
    mask: Tensor  # bool

    @torch.no_grad()
    def apply(self) -> None:
        self.weight.mul_(self.mask)


def masked_net(config: TrainConfig, seed: int, epoch: int) -> tuple[nn.Module, list[Masked]]:
    """The dense net with the weights that a sparse one starts with, zeros elsewhere.

    epoch: steps of one.
    """
    sparse = dict(sparse_layers(build_sparse(config, seed, config.epochs * epoch, epoch).model))
    net, layers = models.build(config.net), []
    for name, module in net.named_modules():
        if name in sparse:
            first = sparse[name].weight.detach()
            module.weight.data.copy_(first)
            module.bias.data.copy_(sparse[name].bias.detach())
            layers.append(Masked(module.weight, first != 0))
    return net, layers


@torch.no_grad()
def update(layers: Sequence[Masked], momenta: Sequence[Tensor], rate: float) -> None:
    """Prune, redistribute and grow; counts are rounded down, by less than one a layer."""
    importance = [float(m[x.mask].abs().mean()) for x, m in zip(layers, momenta, strict=True)]
    shares = [value / sum(importance) for value in importance]
    kept, removed = [], 0
    for layer, share in zip(layers, shares, strict=True):
        stored, size = int(layer.mask.sum()), layer.mask.numel()
        empty = (size - stored) / size
        spared = empty < NEARLY_DENSE and share > 1 / len(layers)
        count = math.ceil((min(empty, rate) if spared else rate) * stored)
        magnitude = layer.weight.abs().masked_fill(~layer.mask, math.inf).flatten()
        smallest = magnitude.argsort(stable=True)[:count]
        kept.append(layer.mask.flatten().index_fill(0, smallest, False))
        removed += count
    for layer, momentum, mask, count in zip(
        layers, momenta, kept, _regrown(shares, removed, kept), strict=True
    ):
        signal = momentum.abs().flatten().masked_fill(mask, -1)
        mask[signal.argsort(descending=True, stable=True)[:count]] = True
        layer.mask = mask.view_as(layer.mask)
        layer.apply()
        momentum[~layer.mask] = momentum[layer.mask].mean()  # as the official code has it


def _regrown(shares: Sequence[float], removed: int, kept: Sequence[Tensor]) -> list[int]:
    """How many each layer regrows: its share, at most nearly all free places; the rest to all."""
    limits = [FREE_SHARE * int((~mask).sum()) for mask in kept]
    wanted = [share * removed for share in shares]
    for _ in range(1000):
        over = sum(max(0.0, w - limit) for w, limit in zip(wanted, limits, strict=True))
        wanted = [min(w, limit) for w, limit in zip(wanted, limits, strict=True)]
        if over < 0.5:
            break
        wanted = [w + over / len(wanted) for w in wanted]
    return [int(min(w, limit)) for w, limit in zip(wanted, limits, strict=True)]


def train(config: TrainConfig, seed: int, epochs: int) -> list[dict[str, Any]]:
    """One row per epoch: mean and largest loss, density per layer before the epoch's update.

    The prune rate falls as over all of ``config.epochs``. A loss above 10,000 or not a number ends
    the training.
    """
    data = load(config.data, config.data_dir)
    split, _ = hold_out(data.train, config.holdout, seed)
    batches = BatchLoader(split, data, config.batch_size, seed=seed)
    steps = len(batches) * config.epochs
    net, layers = masked_net(config, seed, len(batches))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=True,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    done, start = 0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses: list[float] = []
        for images, labels in batches:
            rate = config.lr * 0.1 ** (done // config.lr_decay_every)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            for layer in layers:
                layer.apply()
            losses.append(loss.item())
            done += 1
            if not losses[-1] < 1e4:
                break
        density = [float(layer.mask.float().mean()) for layer in layers]
        rows.append({"epoch": epoch, "loss": sum(losses) / len(losses), "largest": max(losses),
                     "density": density})  # fmt: skip
        shown = " ".join(f"{100 * share:.1f}" for share in density)
        print(f"epoch {epoch}  loss {rows[-1]['loss']:.4f}, at most {max(losses):.4g}  density "
              f"{shown} %  {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        if not losses[-1] < 1e4:
            break
        if epoch < config.epochs:
            cosine = (1 + math.cos(math.pi * done / steps)) / 2
            momenta = [optimizer.state[layer.weight]["momentum_buffer"] for layer in layers]
            update(layers, momenta, LAST_RATE + (config.prune_rate - LAST_RATE) * cosine)
    return rows


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--net", default="lenet-300-100", choices=["lenet-300-100",
                        "lenet-5-caffe"])  # fmt: skip
    parser.add_argument("--data", default="mnist", choices=["mnist", "mnist-sample"])
    parser.add_argument("--data-dir", default=None, help="directory of the MNIST files")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=100, help="how many of the 100 to run")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    config = TrainConfig(net=given.net, data=given.data, data_dir=given.data_dir,
                         density=given.density, lr=given.lr, batch_size=given.batch_size,
                         threads=given.threads)  # fmt: skip
    config.check()
    return train(config, given.seed, given.epochs)


if __name__ == "__main__":
    main()
