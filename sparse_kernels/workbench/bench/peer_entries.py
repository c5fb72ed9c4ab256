"""Other libraries' sparse layers as contenders, each in the layout that suits it best.

Imported where they are used: all of them are optional (`pip install 'sparse_kernels[peers]'`).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ... import layout
from .contest import Contest, Entry, module_entry

FORWARD_ONLY = ("torch.sparse", "scipy.sparse")
TRAINING = ("sparseprop", "sparseprop, over the row", "sparselab")
NAMES = (*TRAINING, *FORWARD_ONLY)


class Unsupported(RuntimeError):
    """A peer has no operator for this layer."""


def make(name: str, contest: Contest) -> Entry:
    """The contender ``name`` of NAMES. Raises ImportError, Unsupported, or what the peer raises."""
    if name.startswith("sparseprop"):
        return _sparseprop(contest, over_row=name != "sparseprop")
    if name == "sparselab":
        return _sparselab(contest)
    if contest.shape.size:
        raise Unsupported(f"{name} has products of matrices, no convolution")
    return _torch_csr(contest) if name == "torch.sparse" else _scipy_csr(contest)


def _sparseprop(contest: Contest, over_row: bool) -> Entry:
    """sparseprop 0.1.14: Nikdan et al. 2023 (arXiv 2302.04852).

    Its convolution vectorises over the batch, for which feature-major activations cost it no
    conversion, or over the row of the image, for which it needs contiguous ones.
    """
    from sparseprop.modules.conv2d import SparseConv2d
    from sparseprop.modules.linear import SparseLinear

    dense = copy.deepcopy(contest.dense)
    if not contest.shape.size:
        if over_row:
            raise Unsupported("a linear layer has one variant")
        return module_entry(
            "sparseprop", SparseLinear.from_dense(dense), contest, Tensor.contiguous, _csr_gradient
        )
    made = SparseConv2d.from_dense(dense, vectorizing_over_on=over_row)
    name = "sparseprop, over the row" if over_row else "sparseprop"
    arrange = Tensor.contiguous if over_row else layout.to_feature_major

    def gradient(module: nn.Module, sparse: Any) -> Tensor:
        values = module.W_val
        assert isinstance(values, Tensor) and values.grad is not None
        twin = copy.deepcopy(module)
        with torch.no_grad():
            twin.W_val.copy_(values.grad)  # type: ignore[operator]
        # Its own conversion tells which gradient is whose.
        matrix = sparse.weight_to_matrix(twin.to_dense().weight.detach())  # type: ignore[operator]
        return sparse.pattern.compress(matrix)

    return module_entry(name, made, contest, arrange, gradient)


def _csr_gradient(module: nn.Module, sparse: Any) -> Tensor:
    """CSR by rows with increasing columns is the order of element values."""
    values = module.W_val
    assert isinstance(values, Tensor) and values.grad is not None
    return _in_pattern(values.grad, sparse)


def _in_pattern(gradient: Tensor, sparse: Any) -> Tensor:
    """Gradients of the non-zeros in row-major order as the values of ``sparse``."""
    matrix = torch.zeros(sparse.matrix_shape)
    matrix[sparse.pattern.mask()] = gradient
    return sparse.pattern.compress(matrix)


def _sparselab(contest: Contest) -> Entry:
    """sparselab 0.2.2: padded CSR, linear layers."""
    if contest.shape.size:
        raise Unsupported("sparselab has no convolution")
    import sparselab
    from sparselab import layout as padded

    rows, columns = contest.sparse.matrix_shape
    bias = contest.sparse.bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's CSR is "beta", once per process
        module = sparselab.SparseLinear(columns, rows, bias=bias is not None)
        weight = contest.dense.get_parameter("weight").detach()
        module._csr = padded.from_dense(weight, padding_ratio=0.2)
    import numpy as np

    module._values = nn.Parameter(torch.from_numpy(np.asarray(module._csr.values)))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())

    def gradient(module: Any, sparse: Any) -> Tensor:
        starts = torch.tensor(module._csr.row_start.tolist())
        counts = torch.tensor(module._csr.row_nnz.tolist())
        live = torch.cat([
            torch.arange(int(s), int(s + n)) for s, n in zip(starts, counts, strict=True)
        ])  # fmt: skip
        return _in_pattern(module._values.grad[live], sparse)

    return module_entry("sparselab", module, contest, Tensor.contiguous, gradient)


def _torch_csr(contest: Contest) -> Entry:
    """torch.sparse_csr (MKL), forward only: torch has no sparse gradient for the values."""
    weight = contest.dense.get_parameter("weight").detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "beta state", once per process
        matrix = weight.to_sparse_csr()
    # The product wants [features, batch]: what feature-major activations are in memory.
    x = layout.to_feature_major(contest.x.clone()).t()
    bias = contest.sparse.bias

    def forward() -> Tensor:
        with torch.no_grad():
            y = matrix @ x
            return y.t() if bias is None else y.add_(bias[:, None]).t()

    return Entry("torch.sparse", forward, None, lambda: {"output": forward()})


def _scipy_csr(contest: Contest) -> Entry:
    """scipy.sparse CSR, forward only, one thread."""
    from scipy import sparse as scipy_sparse

    weight = contest.dense.get_parameter("weight").detach().numpy()
    matrix = scipy_sparse.csr_matrix(weight)
    x = layout.to_feature_major(contest.x.clone()).t().numpy()
    bias = None if contest.sparse.bias is None else contest.sparse.bias.detach().numpy()[:, None]

    def forward() -> Tensor:
        y = matrix @ x
        return torch.from_numpy(y if bias is None else y + bias).t()

    return Entry("scipy.sparse", forward, None, lambda: {"output": forward()})
