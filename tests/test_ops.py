"""The registered operators: opcheck, gradients of every order, torch.compile, errors."""

from __future__ import annotations

import numpy
import pytest
import torch

from sparse_kernels import layout, ops, plan
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.pattern import SparsityPattern

LIB = torch.ops.sparse_kernels


def _randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _linear_args(dtype: torch.dtype, block: tuple[int, int] = (1, 1), probe: bool = True):
    pattern = SparsityPattern.random((6, 5), density=0.4, block=block)
    x = _randn(4, 5, dtype=dtype)
    values = pattern.compress(torch.randn(6, 5, dtype=dtype)).requires_grad_()
    bias = _randn(6, dtype=dtype)
    probe_tensor = torch.zeros((), dtype=dtype).expand(6, 5).detach().requires_grad_()
    return x, values, *pattern.tensors(), bias, probe_tensor if probe else None, 6, False


GEOMETRY = Conv2dGeometry(4, 4, 3, 2, 2, 1, 1, 0, 0, 1, 1, 2, 2)


def _conv_args(dtype: torch.dtype, block: tuple[int, int] = (1, 1), probe: bool = True):
    rows, cols = GEOMETRY.matrix_shape
    pattern = SparsityPattern.random(
        (rows, cols), density=0.4, block=block, row_parts=2, col_parts=GEOMETRY.taps
    )
    x = _randn(3, 4, 5, 6, dtype=dtype)
    values = pattern.compress(torch.randn(rows, cols, dtype=dtype)).requires_grad_()
    bias = _randn(4, dtype=dtype)
    probe_tensor = torch.zeros((), dtype=dtype).expand(rows, cols).detach().requires_grad_()
    return (
        *(x, values, *pattern.tensors(), bias),
        *(probe_tensor if probe else None, list(GEOMETRY), False),
    )


def _backward_args(name: str, dtype: torch.dtype) -> tuple:
    """Arguments of every operator but the two forward products."""
    if name.startswith("linear"):
        x, values, *index, _, _, out, _ = _linear_args(dtype)
        grad = _randn(4, out, dtype=dtype)
        return {
            "linear_dgrad": (grad, values, *index, 5),
            "linear_wgrad": (grad, x, *index, 1, 1),
            "linear_wgrad_dense": (grad, x),
        }[name]
    if name.startswith("conv2d"):
        x, values, *index, _, _, geometry, _ = _conv_args(dtype)
        grad = _randn(3, 4, *GEOMETRY.output_size(5, 6), dtype=dtype)
        return {
            "conv2d_dgrad": (grad, values, *index, 5, 6, geometry),
            "conv2d_wgrad": (grad, x, *index, 1, 1, geometry),
            "conv2d_wgrad_dense": (grad.detach(), x.detach(), geometry),
        }[name]
    x = _randn(3, 2, 5, 4, dtype=dtype)
    mean, var = torch.randn(2, dtype=dtype), torch.rand(2, dtype=dtype) + 0.5
    weight, bias = _randn(2, dtype=dtype), _randn(2, dtype=dtype)
    taps = torch.randint(0, 4, (3, 2, 2, 2), dtype=torch.uint8)
    window = ([2, 2], [2, 2], [0, 0])
    grad = torch.randn(3, 2, 2, 2, dtype=dtype)
    y = torch.randn_like(x)
    return {
        "batch_norm": (x, weight, bias, None, None, True, 1e-5, False, y),
        "batch_norm_backward": (*(y, x, y, weight, mean, var, None), True, 1e-5, True, True),
        "batch_norm_pool": (x, weight, bias, None, None, True, 1e-5),
        "batch_norm_pool_backward": (*(grad, taps, x, weight, mean, var, mean), True, 1e-5),
        "max_pool2d": (x, *window, [1, 1], False),
        "max_pool2d_backward": (grad, taps, 5, 4, *window, [1, 1]),
        "dropout": (x, torch.tensor(-5), 0.3, [1, 60, 12, 3]),
        "avg_pool2d": (x, *window, False, True, None),
        "avg_pool2d_backward": (grad, 5, 4, *window, False, True, None),
    }[name]


