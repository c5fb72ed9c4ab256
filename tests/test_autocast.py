"""torch.autocast over sparse layers: dtypes as nn.Linear's, float32 values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sparse_kernels import SparseMomentum, plan, sparsify
from sparse_kernels.backends import cpu
from sparse_kernels.nn import SparseConv2d, SparseLayer, SparseLinear, densify

HALF = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str, dtype=torch.float32, block=(1, 1)) -> tuple[SparseLayer, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    options = {"density": 0.4, "block": block, "generator": generator, "dtype": dtype}
    if kind == "linear":
        return SparseLinear(40, 24, **options), torch.randn(9, 40, generator=generator)
    layer = SparseConv2d(8, 12, 3, padding=1, **options)
    return layer, torch.randn(3, 8, 5, 5, generator=generator)


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", HALF)
def test_dtypes_are_those_of_torch_and_gradients_float32(dtype, kind, storage) -> None:
    layer, x = make(kind)
    dense = layer.to_dense()
    layer.to_storage_(storage)
    probe = layer.make_probe()
    results = []
    for module in (layer, dense):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(given)
        y.float().square().sum().backward()
        weight = module.values.grad if module is layer else module.weight.grad
        results.append((y, given.grad, weight, module.bias.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
    (y, dx, dv, db), (expected, want_dx, want_dw, want_db) = results
    assert y.dtype == dtype and dv.dtype == db.dtype == probe.grad.dtype == torch.float32
    bound = 8 * EPS[dtype]

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        a, b = a.detach().float(), b.detach().float()
        assert float((a - b).norm()) <= bound * float(b.norm())

    close(y, expected)
    close(dx, want_dx)
    close(db, want_db)
    matrix = layer.weight_to_matrix(want_dw)
    close(
        dv if storage == "dense-masked" else layer.pattern.expand(dv), matrix * layer.pattern.mask()
    )
    close(probe.grad, matrix)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_cpu_rounds_activations_only_and_once(kind, block) -> None:
    """Input rounded, product in float32 with float32 values, output rounded: the rule."""
    layer, x = make(kind, block=block)
    with torch.no_grad():
        expected = layer(x.bfloat16().float()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.bfloat16()), expected)  # the same without autocast


def test_a_backward_pass_inside_of_autocast_is_the_same() -> None:
    gradients = []
    for inside in (False, True):
        layer, x = make("linear")
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append((layer.values.grad, layer.bias.grad))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_float64_stays_and_a_switched_off_autocast_is_none() -> None:
    layer, x = make("linear", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64
        single, _ = make("linear")
        with torch.autocast("cpu", enabled=False):
            assert single(x).dtype == torch.float32
        with pytest.raises(TypeError, match="float64"):
            single(x.double())


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_inputs_of_the_other_sixteen_bit_dtype_are_cast(storage) -> None:
    layer, x = make("linear")
    layer.to_storage_(storage)
    with torch.autocast("cpu", torch.float16):
        assert layer(x.bfloat16()).dtype == torch.float16


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sixteen_bit_values_decide_themselves(kind) -> None:
    layer, x = make(kind, torch.bfloat16)
    with pytest.raises(TypeError, match="expected an input of torch.bfloat16"):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_where_no_backend_takes_sixteen_bit_the_product_is_float32(monkeypatch, kind) -> None:
    layer, x = make(kind)
    expected = layer(x)
    rounded = layer(x.bfloat16().float())
    serves = cpu.supports

    def float32_only(op, tensor, *others):
        if tensor.dtype in HALF:
            return f"computes float32 only, got {tensor.dtype}"
        return serves(op, tensor, *others)

    monkeypatch.setattr(cpu, "supports", float32_only)
    monkeypatch.setattr(plan, "_cache", {})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        y = layer(x.bfloat16())  # what a 16-bit layer before it hands on
    assert y.dtype == torch.float32 and torch.equal(y, rounded)
    with pytest.raises(plan.BackendError, match="computes float32 only"):
        layer(x.bfloat16())  # asked for without autocast: an error that says so


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_casts_alike() -> None:
    layer, x = make("linear")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )


def learn(model: nn.Module, dtype, scaler=None, masks=True, steps=30, bad=()) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    driver = None
    if masks:
        driver = SparseMomentum(model, optimizer, total_steps=steps, update_every=5, signal="exact")
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, 6, 6, generator=draw), torch.randint(10, (32,), generator=draw)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            out = model(x)
            loss = nn.functional.cross_entropy(out.float(), y)
        losses.append(float(loss.detach()))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss * (float("inf") if number in bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        if driver is not None:
            driver.step()
    if driver is not None:
        assert driver.steps == steps - len(bad) and driver.updates == (steps - len(bad) - 1) // 5
    return losses


@pytest.mark.parametrize("block", [(1, 1), "auto"])
def test_a_network_trains_under_bfloat16_as_its_dense_twin_begins(block) -> None:
    model = network()
    sparsify(model, density=0.3, block=block)
    dense = densify(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 3, 6, 6)
        mine, theirs = model(x), dense(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.05, atol=0.05)
    losses = learn(model, torch.bfloat16)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_float16_with_a_scaler_trains_and_skips_what_overflows() -> None:
    model = network()
    sparsify(model, density=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = learn(model, torch.float16, scaler, bad=(7,))
    assert losses[-1] < 0.5 * losses[0]
    assert scaler.get_scale() == 2.0**9  # halved once
    assert all(torch.isfinite(p).all() for p in model.parameters())
