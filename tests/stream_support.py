"""Streams and graphs for tests that are to run on a GPU and, without one, on the CPU.

On the CPU a stream is a queue: what is given to it runs when somebody waits for it, as work queued
on a GPU runs after the call has returned. A kernel that ignores its stream then reads too early.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

CYCLES = 200_000_000  # of torch.cuda._sleep: some 100 ms, longer than any launch takes to return
NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # torch asks whether it is set, whatever its value


class CudaLane:
    """A side stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[[], Any]) -> None:
        """Queue ``work`` behind what is on this stream."""
        with torch.cuda.stream(self.stream):
            work()

    def delay(self) -> None:
        """Keep the stream busy before what is queued next."""
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(CYCLES)

    def after(self, other: CudaLane) -> None:
        """What is queued next waits for what ``other`` has now."""
        self.stream.wait_stream(other.stream)

    def busy(self) -> bool:
        return not self.stream.query()

    def wait(self) -> None:
        self.stream.synchronize()


class HostLane:
    """The same on the CPU: work waits in a list until somebody waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queued: list[Callable[[], Any]] = []

    def submit(self, work: Callable[[], Any]) -> None:
        self.queued.append(work)

    def delay(self) -> None:
        pass  # nothing runs before wait() anyway

    def after(self, other: HostLane) -> None:
        self.queued.append(other.wait)

    def busy(self) -> bool:
        return bool(self.queued)

    def wait(self) -> None:
        while self.queued:
            self.queued.pop(0)()


def still_busy(lane: Any) -> bool:
    """Whether work on ``lane`` is under way, as far as that can be asked for.

    Under compute-sanitizer torch keeps no freed memory (NO_CACHE). Each temporary that goes is then
    a cudaFree, which waits for the whole GPU: nothing is under way any more, whatever a kernel did.
    """
    return NO_CACHE in os.environ or bool(lane.busy())


def lane_on(device: torch.device) -> Any:
    """A side stream of ``device``."""
    return CudaLane(device) if device.type == "cuda" else HostLane(device)


class HostGraph:
    """A captured call on the CPU: replay runs it again into the memory of its first results."""

    def __init__(self, call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        self.call = call
        self.results = tuple(t.detach().clone() for t in call())
        for result in self.results:
            result.fill_(float("nan"))  # a capture computes nothing

    def replay(self) -> None:
        for kept, made in zip(self.results, self.call(), strict=True):
            kept.copy_(made.detach())


class CudaGraph:
    """A CUDA graph of ``call``; ``results`` are its tensors, written by each replay."""

    def __init__(self, call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device) -> None:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and loaded before a capture
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.results = call()

    def replay(self) -> None:
        self.graph.replay()


def captured(call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device) -> Any:
    """``call`` captured; its results hold nothing before the first replay."""
    return CudaGraph(call, device) if device.type == "cuda" else HostGraph(call)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """``device`` as torch's current one; nothing to do on the CPU."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream that may be captured as torch's current one; nothing to do on the CPU.

    What autograd keeps of a first step belongs to the stream of that step.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
