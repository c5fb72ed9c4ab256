"""Sparse layers under torch.compile, torch.export, torch.func, autocast and parametrizations.

Right, or refused with a message that says what to do: never another number.
"""

# ruff: noqa: B023  the functions made in loops are called in the same round
from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from module_support import SPARSE, Subject, cases, dense_twin
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from sparse_kernels.nn import DENSE_MASKED, SparseLayer

pytestmark = [
    # Dynamo itself instantiates autograd Functions and warns of that.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # torch compiles the rules of forward mode when it is first used, in a way that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # torch.export
]
every = pytest.mark.parametrize("subject", SPARSE, ids=lambda s: s.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _close(a: Any, b: Any) -> None:
    assert_close(a, b, check_stride=False, rtol=1e-4, atol=1e-5)


def _stored(module: SparseLayer, dense: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """The dense weight's gradient where the layer has weights, in the form of ``values``."""
    matrix = module.weight_to_matrix(gradient)
    if module.storage == DENSE_MASKED:
        return matrix * module.mask
    return module.pattern.compress(matrix)


def _loss(module: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return (torch.func.functional_call(module, parameters, (x,)) ** 2).sum()


@every
@dtypes
def test_vmap(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        dense, stacked = dense_twin(module), torch.stack([x, 2 * x, -x], 1)
        _close(torch.vmap(module, 1, 1)(stacked), torch.vmap(dense, 1, 1)(stacked))


@every
@dtypes
def test_func_grad_and_per_sample_gradients(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        assert isinstance(module, SparseLayer)
        dense = dense_twin(module)
        ours, theirs = dict(module.named_parameters()), dict(dense.named_parameters())
        xs = torch.stack([x, 2 * x])
        for transform in (
            lambda m, p: torch.func.grad(lambda p: _loss(m, p, x))(p),
            lambda m, p: torch.vmap(torch.func.grad(lambda p, x: _loss(m, p, x)), (None, 0))(p, xs),
        ):
            found, expected = transform(module, ours), transform(dense, theirs)
            weights = expected["weight"]
            if weights.dim() > dense.weight.dim():
                _close(found["values"], torch.stack([_stored(module, dense, w) for w in weights]))
            else:
                _close(found["values"], _stored(module, dense, weights))
            assert ("bias" in found) == ("bias" in expected)
            if "bias" in found:
                _close(found["bias"], expected["bias"])


@every
def test_vjp_and_jacobians(subject: Subject) -> None:
    for module, x in cases(subject):
        dense, probe = dense_twin(module), torch.ones_like(module(x))
        _close(torch.func.vjp(module, x)[1](probe)[0], torch.func.vjp(dense, x)[1](probe)[0])
        _close(torch.func.jacrev(module)(x), torch.func.jacrev(dense)(x))

        def cubes(m: nn.Module) -> Any:
            return lambda x: (m(x) ** 3).sum()

        twice = torch.func.jacrev(torch.func.jacrev(cubes(module)))(x)
        _close(twice, torch.func.jacrev(torch.func.jacrev(cubes(dense)))(x))


@every
def test_an_ensemble_of_weights(subject: Subject) -> None:
    for module, x in cases(subject, torch.float32):
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.values.mul_(2)
        state = torch.func.stack_module_state([module, other])

        def run(p: Any, b: Any) -> torch.Tensor:
            return torch.func.functional_call(module, (p, b), (x,))

        _close(torch.vmap(run)(*state), torch.stack([module(x), other(x)]))


@every
@dtypes
def test_forward_mode_is_right_or_refused(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        calls = [
            lambda m: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
            lambda m: torch.func.jacfwd(m)(x),
            lambda m: torch.func.hessian(lambda x: (m(x) ** 3).sum())(x),
        ]
        for call in calls:
            if subject.storage == DENSE_MASKED:
                _close(call(module), call(dense_twin(module)))
            else:
                with pytest.raises(NotImplementedError, match="jvp.*use reverse mode"):
                    call(module)


@every
def test_a_tangent_of_the_gradient_is_not_dropped(subject: Subject) -> None:
    """Forward mode over a backward pass whose forward pass had no tangent."""
    if subject.storage == DENSE_MASKED:
        pytest.skip("a dense-masked layer's backward pass is torch's own: next test")
    for module, x in cases(subject, requires_grad=True):
        y = module(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            with pytest.raises(NotImplementedError, match="jvp"):
                torch.autograd.grad(y, x, dual)


@every
@dtypes
def test_export(subject: Subject, dtype: torch.dtype) -> None:
    for module, x in cases(subject, dtype):
        program = torch.export.export(module, (x,))
        _close(program.module()(x), module(x))
        _close(program.run_decompositions().module()(x), module(x))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        _close(torch.export.load(file).module()(x), module(x))


@every
def test_export_with_any_batch_size(subject: Subject) -> None:
    for module, x in cases(subject, torch.float32):
        if x.dim() in (1, 3):
            continue  # no batch
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        more = torch.cat([x, 2 * x, x])
        _close(program.module()(more), module(more))


@every
def test_compile(subject: Subject) -> None:
    torch._dynamo.reset()
    for module, x in cases(subject, torch.float32, requires_grad=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        wanted = (x, *module.parameters())
        y, expected = compiled(x), module(x)
        _close(y, expected)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            _close(a, b)


@every
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu(subject: Subject, to: torch.dtype) -> None:
    for module, x in cases(subject, torch.float32):
        dense = dense_twin(module)
        with torch.autocast("cpu", dtype=to):
            y, expected = module(x), dense(x)
            assert y.dtype == expected.dtype == to
        assert_close(y, expected, check_stride=False, rtol=0.02, atol=0.3)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


class Doubled(nn.Module):
    """A parametrization of one line (with a right_inverse torch rewrites the data at once)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


@every
def test_parametrizing_values_is_refused_and_changes_nothing(subject: Subject) -> None:
    for module, x in cases(subject):
        before, kind = module(x), type(module)
        with pytest.raises(ValueError, match="`values` of a sparse layer cannot be parametrized"):
            parametrize.register_parametrization(module, "values", Doubled())
        assert type(module) is kind and torch.equal(module(x), before)


@every
def test_a_bias_can_be_parametrized(subject: Subject) -> None:
    for module, x in cases(subject):
        if module.bias is None:
            continue
        with torch.no_grad():
            module.bias.mul_(2)
            expected = module(x)
            module.bias.div_(2)
        parametrize.register_parametrization(module, "bias", Doubled())
        _close(module(x), expected)
        module(x).sum().backward()
        assert module.parametrizations["bias"].original.grad.abs().sum() > 0
        _close(copy.deepcopy(module)(x), expected)
        parametrize.remove_parametrizations(module, "bias")
        _close(module(x), expected)


@every
def test_parametrizations_of_the_weight_are_refused(subject: Subject) -> None:
    for module, x in cases(subject):
        before = module(x)
        for register in (
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.orthogonal,
            lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        ):
            with pytest.raises(ValueError, match="does not have a parameter.*'weight'"):
                register(module)
        with pytest.raises(ValueError, match="`weight` of a sparse layer.*`values`"):
            prune.l1_unstructured(module, "weight", 0.5)
        assert torch.equal(module(x), before)
