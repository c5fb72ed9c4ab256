"""Streams, devices and CUDA graphs: the emulator's own, then every launcher on them.

Launchers are called through recordings.py, with calls that other tests make. Each must put all of
its work on the stream and device that it is given, wait for nothing and allocate nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mma_problems
import problems
import pytest
import test_dense
import test_norm_pool
import test_staged_wgrad
import torch
from emulator import add_memory, address, load, nan_like, queued, registered
from recordings import ASKING, Issue, Recording, record

from sparse_kernels.backends import cuda_pattern as change
from sparse_kernels.pattern import SparsityPattern

SIZE = 64
ASAN = os.environ.get("SPARSE_KERNELS_EMULATION") == "asan"

# -- the emulator ----------------------------------------------------------------------------------


class Placed:
    """selftest.cu's launcher of two kernels, y = x by way of `between`, on a device's memory."""

    def __init__(self, device: int) -> None:
        self.x, self.device = torch.randn(SIZE), device
        self.out_between, self.out_y = nan_like((SIZE,)), nan_like((SIZE,))

    def register(self, number: int = 0) -> None:
        add_memory(self.device, **{f"x{number}": self.x, f"out_y{number}": self.out_y})
        add_memory(self.device, **{f"out_between{number}": self.out_between})

    def run(self, stream: int, how: str = "right") -> None:
        tensors = (self.out_y, self.out_between, self.x)
        load().run_placed(how, *map(address, tensors), self.device, stream)


@contextmanager
def memory_of(*placed: Placed | Issue) -> Iterator[Any]:
    with registered() as module:
        for number, one in enumerate(placed):
            one.register(number)
        module.take_done()
        yield module


def test_queued_work_is_done_at_the_synchronisation_and_in_the_order_of_its_stream() -> None:
    for seed in range(4):
        one, other = Placed(0), Placed(1)
        with memory_of(one, other) as module, queued(seed):
            streams = [module.new_stream(0), module.new_stream(1)]
            one.run(streams[0])
            other.run(streams[1])
            assert torch.isnan(one.out_y).all() and torch.isnan(other.out_y).all()
            module.synchronize()
            assert torch.equal(one.out_y, one.x) and torch.equal(other.out_y, other.x)
            expected = [("launch", 0, streams[0])] * 2 + [("launch", 1, streams[1])] * 2
            assert [call for call in module.take_done() if call[0] == "launch"] == expected


@pytest.mark.parametrize("ordered", [False, True], ids=["free", "by an event"])
def test_only_an_event_orders_two_streams(ordered: bool) -> None:
    right = []
    for seed in range(12):
        first, second = Placed(0), Placed(0)
        second.x = first.out_y  # what the first one writes
        with memory_of(second, first) as module, queued(seed):  # the writer's view of out_y counts
            one, other, event = module.new_stream(0), module.new_stream(0), module.new_event()
            first.run(one)
            if ordered:
                module.record_event(event, one)
                module.wait_event(other, event)
            second.run(other)
        right.append(torch.equal(second.out_y, first.x))
    assert all(right) if ordered else 0 < sum(right) < len(right), right


def test_a_stream_is_waited_for_alone() -> None:
    one, other = Placed(0), Placed(0)
    with memory_of(one, other) as module, queued(3):
        first, second = module.new_stream(0), module.new_stream(0)
        one.run(first)
        other.run(second)
        module.synchronize_stream(first)
        assert torch.equal(one.out_y, one.x)
    assert torch.equal(other.out_y, other.x)


def test_copies_and_zeros_are_queued_and_checked() -> None:
    x, y = torch.randn(SIZE // 2), nan_like((SIZE,))
    with registered(x=x, out_y=y), queued() as module:
        stream = module.new_stream(0)
        module.run_moves(address(y), address(x), 4 * SIZE, stream)
        assert torch.isnan(y).all()
        module.synchronize()
        assert torch.equal(y, torch.cat((torch.zeros_like(x), x)))
    with (
        pytest.raises(RuntimeError, match="write of 260 bytes at byte 0 of out_y, which has 256"),
        registered(x=x, out_y=y),
        queued() as module,
    ):
        module.run_moves(address(y), address(x), 4 * SIZE + 4, module.new_stream(0))
        module.synchronize()


def test_work_on_another_stream_or_device_is_seen() -> None:
    placed = Placed(1)
    with memory_of(placed) as module:
        stream, foreign = module.new_stream(1), module.new_stream(0)
        placed.run(stream, "default stream")
        assert module.take_done() == [("launch", 1, stream), ("launch", 1, 0)]
        with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
            placed.run(foreign)
        with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
            placed.run(stream, "device ignored")
        if not ASAN:  # that variant leaves accesses to the sanitizer, which knows no devices
            with pytest.raises(RuntimeError, match="memory of device 1, on device 0"):
                placed.run(0, "device ignored")
        module.take_done()
        placed.run(stream, "allocates")
        placed.run(stream, "waits")
        calls = [call[0] for call in module.take_done()]
        assert calls == ["malloc", "free", "launch", "launch", "launch", "synchronize", "launch"]


def test_a_graph_does_the_work_each_time_that_it_is_run() -> None:
    placed = Placed(1)
    with memory_of(placed) as module:
        stream = module.new_stream(1)
        module.begin_capture(stream)
        placed.run(stream)
        graph = module.end_capture()
        assert torch.isnan(placed.out_y).all()
        for _ in range(2):
            placed.x.normal_()
            module.replay(graph)
            assert torch.equal(placed.out_y, placed.x)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("allocates", "cudaMalloc failed: operation not permitted when stream is capturing"),
        ("waits", "cudaStreamSynchronize failed: operation not permitted when stream is capturing"),
        ("default stream", "cudaErrorStreamCaptureImplicit"),
    ],
)
def test_what_a_capture_forbids_breaks_it(how: str, error: str) -> None:
    placed = Placed(0)
    with memory_of(placed) as module:
        stream = module.new_stream(0)
        module.begin_capture(stream)
        with pytest.raises(RuntimeError, match=error):
            placed.run(stream, how)
        with pytest.raises(RuntimeError, match="the capture was broken"):
            module.end_capture()
        placed.run(stream)
        assert torch.equal(placed.out_y, placed.x)


# -- every launcher --------------------------------------------------------------------------------


def _product(name: str, kernel: str, dtype: torch.dtype) -> Callable[[], object]:
    case = next(c for c in problems.all_cases() if c.id == name)
    return lambda: problems.check(case, dtype, kernel)


def _blocks(name: str, kernel: str, dtype: torch.dtype) -> Callable[[], object]:
    case = next(c for c in mma_problems.CASES if c.id == name)
    return lambda: mma_problems.check(case, dtype, kernel)


class Layers:
    """Two layers of a pattern change, before and after it."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        tall = SparsityPattern.random((24, 36), 0.3, block=(4, 1), generator=draw, capacity=90)
        plain = SparsityPattern.random((9, 31), 0.4, generator=draw, capacity=130)
        self.patterns = [tall, plain]
        self.keys = [p.keys() for p in self.patterns]
        self.masks = [torch.arange(k.numel()) % 3 == 0 for k in self.keys]
        pairs = list(zip(self.keys, self.masks, strict=True))
        self.kept, self.grown = [k[~m] for k, m in pairs], [k[m] for k, m in pairs]
        sizes = [p.block_rows * p.block_cols for p in self.patterns]
        self.scores = [torch.rand(size, generator=draw) for size in sizes]
        self.values = [torch.rand(p.capacity, *p.block, generator=draw) for p in self.patterns]
        # From the third block on they stay, in reverse order; the first three are new.
        self.sources = [torch.arange(len(k), dtype=torch.int32).flip(0) - 3 for k in self.keys]

    def moves(self) -> list[change.Move]:
        return [change.Move(v, v, s, None) for v, s in zip(self.values, self.sources, strict=True)]

    def calls(self) -> Iterator[tuple[dict[str, list[torch.Tensor]], Callable[[], object]]]:
        """Tensors by name (out_... are written), and the call that may touch them."""
        yield {"scores": self.scores}, lambda: change.select_mask(self.scores, [50, 100], True)
        counts = [k.numel() for k in self.kept]
        yield (
            {"masks": self.masks, "keys": self.keys, "out_scores": self.scores},
            lambda: change.keep_blocks(self.masks, self.keys, counts, self.scores),
        )
        lists = {"kept": self.kept, "grown": self.grown}
        yield lists, lambda: change.merge_keys(self.kept, self.grown)
        index = [array for p in self.patterns for array in p.tensors()]
        lists = {"keys": self.keys, "out_index": index}
        yield lists, lambda: change.build_index(self.patterns, self.keys)
        lists = {"kept": self.kept, "keys": self.keys}
        yield lists, lambda: change.locate_blocks(self.kept, self.keys)
        lists = {"out_values": self.values, "sources": self.sources}
        yield lists, lambda: change.move_blocks(self.moves())


