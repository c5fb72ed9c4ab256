"""Growth signals: what they gather, and what they cost outside their window."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.training import SparseMomentum
from sparse_kernels.training.blocks import BlockGrid
from sparse_kernels.training.gradient_scale import gather
from sparse_kernels.training.optimizers import OptimizerView
from sparse_kernels.training.schedule import UpdateSchedule
from sparse_kernels.training.signals import LayerSignal

STEPS = 30


def gradients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(count)]


def dense_twin(make, grads):
    """A dense parameter stepped by the same optimizer on the same dense gradients."""
    weight = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    optimizer = make([weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return optimizer.state[weight]


def observed(make, grads, kind, last=None, block=(1, 1), tolerance=0.1):
    """A signal that saw the last `last` gradients while its optimizer saw all of them."""
    layer = SparseLinear(9, 6, density=0.3, dtype=torch.float64, block=block)
    optimizer = make(layer.parameters())
    signal = LayerSignal("x", layer, OptimizerView(optimizer, layer.values, "x"), kind, tolerance)
    first = len(grads) - (last or len(grads))
    for i, grad in enumerate(grads):
        layer.values.grad = layer.pattern.compress(grad)
        if i >= first:
            layer.make_probe().grad = grad.clone()
            gather([signal], None)
            assert layer.probe.grad is None
        optimizer.step()
    return layer, optimizer, signal


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.4),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
}


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("name", MAKERS)
def test_exact_gathers_the_dense_optimizers_state(name, block):
    grads = gradients(12)
    layer, _, signal = observed(MAKERS[name], grads, "exact", block=block)
    twin = dense_twin(MAKERS[name], grads)
    keys = layer.pattern.keys()
    scores = signal.complete(keys)
    grid = BlockGrid.of(layer)
    for key in signal.view.state_names:
        torch.testing.assert_close(signal.buffers[key], grid.to_blocks(twin[key]))
    if "exp_avg" in twin:
        momentum = twin["exp_avg"] / (twin["exp_avg_sq"].sqrt() + 1e-8)
    else:
        momentum = twin["momentum_buffer"]
    torch.testing.assert_close(scores, grid.means(grid.to_blocks(momentum)))
    state = signal.collect()
    torch.testing.assert_close(state.momentum, layer.pattern.compress(momentum)[: state.nnz])
    added = torch.tensor([0, 2])
    grown = signal.grown_state(added)
    assert set(grown) == set(signal.view.state_names)
    for key, tensor in grown.items():
        assert torch.equal(tensor, signal.buffers[key][added])


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_window_misses_exactly_beta_to_the_length(tolerance):
    grads = gradients(80)
    signal = observed(MAKERS["sgd"], grads, "window", 1, tolerance=tolerance)[2]
    length = signal.length()
    _, _, signal = observed(MAKERS["sgd"], grads, "window", length, tolerance=tolerance)
    full = dense_twin(MAKERS["sgd"], grads)["momentum_buffer"]
    early = dense_twin(MAKERS["sgd"], grads[:-length])["momentum_buffer"]
    gathered = signal.buffers["momentum_buffer"].reshape(6, 9)
    torch.testing.assert_close(gathered, full - 0.9**length * early)
    assert 0.9**length <= tolerance


def test_adam_window_has_the_scale_of_the_optimizers_own_state():
    """Constant gradients: an average over any window is the same, so only the scale is tested."""
    grads = gradients(1) * 60
    layer, _, signal = observed(MAKERS["adam"], grads, "window", 22)
    twin = dense_twin(MAKERS["adam"], grads)
    signal.complete(layer.pattern.keys())
    torch.testing.assert_close(signal.state("exp_avg_sq").reshape(6, 9), twin["exp_avg_sq"])
    free = ~layer.pattern.mask()
    short = signal.buffers["exp_avg"].reshape(6, 9)[free] / twin["exp_avg"][free]
    torch.testing.assert_close(short, torch.full_like(short, (1 - 0.9**22) / (1 - 0.9**60)))


def test_adam_window_over_everything_is_exact():
    grads = gradients(15)
    layer, _, signal = observed(MAKERS["adam"], grads, "window", 15)
    twin = dense_twin(MAKERS["adam"], grads)
    signal.complete(layer.pattern.keys())
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(signal.state(key).reshape(6, 9), twin[key])


def test_adam_windows_that_overlap_are_corrected_once():
    """Constant gradients over three updates in one window: the scale is the optimizer's each time,
    stored or not.
    """
    grad = gradients(1)[0]
    layer = SparseLinear(9, 6, density=0.3, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    view = OptimizerView(optimizer, layer.values, "x")
    signal = LayerSignal("x", layer, view, "window", 0.01)
    for step in range(1, 61):
        layer.values.grad = layer.pattern.compress(grad)
        if step > 30:
            layer.make_probe().grad = grad.clone()
            gather([signal], None)
        optimizer.step()
        if step in (40, 50, 60):
            twin = dense_twin(MAKERS["adam"], [grad] * step)
            signal.complete(layer.pattern.keys())
            found = signal.state("exp_avg_sq").reshape(6, 9)
            torch.testing.assert_close(found, twin["exp_avg_sq"])
            torch.testing.assert_close(
                signal.grown_state(torch.arange(54))["exp_avg_sq"].reshape(6, 9), found
            )
            signal.finish_update(UpdateSchedule(100, 10), step)
            assert signal.gathered == step - 30


def test_adam_window_keeps_the_average_of_a_weight_that_was_pruned():
    """A stored second moment enters the buffer in the buffer's own scale."""
    layer = SparseLinear(9, 6, density=0.3, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    view = OptimizerView(optimizer, layer.values, "x")
    signal = LayerSignal("x", layer, view, "window", 0.01)
    grad = torch.ones(6, 9, dtype=torch.float64)
    for step in range(1, 41):
        layer.values.grad = layer.pattern.compress(grad)
        if step > 30:
            layer.make_probe().grad = grad.clone()
            gather([signal], None)
        optimizer.step()
    signal.complete(layer.pattern.keys())
    everywhere = signal.buffers["exp_avg_sq"]
    torch.testing.assert_close(everywhere, everywhere[:1].expand_as(everywhere))


def test_a_layer_whose_gradient_is_rounding_takes_the_scale_of_its_group():
    """A weight row before BatchNorm has no gradient along itself. Where it has one weight, both
    gradients of that weight are rounding, here 1e-7 of the rest, and no multiples of each other.
    """
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(9, 6, density=0.4), SparseLinear(6, 5, density=0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=10, signal="exact")
    dense = [torch.randn(layer.matrix_shape) for layer in model]
    dense[0][model[0].pattern.mask()] *= 1e-7
    for layer, grad in zip(model, dense, strict=True):
        layer.values.grad = layer.pattern.compress(grad) * 0.01
        layer.probe.grad = grad.clone()
    model[0].values.grad = model[0].values.grad.flip(0).contiguous() * 30
    optimizer.step()
    for signal, grad in zip(masks._signals, dense, strict=True):
        found = signal.buffers["momentum_buffer"].reshape(grad.shape)
        torch.testing.assert_close(found, grad * 0.01, rtol=1e-5, atol=0)


def test_param_groups_have_a_scale_of_their_own():
    model = nn.Sequential(SparseLinear(9, 6, density=0.4), SparseLinear(6, 5, density=0.4))
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=10, signal="exact")
    model(torch.randn(7, 9)).pow(2).sum().backward()
    dense = [layer.probe.grad.clone() for layer in model]
    for layer, factor in zip(model, (0.25, 3.0), strict=True):
        layer.values.grad *= factor
    optimizer.step()
    for signal, grad, factor in zip(masks._signals, dense, (0.25, 3.0), strict=True):
        found = signal.buffers["momentum_buffer"].reshape(grad.shape)
        torch.testing.assert_close(found, grad * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [1.0, 1 / 65536, 0.37, 3.0])
