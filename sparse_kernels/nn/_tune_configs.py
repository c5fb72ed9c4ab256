"""The choices there are for a layer's products on a GPU, pass by pass: configurations of Triton,
variants of the native CUDA kernels. Timed by ``tune``, and put to use.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sparse_kernels import plan, plan_variants
from sparse_kernels.backends import _cuda_variants, cuda, triton
from sparse_kernels.backends.triton import chosen
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn import _tune_variants as native_variants
from sparse_kernels.nn._tune_problem import Problem
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.plan_variants import RULE, Choice, Measure

logger = logging.getLogger(__name__)


def served(layer: SparseLayer, dtype: torch.dtype) -> dict[str, ModuleType]:
    """The passes with a choice for activations of ``dtype`` in a compressed layer, and the backend
    that computes each: Triton, or the native CUDA kernels.
    """
    x = torch.empty(0, dtype=dtype, device=layer.values.device)
    values = torch.empty(0, *layer.block, dtype=layer.values.dtype, device=layer.values.device)
    found = {}
    for name in native_variants.PASSES:
        op = _operator(layer, name)
        try:
            operand = None if name == "wgrad" else values
            module = plan.choose(op, x, operand, layer.block)
        except plan.BackendError:
            continue
        if module is triton or (module is cuda and layer.block[1] == 1):
            found[name] = module
    return found


def _operator(layer: SparseLayer, name: str) -> str:
    kind = "conv2d" if isinstance(layer, SparseConv2d) else "linear"
    return kind if name == "forward" else f"{kind}_{name}"


class _Table(NamedTuple):
    """One site of a backend's table, as ``plan_variants.choose`` puts names to use."""

    site: chosen.Site
    module: ModuleType

    def use(self, name: str) -> None:
        (chosen if self.module is triton else _cuda_variants).use(self.site, name)

    def options(self) -> dict[str, dict[str, Any]]:
        """Keyword arguments of the backend's function by the name of the choice, the default
        first.
        """
        if self.module is triton:
            return {chosen.name_of(c): {"config": c} for c in chosen.candidates(self.site)}
        return {name: {"variant": name} for name in _cuda_variants.candidates(self.site)}


def _table(
    layer: SparseLayer,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
    capacity: int,
    module: ModuleType,
) -> _Table:
    """The site of one pass for inputs of ``shape``."""
    place = native_variants.Site(layer, shape, capacity)
    op = _operator(layer, name)
    site = chosen.site_of(
        op, dtype, layer.block, place.batch, place.image, place.conv, place.capacity
    )
    return _Table(site, module)


def measured(
    problem: Problem, pattern: SparsityPattern, seconds: float, measure: Measure
) -> native_variants.Choices:
    """The choice for each pass that the problem computes on a GPU; they are in use afterwards.

    Empty where neither Triton nor the CUDA kernels serve the layer.
    """
    layer, dtype = problem.layer, problem.compute_dtype
    weight_gradient = problem.training and layer.values.requires_grad
    wanted = {"forward": True, "dgrad": problem.input_gradient, "wgrad": weight_gradient}
    choices: native_variants.Choices = {}
    for name, module in served(layer, dtype).items():
        if not wanted[name]:
            continue
        table = _table(layer, problem.shape, dtype, name, pattern.capacity, module)
        if table.site.batch == 0:
            continue
        if len(table.options()) < 2:
            choices[name] = Choice(RULE)
            continue
        calls = _calls(table, pattern, layer.values.device)
        choices[name] = plan_variants.choose(table, calls, seconds=seconds, measure=measure)
    return choices


def _calls(
    table: _Table, pattern: SparsityPattern, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The product by the name of the choice, on random numbers; the default is RULE."""
    site = table.site
    arguments = _arguments(site, pattern, device, table.module)
    call = functools.partial(getattr(table.module, site.op), *arguments)
    (_, default), *others = table.options().items()
    calls: dict[str, Callable[[], object]] = {RULE: functools.partial(call, **default)}
    for name, option in others:
        candidate = functools.partial(call, **option)
        try:
            candidate()
        except Exception as error:  # Triton's errors have no base: a chip with less shared memory
            logger.info("%s: %s is left out: %s", site.op, name, error)
        else:
            calls[name] = candidate
    return calls


def _arguments(
    site: chosen.Site, pattern: SparsityPattern, device: torch.device, module: ModuleType
) -> tuple[Any, ...]:
    """Operands of the backend's function, in the memory order that its kernels read."""
    g, generator = site.geometry, torch.Generator().manual_seed(2)
    spatial = site.op.startswith("conv2d")
    form = torch.channels_last if spatial else torch.contiguous_format

    def images(channels: int, size: tuple[int, int]) -> torch.Tensor:
        shape = (site.batch, channels, *size) if spatial else (site.batch, channels)
        made = torch.randn(shape, generator=generator).to(device, site.dtype)
        if module.writes_batch_major(site.block):
            return made.contiguous(memory_format=form)
        return to_feature_major(made)

    index = pattern.tensors()
    x, grad = images(g.in_channels, site.image), images(g.out_channels, g.output_size(*site.image))
    values = 0.1 * torch.randn((pattern.capacity, *site.block), generator=generator)
    values = values.to(device)
    rest = (list(g),) if spatial else ()
    if site.op.endswith("_dgrad"):
        return (grad, values, *index, *(site.image if spatial else (g.in_channels,)), *rest)
    if site.op.endswith("_wgrad"):
        return (grad, x, *index, *site.block, *rest)
    return (x, values, *index, None, *(rest or (g.out_channels,)), False)


def use(
    layer: SparseLayer,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    choices: Mapping[str, Choice],
) -> None:
    """Put choices to use for a layer's calls with inputs of ``shape`` and ``dtype``.

    A choice that is no candidate here (it was made for a batch of nearly the same size) leaves its
    pass to the default.
    """
    if not choices:
        return
    for name, module in served(layer, dtype).items():
        if name in choices:
            table = _table(layer, shape, dtype, name, layer.pattern.capacity, module)
            table.use(choices[name].name)
