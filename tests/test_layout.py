"""Feature-major layout: strides, conversions from any layout, and their count."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from sparse_kernels import layout
from sparse_kernels._load import native_or_none

SHAPES = [(1, 1), (5, 7), (17, 1), (1, 9), (33, 65), (2, 3, 4, 5), (1, 3, 2, 2), (67, 5, 3, 1)]
EMPTY = [(0, 4), (3, 0), (0, 3, 2, 2), (2, 0, 3, 3)]
SOURCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "feature_major": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_other": lambda t: torch.stack([t, torch.full_like(t, 9)], -1)[..., 0],
    "offset_slice": lambda t: torch.cat([t[:1] * 2, t])[1:],
    "expanded": lambda t: t[:1].expand(t.shape),
    "one_channel_of_many": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
}


def test_strides_by_hand() -> None:
    assert layout.feature_major_strides((5, 7)) == (1, 5)
    assert layout.feature_major_strides((5, 2, 3, 4)) == (1, 60, 20, 5)
    assert layout.feature_major_strides((5,)) == (1,)
    assert layout.feature_major_strides((0, 3, 2)) == (1, 2, 1)
    with pytest.raises(ValueError, match="at least one dimension"):
        layout.feature_major_strides(())


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_empty_has_exactly_these_strides(shape: tuple[int, ...]) -> None:
    out = layout.empty_feature_major(shape, torch.float64)
    assert out.shape == shape and out.dtype == torch.float64
    assert out.stride() == layout.feature_major_strides(shape)
    assert out.untyped_storage().nbytes() == 8 * out.numel()
    assert layout.is_feature_major(out)
    # What torch allocates for the batch-innermost order has the same strides.
    moved = torch.empty(*shape[1:], shape[0]).movedim(-1, 0)
    assert moved.stride() == out.stride()


def test_is_feature_major() -> None:
    assert layout.is_feature_major(
        torch.empty(1, 4, 3, 2)
    )  # a single image, any stride of the batch
    assert layout.is_feature_major(torch.empty(4, 1))
    assert not layout.is_feature_major(torch.empty(4, 3))
    assert not layout.is_feature_major(torch.empty(4, 3, 2, 2))
    assert not layout.is_feature_major(
        torch.empty(1, 3, 2, 2).to(memory_format=torch.channels_last)
    )
    assert not layout.is_feature_major(torch.empty(1, 3).expand(4, 3))
    assert not layout.is_feature_major(torch.tensor(1.0))
    images = layout.empty_feature_major((4, 6, 3, 2))
    assert layout.is_feature_major(images[:, 2:5])
    assert not layout.is_feature_major(images[:, :, 1:])
    assert not layout.is_feature_major(images[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_conversions(shape: tuple[int, ...], source: str, dtype: torch.dtype) -> None:
    x = SOURCES[source]((torch.rand(shape) * 50).to(dtype))
    layout.reset_conversions()
    out = layout.to_feature_major(x)
    assert layout.conversions() == (0 if layout.is_feature_major(x) else 1)
    assert (out is x) == layout.is_feature_major(x)
    assert layout.is_feature_major(out) and out.dtype == dtype
    assert torch.equal(out, x)
    layout.reset_conversions()
    back = layout.from_feature_major(out)
    assert back.is_contiguous()
    assert torch.equal(back, x)
    assert layout.conversions() == (0 if out.is_contiguous() else 1)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_tensors_need_no_conversion(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    layout.reset_conversions()
    assert layout.to_feature_major(x) is x
    assert layout.conversions() == 0


@pytest.mark.skipif(native_or_none() is None, reason="the native module is not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1000, 37), (37, 1000), (31, 17, 9, 7), (65, 3, 1, 1)])
def test_native_equals_torch(
    shape: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(shape)
        sources = [x] if x.ndim == 2 else [x, x.to(memory_format=torch.channels_last)]
        native = [layout.to_feature_major(source) for source in sources]
        native_back = layout.from_feature_major(native[0])
        monkeypatch.setattr(layout, "native_or_none", lambda: None)
        for got in native:
            assert torch.equal(got, layout.to_feature_major(x))
            assert got.stride() == layout.feature_major_strides(shape)
        assert torch.equal(native_back, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(native_or_none() is None, reason="the native module is not built")
def test_native_is_used_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., None]:
            calls.append(name)
            return getattr(native_or_none(), name)

    monkeypatch.setattr(layout, "native_or_none", lambda: Recorder())
    x = torch.randn(4, 3, 5, 6)
    out = layout.to_feature_major(x)
    layout.to_feature_major(x.to(memory_format=torch.channels_last))
    layout.from_feature_major(out)
    assert calls == ["to_feature_major", "nhwc_to_feature_major", "from_feature_major"]
    layout.to_feature_major(x.double())
    layout.to_feature_major(x.transpose(2, 3))
    layout.to_feature_major(x.clone().requires_grad_())
    assert len(calls) == 3


def test_gradients_flow_through_a_conversion() -> None:
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    weight = torch.randn(3, 4, 2, 2)
    (layout.from_feature_major(layout.to_feature_major(x) * 2) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * weight)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert layout.is_feature_major(layout.to_feature_major(torch.empty(4, 3, device="meta")))
    with FakeTensorMode():
        assert layout.is_feature_major(layout.to_feature_major(torch.empty(4, 3, 2, 2)))


def test_counting_over_threads() -> None:
    layout.reset_conversions()
    x = torch.randn(2, 3)

    def convert() -> None:
        for _ in range(200):
            layout.to_feature_major(x)

    workers = [threading.Thread(target=convert) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert layout.conversions() == 800
