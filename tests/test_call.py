"""The short way to the kernels: nobody who looks at operators or tensors misses one, results are
the same on both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import layout
from sparse_kernels.backends.cpu.prepared import Product
from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.ops import _library
from sparse_kernels.plan import use_backend

LIB = torch.ops.sparse_kernels
KINDS = ("linear", "conv2d")
BIAS_GRADIENT = 3  # its place in what _gradients gives


class Record(TorchDispatchMode):
    """Names of this project's operators that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A user's own tensor."""


def _layer(kind: str) -> tuple[SparseLayer, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return SparseLinear(6, 5, density=0.5), torch.randn(4, 6)
    return SparseConv2d(4, 6, 3, padding=1, density=0.5, block=(2, 1)), torch.randn(3, 4, 5, 5)


def _gradients(layer: SparseLayer, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, first derivatives (the probe's too) and a second derivative."""
    x = x.clone().requires_grad_()
    wanted = (x, layer.values, layer.bias, layer.make_probe())
    y = layer(x)
    first = torch.autograd.grad((y**2).sum(), wanted)
    layer.probe = None
    inner = torch.autograd.grad((layer(x) ** 3).sum(), (x, layer.values), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in inner), (x, layer.values))
    return [y, *first, *second]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_numbers(kind: str) -> None:
    layer, x = _layer(kind)
    short = _gradients(layer, x)
    with Record() as record:
        long = _gradients(layer, x)
    assert record.names.count(kind) >= 2 and f"{kind}_wgrad_dense" in record.names
    for at, (one, other) in enumerate(zip(short, long, strict=True)):
        assert one.stride() == other.stride()
        if at == BIAS_GRADIENT:  # the short way adds up the rows in another order than torch
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_reached_without_the_dispatcher(kind: str, monkeypatch) -> None:
    layer, x = _layer(kind)
    x.requires_grad_()
    called: list[str] = []

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: called.append(name) or function(*args)

    for name, kernel in list(_library._KERNELS.items()):
        # The dispatcher keeps the kernel that was registered; only ``call`` sees this one.
        monkeypatch.setitem(_library._KERNELS, name, count(name, kernel))
    for name in ("forward", "backward"):
        monkeypatch.setattr(Product, name, count(name, getattr(Product, name)))
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    assert called == ["forward", "backward", "forward"]
    called.clear()
    gradient = torch.autograd.grad(layer(x).sum(), x, create_graph=True)[0]
    gradient.sum().backward()  # derivatives of derivatives are the operators'
    assert called[0] == "forward" and "backward" not in called and f"{kind}_dgrad" in called
    called.clear()
    with Record():
        layer(x).sum().backward()
    assert called == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_prepared_product_depends_on(kind: str) -> None:
    """Nothing stale is computed: other index tensors, other contents, other values, other sizes."""
    layer, x = _layer(kind)

    def agrees(inputs: torch.Tensor) -> None:
        with Record():
            expected = layer(inputs)
        assert torch.equal(layer(inputs), expected)

    agrees(x)
    agrees(x[:2])
    if kind == "conv2d":
        agrees(torch.nn.functional.pad(x, (0, 1, 0, 2)))
    layer.set_pattern_(layer.pattern.keys().flip(0).neg() + layer.pattern.keys().max())
    agrees(x)
    layer.values.data = layer.values.data * 2
    agrees(x)
    other = copy.deepcopy(layer)
    other.set_pattern_(layer.pattern.keys()[:-1])
    layer._register_pattern(other.pattern)
    agrees(x)
    for name in ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm"):
        layer._buffers[name] = layer._buffers[name].clone()
        agrees(x)
    with use_backend("reference"):
        assert torch.allclose(layer(x), layer.to_dense()(x), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_indices_raise_on_the_short_way(kind: str) -> None:
    layer, x = _layer(kind)
    layer(x)
    layer.col_indices[0] = 10_000
    with pytest.raises(ValueError, match="damaged"):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatch_mode_sees_every_operator(kind: str) -> None:
    layer, x = _layer(kind)
    with Record() as record:
        layer(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            layer(x)
    assert record.names == [kind, f"{kind}_dgrad", f"{kind}_wgrad", kind]


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_stay_fake_and_traces_hold_the_operator(kind: str) -> None:
    layer, x = _layer(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
        assert type(y) is not torch.Tensor and y.shape[1] == layer.matrix_shape[0]
        assert type(layer(x)) is not torch.Tensor  # a real input among fakes
    for mode_name in ("real", "fake", "symbolic"):
        with torch.no_grad():
            traced = make_fx(
                lambda x: layer(x) * 2, tracing_mode=mode_name, _allow_non_fake_inputs=True
            )(x)
        targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert getattr(LIB, kind).default in targets
        assert torch.equal(traced(x), layer(x) * 2)


# Dynamo itself instantiates torch.autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_holds_the_operators(kind: str) -> None:
    torch._dynamo.reset()
    layer, x = _layer(kind)
    targets: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    compiled(x.requires_grad_()).sum().backward()
    for name in (kind, f"{kind}_dgrad", f"{kind}_wgrad"):
        assert getattr(LIB, name).default in targets


def test_a_function_mode_sees_the_operator() -> None:
    found: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = _layer("linear")
    with Mode(), torch.no_grad():
        layer(x)
    assert any("sparse_kernels" in str(func) for func in found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_profiler_names_the_operators(kind: str) -> None:
    layer, x = _layer(kind)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        layer(x.requires_grad_()).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert {f"sparse_kernels::{kind}{end}" for end in ("", "_dgrad", "_wgrad")} <= names


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_is_seen_and_what_is_not() -> None:
    x = torch.randn(4, 6)
    with torch.inference_mode():
        inference = torch.randn(4, 6)
    plain = (x, torch.nn.Parameter(x), x.t(), x[1:], x.expand(4, 6), inference, x.bfloat16())
    assert not any(_library.seen(tensor, None, 3, [1, 2]) for tensor in plain)
    special = {
        "meta": x.to("meta"),
        "negative": torch.complex(x, x).conj().imag,
        "zero": torch._efficientzerotensor(4, 6),
        "subclass": x.as_subclass(Subclass),
        "sparse": torch.eye(3).to_sparse(),
        "fake": FakeTensorMode().from_tensor(x),
    }
    assert [name for name, tensor in special.items() if not _library.seen(tensor)] == []
    assert _library.seen(x, None, special["negative"])  # wherever it stands
    inside: list[bool] = []
    torch.vmap(lambda row: inside.append(_library.seen(x)) or row)(x)
    torch.func.functionalize(lambda t: inside.append(_library.seen(x)) or t)(x)
    with torch.autograd.forward_ad.dual_level():
        inside.append(_library.seen(x))
    assert inside == [True] * 3 and not _library.seen(x)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_only_torch_can_resolve(kind: str) -> None:
    layer, x = _layer(kind)
    lazy = torch.complex(x, x).conj().imag  # -x, whose memory holds x
    assert lazy.is_neg()
    for dense in (lazy, torch._neg_view(x), torch._efficientzerotensor(x.shape)):
        plain = dense.clone() if dense.is_neg() else torch.zeros(x.shape)
        assert torch.equal(layer(dense), layer(plain))
        with torch.no_grad():
            assert torch.equal(layer(dense), layer(plain))
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        gradient = layout.to_feature_major(torch.randn(y.shape))
        lazy_gradient = torch.complex(gradient, gradient).conj().imag
        found = torch.autograd.grad(y, (inputs, layer.values), lazy_gradient, retain_graph=True)
        expected = torch.autograd.grad(y, (inputs, layer.values), -gradient)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# torch compiles the rules of forward mode when it is first used, in a way that it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivatives_are_refused_not_dropped() -> None:
    layer, x = _layer("linear")
    for recording in (True, False):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(recording):
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="jvp"):
                layer(dual)


def test_indices_are_checked_on_the_short_way() -> None:
    layer, x = _layer("linear")
    y = layer(x.requires_grad_())
    layer.t_perm.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer.t_perm.resize_(1)
    with pytest.raises(ValueError, match="t_perm must be int32 of shape"):
        layer(x)


def test_a_layer_without_a_registered_parameter_works() -> None:
    layer, x = _layer("linear")
    expected = layer(x)
    values = layer.values.detach()
    del layer.values
    layer.values = values  # as FSDP's flat parameters are handed to a layer
    assert "values" not in layer._parameters and torch.equal(layer(x), expected)
    without = torch.func.functional_call(layer, {"bias": torch.zeros(5)}, (x,))
    assert torch.allclose(without, expected - layer.bias, atol=1e-6)
