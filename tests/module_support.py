"""The adapter between torch's checks of its own modules and the sparse layers.

torch describes nn.Linear and nn.Conv2d by functions that give constructor arguments and inputs
(``torch.testing._internal.common_modules``).  The same descriptions serve the sparse layers, in
both storages: a ``Subject`` is one module class with one way to make it.  The dense classes stay in
the list: a check that they fail is a wrong check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal import common_modules

from sparse_kernels.nn import COMPRESSED, DENSE_MASKED, SparseConv2d, SparseLayer, SparseLinear


@dataclass(frozen=True)
class Subject:
    """A module class under test; ``storage`` is None for torch's own."""

    module_cls: type[nn.Module]
    inputs: Callable[..., list[Any]]
    storage: str | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        parts = (self.module_cls.__name__, self.storage, None if self.block == (1, 1) else "2x1")
        return "-".join(part for part in parts if part)

    def make(self, args: Any, **options: Any) -> nn.Module:
        """The module of one description, on the CPU unless ``options`` say otherwise."""
        if self.storage is None:
            return self.module_cls(*args.args, **{**args.kwargs, **options})
        torch.manual_seed(3)
        sparse = {"density": 0.4, "block": self.block}
        layer = self.module_cls(*args.args, **{**args.kwargs, **sparse, **options})
        return layer if layer.values.is_meta else layer.to_storage_(self.storage)  # type: ignore


def _conv_inputs(*args: Any, **kwargs: Any) -> list[Any]:
    return common_modules.module_inputs_torch_nn_ConvNd(*args, N=2, **kwargs)


_LINEAR = common_modules.module_inputs_torch_nn_Linear
DENSE = [Subject(nn.Linear, _LINEAR), Subject(nn.Conv2d, _conv_inputs)]
SPARSE = [
    Subject(module_cls, inputs, storage, block)
    for module_cls, inputs in ((SparseLinear, _LINEAR), (SparseConv2d, _conv_inputs))
    for storage, block in ((COMPRESSED, (1, 1)), (COMPRESSED, (2, 1)), (DENSE_MASKED, (1, 1)))
]
SUBJECTS = DENSE + SPARSE


def cases(
    subject: Subject, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> Iterator[tuple[nn.Module, Tensor]]:
    """A fresh module and its input for each of torch's descriptions."""
    torch.manual_seed(11)
    found = subject.inputs(None, "cpu", dtype, requires_grad, True)
    assert len(found) >= 3, "torch describes this module no longer as this adapter expects"
    for item in found:
        (x,) = (*item.forward_input.args, *item.forward_input.kwargs.values())
        yield subject.make(item.constructor_input, dtype=dtype), x


def constructors(subject: Subject) -> list[Any]:
    """Constructor arguments of torch's descriptions."""
    found = subject.inputs(None, "cpu", torch.float32, False, True)
    return [item.constructor_input for item in found]


def dense_twin(module: nn.Module) -> nn.Module:
    """The dense module with the same weights."""
    return module.to_dense() if isinstance(module, SparseLayer) else copy.deepcopy(module)


def free_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters as leaves that a check may change entry by entry (see ``function_of``)."""
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}


def function_of(module: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    """The module as a function of input and parameters, for gradcheck.

    Entries of ``values`` that do not exist (outside of a mask) must stay zero, as every optimizer
    leaves them: they are multiplied by the mask before.
    """
    masked = isinstance(module, SparseLayer) and module.storage == DENSE_MASKED

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        if masked:
            given["values"] = given["values"] * module.mask
        return torch.func.functional_call(module, given, (x,))

    return function
