"""Every operator once by every backend that serves it here, against the float64 reference.

The first thing to run on a GPU: small shapes, about a minute, native kernels before those that
Triton must compile. A case that fails is noted, and the rest still runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import SparseMomentum, ops, plan
from sparse_kernels.backends import reference
from sparse_kernels.nn import sparsify
from sparse_kernels.training.selection import largest_indices, select_smallest
from tools.gpu_bench.measure import precision

BOUND = {"fp32": 2e-5, "tf32": 3e-3, "bf16": 1e-2}
# In bf16 sums near zero round to the other side of a ReLU, or to another maximum: one gradient in
# two hundred goes elsewhere.
BOUND_OF_NORM_IN_BF16 = 0.2
BLOCKS = ((1, 1), (4, 1), (32, 1), (16, 16), (32, 32))
DENSE_OPS = ("linear_wgrad_dense", "conv2d_wgrad_dense")
AROUND = ("batch_norm", "batch_norm_pool", "max_pool2d", "avg_pool2d", "dropout")
Case = tuple[str, Callable[[], str]]


class NotServed(Exception):
    """No kernel here for this case; says why. Not a failure: another backend serves it."""


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """(key, what runs it and returns its error as text). Raises AssertionError if it is wrong."""
    names = ("cuda", "torch", "triton") if device.type == "cuda" else ("cpu", "torch", "triton")
    yield from ((f"pattern {n}", functools.partial(f, device)) for n, f in _PATTERNS.items())
    for backend in names:
        for kind in ("linear", "conv2d"):
            for block in BLOCKS[:4:3] if small else BLOCKS:
                for name in ("fp32",) if small else ("fp32", "bf16", "tf32"):
                    if name == "tf32" and block[1] == 1:
                        continue
                    for which in ("", "_dgrad", "_wgrad"):
                        key = f"{backend} {kind}{which} {block[0]}x{block[1]} {name}"
                        run = functools.partial(_product, backend, kind, which, block, name, device)
                        yield key, run
        for op in (*DENSE_OPS, *AROUND):
            for name in ("fp32", "bf16"):
                yield f"{backend} {op} {name}", functools.partial(_other, backend, op, name, device)
    yield "training", functools.partial(_training, device)


def _shared_cases() -> Any:
    """The tests' table of shapes and tensors."""
    folder = str(Path(__file__).resolve().parents[2] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    import cases as shared  # type: ignore[import-not-found]

    return shared


@functools.lru_cache(maxsize=4)
def _problem(kind: str, block: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    shared = _shared_cases()
    draw = torch.Generator().manual_seed(3)
    case: Any
    if kind == "linear":
        case = shared.LinearCase("smoke", 72, 90, 75, 0.3, block)
        return case, shared.make_linear(case, torch.float32, draw)
    geometry = shared._conv((40, 70), (3, 3), stride=2, pad=1)
    case = shared.ConvCase("smoke", 9, 8, 7, geometry, 0.3, block)
    return case, shared.make_conv(case, torch.float32, draw)


def _product(
    backend: str, kind: str, which: str, block: tuple[int, int], name: str, device: torch.device
) -> str:
    case, t = _problem(kind, block)
    module: Any = plan.BACKENDS[backend]
    with precision(name) as dtype:
        x, grad, values = (t[n].to(dtype).float() for n in ("x", "grad", "values"))
        found = []
        for place, made in ((device, dtype), (torch.device("cpu"), torch.float64)):
            on = functools.partial(_moved, place)
            args = _arguments(
                case, which, on(x, made), on(grad, made),
                on(values, torch.float64 if made == torch.float64 else torch.float32),
                tuple(index.to(place) for index in t["indices"]), on(t["bias"], made),
            )  # fmt: skip
            serving = module if made != torch.float64 else reference
            if serving is module:
                operand = None if which == "_wgrad" else values.to(device)
                _refuse(serving, kind + which, args[0], operand, block)
            found.append(getattr(serving, kind + which)(*args))
    return _compared({kind + which: found[0]}, {kind + which: found[1]}, BOUND[name])


def _moved(place: torch.device, t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(place, dtype)


def _refuse(module: Any, op: str, x: Tensor, values: Tensor | None, block: Any) -> None:
    """Raise NotServed if the backend does not compute this."""
    if not hasattr(module, op):
        raise NotServed(f"has no {op}")
    if why := module.supports(op, x, values, block):
        raise NotServed(why)


def _arguments(
    case: Any, which: str, x: Tensor, grad: Tensor, values: Tensor, index: Any, bias: Tensor
) -> tuple[Any, ...]:
    """Of linear or conv2d and their gradients, as the backends take them."""
    conv = hasattr(case, "geometry")
    tail = (list(case.geometry),) if conv else ()
    if which == "_wgrad":
        return (grad, x, *index, *case.block, *tail)
    if which == "_dgrad":
        return (grad, values, *index, *(x.shape[2:] if conv else x.shape[1:]), *tail)
    return (x, values, *index, bias, *(tail if conv else (case.out_features,)), False)


def _other(backend: str, op: str, name: str, device: torch.device) -> str:
    """Dense weight gradients, norm, pooling, dropout: forward, and backward on its results."""
    module: Any = plan.BACKENDS[backend]
    draw = torch.Generator().manual_seed(5)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    shape = (6, 24, 8, 6)
    if op == "linear_wgrad_dense":
        shape = (64, 48)  # type: ignore[assignment]
    x, other, residual = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=draw) for _ in range(2))
    _refuse(module, op, x.to(device), None, None)
    run = functools.partial(_around, op)
    with precision("fp32"):
        ours = run(module, *(t.to(device) for t in (x, other, residual, weight, bias)))
    exact = run(reference, *(t.double() for t in (x, other, residual, weight, bias)))
    rounds = op.startswith("batch_norm") and name == "bf16"
    return _compared(ours, exact, BOUND_OF_NORM_IN_BF16 if rounds else BOUND[name])


def _around(
    op: str, m: Any, x: Tensor, other: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Results of an operator and of its gradient, which gets the results as they are."""
    pair, one, none = [2, 2], [1, 1], [0, 0]
    size = tuple(x.shape[2:])
    if op == "linear_wgrad_dense":
        return {"dw": m.linear_wgrad_dense(other, x)}
    if op == "conv2d_wgrad_dense":
        geometry = list(_shared_cases()._conv((x.shape[1], x.shape[1]), (3, 3), pad=1))
        return {"dw": m.conv2d_wgrad_dense(other, x, geometry)}
    if op == "dropout":
        seed = torch.tensor(7, dtype=torch.int64, device=x.device)
        return {"y": m.dropout(x, seed, 0.4, list(x.stride()))}
    if op == "max_pool2d":
        y, argmax = m.max_pool2d(x, pair, pair, none, one, False)
        g = other[:, :, : y.shape[2], : y.shape[3]].contiguous()
        return {"y": y, "dx": m.max_pool2d_backward(g, argmax, *size, pair, pair, none, one)}
    if op == "avg_pool2d":
        y = m.avg_pool2d(x, pair, pair, none, False, True, None)
        g = other[:, :, : y.shape[2], : y.shape[3]].contiguous()
        dx = m.avg_pool2d_backward(g, *size, pair, pair, none, False, True, None)
        return {"y": y, "dx": dx}
    if op == "batch_norm_pool":
        y, argmax, mean, var, rest = m.batch_norm_pool(x, weight, bias, None, None, True, 1e-5)
        g = other[:, :, : y.shape[2], : y.shape[3]].contiguous()
        back = m.batch_norm_pool_backward(g, argmax, x, weight, mean, var, rest, True, 1e-5)
        return {"y": y, **dict(zip(("dx", "dweight", "dbias"), back, strict=True))}
    y, mean, var, offset = m.batch_norm(x, weight, bias, None, None, True, 1e-5, True, residual)
    back = m.batch_norm_backward(
        other, x, y, weight, mean, var, offset, True, 1e-5, True, True
    )  # fmt: skip
    return {"y": y, **dict(zip(("dx", "dweight", "dbias", "dresidual"), back, strict=True))}


def _compared(ours: dict[str, Tensor], exact: dict[str, Tensor], bound: float) -> str:
    """The largest relative error. Raises AssertionError above ``bound``."""
    relative_error = _shared_cases().relative_error
    errors = {name: relative_error(out, exact[name]) for name, out in ours.items()}
    for name, error in errors.items():
        assert error <= bound, f"{name}: relative error {error:.1e}, expected at most {bound:.0e}"
    return f"{max(errors.values()):.1e}"


# -- pattern changes and a training ----------------------------------------------------------------


def _selection(device: torch.device) -> str:
    """Largest and smallest of scores with many ties, the lowest index first, as on the CPU."""
    draw = torch.Generator().manual_seed(6)
    scores = torch.randint(0, 50, (10_007,), generator=draw).float()
    for count in (0, 1, 3000, 10_007):
        expected = largest_indices(scores, count)
        assert torch.equal(largest_indices(scores.to(device), count).cpu(), expected), count
        expected = select_smallest(scores, count)
        assert torch.equal(select_smallest(scores.to(device), count).cpu(), expected), count
    return "equal"


def _updates(device: torch.device) -> str:
    """Masks, values and momentum after three updates are the CPU's to the last bit.

    Gradients are set, not computed: rounding has no part in it.
    """
    runs = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 48, 3, padding=1))
        sparsify(model, density=0.2, block=(4, 1))
        model.to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        masks = SparseMomentum(model, optimizer, total_steps=6, update_every=1, signal="random")
        for step in range(3):
            for parameter in model.parameters():
                draw = torch.Generator().manual_seed(step)
                grad = torch.randint(-8, 8, parameter.shape, generator=draw).float() / 16
                parameter.grad = grad.to(place)
            optimizer.step()
            assert masks.step() is not None
        layers: Any = list(model)
        runs.append([t.detach().cpu() for n in layers for t in (n.values, *n.pattern.tensors())])
    for cpu, ours in zip(*runs, strict=True):
        assert torch.equal(cpu, ours), "pattern or values after mask updates differ from the CPU's"
    return "equal"


_PATTERNS = {"selection": _selection, "updates": _updates}


def _training(device: torch.device) -> str:
    """Ten steps of a small net by whatever ``plan`` chooses, losses against float64."""
    losses = []
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        torch.manual_seed(8)
        model = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 16),
        )  # fmt: skip
        sparsify(model, density=0.3)
        model.to(place, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        draw = torch.Generator().manual_seed(9)
        found = []
        serving: AbstractContextManager[None]
        serving = plan.use_backend("reference") if dtype == torch.float64 else nullcontext()
        with precision("fp32"), serving:
            for _ in range(10):
                x = torch.randn(8, 16, 4, 4, generator=draw).to(place, dtype)
                target = torch.randint(16, (8,), generator=draw).to(place)
                loss = nn.functional.cross_entropy(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach().double().cpu())
        losses.append(torch.stack(found))
    return _compared({"losses": losses[0]}, {"losses": losses[1]}, 1e-4)


def operators_covered() -> set[str]:
    """Names of the operators that the cases run, gradients included."""
    backward = {f"{op}_backward" for op in AROUND if op != "dropout"}
    products = {f"{kind}{w}" for kind in ("linear", "conv2d") for w in ("", "_dgrad", "_wgrad")}
    return {*products, *DENSE_OPS, *AROUND, *backward} & set(ops.OPERATORS)