def _pattern() -> None:
    """One call of each launcher of a pattern change; what it allocates is registered too."""
    made: list[torch.Tensor] = []
    empty = torch.empty

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(empty(*args, **kwargs))
        name = "workspace" if made[-1].dtype == torch.uint8 else "made"
        add_memory(**{f"out_{name}{len(made)}": made[-1].view(torch.uint8).fill_(0xEE)})
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change, "native", load)
        patch.setattr(change, "_place", lambda x: (0, 0))
        patch.setattr(change.torch, "empty", watched)
        for lists, call in Layers().calls():
            with registered(**{f"{n}{i}": t for n, ts in lists.items() for i, t in enumerate(ts)}):
                call()


SOURCES: dict[str, Callable[[], object]] = {
    "product": _product("b3-batch33", "product", torch.float32),
    "staged": _product("staged-b5", "staged", torch.bfloat16),
    "small": _product("small-b13-batch8", "small", torch.float32),
    "small-dgrad": _product("small-conv-b4-groups", "dgrad", torch.float16),
    "small-wgrad": _product("small-b4-batch2", "wgrad", torch.float32),
    "dgrad": _product("conv-b8-stride-groups", "dgrad", torch.bfloat16),
    "staged-dgrad": _product("staged-conv-3x3", "staged_dgrad", torch.float32),
    "wgrad": _product("parts-b4", "wgrad", torch.float32),
    "block_product": _blocks("b16-narrow", "block_product", torch.bfloat16),
    "block_dgrad": _blocks("b16-conv-stride2", "block_dgrad", torch.float32),
    "block_wgrad": _blocks("b16-parts", "block_wgrad", torch.float16),
    "batch_norm": lambda: test_dense.test_batch_norm_matches_float64(
        test_dense.Norm((4, 2, 36, 30), relu=True, residual=True), torch.float32
    ),
    "norm_pool": lambda: test_norm_pool.test_batch_norm_pool_matches_float64(
        test_norm_pool.CASES[0], torch.float16
    ),
    "staged-wgrad": lambda: test_staged_wgrad.test_staged_wgrad_matches_float64(
        test_staged_wgrad.find("conv-stride").case, torch.float32
    ),
    "max_pool": lambda: test_dense.test_max_pooling_matches_float64(
        test_dense.WINDOWS[1], torch.float16
    ),
    "avg_pool": lambda: test_dense.test_average_pooling_matches_float64(
        test_dense.WINDOWS[1], False, None, torch.float32
    ),
    "pattern": _pattern,
}