def _args(name: str, dtype: torch.dtype) -> tuple:
    if name == "linear":
        return _linear_args(dtype)
    if name == "conv2d":
        return _conv_args(dtype)
    args = _backward_args(name, dtype)
    if name.endswith("_backward"):  # these have no second derivative, by design
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    return args


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(LIB, name).default, _args(name, dtype))


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (3, 2)], ids=str)
def test_gradients_of_first_and_second_order(block: tuple[int, int]) -> None:
    for function, args in (
        (ops.SparseLinearFunction, _linear_args(torch.float64, block, probe=False)),
        (ops.SparseConv2dFunction, _conv_args(torch.float64, (min(block[0], 2), block[1]), False)),
    ):
        x, values, *rest = args
        assert torch.autograd.gradcheck(function.apply, (x, values, *rest))
        assert torch.autograd.gradgradcheck(function.apply, (x, values, *rest), fast_mode=True)


def test_relu_and_probe_gradients() -> None:
    for name, args in (
        ("linear", _linear_args(torch.float64)),
        ("conv2d", _conv_args(torch.float64)),
    ):
        x, values, *index, bias, probe, where, _ = args
        function = ops.SparseLinearFunction if name == "linear" else ops.SparseConv2dFunction
        y = function.apply(x, values, *index, bias, probe, where, True)
        assert (y >= 0).all() and (y == 0).any() and (y > 0).any()
        grad = torch.randn_like(y)
        y.backward(grad)
        dense = x.detach().new_zeros(probe.shape).requires_grad_()
        masked = grad * (y > 0)
        if name == "linear":
            torch.nn.functional.linear(x.detach(), dense).backward(masked)
        else:
            g = GEOMETRY
            weight = dense.view(g.out_channels, g.kernel_height, g.kernel_width, -1)
            padded = torch.nn.functional.pad(x.detach(), (0, 1, 1, 0))
            torch.nn.functional.conv2d(
                padded,
                weight.permute(0, 3, 1, 2),
                stride=(2, 1),
                dilation=(1, 2),
                groups=2,
            ).backward(masked)
        assert torch.allclose(probe.grad, dense.grad)
        assert torch.allclose(bias.grad, masked.sum([d for d in range(y.dim()) if d != 1]))


def test_probe_accumulates_over_micro_batches() -> None:
    x, values, *index, bias, probe, out, _ = _linear_args(torch.float64)
    for _ in range(2):
        y = ops.linear(x, values, *index, bias, probe, out_features=out)
        y.sum().backward()
    once = torch.ones(4, 6, dtype=torch.float64).t() @ x.detach()
    assert torch.allclose(probe.grad, 2 * once)


def test_masked_weight() -> None:
    dense = _randn(3, 4)
    mask = torch.rand(3, 4) < 0.5
    probe = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, dtype=torch.float64)
    (ops.masked_weight(dense, mask, probe) * 2).backward(grad)
    assert torch.equal(dense.grad, 2 * grad * mask)
    assert torch.equal(probe.grad, 2 * grad)
    with pytest.raises(ValueError, match="share a shape"):
        ops.masked_weight(dense, mask[:2])


# Dynamo itself instantiates torch.autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_survives_twelve_mask_updates_with_one_compilation() -> None:
    x, values, *index, bias, _, out, _ = _linear_args(torch.float32)
    compiled_graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled_graphs.append(graph)
        return graph

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, values, *index, bias, out_features=out, relu=True) * 2

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for seed in range(12):
        pattern = SparsityPattern.random(
            (6, 5), nnzb=values.shape[0], generator=torch.Generator().manual_seed(seed)
        )
        for old, new in zip(index, pattern.tensors(), strict=True):
            old.copy_(new)
        y = compiled(x)
        y.sum().backward()
        expected = (x @ pattern.expand(values.detach()).t() + bias).clamp(min=0) * 2
        assert torch.allclose(y, expected, atol=1e-5)
    assert len(compiled_graphs) == 1


def test_leading_dimensions_and_unbatched() -> None:
    x, values, *index, bias, _, out, _ = _linear_args(torch.float32)
    many = torch.randn(2, 3, 5)
    y = ops.linear(many, values, *index, bias, out_features=out)
    flat = ops.linear(many.reshape(6, 5), values, *index, bias, out_features=out)
    assert y.shape == (2, 3, 6) and torch.equal(y.reshape(6, 6), flat)
    one = ops.linear(many[0, 0], values, *index, bias, out_features=out)
    assert one.shape == (6,) and torch.allclose(one, flat[0])
    x, values, *index, bias, _, geometry, _ = _conv_args(torch.float32)
    image = ops.conv2d(x[0], values, *index, bias, geometry=geometry)
    batch = ops.conv2d(x, values, *index, bias, geometry=geometry)
    assert image.shape == batch.shape[1:] and torch.allclose(image, batch[0], atol=1e-6)


