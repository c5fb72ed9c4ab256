"""Torch's tools around a module, for the sparse layers as for nn.Linear and nn.Conv2d.

What test_torch_modules.py does not hold: sharing memory with processes, deferred initialisation,
activation checkpointing, flat vectors of parameters, state dictionaries that are assigned or not
whole, and half precision.  Each runs on torch's own layers too: what they fail is a wrong test.
"""

# ruff: noqa: B023  the functions made in loops are called in the same round
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from module_support import SUBJECTS, Subject, cases, constructors, dense_twin
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sparse_kernels.nn import SparseLayer

every = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def _gradients(module: nn.Module, y: torch.Tensor, *more: torch.Tensor) -> tuple[Any, ...]:
    return torch.autograd.grad(y.square().sum(), (*module.parameters(), *more))


@every
def test_activation_checkpointing(subject: Subject) -> None:
    """The second forward pass, inside the backward pass, gives the same gradients."""
    for module, x in cases(subject, torch.float32, requires_grad=True):
        expected = _gradients(module, module(x), x)
        for reentrant in (False, True):
            y = checkpoint(module, x, use_reentrant=reentrant)
            module.zero_grad()
            x.grad = None
            y.square().sum().backward()  # the reentrant kind refuses autograd.grad
            found = (*(p.grad for p in module.parameters()), x.grad)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every
def test_flat_vectors_and_clipping(subject: Subject) -> None:
    for module, x in cases(subject):
        expected = module(x).detach()
        flat = nn.utils.parameters_to_vector(module.parameters()).detach()
        nn.utils.vector_to_parameters(torch.zeros_like(flat), module.parameters())
        assert not module(x).any()
        nn.utils.vector_to_parameters(flat, module.parameters())
        assert torch.equal(module(x), expected)
        module(x).sum().backward()
        norm = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm()
        assert_close(nn.utils.clip_grad_norm_(module.parameters(), float(norm) / 2), norm)
        after = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm()
        assert_close(after, norm / 2, rtol=0, atol=1e-6)  # torch divides by norm + 1e-6
        module.zero_grad()
        assert all(p.grad is None for p in module.parameters())


@every
def test_state_that_is_assigned_not_whole_or_foreign(subject: Subject) -> None:
    for (module, x), args in zip(cases(subject), constructors(subject), strict=True):
        state, expected = copy.deepcopy(module.state_dict()), module(x).detach()
        twin = subject.make(args, dtype=torch.float64)
        assert twin.load_state_dict(state, assign=True) == ([], [])
        assert torch.equal(twin(x), expected)
        for name in state:  # each entry alone may be missing, and is named
            part = {k: v for k, v in state.items() if k != name}
            with pytest.raises(RuntimeError, match=name.rpartition(".")[2]):
                twin.load_state_dict(part)
            assert torch.equal(twin(x), expected)
        with pytest.raises(RuntimeError, match="foreign"):
            twin.load_state_dict({**state, "foreign": torch.zeros(1)})
        found = twin.load_state_dict({**state, "foreign": torch.zeros(1)}, strict=False)
        assert found.unexpected_keys == ["foreign"] and found.missing_keys == []
        assert torch.equal(twin(x), expected)


@every
def test_state_inside_a_model_has_prefixes_and_hooks_run(subject: Subject) -> None:
    for module, x in cases(subject):
        model = nn.ModuleDict({"inner": nn.Sequential(module)})
        seen: list[str] = []
        module.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("save " + prefix))
        module.register_load_state_dict_post_hook(lambda m, keys: seen.append("load"))
        state = copy.deepcopy(model.state_dict())
        assert all(name.startswith("inner.0.") for name in state)
        expected = module(x).detach()
        with torch.no_grad():
            next(module.parameters()).zero_()
        model.load_state_dict(state)
        assert torch.equal(module(x), expected)
        assert seen == ["save inner.0.", "load"]


@every
def test_apply_and_named_members(subject: Subject) -> None:
    for module, _ in cases(subject):
        seen: list[nn.Module] = []
        module.apply(seen.append)
        assert seen[-1] is module
        names = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
        assert set(module.state_dict()) - names <= {"_extra_state"}
        assert all(p.is_leaf and p.requires_grad for p in module.parameters())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_whole_module(subject: Subject, dtype: torch.dtype) -> None:
    """Right within the type's precision, or refused: sparse layers may keep float32 values."""
    limit = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for module, x in cases(subject, torch.float32):
        twin = dense_twin(module).to(dtype).float()
        module.to(dtype)
        x = x.to(dtype)
        assert all(p.dtype == dtype for p in module.parameters())
        y = module(x)
        assert y.dtype == dtype
        assert_close(y.float(), twin(x.float()), rtol=limit, atol=limit, check_stride=False)
        found, expected = _gradients(module, y.float()), _gradients(twin, twin(x.float()))
        assert all(g.dtype == dtype and g.isfinite().all() for g in found)
        if module.bias is not None:
            bias, wanted = found[-1].float(), expected[-1]
            assert_close(bias, wanted, rtol=limit, atol=4 * limit * float(wanted.abs().max()))


def _other_process(module: nn.Module, x: torch.Tensor, results: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        y = module(x)
        next(module.parameters()).mul_(2)
    results.put(y.numpy())


@pytest.mark.slow
@every
def test_memory_shared_with_another_process(subject: Subject) -> None:
    """As in Hogwild training: the other process computes the same and its writes are seen here."""
    module, x = next(iter(cases(subject, torch.float32)))
    module.share_memory()
    assert all(t.is_shared() for t in (*module.parameters(), *module.buffers()))
    with torch.no_grad():
        expected, before = module(x), next(module.parameters()).clone()
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_other_process, args=(module, x, results))
    process.start()
    y = results.get()
    process.join()
    assert process.exitcode == 0
    assert_close(torch.from_numpy(y), expected, check_stride=False)
    assert torch.equal(next(module.parameters()), 2 * before)
    if isinstance(module, SparseLayer):
        module.pattern.validate()


@every
def test_skip_init(subject: Subject) -> None:
    """A module made on meta and then filled: never with indices that are garbage."""
    for (module, x), args in zip(cases(subject, torch.float32), constructors(subject), strict=True):
        with torch.device("meta"):
            made = subject.make(args)
        made.to_empty(device="cpu")
        if isinstance(module, SparseLayer) and isinstance(made, SparseLayer):
            made.pattern.validate()
        made.load_state_dict(module.state_dict())
        assert_close(made(x), module(x), check_stride=False)