@cache
def recordings(source: str) -> list[Recording]:
    found = record(SOURCES[source])
    assert found, source
    return found


def everyone() -> list[Recording]:
    return [found for source in SOURCES for found in recordings(source)]


def test_the_table_has_every_launcher() -> None:
    bindings = {name for name in dir(load()) if name.startswith("cuda_")}
    launchers = {name for name in bindings if not name.endswith(ASKING)}
    assert {found.function for found in everyone()} == launchers
    assert len(launchers) >= 16


@pytest.mark.parametrize("source", SOURCES)
def test_all_work_is_queued_on_the_given_stream_and_device(source: str) -> None:
    for number, found in enumerate(recordings(source)):
        device = (number + 1) % 2
        stream = load().new_stream(device)
        issue = Issue(found, device, stream)
        with memory_of(issue) as module, queued(number):
            issue.call()
            done = module.take_done()
            # Nothing else is called: no allocation, no wait.
            assert {call[0] for call in done} <= {"launch", "memset", "copy"}, done
            assert {call[1:] for call in done} == {(device, stream)}, (found.function, done)
            for name, tensor in issue.tensors.items():  # and nothing is done yet
                before = found.before[name].contiguous().view(torch.uint8)
                assert torch.equal(tensor.contiguous().view(torch.uint8), before), name
            module.synchronize()
        issue.check()


@pytest.mark.parametrize("seed", range(2))
def test_launchers_on_four_streams_do_not_disturb_each_other(seed: int) -> None:
    found = everyone()
    places = [(device, load().new_stream(device)) for device in (0, 1, 0, 1)]
    issues = [Issue(one, *places[(i + seed) % 4]) for i, one in enumerate(found)]
    with memory_of(*issues), queued(seed):
        for issue in issues:
            issue.call()
    for issue in issues:
        issue.check()


@pytest.mark.parametrize("source", SOURCES)
def test_every_launcher_can_be_captured_and_run_again(source: str) -> None:
    for found in recordings(source):
        stream = load().new_stream(1)
        issue = Issue(found, 1, stream)
        with memory_of(issue) as module:
            module.begin_capture(stream)
            issue.call()
            graph = module.end_capture()
            for _ in range(2):
                issue.reset()
                module.replay(graph)
                issue.check()