def test_sixteen_bit_activations_keep_float32_values() -> None:
    x, values, *index, bias, _, out, _ = _linear_args(torch.float32)
    half = x.detach().to(torch.bfloat16).requires_grad_()
    y = ops.linear(half, values, *index, bias, out_features=out)
    y.float().sum().backward()
    assert y.dtype == half.grad.dtype == torch.bfloat16 and values.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.linear(x, values, *index, bias, out_features=out)
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, y)


def test_errors_name_both_sides() -> None:
    x, values, *index, bias, _, out, _ = _linear_args(torch.float32)
    wrong = [
        (x[:, :4], values, index, bias, "t_crow must be int32 of shape"),
        (x, values[:, 0], index, bias, r"values must have shape \[capacity, bh, bw\]"),
        (x, values, index[::-1], bias, "crow must be int32 of shape"),
        (x, values, [t.long() for t in index], bias, "int64"),
        (x, values, index, bias[:2], r"bias must have shape \(6,\), got \(2,\)"),
    ]
    for x_, values_, index_, bias_, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.linear(x_, values_, *index_, bias_, out_features=out)
    with pytest.raises(TypeError, match=r"float64 and torch\.float32"):
        ops.linear(x.double(), values, *index, bias, out_features=out)
    with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
        ops.linear(torch.ones(4, 5, dtype=torch.int64), values, *index, bias, out_features=out)
    x, values, *index, bias, _, geometry, _ = _conv_args(torch.float32)
    with pytest.raises(ValueError, match="input must have 4 channels, got 3"):
        ops.conv2d(x[:, :3], values, *index, bias, geometry=geometry)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        ops.conv2d(x[:, :, :1], values, *index, bias, geometry=geometry)
    with pytest.raises(ValueError, match="13 integers"):
        ops.conv2d(x, values, *index, bias, geometry=geometry[:5])


def test_a_device_without_a_backend_lists_the_reasons() -> None:
    x, values, *_ = _linear_args(torch.float32)
    with pytest.raises(plan.BackendError, match="no backend computes.*cpu: serves CPU tensors"):
        plan.choose("linear", x.to("meta"), values.to("meta"))
    message = "'gpu' is no backend: choose one of cpu"
    with pytest.raises(plan.BackendError, match=message), plan.use_backend("gpu"):
        pass


