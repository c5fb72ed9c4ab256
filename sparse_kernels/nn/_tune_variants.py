"""The variants of a layer's native products, pass by pass: timed by ``tune``, and put to use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sparse_kernels import plan, plan_variants
from sparse_kernels._load import native, native_or_none
from sparse_kernels.backends import _cuda_variants
from sparse_kernels.backends.cpu import prepared
from sparse_kernels.backends.triton import chosen
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn._tune_problem import Problem
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.plan_variants import RULE, Choice, Measure

PASSES = ("forward", "dgrad", "wgrad")
_SUFFIXES = {"forward": "", "dgrad": "_dgrad", "wgrad": "_wgrad"}

Choices = dict[str, Choice]


def serves(layer: SparseLayer) -> bool:
    """Whether the native kernels compute the layer where it is compressed."""
    served = layer.values.dtype != torch.float64 and layer.values.device.type == "cpu"
    return served and native_or_none() is not None and plan.forced() in (None, "cpu")


class Site:
    """A layer's products for one shape of input, whatever storage the layer is in.

    Attributes:
        conv: the geometry; a linear layer is a convolution of one pixel by one tap.
        batch: samples; image, out_image: (height, width) as the kernels see them.
    """

    def __init__(self, layer: SparseLayer, shape: tuple[int, ...], capacity: int) -> None:
        """``shape``: of the layer's input; ``capacity``: blocks that its values have room for."""
        self.kind, self.block, self.capacity = "linear", layer.block, capacity
        self.image = self.out_image = (1, 1)
        rows, cols = layer.matrix_shape
        if isinstance(layer, SparseConv2d):
            self.kind, self.conv = "conv2d", layer.geometry
            height, width = shape[-2:]
            if layer.padding_mode != "zeros":  # the layer pads the image itself
                left, right, top, bottom = layer._image_pads
                height, width = height + top + bottom, width + left + right
            self.image = (height, width)
            self.out_image = self.conv.output_size(height, width)
        else:
            self.conv = Conv2dGeometry(rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        self.batch = math.prod(shape[: -3 if self.kind == "conv2d" else -1])

    def variants(self, name: str) -> Any:
        """The ``_native.ProductVariants`` of the pass called ``name``."""
        sizes = [self.batch, *self.image, *self.out_image, *self.conv]
        op = self.kind + _SUFFIXES[name]
        return native().ProductVariants(op, sizes, *self.block, self.capacity)

    def calls(self, pattern: SparsityPattern) -> _Calls:
        """Calls of the products with ``pattern`` and random numbers."""
        return _Calls(self, pattern)


class _Calls:
    def __init__(self, site: Site, pattern: SparsityPattern) -> None:
        self.site, self.pattern = site, pattern
        features = 3 if site.kind == "conv2d" else 1
        self.in_shape = (site.conv.in_channels, *site.image)[:features]
        self.out_shape = (site.conv.out_channels, *site.out_image)[:features]
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.x = to_feature_major(random(site.batch, *self.in_shape))
        self.grad = to_feature_major(random(site.batch, *self.out_shape))
        self.values = 0.1 * random(site.capacity, *site.block)

    def of(self, name: str) -> Any:
        """One pass as a call without arguments.  Each has lists of its own: a pattern keeps only
        so many, and lists made anew in every call would be part of the time.
        """
        index = self.pattern.clone().tensors()
        product = prepared.Product(
            index,
            prepared.state_of(index),
            tuple(self.values.shape),
            self.in_shape,
            self.out_shape,
            None,
            self.site.conv,
        )
        if name == "forward":
            return lambda: (product.forward(self.x, self.values, None), index)
        needs = (name == "dgrad", name == "wgrad", False)
        return lambda: (product.backward(self.grad, self.x, self.values, needs), index)


def measured(
    problem: Problem, pattern: SparsityPattern, seconds: float, measure: Measure
) -> Choices:
    """The choice for each pass that the problem computes; they are in use afterwards.

    Empty where the native kernels do not serve the layer.
    """
    choices: Choices = {}
    layer = problem.layer
    if not serves(layer):
        return choices
    site = Site(layer, problem.shape, pattern.capacity)
    calls = site.calls(pattern)
    wanted = (True, problem.input_gradient, problem.training and layer.values.requires_grad)
    for name, is_wanted in zip(PASSES, wanted, strict=True):
        if not is_wanted:
            continue
        variants = site.variants(name)
        contenders = {variant: calls.of(name) for variant in variants.names}
        choices[name] = plan_variants.choose(variants, contenders, seconds=seconds, measure=measure)
    return choices


def use(layer: SparseLayer, shape: tuple[int, ...], choices: Mapping[str, Choice]) -> None:
    """Put choices to use for a layer's calls with inputs of ``shape``.

    A variant that does not apply here (a choice made for a batch of nearly the same size) leaves
    its pass to the rule.
    """
    if not choices or not serves(layer):
        return
    site = Site(layer, shape, layer.pattern.capacity)
    for name, choice in choices.items():
        variants = site.variants(name)
        variants.use(choice.name if choice.name in variants.names else RULE)


def all_by_rule() -> Choices:
    """Every pass left to the built-in rule."""
    return {name: Choice(RULE) for name in PASSES}


def to_entry(choices: Choices) -> dict[str, list[Any]]:
    """Choices as JSON holds them."""
    return {name: list(choice) for name, choice in choices.items()}


def from_entry(entry: Any) -> Choices:
    """Choices from a cache's entry.

    Raises:
        AssertionError, TypeError, ValueError, AttributeError: it is none, or names a pass or a
            variant that this version does not have.
    """
    known = plan_variants.names() if native_or_none() is not None else [RULE]
    choices = {name: Choice(str(variant), float(gain)) for name, (variant, gain) in entry.items()}
    for name, choice in choices.items():
        on_gpu = chosen.NAME.fullmatch(choice.name) or choice.name in _cuda_variants.NUMBERS
        exists = choice.name in known or bool(on_gpu)
        assert name in PASSES and exists and choice.gain > 0
    return choices
