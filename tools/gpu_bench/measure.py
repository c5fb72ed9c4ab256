"""Time calls by replaying CUDA graphs; on a CPU (rehearsal) call them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparse_kernels.workbench.timing import Timing, interleave, summarize

Call = Callable[[], object]
PRECISIONS = ("bf16", "tf32", "fp32")
# Of ||ours - dense|| / ||dense||, dense in strict float32. A wrong contender is not timed.
TOLERANCE = {"bf16": 3e-2, "tf32": 3e-3, "fp32": 2e-5}
SAMPLE_SECONDS = 0.01


class Broken(RuntimeError):
    """A contender has broken the CUDA context: nothing more runs in this process."""

    def __init__(self, contender: str, error: BaseException) -> None:
        super().__init__(f"{contender}: {reason(error)}")
        self.contender, self.why = contender, reason(error)


def still_works(contender: str, error: BaseException) -> None:
    """Raise Broken if ``error`` of ``contender`` has left CUDA unusable."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise Broken(contender, error) from error


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """float32 products strict or in TF32 inside; yields the dtype of activations."""
    holders: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield torch.bfloat16 if name == "bf16" else torch.float32
    finally:
        for holder, was in zip(holders, before, strict=True):
            holder.fp32_precision = was


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """The work of ``call`` as a CUDA graph, captured after three warming calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def race(
    calls: dict[str, Call],
    rounds: int,
    device: torch.device,
    later: Callable[[], dict[str, Call]] | None = None,
) -> tuple[Any, dict[str, str]]:
    """Timings by contender, one after the other in every round, and why others are missing.

    ``later`` gives more contenders once ``calls`` are captured: ``tune`` changes for the whole
    process which kernels serve, and a graph keeps those that it was captured with. Raises Broken.

    On a GPU: events around replays of each contender's graph, so that nothing of Python or of
    launches is in the time; a sample is the mean of as many replays as take about 10 ms. What
    cannot be captured is missing, with the error.
    """
    if device.type != "cuda":
        calls = {**calls, **(later() if later is not None else {})}
        return interleave(calls, rounds, 1, device=device), {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    missing: dict[str, str] = {}
    _capture(calls, graphs, missing)
    if later is not None:
        _capture(later(), graphs, missing)
    repeats = {n: max(1, int(SAMPLE_SECONDS / _seconds(g, 1))) for n, g in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(_seconds(graph, repeats[name]))
    return {name: summarize(found) for name, found in samples.items()}, missing


def _capture(
    calls: dict[str, Call], graphs: dict[str, torch.cuda.CUDAGraph], missing: dict[str, str]
) -> None:
    for name, call in calls.items():
        try:
            graphs[name] = captured(call)
        except Exception as error:  # foreign code may raise anything; it is reported
            still_works(name, error)
            missing[name] = reason(error)


def _seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Mean GPU seconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3 / repeats, 1e-9)


def as_row(timings: dict[str, Timing], missing: dict[str, str], **facts: Any) -> dict[str, Any]:
    """A row for the journal: medians and quartiles, and the speedup over the best dense."""
    dense = {n: t.median for n, t in timings.items() if n.startswith("dense")}
    if not dense:
        return {**facts, "why": "; ".join(f"{n}: {w}" for n, w in missing.items())}
    best = min(dense, key=dense.__getitem__)
    return {
        **facts,
        "timings": {n: t.as_dict() for n, t in timings.items()},
        "dense_best": best,
        "speedups": {
            n: dense[best] / t.median for n, t in timings.items() if not n.startswith("dense")
        },
        "missing": missing,
    }


def reason(error: BaseException) -> str:
    """The first line of an error, with its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
