"""Single layers, sparse against dense: checked against float64 first, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..nn import SparseConv2d, SparseLinear
from ..nn.base import SparseLayer
from . import machine
from .config import parse_block
from .errors import WorkbenchError
from .steptime import Timing, interleave

_TOLERANCE = 1e-5  # relative error, ||sparse - float64|| / ||float64||


@dataclass(frozen=True)
class LayerShape:
    """A layer of the table: ``size`` is the image's side, 0 for a linear layer."""

    name: str
    rows: int
    columns: int
    kernel: int = 0
    size: int = 0

    def dense(self) -> nn.Module:
        """The dense layer, freshly initialised."""
        if self.size == 0:
            return nn.Linear(self.columns, self.rows)
        return nn.Conv2d(self.columns, self.rows, self.kernel, padding=self.kernel // 2)

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """[batch, columns] or [batch, columns, size, size]."""
        return (
            (batch, self.columns) if self.size == 0 else (batch, self.columns, self.size, self.size)
        )


# The layers whose times for peers are known (3x3 convolutions of VGG16-D, and wide products).
LAYERS = (
    LayerShape("conv-64-32", 64, 64, 3, 32),
    LayerShape("conv-128-16", 128, 128, 3, 16),
    LayerShape("conv-256-8", 256, 256, 3, 8),
    LayerShape("conv-512-4", 512, 512, 3, 4),
    LayerShape("conv-512-2", 512, 512, 3, 2),
    LayerShape("linear-784-300", 300, 784),
    LayerShape("linear-1024", 1024, 1024),
    LayerShape("linear-4096", 4096, 4096),
)


def run(
    *,
    names: tuple[str, ...] = (),
    density: float,
    block: str,
    batch_size: int,
    rounds: int,
    threads: int | None,
) -> dict[str, Any]:
    """Time the layers ``names`` (default: all of LAYERS); plain data with one row per layer.

    Raises WorkbenchError for an unknown layer, a density outside (0, 1] or a layer whose results
    are not those of float64.
    """
    if not 0 < density <= 1:
        raise WorkbenchError(f"--density: expected a number above 0 and at most 1, got {density}")
    known = {shape.name: shape for shape in LAYERS}
    for name in names:
        if name not in known:
            raise WorkbenchError(f"--layer: expected one of {', '.join(known)}, got {name!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = [
        _measure(known[name], density, parse_block(block), batch_size, rounds)
        for name in names or known
    ]
    settings = {"density": density, "block": block, "batch_size": batch_size, "rounds": rounds}
    return {"machine": machine.header(), "settings": settings, "rows": rows}


def _measure(
    shape: LayerShape, density: float, block: tuple[int, int], batch: int, rounds: int
) -> dict[str, Any]:
    dense = shape.dense()
    sparse = _sparsified(dense, density, block)
    x = torch.randn(shape.input_shape(batch))
    error = relative_error(sparse, x)
    if error > _TOLERANCE:
        raise WorkbenchError(
            f"{shape.name}: relative error {error:.1e} against float64, expected at most "
            f"{_TOLERANCE:.0e}; "
            "a wrong operator is not timed: please report this"
        )
    steps = {"sparse": _passes(sparse, layout.to_feature_major(x), layout.to_feature_major)}
    steps["contiguous"] = _passes(dense, x, Tensor.contiguous)
    # No compiled layout: a single layer leaves torch.compile nothing to fuse.
    if shape.size:
        last = shape.dense().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        to_last = _to_channels_last
        steps["channels_last"] = _passes(last, to_last(x), to_last)
    row: dict[str, Any] = {
        "layer": shape.name,
        "shape": [shape.rows, shape.columns],
        "error": error,
    }
    for part, index in (("forward", 0), ("forward_backward", 1)):
        timings = interleave(
            {name: passes[index] for name, passes in steps.items()}, rounds, warmup=2
        )
        row[part] = _compare(timings)
    return row


def _sparsified(dense: nn.Module, density: float, block: tuple[int, int]) -> SparseLayer:
    generator = torch.Generator().manual_seed(0)
    if isinstance(dense, nn.Conv2d):
        return SparseConv2d.from_dense(dense, density=density, block=block, generator=generator)
    assert isinstance(dense, nn.Linear)
    return SparseLinear.from_dense(dense, density=density, block=block, generator=generator)


def _to_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _passes(
    module: nn.Module, x: Tensor, arrange: Callable[[Tensor], Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, forward with backward to input and weight), all in the contender's layout."""
    x = x.detach().requires_grad_(True)
    gradient = arrange(torch.randn_like(module(x)))

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    def both() -> object:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(gradient)
        return x.grad

    return forward, both


def _compare(timings: dict[str, Timing]) -> dict[str, Any]:
    best = min(
        (name for name in timings if name != "sparse"), key=lambda name: timings[name].median
    )
    return {
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "dense_best": best,
        "speedup": timings[best].median / timings["sparse"].median,
    }


def relative_error(sparse: SparseLayer, x: Tensor) -> float:
    """Worst relative error of output, input gradient and value gradient against dense float64."""
    reference = sparse.to_dense().double()
    x32, x64 = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    y64 = reference(x64)
    gradient = torch.randn(y64.shape)
    y64.backward(gradient.double())
    sparse.zero_grad(set_to_none=True)
    y32 = sparse(x32)
    y32.backward(gradient)
    weight = reference.get_parameter("weight").grad
    assert weight is not None and x64.grad is not None and x32.grad is not None
    assert sparse.values.grad is not None
    wanted = sparse.pattern.compress(sparse.weight_to_matrix(weight))
    pairs = [(y32, y64), (x32.grad, x64.grad), (sparse.values.grad, wanted)]
    sparse.zero_grad(set_to_none=True)
    with torch.no_grad():
        return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def table(results: dict[str, Any]) -> str:
    """Markdown: forward and forward + backward per layer, median and quartiles in milliseconds."""
    settings = results["settings"]
    lines = [
        f"Layers at density {100 * settings['density']:g} %, block {settings['block']}, batch "
        f"{settings['batch_size']}, {settings['rounds']} rounds in turns. "
        f"{machine.one_line(results['machine'])}",
        "",
        "| layer | forward dense | sparse | speedup | +backward dense | sparse | speedup | error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [row["layer"]]
        for part in ("forward", "forward_backward"):
            best, timings = row[part]["dense_best"], row[part]["timings"]
            cells += [
                f"{_ms(timings[best])} ({best})",
                _ms(timings["sparse"]),
                f"{row[part]['speedup']:.2f}x",
            ]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.0e}"]) + " |")
    return "\n".join(lines)


def _ms(timing: dict[str, float]) -> str:
    low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
    return f"{median:.2f} [{low:.2f}, {high:.2f}] ms"
