"""Whole training steps: forward, loss, backward and optimizer of four nets, in one graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn import sparsify
from sparse_kernels.workbench.models import build
from tools.gpu_bench.layers import Settings, Task
from tools.gpu_bench.measure import Call, as_row, precision, race, reason, still_works


class TransformerBlock(nn.Module):
    """[N, L, d] -> [N, L, d]: attention and an MLP of 4 d, each after a norm, with residuals.

    Pre-norm, as in Xiong et al., arXiv 2002.04745; heads of 64 channels (of 16 where d < 64).
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.heads = max(1, d // 64)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.read, self.write = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        q, k, v = self.read(self.norms[0](x)).reshape(n, length, 3, self.heads, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.write(seen.transpose(1, 2).reshape(n, length, d))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


def small_net() -> nn.Module:
    """A net of the rehearsal: every kind of operator once, in sizes that the interpreter bears."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16),
    )  # fmt: skip


# Name: net, shape of the input, classes (0: the target has the output's shape).
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "vgg16-d": (lambda: build("vgg16-d"), (128, 3, 32, 32), 10),
    "wrn-16-8": (lambda: build("wrn-16-8"), (128, 3, 32, 32), 10),
    "wide-mlp": (lambda: build("wide-mlp", width=4096), (1024, 1, 28, 28), 10),
    "transformer": (lambda: TransformerBlock(4096), (8, 512, 4096), 0),
}
SMALL = {
    "convolutions": (small_net, (2, 16, 4, 4), 16),
    "transformer": (lambda: TransformerBlock(16), (2, 4, 16), 0),
}


def steps(settings: Settings) -> Iterator[Task]:
    """A row per net and precision."""
    for name in settings.precisions:
        for net in SMALL if settings.small else NETS:
            yield f"step {net} {name}", lambda a=(net, name, settings): step_row(*a)  # type: ignore[misc]


def step_row(net: str, name: str, settings: Settings) -> dict[str, Any]:
    """Dense in its layouts, eager and compiled, against each density and block.

    bf16 is autocast on both sides: weights, statistics and optimizer stay float32.
    """
    make, shape, classes = (SMALL if settings.small else NETS)[net]
    torch.manual_seed(0)
    dense, device = make(), settings.device
    x = torch.randn(shape, device=device)
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    with precision(name):
        for label, module in variants(dense, len(shape), settings, missing):
            if label in settings.faults:
                continue
            arranged = x
            if "channels_last" in label:
                arranged = x.contiguous(memory_format=torch.channels_last)
            try:
                calls[label] = training_step(module, arranged, classes, name == "bf16")
            except Exception as error:  # reported in the row
                still_works(label, error)
                missing[label] = reason(error)
        missing |= settings.faults
        timings, uncaptured = race(calls, settings.rounds, device)
    facts = {"shape": f"step {net}", "batch": shape[0], "precision": name}
    return {**facts, "training": as_row(timings, {**missing, **uncaptured})}


def variants(
    dense: nn.Module, dims: int, settings: Settings, missing: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """(label, net on the device) of every contender.

    Layers narrower than a block stay dense: a block would be mostly padding there.
    """
    device = settings.device
    forms: dict[str, Any] = {"contiguous": torch.contiguous_format}
    if dims == 4:
        forms["channels_last"] = torch.channels_last
    for label, form in forms.items():
        net: Any = copy.deepcopy(dense).to(device)
        net = net.to(memory_format=form) if dims == 4 else net
        yield f"dense {label}", net
        if settings.compiled:
            yield f"dense {label} compiled", torch.compile(copy.deepcopy(net))
    for density in settings.densities:
        for block in settings.blocks:
            label = f"sparse {100 * density:g}% {block[0]}x{block[1]}"
            net = copy.deepcopy(dense)
            try:
                sparsify(net, density=density, block=block, exclude=[narrower(max(block))])
            except ValueError as error:
                missing[label] = reason(error)
                continue
            yield (
                label + (" channels_last" if dims == 4 and block != (1, 1) else ""),
                net.to(device),
            )


def narrower(side: int) -> Callable[[str, nn.Module], bool]:
    """Whether a layer has fewer features or channels than ``side`` on one of its sides."""

    def excluded(name: str, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() > 1 and min(weight.shape[:2]) < side

    return excluded


def training_step(net: Any, x: Tensor, classes: int, autocast: bool) -> Call:
    """Forward, loss, backward, SGD with momentum; checked for a finite loss before it is timed."""
    capturable = x.device.type == "cuda"
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1e-4, momentum=0.9, fused=True if capturable else None
    )
    target = torch.arange(x.shape[0], device=x.device) % max(classes, 1)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        # Without the cache of casts: memory made in a capture belongs to the graph.
        cast: Any = torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False)
        with cast if autocast else contextlib.nullcontext():
            y = net(x)
            loss = (
                nn.functional.cross_entropy(y.float(), target)
                if classes
                else y.float().square().mean()
            )
        loss.backward()
        optimizer.step()
        return loss.detach()

    loss = float(step())
    if not loss == loss or loss in (float("inf"), float("-inf")):
        raise ValueError(f"the loss is {loss}: a net that does not compute is not timed")
    return step
