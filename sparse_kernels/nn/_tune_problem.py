"""What ``tune`` times: a layer, an input as the model gives it, and the storages to choose from."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_kernels import plan, plan_cache
from sparse_kernels.backends.triton.operands import allows_tf32
from sparse_kernels.layout import is_feature_major, to_feature_major
from sparse_kernels.nn._parameter import replace_data
from sparse_kernels.nn.base import DENSE_MASKED, SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.ops.masked_conv2d import FORMATS
from sparse_kernels.pattern import SparsityPattern

Layout = Literal["seen", "own"]


@dataclass(frozen=True)
class Problem:
    """One call of one layer: everything that its time depends on, the weights' pattern excepted.

    ``order`` is the memory order of the input: "feature-major", "channels_last", "contiguous", or
    "own": for each storage the order that it likes best.
    """

    layer: SparseLayer
    shape: tuple[int, ...]
    order: str
    dtype: torch.dtype
    input_gradient: bool
    training: bool

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return isinstance(self.layer, SparseConv2d)

    @property
    def batch(self) -> int:
        """Samples: images of a convolution, vectors of a linear layer."""
        features = 3 if self.is_conv else 1
        return math.prod(self.shape[:-features])

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.layer.values.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations inside of the operators: that of an autocast, if one is on."""
        kind = self.device.type
        on = torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if on else self.dtype

    def key(self) -> str:
        """The problem as one line, batch size to the nearest power of two."""
        layer, conv = self.layer, self.is_conv
        facts: dict[str, Any] = {"shape": layer.matrix_shape, "block": layer.block}
        if isinstance(layer, SparseConv2d):
            facts["geometry"] = ",".join(map(str, layer.geometry))
            facts["image"] = self.shape[-2:]
            facts["pad"] = layer.padding_mode
        kind = self.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        facts |= _where(self.device, "conv2d" if conv else "linear")
        return plan_cache.problem_key(
            "conv2d" if conv else "linear",
            **facts,
            batch=plan_cache.power_of_two(self.batch),
            dtype=str(self.dtype).removeprefix("torch."),
            autocast=str(half).removeprefix("torch."),
            bias=layer.bias is not None,
            mode="training" if self.training else "inference",
            weight_gradient=layer.values.requires_grad,
            input_gradient=self.input_gradient,
            order=self.order,
        )


def _where(device: torch.device, op: str) -> dict[str, str]:
    """What the times depend on besides the CPU, which the cache's identity names."""
    facts = {} if plan.forced() is None else {"backend": str(plan.forced())}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device).replace(" ", "-")
        facts["tf32"] = str(allows_tf32(op))
        facts["triton"] = "none"
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts["triton"] = metadata.version("triton")
    return facts


def cuda_devices(model: nn.Module) -> list[int]:
    """The GPUs that hold parameters of ``model``: their random states are kept, too."""
    places = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return sorted(torch.cuda.current_device() if d.index is None else d.index for d in places)


def problems(
    model: nn.Module, example: Any, training: bool, layout: Layout
) -> dict[SparseLayer, Problem]:
    """Run ``model`` once; the problem of each sparse layer that was called.

    Of several calls of one layer the one with the largest input counts.  Modes, buffers (running
    statistics) and torch's random state are afterwards what they were; no gradient is computed.
    """
    found: dict[SparseLayer, Problem] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, SparseLayer)
        x, known = inputs[0], found.get(layer)
        if known is None or x.numel() > math.prod(known.shape):
            order = "own" if layout == "own" else _order(x)
            wanted = training and x.requires_grad
            found[layer] = Problem(layer, tuple(x.shape), order, x.dtype, wanted, training)

    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with _undisturbed(model, training), torch.set_grad_enabled(training):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, (tuple, list)) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train(training)
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                # Only what changed: writing an index buffer would look like a new pattern.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _order(x: Tensor) -> str:
    if x.is_contiguous() or x.dim() not in (2, 4) or x.shape[0] < 2:
        return "contiguous"
    if is_feature_major(x):
        return "feature-major"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "contiguous"


def _ordered(x: Tensor, order: str) -> Tensor:
    if order == "feature-major" and x.dim() in (2, 4):
        return to_feature_major(x)
    if order == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def compressed_call(problem: Problem, pattern: SparsityPattern) -> Call:
    """The layer compressed with ``pattern`` and random values."""
    layer = _twin(problem.layer)
    data = torch.randn(pattern.capacity, *pattern.block, dtype=layer.values.dtype)
    layer.values.grad = None
    layer._register_pattern(pattern)
    replace_data(layer.values, (data * 0.1).to(problem.device))
    layer._zero_outside()
    return Call(problem, layer, _own_order(problem, layer))


def _own_order(problem: Problem, layer: SparseLayer) -> str:
    """The problem's memory order; that of the backend's results where each has its own."""
    if problem.order != "own":
        return problem.order
    x = torch.empty(0, dtype=problem.compute_dtype, device=problem.device)
    batch_major = plan.batch_major("conv2d" if problem.is_conv else "linear", x, layer.values)
    return "channels_last" if batch_major else "feature-major"


def random_pattern(layer: SparseLayer, density: float) -> SparsityPattern:
    """A uniformly random pattern for ``layer``, the same one for the same density."""
    return SparsityPattern.random(
        layer.matrix_shape,
        density=density,
        block=layer.block,
        row_parts=layer.row_parts,
        col_parts=layer.col_parts,
        generator=torch.Generator().manual_seed(0),
    ).to(layer.values.device)


def dense_masked_calls(problem: Problem) -> dict[str, Call]:
    """The layer dense-masked, in each image format; "contiguous" only for a linear layer."""
    calls = {}
    for name in _formats(problem):
        layer = _twin(problem.layer).to_storage_(DENSE_MASKED)
        layer.image_format = name
        calls[name] = Call(problem, layer, name if problem.order == "own" else problem.order)
    return calls


def dense_calls(problem: Problem) -> dict[str, Call]:
    """torch's own layer, weight and input in each image format."""
    calls = {}
    for name in _formats(problem):
        module = _twin(problem.layer).to_dense()
        if problem.is_conv:
            module = module.to(memory_format=FORMATS[name])  # type: ignore[call-overload]
        calls[name] = Call(problem, module, name)
    return calls


def _formats(problem: Problem) -> list[str]:
    return list(FORMATS) if problem.is_conv else ["contiguous"]


def _twin(layer: SparseLayer) -> SparseLayer:
    """A copy without gradient and hooks: what is registered on the layer must not be called."""
    gradient, layer.values.grad = layer.values.grad, None
    try:
        twin = copy.deepcopy(layer)
    finally:
        layer.values.grad = gradient
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(twin, name).clear()
    return twin


class Call:
    """Forward, and backward if training, of ``module`` on random numbers in memory ``order``."""

    def __init__(self, problem: Problem, module: nn.Module, order: str) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(problem.shape, generator=generator).to(problem.device, problem.dtype)
        self.x = _ordered(x, order).requires_grad_(problem.input_gradient)
        self.module = module.train(problem.training)
        with torch.no_grad():
            # In the order in which the output comes: the neighbour's gradient mostly does too.
            self.grad = torch.randn_like(module(self.x))
        self.leaves = [self.x, *module.parameters()]
        self.backward = problem.training and any(leaf.requires_grad for leaf in self.leaves)

    def __call__(self) -> None:
        if not self.backward:
            with torch.no_grad():
                self.module(self.x)
            return
        for leaf in self.leaves:
            leaf.grad = None
        self.module(self.x).backward(self.grad)
