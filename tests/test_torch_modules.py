"""What torch checks of its own modules, for the sparse layers as for nn.Linear and nn.Conv2d.

The checks are those of torch's test/test_modules.py and the module parts of test_nn.py, written
anew; descriptions of modules and inputs are torch's (module_support.py).  docs/results.md has the
table of what passes and what does not apply.
"""

# ruff: noqa: B023  the functions made in loops are called in the same round
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from module_support import (
    SPARSE,
    SUBJECTS,
    Subject,
    cases,
    constructors,
    dense_twin,
    free_parameters,
    function_of,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from sparse_kernels.nn import SparseLayer

DTYPES = [torch.float32, torch.float64]
every = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
sparse = pytest.mark.parametrize("subject", SPARSE, ids=lambda s: s.name)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_equals_the_dense_module(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        assert_close(module(x), dense_twin(module)(x), check_stride=False)


@every
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_arguments(subject: Subject, dtype: torch.dtype, device: str) -> None:
    for args in constructors(subject):
        made = subject.make(args, device=device, dtype=dtype)
        with torch.device(device):  # the context says the same
            other = subject.make(args, dtype=dtype)
        for module in (made, other):
            tensors = [*module.parameters(), *module.buffers()]
            assert len(tensors) >= 1
            assert all(t.device.type == device for t in tensors)
            assert all(t.dtype == dtype for t in tensors if t.is_floating_point())


@every
def test_repr_and_extra_repr(subject: Subject) -> None:
    for module, _ in cases(subject):
        assert type(module).__name__ in repr(module) and module.extra_repr() in str(module)


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save", "state_dict"])
def test_copies(subject: Subject, dtype: torch.dtype, way: str) -> None:
    for (module, x), args in zip(cases(subject, dtype), constructors(subject), strict=True):
        if way == "deepcopy":
            twin = copy.deepcopy(module)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        else:
            file = io.BytesIO()
            torch.save(module if way == "torch.save" else module.state_dict(), file)
            file.seek(0)
            twin = torch.load(file, weights_only=way == "state_dict")
            if way == "state_dict":
                state, twin = twin, subject.make(args, dtype=dtype)
                assert twin.load_state_dict(state) == ([], [])
        assert same_state(module, twin) and torch.equal(module(x), twin(x))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not same_state(module, twin)


@every
@pytest.mark.parametrize("swap", [False, True])
def test_moves(subject: Subject, swap: bool) -> None:
    """double(), float(), to(meta), to_empty: parameters stay the objects that they were."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for module, x in cases(subject, torch.float32):
            parameters = list(module.parameters())
            expected = module(x).detach()  # a graph would hold on to what is swapped
            module.double()
            assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
            with torch.no_grad():
                assert_close(module(x.double()).float(), expected, check_stride=False)
                assert_close(module.float()(x), expected, check_stride=False)
            state = copy.deepcopy(module.state_dict())
            module.to("meta")
            assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
            module.to_empty(device="cpu")
            module.load_state_dict(state)
            assert torch.equal(module(x), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@every
def test_train_and_eval_do_not_differ(subject: Subject) -> None:
    for module, x in cases(subject, torch.float32):
        assert module.training and torch.equal(module(x), module.eval()(x))
        assert not module.training and not any(m.training for m in module.modules())
        assert all(p.requires_grad is False for p in module.requires_grad_(False).parameters())
        assert module(x).requires_grad is False


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_grad_and_inference_mode(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        expected = module(x).detach()
        with torch.no_grad():
            assert_close(module(x), expected)
        with torch.inference_mode():
            y = module(x)
            assert y.is_inference()
            assert_close(y, expected)
            inference = x.clone()
        with torch.no_grad():
            assert_close(module(inference), expected)
        # The weight's gradient needs the input: torch refuses, or a layer has its own copy of it.
        try:
            grads = torch.autograd.grad(module(inference).sum(), list(module.parameters()))
        except RuntimeError as refusal:
            assert "Inference tensors cannot be saved" in str(refusal)
        else:
            assert isinstance(module, SparseLayer)
            wanted = torch.autograd.grad(module(x).sum(), list(module.parameters()))
            assert all(torch.equal(g, w) for g, w in zip(grads, wanted, strict=True))


def _non_contiguous(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 1] = x.detach()
    return wide[..., 1].requires_grad_(x.requires_grad)


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_input_parameters_and_gradient(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype, requires_grad=True):
        y = module(x)
        grad = torch.randn_like(y)
        wanted = (x, *module.parameters())
        expected = torch.autograd.grad(y, wanted, grad)
        strange = _non_contiguous(x)
        for parameter in module.parameters():
            parameter.data = _non_contiguous(parameter.data)
            assert not parameter.is_contiguous() or parameter.numel() < 2
        wanted = (strange, *module.parameters())
        y = module(strange)
        assert_close(y, module(x), check_stride=False)
        found = torch.autograd.grad(y, wanted, _non_contiguous(grad))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, check_stride=False)


@every
def test_memory_formats(subject: Subject) -> None:
    for module, x in cases(subject, torch.float32, requires_grad=True):
        if x.dim() != 4:
            continue
        expected = module(x)
        for form in (torch.channels_last, torch.contiguous_format):
            moved = copy.deepcopy(module).to(memory_format=form)
            given = x.detach().to(memory_format=form).requires_grad_()
            y = moved(given)
            assert_close(y, expected, check_stride=False)
            (dx,) = torch.autograd.grad(y.sum(), given)
            (want,) = torch.autograd.grad(module(x).sum(), x)
            assert_close(dx, want, check_stride=False)


@every
def test_input_is_not_written(subject: Subject) -> None:
    for module, x in cases(subject, torch.float32, requires_grad=True):
        version, copied = x._version, x.detach().clone()
        module(x).sum().backward()
        assert x._version == version and torch.equal(x, copied)


@every
def test_gradcheck(subject: Subject) -> None:
    for module, x in cases(subject, requires_grad=True):
        parameters = free_parameters(module)
        function = function_of(module, list(parameters))
        assert gradcheck(function, (x, *parameters.values()), fast_mode=True)


@every
def test_gradgradcheck(subject: Subject) -> None:
    for module, x in cases(subject, requires_grad=True):
        parameters = free_parameters(module)
        function = function_of(module, list(parameters))
        assert gradgradcheck(function, (x, *parameters.values()), fast_mode=True)


@every
def test_hooks(subject: Subject) -> None:
    """Each hook runs once, sees what torch says it sees, and may replace it."""
    for module, x in cases(subject, requires_grad=True):
        seen: list[str] = []
        expected = module(x).detach()
        handles = [
            module.register_forward_pre_hook(lambda m, a: (seen.append("pre"), (2 * a[0],))[1]),
            module.register_forward_hook(lambda m, a, y: (seen.append("post"), 3 * y)[1]),
            module.register_full_backward_pre_hook(lambda m, g: (seen.append("before"), g)[1]),
            module.register_full_backward_hook(
                lambda m, gi, go: (seen.append("after"), (5 * gi[0],))[1]
            ),
        ]
        y = module(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert seen == ["pre", "post", "before", "after"]
        for handle in handles:
            handle.remove()
        (plain,) = torch.autograd.grad(module(2 * x).sum() * 3, x)
        assert_close(y, 3 * module(2 * x), check_stride=False)
        assert_close(dx, 5 * plain, check_stride=False)
        assert torch.equal(module(x), expected) and len(seen) == 4


@every
def test_parameter_hooks_and_accumulation(subject: Subject) -> None:
    for module, x in cases(subject):
        calls: list[str] = []
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, n=name: calls.append(n))
            parameter.register_post_accumulate_grad_hook(lambda p, n=name: calls.append(n + "!"))
        module(x).sum().backward()
        once = [p.grad.clone() for p in module.parameters()]
        module(x).sum().backward()
        for parameter, grad in zip(module.parameters(), once, strict=True):
            assert_close(parameter.grad, 2 * grad)
        names = [name for name, _ in module.named_parameters()]
        assert sorted(calls) == sorted(2 * (names + [n + "!" for n in names]))


@sparse
def test_error_inputs(subject: Subject) -> None:
    """Another size, another dtype, no tensor: an error that says what was expected."""
    for module, x in cases(subject):
        assert isinstance(module, SparseLayer)
        with pytest.raises(ValueError, match="expected an input"):
            module(torch.cat([x, x], -1 if x.dim() <= 2 else -3))
        with pytest.raises(TypeError, match="expected an input of torch.float64"):
            module(x.long())
        with pytest.raises((TypeError, AttributeError)):
            module("x")
