"""Streams, devices and CUDA graphs: forward and both gradients of each backend against float64.

Under the mark `gpu` by the native kernels and by Triton's; on the CPU by its own kernels with a
queue for a stream (stream_support.py), so that what a GPU machine will run has run before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import ConvCase, LinearCase, _conv, make_conv, make_linear, relative_error
from stream_support import captured, current, lane_on, side_stream, still_busy, wait_for

from sparse_kernels import SparseMomentum, ops, plan
from sparse_kernels.backends import reference
from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.training import reserve, rewrite

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="torch sees no GPU on this machine"),
]
BACKENDS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=ON_GPU),
    pytest.param("triton", id="triton", marks=ON_GPU),
]
BLOCKS = [(1, 1), (4, 1), (16, 16)]
pytestmark = pytest.mark.usefixtures("strict_products")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything is served by this one."""
    with plan.use_backend(request.param):
        yield request.param


def device_of(backend: str, index: int = 0) -> torch.device:
    return torch.device("cpu") if backend == "cpu" else torch.device("cuda", index)


class Layer:
    """A layer's tensors on a device, and forward and both gradients by the registered operators."""

    def __init__(self, kind: str, block: tuple[int, int], backend: str, index: int = 0) -> None:
        draw = torch.Generator().manual_seed(11)
        device = device_of(backend, index)
        self.case: Any
        if kind == "linear":
            self.case = LinearCase("streams", 40, 70, 52, 0.3, block, bias=False)
            t = make_linear(self.case, torch.float32, draw)
        else:
            geometry = _conv((24, 36), (3, 3), stride=2, pad=1)
            self.case = ConvCase("streams", 5, 8, 7, geometry, 0.3, block, bias=False)
            t = make_conv(self.case, torch.float32, draw)
        # The native kernels for blocks multiply in 16 bits here: strict float32 is Triton's.
        half = backend == "cuda" and block == (16, 16)
        self.dtype = torch.bfloat16 if half else torch.float32
        self.exact = [t[name].to(self.dtype).double() for name in ("x", "grad", "values")]
        self.exact_index = t["indices"]
        self.x, self.grad = (t[name].to(device, self.dtype) for name in ("x", "grad"))
        self.values = t["values"].to(self.dtype).float().to(device)
        self.index = tuple(index.to(device) for index in t["indices"])
        self.device = device

    def passes(self) -> Tensors:
        """y, dx, dvalues."""
        lib: Any = torch.ops.sparse_kernels
        case, index = self.case, self.index
        if isinstance(case, LinearCase):
            end = (case.out_features, False)
            return (
                lib.linear(self.x, self.values, *index, None, None, *end),
                lib.linear_dgrad(self.grad, self.values, *index, case.in_features),
                lib.linear_wgrad(self.grad, self.x, *index, *case.block),
            )
        g = list(case.geometry)
        return (
            lib.conv2d(self.x, self.values, *index, None, None, g, False),
            lib.conv2d_dgrad(self.grad, self.values, *index, case.height, case.width, g),
            lib.conv2d_wgrad(self.grad, self.x, *index, *case.block, g),
        )

    def check(self, found: Tensors) -> None:
        """Hold results against float64. Raises AssertionError."""
        case, (x, grad, values), index = self.case, self.exact, self.exact_index
        exact: Tensors
        if isinstance(case, LinearCase):
            exact = (
                reference.linear(x, values, *index, None, case.out_features, False),
                reference.linear_dgrad(grad, values, *index, case.in_features),
                reference.linear_wgrad(grad, x, *index, *case.block),
            )
        else:
            g = list(case.geometry)
            exact = (
                reference.conv2d(x, values, *index, None, g, False),
                reference.conv2d_dgrad(grad, values, *index, case.height, case.width, g),
                reference.conv2d_wgrad(grad, x, *index, *case.block, g),
            )
        for name, out, right in zip(("y", "dx", "dvalues"), found, exact, strict=True):
            assert out.device == self.device
            error = relative_error(out, right)
            assert error <= BOUND[self.dtype], f"{name}: relative error {error:.1e}"


@pytest.fixture(params=["linear", "conv2d"])
def layer(request: pytest.FixtureRequest, backend: str, block: tuple[int, int]) -> Layer:
    return Layer(request.param, block, backend)


