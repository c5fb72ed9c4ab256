"""A training loop of your own: an MLP on the shipped MNIST sample, 5 % of the weights.

python examples/mnist_mlp.py [--epochs 5] [--width 1024] [--density 0.05]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.workbench.datasets import BatchLoader, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--density", type=float, default=0.05)
    options = parser.parse_args()
    torch.manual_seed(0)

    data = load("mnist-sample")
    train = BatchLoader(data.train, data, batch_size=100, seed=0)
    test = BatchLoader(data.test, data, batch_size=500)

    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, options.width),
        nn.ReLU(),
        nn.Linear(options.width, options.width),
        nn.ReLU(),
        nn.Linear(options.width, 10),
    )
    # The order matters: sparsify replaces the parameters that the optimizer must then hold.
    print(sparsify(model, density=options.density, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    sparse = SparseMomentum(
        model, optimizer, total_steps=options.epochs * len(train), update_every=len(train)
    )

    for epoch in range(options.epochs):
        start = time.perf_counter()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sparse.step()  # prunes, redistributes and grows at the end of each epoch
        seconds = time.perf_counter() - start
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
        print(f"epoch {epoch + 1}: test accuracy {right / len(data.test):.4f}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