def test_a_weight_gradient_tells_plan_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no values yet from which a backend could read what it must compute."""
    asked, choose = {}, plan.choose

    def record(op: str, x: torch.Tensor, values=None, block=None):
        asked[op] = (None if values is None else tuple(values.shape[1:]), block)
        return choose(op, x, values, block)

    monkeypatch.setattr(plan, "choose", record)
    for make, operator in ((_linear_args, ops.linear), (_conv_args, ops.conv2d)):
        x, values, *index, bias, _, where, _ = make(torch.float64, block=(2, 1))
        name = operator.__name__
        keyword = {"out_features": where} if name == "linear" else {"geometry": where}
        operator(x, values, *index, bias, **keyword).sum().backward()
        assert asked[f"{name}_wgrad"] == (None, (2, 1))
        assert asked[f"{name}_dgrad"] == asked[name] == ((2, 1), None)


def test_float64_is_served_by_the_reference_and_float32_by_the_native_kernels() -> None:
    x, values, *_ = _linear_args(torch.float32)
    assert plan.choose("linear", x, values) is plan.BACKENDS["cpu"]
    assert plan.choose("linear", x.double(), values.double()) is plan.BACKENDS["reference"]
    with plan.use_backend("reference"):
        assert plan.choose("linear", x, values) is plan.BACKENDS["reference"]


def test_a_fused_relu_treats_infinite_and_missing_gradients_as_torch_does() -> None:
    pattern = SparsityPattern.full((2, 2))
    values = pattern.compress(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    x = torch.tensor([[-1.0, float("nan")]])
    y = ops.linear(x, values, *pattern.tensors(), bias, out_features=2, relu=True)
    y.backward(torch.tensor([[float("inf"), 1.0]]))
    weight = torch.eye(2)
    plain = torch.zeros(2, requires_grad=True)
    torch.nn.functional.linear(x, weight, plain).relu().backward(torch.tensor([[float("inf"), 1]]))
    assert torch.equal(bias.grad.isnan(), plain.grad.isnan())
    assert torch.equal(bias.grad.nan_to_num(), plain.grad.nan_to_num())


def test_tensors_on_another_device_are_refused() -> None:
    x, values, *index, bias, _, out, _ = _linear_args(torch.float32)
    with pytest.raises(ValueError, match="bias must be on the input's device cpu, got meta"):
        ops.linear(x, values, *index, bias.to("meta"), out_features=out)
    image = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="weight must be on the input's device cpu, got meta"):
        ops.batch_norm(image, None, None, torch.ones(3, device="meta"), training=True)
    shape = ops.linear(
        x.to("meta"), values.to("meta"), *[t.to("meta") for t in index], out_features=out
    )
    assert shape.is_meta and shape.shape == (4, 6)


def test_evaluating_batch_norm_returns_fresh_statistics() -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    torch.library.opcheck(
        LIB.batch_norm.default, (x, None, None, mean, var, False, 1e-5, False, None)
    )
    _, out_mean, out_var, _ = LIB.batch_norm(x, None, None, mean, var, False, 1e-5, False, None)
    assert out_mean.data_ptr() != mean.data_ptr() and out_var.data_ptr() != var.data_ptr()
    assert not LIB.batch_norm(x.requires_grad_(), *[None] * 4, True, 1e-5, False, None)[
        1
    ].requires_grad


def test_batch_norm_keeps_its_output_only_where_the_mask_needs_it() -> None:
    x, residual = torch.randn(2, 6, 3, 4, 5).unbind()
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    def images(x: torch.Tensor, residual: torch.Tensor | None) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            ops.batch_norm(x, None, None, training=True, relu=True, residual=residual)
        return sum(t.dim() == 4 for t in kept)

    leaf = x.requires_grad_()
    assert images(leaf, None) == 1 and images(leaf, residual) == 2
    # 16-bit outputs may have been rounded to 0, where torch passes no gradient.
    assert images(leaf.bfloat16(), None) == 2


def test_batch_norm_backward_refuses_a_missing_mask() -> None:
    x, v = torch.randn(4, 3), torch.ones(3)
    for y, offset, has_residual in ((None, None, False), (None, v, True)):
        with pytest.raises(ValueError, match="the ReLU's mask needs the output y"):
            LIB.batch_norm_backward(*(x, x, y, None, v, v, offset), True, 1e-5, True, has_residual)
    with pytest.raises(ValueError, match=r"offset must have shape \(3,\), got \(2,\)"):
        LIB.batch_norm_backward(*(x, x, None, None, v, v, v[:2]), True, 1e-5, True, False)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_pool_equals_its_parts_and_refuses_what_they_refuse(training) -> None:
    x = torch.randn(5, 3, 7, 6, requires_grad=True)
    w, b = torch.randn(2, 3).unbind()
    running = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
    y = ops.batch_norm_pool(x, *running[0], w, b, training=training)
    normed = ops.batch_norm(x, *running[1], w, b, training=training, relu=True)
    want = ops.max_pool2d(normed, 2)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(running[0], running[1])
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(out, x, grad)[0] for out in (y, want))
    torch.testing.assert_close(first, second)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.batch_norm_pool(x[:1, :, :1, :1], None, None, training=True)
    with pytest.raises(ValueError, match="1 x 6 pixels is smaller than the window"):
        ops.batch_norm_pool(x[:, :, :1], None, None, training=True)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.batch_norm_pool(x, None, None, w[:2], training=True)
    with pytest.raises(ValueError, match="grad and argmax .* must have shape"):
        LIB.batch_norm_pool_backward(grad, grad, x, w, b, b, b, True, 1e-5)


def test_second_derivatives_in_float32_are_those_of_float64() -> None:
    found = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        x, values, *index, _, _, out, _ = _linear_args(torch.float64)
        x, values = (t.detach().to(dtype).requires_grad_() for t in (x, values))
        y = ops.linear(x, values, *index, out_features=out)
        first = torch.autograd.grad((y**3).sum(), (x, values), create_graph=True)
        found[dtype] = torch.autograd.grad(sum((g**2).sum() for g in first), (x, values))
    for narrow, wide in zip(*found.values(), strict=True):
        assert torch.allclose(narrow.double(), wide, rtol=1e-4)


def test_an_input_is_converted_once_a_step() -> None:
    x, values, *index, _, _, out, _ = _linear_args(torch.float32)
    layout.reset_conversions()
    y = ops.linear(x.detach(), values, *index, out_features=out)
    y.backward(torch.randn(4, 6))
    assert layout.conversions() == 2  # the input and the gradient, which both products read


def test_pooling_takes_the_argument_forms_of_torch() -> None:
    x = torch.randn(2, 3, 6, 6)
    expected = torch.nn.functional.max_pool2d(x, 2)
    for kernel, stride in (((2,), []), (numpy.int64(2), None), ([2, 2], (2,))):
        assert torch.equal(ops.max_pool2d(x, kernel, stride), expected)
