"""Single operators: each pass of each operator against dense torch's corresponding pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import layout
from ...nn import AvgPool2d, BatchNorm2d, MaxPool2d
from ...nn.base import SparseLayer
from ...plan import BackendError
from .. import machine
from ..config import parse_block
from ..errors import WorkbenchError
from ..timing import interleave
from . import contest
from .results import Journal, markdown, milliseconds
from .shapes import PASSES, LayerShape, choose, compulsory_bytes

Call = Callable[[], Tensor]
_MIN_SAMPLE = 0.01


@dataclass
class Problem:
    """One operator on one shape: checked contenders by name, and what the work is.

    flops: 2 per useful multiply-add (0 where bytes are the work); dense_flops: of the dense
    operator; bytes: compulsory ones.
    """

    operator: str
    shape: str
    batch: int
    block: str
    calls: dict[str, Call]
    flops: float
    dense_flops: float
    bytes: float
    errors: dict[str, float]
    missing: dict[str, str]


def run(
    *,
    names: tuple[str, ...],
    size: str,
    density: float,
    blocks: tuple[str, ...],
    batch_size: int,
    rounds: int,
    seconds: float,
    device: str,
    journal: Journal,
) -> dict[str, Any]:
    """Time every operator of the layers ``names``, and norm and pooling; one row per operator.

    Raises WorkbenchError for a wrong operator, or if the device has no operator at all.
    """
    place = torch.device(device)
    rows = []
    for key, make in tasks(choose(names, size), size, density, blocks, batch_size, place):
        row = journal.row(key, lambda make=make: _measure(make(), rounds, seconds, place))  # type: ignore[misc]
        print(_progress(row), flush=True)
        rows.append(row)
    if not any("speedup" in row for row in rows):
        raise WorkbenchError(f"no operator runs on {device}: {rows[0]['why']}")
    return {"rows": rows}


def tasks(
    shapes: tuple[LayerShape, ...],
    size: str,
    density: float,
    blocks: tuple[str, ...],
    batch: int,
    device: torch.device,
) -> Iterator[tuple[str, Callable[[], Problem | dict[str, Any]]]]:
    """(key, what makes the problem) of all operators; the tensors come to be when it is called."""
    for block in blocks:
        for shape in shapes:
            for which in PASSES:
                yield (
                    f"{which} {shape.name} {block}",
                    lambda a=(shape, which, density, block, batch, device): product(*a),  # type: ignore[misc]
                )
    images = ((64, 32), (512, 4)) if size != "small" else ((6, 5),)
    for kind in ("batch_norm+relu", "max_pool2d", "avg_pool2d"):
        for channels, side in images:
            for which in ("forward", "backward"):
                yield (
                    f"{which} {kind} {channels}x{side}x{side}",
                    lambda a=(kind, channels, side, which, batch, device): around(*a),  # type: ignore[misc]
                )


def product(
    shape: LayerShape, which: str, density: float, block: str, batch: int, device: torch.device
) -> Problem | dict[str, Any]:
    """Forward, dgrad or wgrad of a sparse layer; the reason instead if no backend computes it."""
    race = contest.set_up(shape, density, parse_block(block), batch)
    sparse, dense = race.sparse.to(device), race.dense.to(device)
    x, grad = race.x.to(device), race.grad.to(device)
    kind = "conv2d" if shape.size else "linear"
    operator = kind if which == "forward" else f"{kind}_{which}"
    place = {"operator": operator, "shape": shape.name, "block": block, "batch": x.shape[0]}
    key = {"forward": "output", "dgrad": "dx", "wgrad": "dvalues"}[which]
    reference = race.reference[key].to(device)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    try:
        calls["sparse"] = pass_call(
            sparse, layout.to_feature_major(x), layout.to_feature_major(grad), which
        )
        calls["sparse"]()
    except (BackendError, NotImplementedError) as error:
        return {**place, "why": " ".join(str(error).split())}
    for name in ("contiguous", "channels_last") if shape.size else ("contiguous",):
        module, arrange = contest.in_layout(copy.deepcopy(dense), name)
        calls[name] = pass_call(module, arrange(x), arrange(grad), which)
    for name, call in calls.items():
        found = call()
        if which == "wgrad" and name != "sparse":
            found = sparse.pattern.compress(sparse.weight_to_matrix(found))
        errors[name] = _checked(f"{operator} on {shape.name}", name, found, reference)
    nnz, each = race.sparse.nnz, 2.0 * shape.positions * x.shape[0]
    return Problem(
        operator, shape.name, x.shape[0], block, calls, nnz * each, shape.weights * each,
        float(compulsory_bytes(shape, x.shape[0], nnz)[which]), errors, {},
    )  # fmt: skip


def _checked(what: str, name: str, found: Tensor, reference: Tensor) -> float:
    error = contest.relative_error(found, reference)
    if not error <= contest.TOLERANCE:
        raise WorkbenchError(
            f"{what}, {name}: relative error {error:.1e} against masked dense, expected at most "
            f"{contest.TOLERANCE:.0e}; a wrong operator is not timed"
        )
    return error


def pass_call(module: nn.Module, x: Tensor, grad: Tensor, which: str) -> Call:
    """One pass of a module: "forward", "dgrad", "wgrad", or "backward" (all gradients, dx given).

    Only what the pass needs requires a gradient, so that nothing else is computed.
    """
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)

        return forward
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.requires_grad_(which == "backward")
    inputs = [x.detach().requires_grad_(which != "wgrad")]
    if which == "wgrad":
        weight = module.values if isinstance(module, SparseLayer) else module.weight
        assert isinstance(weight, Tensor)
        wanted = [weight.requires_grad_(True)]
    else:
        wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    y = module(inputs[0])

    def backward() -> Tensor:
        return torch.autograd.grad(y, wanted, grad, retain_graph=True)[0]

    return backward


def around(
    kind: str, channels: int, side: int, which: str, batch: int, device: torch.device
) -> Problem:
    """Batch norm with ReLU (training) or 2x2 pooling on feature-major images against torch's."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=device)
    ours, plain = _modules(kind, channels, device)
    grad = torch.randn_like(plain(x))
    reference = pass_call(copy.deepcopy(plain).double(), x.double(), grad.double(), which)()
    calls = {
        "sparse": pass_call(ours, layout.to_feature_major(x), layout.to_feature_major(grad), which)
    }
    for name in ("contiguous", "channels_last"):
        module, arrange = contest.in_layout(copy.deepcopy(plain), name)
        calls[name] = pass_call(module, arrange(x), arrange(grad), which)
    what = f"{kind} {which}"
    errors = {name: _checked(what, name, call(), reference) for name, call in calls.items()}
    moved = 4.0 * (x.numel() + grad.numel())  # in and out; a norm's backward reads its input too
    if which == "backward" and kind.startswith("batch_norm"):
        moved += 4.0 * x.numel()
    shape = f"{channels}x{side}x{side}"
    return Problem(what, shape, batch, "", calls, 0.0, 0.0, moved, errors, {})


