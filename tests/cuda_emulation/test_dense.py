"""Batch norm and pooling of csrc/cuda under emulation against the float64 reference, and the
functions of backends/cuda.py around them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases import relative_error, tolerance
from emulator import address, load, nan_like, registered
from problems import DTYPES, feature_major

from sparse_kernels.backends import _cuda_native, cuda, reference
from sparse_kernels.geometry import pool_output_size

Shape = tuple[int, ...]


class Norm(NamedTuple):
    """One batch norm; `center` is the mean of x: far from 0 a mean in float32 has lost digits."""

    shape: Shape
    training: bool = True
    relu: bool = False
    residual: bool = False
    affine: bool = True
    center: float = 0.3


NORMS = (
    Norm((6, 3)),  # of 2 elements dx is nothing but cancellation
    Norm((7, 5), relu=True),
    Norm((33, 4, 3, 3), relu=True, residual=True),
    Norm((12, 3, 5, 2), relu=True),
    Norm((4, 2, 36, 30), relu=True, residual=True),  # two parts, the second one short
    Norm((5, 2, 41, 43)),  # three, not in fours
    Norm((3, 300), affine=False),  # more channels than a thread block settles
    Norm((64, 3), center=1000.0),
    Norm((9, 4), training=False, relu=True),
    Norm((8, 4, 2, 3), training=False, residual=True, affine=False),
    Norm((0, 3)),
)


def make_norm(case: Norm, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(sum(case.shape))
    channels = case.shape[1]
    names = ("x", "grad", "residual")
    t: dict[str, Any] = {n: torch.randn(case.shape, generator=g).to(dtype) for n in names}
    t["x"] = (t["x"].float() + case.center).to(dtype)
    if not case.residual:
        t["residual"] = None
    for name in ("weight", "bias"):
        t[name] = torch.randn(channels, generator=g) if case.affine else None
    t["mean"] = None if case.training else torch.randn(channels, generator=g) / 4
    t["var"] = None if case.training else torch.rand(channels, generator=g) + 0.5
    return t


def forward(case: Norm, t: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(y, mean, var, offset) of the kernels."""
    dtype, channels = t["x"].dtype, case.shape[1]
    x = feature_major(t["x"])
    residual = None if t["residual"] is None else feature_major(t["residual"])
    sizes = [channels, x.numel() // channels]
    y, offset = nan_like(x.shape, dtype), nan_like((channels,))
    mean = nan_like((channels,)) if case.training else t["mean"].clone()
    var = nan_like((channels,)) if case.training else t["var"].clone()
    with registered() as e:
        size = e.cuda_batch_norm_workspace(sizes, case.training, False)
    assert size == (0 if not case.training else 12 * channels * -(-sizes[1] // 4096))
    tensors = {
        "out_y": y,
        "x": x,
        "weight": t["weight"],
        "bias": t["bias"],
        "out_mean" if case.training else "mean": mean,
        "out_var" if case.training else "var": var,
        "out_offset": offset,
        "residual": residual,
        "out_workspace": nan_like((size // 4,)),
    }
    with registered(**tensors) as e:
        places = [address(tensor) for tensor in tensors.values()]
        element = DTYPES.index(dtype)
        e.cuda_batch_norm(*places, size, sizes, case.training, 1e-5, case.relu, [element, 0, 0])
    return y.movedim(-1, 0), mean, var, offset


def backward(
    case: Norm, t: dict[str, Any], y: torch.Tensor, saved: tuple[torch.Tensor, ...], from_y: bool
) -> tuple[torch.Tensor, ...]:
    """(dx, dweight, dbias, dresidual) of the kernels; the mask from y or from x."""
    dtype, channels = t["x"].dtype, case.shape[1]
    x, grad = feature_major(t["x"]), feature_major(t["grad"])
    ys = feature_major(y) if from_y else None
    sizes = [channels, x.numel() // channels]
    dx, dresidual = nan_like(x.shape, dtype), nan_like(x.shape, dtype) if case.residual else None
    dweight, dbias = nan_like((channels,)), nan_like((channels,))
    with registered() as e:
        size = e.cuda_batch_norm_workspace(sizes, case.training, True)
    mean, var, offset = saved
    tensors = {
        "out_dx": dx,
        "out_dweight": dweight,
        "out_dbias": dbias,
        "out_dresidual": dresidual,
        "grad": grad,
        "x": x,
        "y": ys,
        "weight": t["weight"],
        "mean": mean,
        "var": var,
        "offset": None if from_y else offset,
        "out_workspace": nan_like((size // 4,)),
    }
    with registered(**tensors) as e:
        places = [address(tensor) for tensor in tensors.values()]
        element = DTYPES.index(dtype)
        e.cuda_batch_norm_backward(
            *places, size, sizes, case.training, 1e-5, case.relu, [element, 0, 0]
        )
    left = x.new_empty(0) if dresidual is None else dresidual.movedim(-1, 0)
    return dx.movedim(-1, 0), dweight, dbias, left


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


# torch's word on the variance of nothing, which the reference asks for.
@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_batch_norm_matches_float64(case: Norm, dtype: torch.dtype) -> None:
    t = make_norm(case, dtype)
    wide = {name: double(tensor) for name, tensor in t.items()}
    names = ("x", "weight", "bias", "mean", "var")
    settings = (case.training, 1e-5, case.relu)
    want = reference.batch_norm(*(wide[n] for n in names), *settings, wide["residual"])
    got = forward(case, t)
    count = t["x"].numel() // case.shape[1]
    if count == 0:
        assert torch.isnan(got[1]).all() and torch.isnan(got[2]).all()
    else:
        assert relative_error(got[0], want[0]) <= tolerance(dtype, 4)
        assert relative_error(got[1], want[1]) <= tolerance(torch.float32, 4)
        assert relative_error(got[2], want[2]) <= tolerance(torch.float32, count)
    y, saved = got[0], got[1:]
    for from_y in (True, False) if case.relu and not case.residual else (True,):
        expected = reference.batch_norm_backward(
            *(wide[n] for n in ("grad", "x")),
            want[0],
            wide["weight"],
            *want[1:],
            *settings,
            case.residual,
        )
        if not from_y and dtype != torch.float32:
            continue  # as ops/norm.py has it: a 16-bit y may have been rounded to 0
        found = backward(case, t, y, saved, from_y)
        for index, name in enumerate(("dx", "dweight", "dbias", "dresidual")):
            assert found[index].shape == expected[index].shape
            if expected[index].numel() == 0:
                continue
            limit = tolerance(dtype if index in (0, 3) else torch.float32, max(count, 4))
            if float(expected[index].norm()) == 0.0:
                assert float(found[index].double().norm()) == 0.0, name
            else:
                assert relative_error(found[index], expected[index]) <= limit, name


# -- pooling ---------------------------------------------------------------------------------------


class Window(NamedTuple):
    """kernel, stride, padding, dilation of a pooling of x [shape]."""

    shape: Shape
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False


WINDOWS = (
    Window((4, 2, 6, 6), (2, 2), (2, 2)),
    Window((5, 3, 7, 5), (3, 3), (2, 2), (1, 1)),
    Window((8, 2, 7, 8), (3, 2), (1, 2), (1, 0)),
    Window((1, 1, 5, 9), (2, 3), (3, 4), ceil_mode=True),
    Window((3, 2, 9, 9), (3, 3), (2, 1), (1, 1), (2, 3)),
    Window((132, 1, 3, 3), (2, 2), (2, 2), (1, 1), ceil_mode=True),
    Window((2, 0, 4, 4), (2, 2), (2, 2)),
    Window((0, 2, 4, 4), (2, 2), (2, 2)),
)


def pool_sizes(w: Window) -> tuple[Shape, list[int]]:
    out_hw = pool_output_size(w.shape[2:], w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode)
    dims = [*w.shape, *out_hw, *w.kernel, *w.stride, *w.padding, *w.dilation]
    return (*w.shape[:2], *out_hw), dims


def moved(shape: Shape) -> Shape:
    """[N, C, H, W] as it lies in memory."""
    return (*shape[1:], shape[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("w", WINDOWS, ids=str)
def test_max_pooling_matches_float64(w: Window, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(sum(w.shape))
    x = torch.randint(-3, 4, w.shape, generator=g).to(dtype)  # with ties
    x[torch.rand(w.shape, generator=g) < 0.05] = float("nan")
    x[torch.rand(w.shape, generator=g) < 0.05] = -float("inf")
    out, dims = pool_sizes(w)
    grad = torch.randn(out, generator=g).to(dtype)
    place = [DTYPES.index(dtype), 0, 0]
    xs, gs = feature_major(x), feature_major(grad)
    y, dx = nan_like(moved(out), dtype), nan_like(moved(w.shape), dtype)
    taps = torch.full(moved(out), 254, dtype=torch.uint8)
    with registered(x=xs, out_y=y, out_taps=taps) as e:
        e.cuda_max_pool2d(False, address(y), address(taps), address(xs), dims, place)
    with registered(grad=gs, out_dx=dx, taps=taps) as e:
        e.cuda_max_pool2d(True, address(dx), address(taps), address(gs), dims, place)
    if x.numel() == 0:
        return
    want, argmax = reference.max_pool2d(
        x.double(), w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode
    )
    torch.testing.assert_close(y.movedim(-1, 0).double(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(taps.movedim(-1, 0), argmax)
    window = (w.kernel, w.stride, w.padding, w.dilation)
    want = reference.max_pool2d_backward(grad.double(), argmax, *w.shape[2:], *window)
    assert relative_error(dx.movedim(-1, 0), want) <= tolerance(dtype, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("include", "divisor"), [(True, None), (False, None), (True, -3)])
@pytest.mark.parametrize("w", [w for w in WINDOWS if w.dilation == (1, 1)], ids=str)
def test_average_pooling_matches_float64(
    w: Window, include: bool, divisor: int | None, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(sum(w.shape))
    x = torch.randn(w.shape, generator=g).to(dtype)
    out, dims = pool_sizes(w)
    grad = torch.randn(out, generator=g).to(dtype)
    xs, gs = feature_major(x), feature_major(grad)
    y, dx = nan_like(moved(out), dtype), nan_like(moved(w.shape), dtype)
    tail = (dims, include, divisor or 0, [DTYPES.index(dtype), 0, 0])
    with registered(x=xs, out_y=y) as e:
        e.cuda_avg_pool2d(False, address(y), address(xs), *tail)
    with registered(grad=gs, out_dx=dx) as e:
        e.cuda_avg_pool2d(True, address(dx), address(gs), *tail)
    if x.numel() == 0:
        return
    settings = (w.kernel, w.stride, w.padding, w.ceil_mode, include, divisor)
    want = reference.avg_pool2d(x.double(), *settings)
    assert relative_error(y.movedim(-1, 0), want) <= tolerance(dtype, 9)
    want = reference.avg_pool2d_backward(grad.double(), *w.shape[2:], *settings)
    assert relative_error(dx.movedim(-1, 0), want) <= tolerance(dtype, 9)


# -- refusals and the backend ----------------------------------------------------------------------


def test_refusals_name_the_kernel_and_both_sides() -> None:
    e = load()
    with pytest.raises(ValueError, match=r"^batch_norm \(channels 5, elements each 7, float32, "):
        e.cuda_batch_norm(
            *[64] * 8, 64, 0, [5, 7], True, 1e-5, False, [0, 0, 0]
        )  # a workspace of 0 bytes
    with pytest.raises(ValueError, match="at most 255 taps .*, got 16 x 16"):
        e.cuda_max_pool2d(False, 64, 64, 64, [1, 1, 20, 20, 5, 5, 16, 16] + [1] * 6, [0, 0, 0])
    with pytest.raises(ValueError, match="dilation must be 1, got 2 x 1"):
        dims = [1, 1, 20, 20, 5, 5, 2, 2, 1, 1, 0, 0, 2, 1]
        e.cuda_avg_pool2d(False, 64, 64, dims, False, 0, [0, 0, 0])
    with pytest.raises(RuntimeError, match=r"^avg_pool2d \(channels 1, .*invalid device ordinal"):
        dims = [1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1]
        e.cuda_avg_pool2d(False, 64, 64, dims, False, 0, [0, 99, 0])
    with pytest.raises(ValueError, match="y or offset .* must be there, got null for both"):
        e.cuda_batch_norm_backward(
            *[64] * 6, 0, 64, 64, 64, 0, 64, 999, [5, 7], True, 1e-5, True, [0, 0, 0]
        )


def test_the_backend_serves_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load()
    module.forget_memory()
    module.set_strict(False)
    monkeypatch.setattr(_cuda_native, "native", lambda: module)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    try:
        x, grad, extra = (torch.randn(6, 3, 4, 5, dtype=torch.float32) for _ in range(3))
        weight, bias = torch.rand(3) + 0.5, torch.randn(3)
        settings = (True, 1e-5, True)
        for residual in (None, extra):
            got = cuda.batch_norm(x, weight, bias, None, None, *settings, residual)
            want = reference.batch_norm(x, weight, bias, None, None, *settings, residual)
            assert relative_error(got[0], want[0]) < 1e-6
            tail = (*settings, residual is not None)
            y = None if residual is None else want[0]
            found = cuda.batch_norm_backward(grad, x, y, weight, *got[1:], *tail)
            expected = reference.batch_norm_backward(grad, x, y, weight, *want[1:], *tail)
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape and (b.numel() == 0 or relative_error(a, b) < 1e-5)
        window = ([3, 3], [2, 2], [1, 1])
        y, taps = cuda.max_pool2d(x, *window, [1, 1], False)
        want_y, want_taps = reference.max_pool2d(x, *window, [1, 1], False)
        assert torch.equal(y, want_y) and torch.equal(taps, want_taps)
        dx = cuda.max_pool2d_backward(want_y, taps, 4, 5, *window, [1, 1])
        other = reference.max_pool2d_backward(want_y, taps, 4, 5, *window, [1, 1])
        assert relative_error(dx, other) < 1e-6
        y = cuda.avg_pool2d(x, *window, True, False, None)
        assert relative_error(y, reference.avg_pool2d(x, *window, True, False, None)) < 1e-6
        dx = cuda.avg_pool2d_backward(y, 4, 5, *window, True, False, None)
        other = reference.avg_pool2d_backward(y, 4, 5, *window, True, False, None)
        assert relative_error(dx, other) < 1e-6
    finally:
        module.set_strict(True)
