"""batch_norm_pool of csrc/cuda under emulation against the float64 reference, and whole training
steps of a convnet whose every sparse, norm and pooling layer runs on the emulated CUDA backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import relative_error, tolerance
from emulator import address, load, nan_like, registered
from problems import DTYPES, feature_major
from torch import nn

import sparse_kernels as sk
from sparse_kernels import layout, plan
from sparse_kernels.backends import _cuda_native, cuda, reference
from sparse_kernels.nn.fusion import FusedMaxPool2d

Shape = tuple[int, int, int, int]


class Pooled(NamedTuple):
    """One batch norm with pooling of x [shape]; `center` is the mean of x."""

    shape: Shape
    training: bool = True
    affine: bool = True
    center: float = 0.3


MANY = Pooled((12, 257, 2, 2))  # more channels than a thread block settles: float32 is enough
# float16 does not reach; the mean loses so much by rounding that gradients tell.
FAR = Pooled((16, 2, 4, 4), center=1e5)
CASES = (
    Pooled((6, 3, 4, 6)),
    Pooled((7, 2, 5, 3)),  # an odd image: its last row and column are in no window
    Pooled((33, 2, 2, 2), affine=False),
    Pooled((4, 2, 72, 60)),  # two parts of 4096 elements of y and five of x
    MANY,
    FAR,
    Pooled((16, 3, 4, 4), center=1000.0),
    Pooled((9, 4, 7, 2), training=False),
    Pooled((8, 3, 4, 4), training=False, affine=False),
    Pooled((0, 3, 4, 4)),
)


def make(case: Pooled, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(sum(case.shape))
    n, channels, height, width = case.shape
    t: dict[str, Any] = {"x": (torch.randn(case.shape, generator=g) + case.center).to(dtype)}
    t["grad"] = torch.randn(n, channels, height // 2, width // 2, generator=g).to(dtype)
    for name in ("weight", "bias"):
        t[name] = torch.randn(channels, generator=g) if case.affine else None
    t["mean"] = None if case.training else torch.randn(channels, generator=g) / 4
    t["var"] = None if case.training else torch.rand(channels, generator=g) + 0.5
    return t


def forward(case: Pooled, t: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """(y, argmax, mean, var, rounding) of the kernels."""
    dtype, channels = t["x"].dtype, case.shape[1]
    x, out = feature_major(t["x"]), feature_major(t["grad"]).shape
    y, argmax = nan_like(out, dtype), torch.full(out, 254, dtype=torch.uint8)
    vectors = {name: nan_like((channels,)) for name in ("mean", "var")}
    if not case.training:
        vectors = {name: t[name].clone() for name in vectors}
    rounding = nan_like((channels,))
    with registered() as e:
        size = e.cuda_batch_norm_workspace([channels, x.numel() // channels], case.training, False)
    written = "out_" if case.training else ""
    tensors = {"out_y": y, "out_argmax": argmax, "x": x, "weight": t["weight"], "bias": t["bias"]}
    tensors |= {written + name: tensor for name, tensor in vectors.items()}
    tensors |= {"out_rounding": rounding, "out_workspace": nan_like((size // 4,))}
    with registered(**tensors) as e:
        places = [address(tensor) for tensor in tensors.values()]
        place = [DTYPES.index(dtype), 0, 0]
        e.cuda_batch_norm_pool(*places, size, list(case.shape), case.training, 1e-5, place)
    return y.movedim(-1, 0), argmax.movedim(-1, 0), vectors["mean"], vectors["var"], rounding


def backward(
    case: Pooled, t: dict[str, Any], saved: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """(dx, dweight, dbias) of the kernels; saved: argmax, mean, var, rounding."""
    dtype, channels = t["x"].dtype, case.shape[1]
    x, grad, argmax = feature_major(t["x"]), feature_major(t["grad"]), feature_major(saved[0])
    dx, dweight, dbias = nan_like(x.shape, dtype), nan_like((channels,)), nan_like((channels,))
    with registered() as e:
        size = e.cuda_batch_norm_workspace(
            [channels, grad.numel() // channels], case.training, True
        )
    tensors = {"out_dx": dx, "out_dweight": dweight, "out_dbias": dbias, "grad": grad}
    tensors |= {"argmax": argmax, "x": x, "weight": t["weight"]}
    tensors |= dict(zip(("mean", "var", "rounding"), saved[1:], strict=True))
    tensors |= {"out_workspace": nan_like((size // 4,))}
    with registered(**tensors) as e:
        places = [address(tensor) for tensor in tensors.values()]
        place = [DTYPES.index(dtype), 0, 0]
        e.cuda_batch_norm_pool_backward(*places, size, list(case.shape), case.training, 1e-5, place)
    return dx.movedim(-1, 0), dweight, dbias


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


@pytest.mark.filterwarnings("ignore:var_mean")  # torch's word on the variance of nothing
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in (DTYPES[:1] if c in (MANY, FAR) else DTYPES)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_batch_norm_pool_matches_float64(case: Pooled, dtype: torch.dtype) -> None:
    t = make(case, dtype)
    got = forward(case, t)
    count = t["x"].numel() // case.shape[1]
    if count == 0:
        assert torch.isnan(got[2]).all() and torch.isnan(got[3]).all()
        dx, dweight, dbias = backward(case, t, got[1:])
        assert dx.shape == t["x"].shape
        assert not dweight.any() and not dbias.any()
        return
    wide = {name: double(tensor) for name, tensor in t.items()}
    names = ("x", "weight", "bias", "mean", "var")
    settings = (case.training, 1e-5)
    want = reference.batch_norm_pool(*(wide[n] for n in names), *settings)
    assert relative_error(got[0], want[0]) <= tolerance(dtype, 4)
    assert relative_error(got[2].double() + got[4].double(), want[2]) <= tolerance(torch.float32, 4)
    assert relative_error(got[3], want[3]) <= tolerance(torch.float32, count)
    # Where two pixels nearly tie, float32 may choose the other; such a choice must be as good.
    other = got[1] != want[1]
    assert float(other.double().mean()) < 0.01
    # The backward pass from its own choices, which the reference is given too.
    expected = reference.batch_norm_pool_backward(
        wide["grad"], got[1], wide["x"], wide["weight"], want[2], want[3], want[4], *settings
    )
    found = backward(case, t, got[1:])
    limits = (dtype, torch.float32, torch.float32)
    for name, a, b, kind in zip(("dx", "dweight", "dbias"), found, expected, limits, strict=True):
        assert relative_error(a, b) <= tolerance(kind, max(count, 4)), name


@pytest.mark.parametrize("value", [float("nan"), -5.0], ids=["nan", "nothing above 0"])
def test_ties_and_nan_as_pooling_the_normalised_image(value: float) -> None:
    """argmax to the bit: the first of equals, the last NaN, 255 where the ReLU leaves nothing."""
    x = torch.randint(-2, 3, (5, 2, 6, 4), generator=torch.Generator().manual_seed(1)).float()
    x[0, :, :2, :2] = value
    t = {"x": x, "weight": torch.tensor([1.0, -1.0]), "bias": torch.zeros(2)}
    t |= {"mean": torch.zeros(2), "var": torch.ones(2), "grad": torch.zeros(5, 2, 3, 2)}
    got = forward(Pooled((5, 2, 6, 4), training=False), t)
    operands = [t[name] for name in ("x", "weight", "bias", "mean", "var")]
    want = reference.batch_norm_pool(*operands, False, 1e-5)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], equal_nan=True)


def test_refusals_name_the_kernel_and_both_sides() -> None:
    e = load()
    with pytest.raises(ValueError, match=r"^batch_norm_pool \(channels 5, elements each 28, float"):
        e.cuda_batch_norm_pool(*[64] * 9, 0, [7, 5, 2, 2], True, 1e-5, [0, 0, 0])
    with pytest.raises(ValueError, match="each of shape must be at least 2, got 1"):
        e.cuda_batch_norm_pool(*[64] * 9, 0, [7, 5, 1, 2], True, 1e-5, [0, 0, 0])
    with pytest.raises(ValueError, match="4 integers batch, channels, height, width, got 3"):
        e.cuda_batch_norm_pool_backward(*[64] * 11, 0, [7, 5, 2], True, 1e-5, [0, 0, 0])
    with pytest.raises(ValueError, match=r"^batch_norm_pool_backward .*a workspace of at least"):
        e.cuda_batch_norm_pool_backward(*[64] * 11, 3, [7, 5, 2, 2], True, 1e-5, [0, 0, 0])


# -- whole training steps --------------------------------------------------------------------------


class Recorder:
    """The emulated module; counts the calls."""

    def __init__(self) -> None:
        self.module, self.calls = load(), Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.module, name)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """CPU tensors are served by the emulated CUDA backend where a test asks for "cuda"; what it
    has no kernel for (dense weight gradients) is torch's, as on a GPU.
    """
    recorder = Recorder()
    monkeypatch.setattr(plan, "_cache", {})
    monkeypatch.setattr(_cuda_native, "native", lambda: recorder)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    monkeypatch.setattr(
        cuda,
        "supports",
        lambda op, x, values=None, block=None: cuda._why_not(op, x.dtype, values, block),
    )
    recorder.module.forget_memory()
    recorder.module.set_strict(False)
    try:
        yield recorder
    finally:
        recorder.module.set_strict(True)


class Residual(nn.Module):
    """A block with a norm that adds a residual and applies ReLU in its pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        fused = isinstance(self.norm, sk.nn.BatchNorm2d)
        return self.norm(y, x) if fused else torch.relu(self.norm(y) + x)


