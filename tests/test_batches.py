"""Hold-out, batches and augmentation, on the shipped sample and random images."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels.workbench import augment, datasets
from sparse_kernels.workbench.datasets import BatchLoader, hold_out, load


def test_hold_out_is_a_partition_fixed_by_its_seed() -> None:
    data = load("mnist-sample")
    train, validation = hold_out(data.train, 0.1, seed=3)
    assert (len(train), len(validation)) == (3600, 400)
    both = torch.cat([train.images, validation.images]).flatten(1)
    assert torch.unique(both, dim=0).shape[0] == 4000
    assert torch.equal(hold_out(data.train, 0.1, seed=3)[1].images, validation.images)
    assert not torch.equal(hold_out(data.train, 0.1, seed=4)[1].images, validation.images)
    assert len(hold_out(data.train, 0.0, seed=0)[1]) == 0
    with pytest.raises(ValueError, match="held-out fraction"):
        hold_out(data.train, 1.0, seed=0)


def test_batches_cover_an_epoch_once_and_equal_seeds_give_equal_batches() -> None:
    data = load("mnist-sample")
    split = datasets.Split(data.train.images[:105], torch.arange(105))
    one, two = (BatchLoader(split, data, 20, seed=5) for _ in range(2))
    first = list(one)
    assert [labels.numel() for _, labels in first] == [20] * 5 + [5]
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(105))
    for (images, labels), (others, other_labels) in zip(first, two, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    second = list(one)
    assert not torch.equal(first[0][1], second[0][1])  # every epoch has its own order
    plain = list(BatchLoader(split, data, 20))
    assert plain[1][1].tolist() == list(range(20, 40))
    expected = (split.images[20:40].float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(plain[1][0], expected)


def test_a_single_left_over_image_is_dropped_only_when_training() -> None:
    data = load("mnist-sample")
    split = datasets.Split(data.train.images[:41], data.train.labels[:41])
    shuffled, plain = BatchLoader(split, data, 20, seed=0), BatchLoader(split, data, 20)
    assert (len(shuffled), len(list(shuffled))) == (2, 2)
    assert (len(plain), len(list(plain))) == (3, 3)
    with pytest.raises(ValueError, match="batch_size"):
        BatchLoader(split, data, 0)


def test_crop_and_flip_is_a_window_of_the_reflected_image() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    out = augment.crop_and_flip(images, torch.Generator().manual_seed(1))
    assert out.shape == images.shape
    padded = torch.nn.functional.pad(images.double(), (4, 4, 4, 4), mode="reflect")
    flips = tops = 0
    for image, result in zip(padded, out.double(), strict=True):
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(
                image[:, top : top + 32, left : left + 32].flip(2)
                if flip
                else image[:, top : top + 32, left : left + 32],
                result,
            )
        ]
        assert len(found) == 1
        tops += found[0][0]
        flips += found[0][2]
    assert 16 < flips < 48 and 3 < tops / 64 < 5  # 32 and 4 in the mean
    again = augment.crop_and_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="pad 32"):
        augment.crop_and_flip(images, torch.Generator(), pad=32)


def test_normalize_checks_its_channels() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        augment.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.5,), (0.5,))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_pass_goes_on_where_it_was_left(augment: bool, stop: int) -> None:
    data = load("mnist-sample")
    split = data.train.select(torch.arange(100))

    def loader() -> BatchLoader:
        return BatchLoader(split, data, 20, seed=5, augment=augment)

    whole = loader()
    seen = [batch for _ in range(3) for batch in whole]
    part, again = loader(), loader()
    list(part)  # one pass, then a part of the second
    for _, _ in zip(range(stop), part, strict=False):
        inside = part.state_dict(inside=True)
    again.load_state_dict(inside)
    rest = [batch for _ in range(2) for batch in again]
    assert len(rest) == 10 - stop
    for (x, y), (u, v) in zip(seen[5 + stop :], rest, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_a_place_that_is_none_is_refused() -> None:
    data = load("mnist-sample")
    loader = BatchLoader(data.test, data, 20, seed=5)
    state = loader.state_dict(inside=False)
    assert state["position"] == 0
    for change in ({"position": -1}, {"position": 10**6}, {"position": "1"}):
        with pytest.raises(ValueError, match="batches of a pass"):
            loader.load_state_dict({**state, **change})
    with pytest.raises(RuntimeError):
        loader.load_state_dict({**state, "generator": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="without a seed"):
        BatchLoader(data.test, data, 20).state_dict(inside=False)
