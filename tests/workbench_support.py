"""Settings and batches that the tests of the workbench share."""

from __future__ import annotations

import dataclasses

import torch

from sparse_kernels.workbench.bench import nets
from sparse_kernels.workbench.config import TrainConfig

SMALL = TrainConfig(
    data="mnist-sample",
    density=0.1,
    compare="dense",
    dense_baseline="contiguous",
    epochs=3,
    batch_size=600,
    update_every=4,
    signal="window",
    threads=1,
)


def batch(config: TrainConfig = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    return nets.random_batch(dataclasses.replace(config, batch_size=32))