def convnet() -> nn.Module:
    """Every layer that this package replaces: norms of all kinds, both poolings, linear."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        Residual(8),
        nn.Sequential(nn.Conv2d(8, 9, 3, stride=2), nn.BatchNorm2d(9), nn.ReLU()),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Sequential(nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU()),
        nn.Linear(12, 5),
    )
    sk.sparsify(model, density=0.4, block=(1, 1))
    model[1].norm.relu = True
    return model


def trained(model: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    """Losses, parameters and running statistics after SGD on fixed images."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(6, 3, 14, 14, generator=g)  # batch-major, as a loader has it
    labels = torch.randint(0, 5, (6,), generator=g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(t.detach().double() for t in model.state_dict().values())]


def test_training_a_convnet_equals_that_of_the_cpu(recorder: Recorder) -> None:
    wanted = trained(convnet())
    model = convnet()
    assert any(isinstance(m, FusedMaxPool2d) for m in model.modules())
    with plan.use_backend("cuda"):  # no other backend, torch's included, may serve
        found = trained(model)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    expected = {
        "cuda_batch_norm_pool": 3,
        "cuda_batch_norm_pool_backward": 3,
        "cuda_batch_norm": 9,
        "cuda_batch_norm_backward": 9,
        "cuda_max_pool2d": 6,
        "cuda_avg_pool2d": 6,
        "cuda_product": 15,
    }
    assert {name: recorder.calls[name] for name in expected} == expected


@pytest.mark.parametrize("block", [(1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["images", "a layer's output"])
def test_activations_are_converted_once(
    recorder: Recorder, block: tuple[int, int], hidden: bool
) -> None:
    """Of a batch-major input one copy serves forward and weight gradient, of a batch-major
    gradient one serves both gradients, whether autograd records the input or not.
    """
    torch.manual_seed(1)
    conv = sk.SparseConv2d(4, 8, 3, padding=1, density=0.5, block=block)
    linear = sk.SparseLinear(12, 8, density=0.5, block=block)
    for layer, shape in ((conv, (5, 4, 6, 6)), (linear, (5, 12))):
        x = torch.randn(shape, requires_grad=hidden)
        grad = torch.randn(layer(x).shape)
        wanted = torch.autograd.grad(layer(x), [*layer.parameters(), *([x] * hidden)], grad)
        with plan.use_backend("cuda"):
            layout.reset_conversions()
            y = layer(x)
            assert layout.conversions() == 1
            found = torch.autograd.grad(y, [*layer.parameters(), *([x] * hidden)], grad)
            assert layout.conversions() == 2
        for a, b in zip(found, wanted, strict=True):
            assert relative_error(a, b) < 1e-5


def test_blocks_of_the_tensor_cores_are_converted_once(recorder: Recorder) -> None:
    """The same in the other direction: feature-major images to channels_last."""
    conv = sk.SparseConv2d(16, 16, 3, padding=1, density=0.5, block=(16, 16))
    values = conv.values.detach().requires_grad_()
    x = layout.to_feature_major(torch.randn(3, 16, 4, 4)).bfloat16().requires_grad_()
    grad = layout.to_feature_major(torch.randn(3, 16, 4, 4)).bfloat16()
    assert layout.is_feature_major(x) and layout.is_feature_major(grad)
    with plan.use_backend("cuda"):
        layout.reset_conversions()
        index = (conv.crow_indices, conv.col_indices, conv.t_crow, conv.t_row, conv.t_perm)
        y = sk.ops.conv2d(x, values, *index, geometry=conv.geometry)
        assert layout.conversions() == 1
        y.backward(grad)
        assert layout.conversions() == 2
    assert x.grad is not None and values.grad is not None


def test_a_recorded_conversion_has_second_derivatives(recorder: Recorder) -> None:
    linear = sk.SparseLinear(3, 4, density=0.6)
    x, v = torch.randn(2, 3, requires_grad=True), linear.values

    def twice() -> tuple[torch.Tensor, ...]:
        (dx,) = torch.autograd.grad((linear(x) ** 2).sum(), [x], create_graph=True)
        return torch.autograd.grad((dx**2).sum(), [x, v])

    wanted = twice()
    with plan.use_backend("cuda"):
        found = twice()
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-5