def test_the_scale_of_the_optimizers_gradient_is_found(factor):
    layer = SparseLinear(9, 6, density=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    signal = LayerSignal("x", layer, OptimizerView(optimizer, layer.values, "x"), "exact", 0.1)
    grad = gradients(1)[0].float()
    layer.values.grad = layer.pattern.compress(grad) * factor
    layer.make_probe().grad = grad.clone()
    gather([signal], None)
    found = signal.buffers["momentum_buffer"].reshape(6, 9)
    torch.testing.assert_close(found, grad * factor, rtol=1e-6, atol=0)
    if factor == 1.0:
        assert torch.equal(found, grad)


@pytest.mark.parametrize("signal", ["random", "gradient"])
def test_zero_grad_before_the_update_changes_nothing(signal):
    """Without momentum the gradient of the last step is what redistribution goes by."""

    def train(early):
        torch.manual_seed(0)
        model = nn.Sequential(SparseLinear(20, 64, density=0.2), SparseLinear(64, 3, density=0.4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal=signal)
        for _ in range(9):
            model(torch.randn(32, 20)).square().mean().backward()
            optimizer.step()
            if early:
                optimizer.zero_grad(set_to_none=early == "none")
            masks.step()
            optimizer.zero_grad()
        return [record.nnz_after for record in masks.history]

    late = train(early=None)
    assert late[0] != {"0": 256, "1": 77}  # redistribution went by something
    assert train(early="none") == late and train(early="zero") == late


# ---- cost outside the window -------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Largest number of elements that any tensor made by any operator has in its own memory."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result


def wide(signal, optimizer=torch.optim.SGD, **options):
    """Two layers of 500 x 600 = 300,000 places each, 2 % stored, batch 8 of <= 600 features."""
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseLinear(600, 500, density=0.02), nn.ReLU(), SparseLinear(500, 600, density=0.02)
    )
    made = optimizer(model.parameters(), lr=1e-3, **options)
    masks = SparseMomentum(model, made, total_steps=STEPS, update_every=10, signal=signal)
    return model, made, masks


def one_step(model, optimizer, masks):
    x = torch.randn(8, 600)
    optimizer.zero_grad()
    (model(x) - x).pow(2).mean().backward()
    optimizer.step()
    masks.step()


MATRIX = 300_000
BOUND = 60_000  # far over what nnz (6,000, some capacity) and activations (4,800) need


@pytest.mark.parametrize("signal", ["window", "gradient", "random"])
def test_no_tensor_of_the_matrix_size_outside_the_window(signal):
    model, optimizer, masks = wide(signal, momentum=0.5)  # window of 4 steps
    length = {"window": 4, "gradient": 1, "random": 0}[signal]
    for step in range(1, STEPS + 1):
        inside = step <= 20 and (step - 1) % 10 >= 10 - length
        # When the window opens at the next step, step() itself makes only the one-number probe.
        with Sizes() as sizes:
            one_step(model, optimizer, masks)
        if inside:
            assert sizes.largest >= MATRIX, step  # the measurement sees a dense gradient
        else:
            assert sizes.largest < BOUND, step
    assert masks.updates == 2


def test_no_allocation_of_the_matrix_size_outside_the_window_by_the_allocator():
    """The same from torch's allocator, which also sees what operators allocate inside."""
    model, optimizer, masks = wide("window", momentum=0.5)
    found = {}
    for step in range(1, 11):
        if step not in (3, 6, 10):
            one_step(model, optimizer, masks)
            continue
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            one_step(model, optimizer, masks)
        found[step] = max(e.self_cpu_memory_usage for e in recorded.events()) // 4
    assert 0 < found[3] < BOUND and 0 < found[6] < BOUND
    assert found[10] >= MATRIX


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_convolutions_with_groups_and_taps_train_and_conserve(block):
    """The signal checks itself: a dense gradient in another order than values.grad would raise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseConv2d(4, 8, 3, groups=2, density=0.4, block=(1, 1), dtype=torch.float64),
        nn.ReLU(),
        SparseConv2d(8, 7, (2, 3), density=0.3, block=block, dtype=torch.float64),
        nn.Flatten(),
        SparseLinear(7 * 5 * 4, 3, density=0.3, block=block, dtype=torch.float64),
    )
    layers = [model[0], model[2], model[4]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=13, update_every=2, signal="exact")
    before = sum(layer.pattern.nnzb for layer in layers)
    for step in range(13):
        x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(5) % 3).backward()
        if layers[0].probe is not None:
            for layer in layers:
                if layer.storage == "compressed":
                    dense = layer.pattern.compress(layer.probe.grad)
                    torch.testing.assert_close(dense, layer.values.grad)
        optimizer.step()
        masks.step()
        assert sum(layer.pattern.nnzb for layer in layers) == before, step
    assert masks.updates == 6
