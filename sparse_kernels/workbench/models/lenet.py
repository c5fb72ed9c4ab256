"""LeNet-300-100 and LeNet-5-Caffe as the official sparse momentum code defines them.

Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840), official repository, ``LeNet_300_100`` and
``LeNet_5_Caffe``. Outputs are logits; the loss applies the log-softmax that those classes end with.
"""

from __future__ import annotations

from torch import nn


def lenet_300_100() -> nn.Sequential:
    """Images [N, 1, 28, 28] -> logits [N, 10] through hidden layers of 300 and 100 with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet5_caffe() -> nn.Sequential:
    """Images [N, 1, 28, 28] -> logits [N, 10]; no padding: 28 -> 24 -> 12 -> 8 -> 4."""
    return nn.Sequential(
        nn.Conv2d(1, 20, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )
