"""The configurations of a layer's Triton products, pass by pass: timed by ``tune``, put to use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sparse_kernels import plan, plan_variants
from sparse_kernels.backends import triton
from sparse_kernels.backends.triton import chosen
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn import _tune_variants as native_variants
from sparse_kernels.nn._tune_problem import Problem
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.plan_variants import RULE, Choice, Measure

logger = logging.getLogger(__name__)


def served(layer: SparseLayer, dtype: torch.dtype) -> list[str]:
    """The passes that Triton computes for activations of ``dtype`` in a compressed layer."""
    x = torch.empty(0, dtype=dtype, device=layer.values.device)
    values = torch.empty(0, *layer.block, dtype=layer.values.dtype, device=layer.values.device)
    found = []
    for name in native_variants.PASSES:
        op = _operator(layer, name)
        try:
            operand = None if name == "wgrad" else values
            module = plan.choose(op, x, operand, layer.block)
        except plan.BackendError:
            continue
        if module is triton:
            found.append(name)
    return found


def _operator(layer: SparseLayer, name: str) -> str:
    kind = "conv2d" if isinstance(layer, SparseConv2d) else "linear"
    return kind if name == "forward" else f"{kind}_{name}"


class _Table(NamedTuple):
    """One site of the table, as ``plan_variants.choose`` puts names to use."""

    site: chosen.Site

    def use(self, name: str) -> None:
        chosen.use(self.site, name)


def _table(
    layer: SparseLayer, shape: tuple[int, ...], dtype: torch.dtype, name: str, capacity: int
) -> _Table:
    """The site of one pass for inputs of ``shape``."""
    place = native_variants.Site(layer, shape, capacity)
    op = _operator(layer, name)
    site = chosen.site_of(
        op, dtype, layer.block, place.batch, place.image, place.conv, place.capacity
    )
    return _Table(site)


def measured(
    problem: Problem, pattern: SparsityPattern, seconds: float, measure: Measure
) -> native_variants.Choices:
    """The choice for each pass that the problem computes on Triton; they are in use afterwards.

    Empty where Triton does not serve the layer.
    """
    layer, dtype = problem.layer, problem.compute_dtype
    weight_gradient = problem.training and layer.values.requires_grad
    wanted = {"forward": True, "dgrad": problem.input_gradient, "wgrad": weight_gradient}
    choices: native_variants.Choices = {}
    for name in served(layer, dtype):
        if not wanted[name]:
            continue
        table = _table(layer, problem.shape, dtype, name, pattern.capacity)
        if table.site.batch == 0:
            continue
        calls = _calls(table.site, pattern, layer.values.device)
        choices[name] = plan_variants.choose(table, calls, seconds=seconds, measure=measure)
    return choices


def _calls(
    site: chosen.Site, pattern: SparsityPattern, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The product by the name of the configuration, on random numbers; the default is RULE."""
    call = functools.partial(getattr(triton, site.op), *_arguments(site, pattern, device))
    default, *others = chosen.candidates(site)
    calls: dict[str, Callable[[], object]] = {RULE: functools.partial(call, config=default)}
    for config in others:
        candidate = functools.partial(call, config=config)
        try:
            candidate()
        except Exception as error:  # Triton's errors have no base: a chip with less shared memory
            logger.info("%s: configuration %s is left out: %s", site.op, config, error)
        else:
            calls[chosen.name_of(config)] = candidate
    return calls


def _arguments(
    site: chosen.Site, pattern: SparsityPattern, device: torch.device
) -> tuple[Any, ...]:
    """Operands of the backend's function, in the memory order that its kernels read."""
    g, generator = site.geometry, torch.Generator().manual_seed(2)
    spatial = site.op.startswith("conv2d")
    form = torch.channels_last if spatial else torch.contiguous_format

    def images(channels: int, size: tuple[int, int]) -> torch.Tensor:
        shape = (site.batch, channels, *size) if spatial else (site.batch, channels)
        made = torch.randn(shape, generator=generator).to(device, site.dtype)
        if triton.writes_batch_major(site.block):
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

    A configuration that is no candidate here (a choice made for a batch of nearly the same size)
    leaves its pass to the default.
    """
    if not choices:
        return
    for name in served(layer, dtype):
        if name in choices:
            table = _table(layer, shape, dtype, name, layer.pattern.capacity)
            table.use(choices[name].name)