def _modules(kind: str, channels: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    if kind == "max_pool2d":
        return MaxPool2d(2), nn.MaxPool2d(2)
    if kind == "avg_pool2d":
        return AvgPool2d(2), nn.AvgPool2d(2)
    ours = BatchNorm2d(channels, device=device)
    ours.relu = True
    return ours, nn.Sequential(nn.BatchNorm2d(channels, device=device), nn.ReLU())


def _measure(
    problem: Problem | dict[str, Any], rounds: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    if isinstance(problem, dict):
        return problem
    timings = interleave(
        problem.calls, rounds, 1, budget=seconds, min_seconds=_MIN_SAMPLE, device=device
    )
    median = timings["sparse"].median
    return {
        "operator": problem.operator,
        "shape": problem.shape,
        "batch": problem.batch,
        "block": problem.block,
        **contest.compare(timings),
        "gflops": problem.flops / median / 1e9,
        "dense_equivalent_gflops": problem.dense_flops / median / 1e9,
        "gbytes_per_second": problem.bytes / median / 1e9,
        "errors": problem.errors,
    }


def _progress(row: dict[str, Any]) -> str:
    label = f"{row['operator']:<24} {row['shape']:<20} {row['block']:<4}"
    if "why" in row:
        return f"{label} missing: {row['why']}"
    return (
        f"{label} {1e3 * row['timings']['sparse']['median']:9.3f} ms  {row['speedup']:6.2f}x  "
        f"{row['gflops']:7.1f} GFLOP/s  {row['gbytes_per_second']:6.1f} GB/s"
    )


def tables(results: dict[str, Any]) -> str:
    """Markdown: one row per operator."""
    settings = results["settings"]
    rows, missing = [], []
    for row in results["rows"]:
        if "why" in row:
            missing.append(
                f"{row['operator']} on {row['shape']} {row['block']}: missing ({row['why']})."
            )
            continue
        best = row["dense_best"]
        rows.append([
            row["operator"], row["shape"], row["block"], str(row["batch"]),
            milliseconds(row["timings"]["sparse"]),
            f"{milliseconds(row['timings'][best])} ({best})", f"{row['speedup']:.2f}x",
            f"{row['gflops']:.1f}" if row["gflops"] else "",
            f"{row['dense_equivalent_gflops']:.0f}" if row["gflops"] else "",
            f"{row['gbytes_per_second']:.1f}", f"{max(row['errors'].values()):.0e}",
        ])  # fmt: skip
    return "\n".join([
        f"Operators at density {100 * settings['density']:g} %, milliseconds, median [quartiles].",
        machine.one_line(results["machine"]),
        "",
        *markdown(
            ["operator", "shape", "block", "batch", "sparse", "best dense", "speedup", "GFLOP/s",
             "dense-equivalent GFLOP/s", "GB/s", "error"], rows, left=3,
        ),
        "",
        "GFLOP/s counts stored weights only, GB/s compulsory bytes; dense: the same pass of torch, "
        "contiguous or channels_last, whichever is faster. Through autograd on both sides.",
        *missing,
    ])  # fmt: skip