@pytest.fixture(params=BLOCKS, ids=str)
def block(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    return found


class Late:
    """The operands hold zeros until the producer, queued behind a delay, writes them."""

    def __init__(self, layer: Layer) -> None:
        self.pairs = [(t, t.clone()) for t in (layer.x, layer.grad, layer.values)]
        for target, _ in self.pairs:
            target.zero_()
        wait_for(layer.device)

    def produce(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)


def warm(lane: Any, layer: Layer) -> None:
    """Kernels compiled and loaded, memory of the stream at hand: what follows only queues."""
    lane.submit(layer.passes)
    lane.wait()


def test_work_on_a_side_stream_sees_a_delayed_producer(layer: Layer) -> None:
    late, lane = Late(layer), lane_on(layer.device)
    found: list[Tensors] = []
    warm(lane, layer)
    lane.delay()
    lane.submit(late.produce)
    lane.submit(lambda: found.append(layer.passes()))
    assert still_busy(lane), "the delay was over before the kernels were queued: nothing is shown"
    lane.wait()
    layer.check(found[0])


def test_two_streams_do_not_wait_for_each_other(layer: Layer, block: tuple[int, int]) -> None:
    """The second stream finishes while the first is still delayed; then the first is right too."""
    backend = plan.forced() or ""
    kind = "linear" if isinstance(layer.case, LinearCase) else "conv2d"
    other = Layer(kind, block, backend)
    late, slow, fast = Late(layer), lane_on(layer.device), lane_on(layer.device)
    found: dict[str, Tensors] = {}
    warm(slow, layer)
    warm(fast, other)
    for _ in range(8):
        slow.delay()
    slow.submit(late.produce)
    slow.submit(lambda: found.update(slow=layer.passes()))
    fast.submit(lambda: found.update(fast=other.passes()))
    fast.wait()
    assert still_busy(slow), "the free stream waited for the delayed one"
    other.check(found["fast"])
    slow.wait()
    layer.check(found["slow"])


def test_a_consumer_stream_takes_results_after_an_event(layer: Layer) -> None:
    """Kernels on one stream, their sum on another that waits for it: no hidden third stream."""
    late, first, second = Late(layer), lane_on(layer.device), lane_on(layer.device)
    found: list[Tensors] = []
    copies: list[torch.Tensor] = []
    warm(first, layer)
    warm(second, layer)
    first.delay()
    first.submit(late.produce)
    first.submit(lambda: found.append(layer.passes()))
    second.after(first)
    second.submit(lambda: copies.extend(t.clone() for t in found[0]))
    second.wait()
    layer.check(tuple(copies))


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, torch sees {GPUS}")
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_device_1_computes_while_device_0_is_current(
    kind: str, name: str, block: tuple[int, int]
) -> None:
    check_on_another_device(kind, block, name, index=1)


def check_on_another_device(kind: str, block: tuple[int, int], name: str, index: int) -> None:
    """Results are right on ``index`` and the current device stays what it was."""
    with plan.use_backend(name), current(device_of(name, 0)):
        layer = Layer(kind, block, name, index)
        before = torch.cuda.current_device() if name != "cpu" else None
        late, lane = Late(layer), lane_on(layer.device)
        found: list[Tensors] = []
        lane.submit(late.produce)
        lane.submit(lambda: found.append(layer.passes()))
        lane.wait()
        layer.check(found[0])
        late.produce()
        layer.check(layer.passes())  # on that device's default stream
        assert before == (torch.cuda.current_device() if name != "cpu" else None)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_check_of_another_device_itself(kind: str, block: tuple[int, int]) -> None:
    """On the CPU, or on the only GPU: there it is device 0 beside itself."""
    check_on_another_device(kind, block, "cpu", index=0)


# -- CUDA graphs -----------------------------------------------------------------------------------


def test_a_graph_replays_on_new_operands(layer: Layer) -> None:
    graph = captured(layer.passes, layer.device)
    late = Late(layer)
    late.produce()
    graph.replay()
    wait_for(layer.device)
    layer.check(graph.results)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_graph_replays_after_pattern_changes(
    kind: str, backend: str, block: tuple[int, int]
) -> None:
    """Captured once; then the layer gets other blocks, more of them and fewer, in place."""
    device = device_of(backend)
    draw = torch.Generator().manual_seed(12)
    layer = made_layer(kind, block, draw)
    rewriting = reserved(layer.to(device))
    half = backend == "cuda" and block == (16, 16)
    shape = (40, 64) if kind == "linear" else (3, 32, 6, 5)
    x = torch.randn(shape, generator=draw).to(device, torch.bfloat16 if half else torch.float32)
    leaf = x.clone().requires_grad_()

    def passes() -> Tensors:
        y = layer(leaf)
        return (y, *torch.autograd.grad(y.float().square().sum(), [leaf, layer.values]))

    graph = captured(passes, device)
    for density in (0.3, 0.6, 0.1):
        rewriting(changed(layer.pattern, density, draw))
        with torch.no_grad():
            leaf.copy_(torch.randn(shape, generator=draw))
            layer.values.copy_(
                layer.pattern.compress(torch.randn(layer.pattern.shape, generator=draw).to(device))
            )
        graph.replay()
        wait_for(device)
        compare(layer, leaf, graph.results, BOUND[x.dtype])


def made_layer(kind: str, block: tuple[int, int], draw: torch.Generator) -> SparseLayer:
    """Dimensions that the blocks divide and do not divide."""
    if kind == "linear":
        return SparseLinear(64, 52, bias=False, density=0.3, block=block, generator=draw)
    return SparseConv2d(32, 36, 3, padding=1, bias=False, density=0.3, block=block, generator=draw)


def reserved(layer: SparseLayer) -> Callable[[torch.Tensor], None]:
    """Room for every block, so that pointers stay; what is returned changes the pattern."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    reserve(layer, optimizer, room=float("inf"))

    def change(keys: torch.Tensor) -> None:
        places = [t.data_ptr() for t in (layer.values, *layer.pattern.tensors())]
        assert not rewrite(layer, optimizer, keys), "the layer was reallocated"
        assert places == [t.data_ptr() for t in (layer.values, *layer.pattern.tensors())]

    return change


def changed(pattern: SparsityPattern, density: float, draw: torch.Generator) -> torch.Tensor:
    """Keys of other blocks at ``density``."""
    blocks = pattern.block_rows * pattern.block_cols
    chosen = torch.randperm(blocks, generator=draw)[: max(1, round(density * blocks))]
    return chosen.sort().values.to(pattern.device)


def compare(layer: SparseLayer, leaf: torch.Tensor, found: Tensors, bound: float) -> None:
    """y, dx and dvalues against the dense twin in float64 on the CPU."""
    dense = layer.to_dense().cpu().double()
    weight = dense.get_parameter("weight")
    if leaf.dtype == torch.bfloat16:
        with torch.no_grad():
            weight.copy_(weight.to(torch.bfloat16).double())
    x = leaf.detach().cpu().double().requires_grad_()
    y = dense(x)
    # The loss's gradient as the layer had it: from its own rounded output.
    given = 2 * found[0].detach().cpu().double()
    dx, dw = torch.autograd.grad(y, [x, weight], given)
    values = layer.pattern.to("cpu").compress(layer.weight_to_matrix(dw))
    for name, out, right in zip(("y", "dx", "dvalues"), found, (y, dx, values), strict=True):
        error = relative_error(out, right)
        assert error <= bound, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_and_mask_updates_between_replays(name: str) -> None:
    """A training whose steps are replays of one graph has the losses of one without capture."""
    losses = {}
    with plan.use_backend(f"{name},torch"):
        for how in ("eager", "graph"):
            with side_stream(device_of(name)):
                losses[how] = train(device_of(name), how == "graph")
    torch.testing.assert_close(losses["graph"], losses["eager"], rtol=1e-4, atol=1e-5)
    assert losses["eager"].unique().numel() > 3


def train(device: torch.device, capture: bool, steps: int = 8) -> torch.Tensor:
    """Losses of steps with a mask update after each."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(
        SparseConv2d(16, 32, 3, padding=1, density=0.3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        SparseLinear(32 * 12, 16, density=0.3, block=(4, 1)),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reserve(model, optimizer, room=float("inf"))
    masks = SparseMomentum(
        model, optimizer, total_steps=4 * steps, update_every=1, signal="random", dense_above=1.0
    )
    draw = torch.Generator().manual_seed(3)
    x = torch.zeros(6, 16, 4, 3, device=device)
    target = torch.zeros(6, dtype=torch.int64, device=device)
    kept = torch.zeros((), device=device)

    def step() -> Tensors:
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        kept.copy_(loss.detach())
        return (kept,)

    losses = []
    run: Callable[[], object] = step
    for index in range(steps):
        x.copy_(torch.randn(x.shape, generator=draw))
        target.copy_(torch.randint(16, (6,), generator=draw))
        if capture and index == 2:
            run = step_graph(step, device)
        run()
        losses.append(float(kept))
        record = masks.step(skipped=False)
        assert record is not None and not record.reallocated
    return torch.tensor(losses)


def step_graph(step: Callable[[], Tensors], device: torch.device) -> Callable[[], object]:
    """A replay of a step that has run before; a training step must not run to warm up."""
    if device.type != "cuda":
        return step
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        step()
    return graph.replay


def test_the_operators_used_here_are_registered() -> None:
    names = {f"{kind}{w}" for kind in ("linear", "conv2d") for w in ("", "_dgrad", "_wgrad")}
    assert names <= set(ops.OPERATORS)
