"""Sparse training that is fast by the clock: compressed weights, forward and backward.

The usual order in a training script::

    report = sparsify(model, density=0.05)        # replace nn.Linear / nn.Conv2d
    print(tune(model, next(iter(loader))[0]))     # optional: never slower than dense
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=..., update_every=...)
    ...
    optimizer.step()
    masks.step()
"""

from __future__ import annotations

from sparse_kernels.nn import SparseConv2d, SparseLinear, densify, sparsify
from sparse_kernels.pattern import PatternError, SparsityPattern
from sparse_kernels.training import SparseMomentum, tune

__version__ = "0.1.0"

__all__ = [
    "PatternError",
    "SparseConv2d",
    "SparseLinear",
    "SparseMomentum",
    "SparsityPattern",
    "densify",
    "sparsify",
    "tune",
]
