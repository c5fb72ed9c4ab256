"""MNIST, its shipped sample and CIFAR-10 as tensors in memory, and the batches made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from . import fetch, formats
from .augment import crop_and_flip, normalize
from .errors import DataError

__all__ = ["DATASETS", "BatchLoader", "DataError", "Dataset", "Split", "hold_out", "load"]

DATASETS = ("mnist", "mnist-sample", "cifar10")

_STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
# Published MD5s: yann.lecun.com's four files, and the binary version of CIFAR-10.
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_MD5 = {_CIFAR_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"}
_MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "cifar10": "https://www.cs.toronto.edu/~kriz",
}
_MNIST_FOLDERS = ("", "mnist", "MNIST", "raw", "mnist/raw", "MNIST/raw")
_CIFAR_FOLDERS = ("", "cifar-10-batches-bin", "cifar10", "cifar-10", "cifar10/cifar-10-batches-bin")
_MNIST_COUNTS = {"train": 60_000, "t10k": 10_000}
_CIFAR_COUNT = 10_000  # images of each batch file
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CIFAR_BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


@dataclass(frozen=True)
class Split:
    """images uint8 [n, C, H, W], labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def select(self, index: Tensor) -> Split:
        """The examples at ``index`` (int64 [m]), copied."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training and test split, the statistics of the training images, and where they came from."""

    name: str
    kind: str  # "mnist" or "cifar10": which nets take it
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
) -> Dataset:
    """Load ``mnist``, ``mnist-sample`` (shipped with the package) or ``cifar10``.

    ``data_dir`` is searched in the usual layouts. Without it the files come from the cache, or, if
    ``download`` is true, from ``mirror`` (or $SPARSE_KERNELS_MIRROR, or the data set's own site),
    verified by their published MD5. Raises DataError naming the file and what to do about it.
    """
    if name == "mnist-sample":
        return _load_sample()
    if name == "imagenet":
        raise DataError(
            "imagenet: this workbench keeps its data in memory and reads no JPEG files; train "
            "sparse_kernels.workbench.models.build('resnet-50') in a loop with your own loader "
            "(docs/training.md shows one)"
        )
    if name not in _STATISTICS:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    root = fetch.cache_root(cache_dir)
    if data_dir is not None:
        files = _locate(name, Path(data_dir))
        if files is None:
            raise DataError(_not_found(name, Path(data_dir)))
    else:
        files = _from_cache_or_site(name, root / "downloads" / name, download, mirror)
    parse = _parse_mnist if name == "mnist" else _parse_cifar
    key = root / "parsed" / f"{name}-{fetch.fingerprint(files)}.npz"
    arrays = fetch.cached_arrays(key, _ARRAYS, lambda: parse(files))
    return _dataset(name, name, arrays, str(files[0].parent))


def _dataset(name: str, kind: str, arrays: dict[str, np.ndarray], source: str) -> Dataset:
    mean, std = _STATISTICS[kind]
    splits = [
        Split(
            torch.from_numpy(arrays[f"{part}_images"]),
            torch.from_numpy(arrays[f"{part}_labels"]).long(),
        )
        for part in ("train", "test")
    ]
    return Dataset(name, kind, splits[0], splits[1], mean, std, source)


def _load_sample() -> Dataset:
    file = resources.files("sparse_kernels.workbench") / "data" / "mnist_sample.npz"
    try:
        with file.open("rb") as stream:
            arrays = fetch.read_npz(cast(BinaryIO, stream), _ARRAYS)
    except fetch.NPZ_ERRORS as error:
        raise DataError(
            f"{file}: the shipped sample cannot be read ({error}); reinstall the package"
        ) from error
    for part in ("train", "test"):
        arrays[f"{part}_images"] = arrays[f"{part}_images"][:, None]
    return _dataset("mnist-sample", "mnist", arrays, "shipped with sparse_kernels")


def _locate(name: str, folder: Path) -> list[Path] | None:
    """The files of a data set below ``folder``, or None; a CIFAR archive counts as one file."""
    if name == "mnist":
        for sub in _MNIST_FOLDERS:
            found = [_mnist_file(folder / sub, md5_name) for md5_name in _MNIST_MD5]
            if all(found):
                return [path for path in found if path]
        return None
    if folder.is_file():
        return [folder]
    for sub in _CIFAR_FOLDERS:
        batches = [folder / sub / batch for batch in _CIFAR_BATCHES]
        # One batch shows that the folder is meant; a missing other is then named by the reader.
        if any(path.is_file() for path in batches):
            _require_all(batches)
            return batches
        if (folder / sub / _CIFAR_ARCHIVE).is_file():
            return [folder / sub / _CIFAR_ARCHIVE]
    return None


def _require_all(paths: list[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path}: missing, while other batches of CIFAR-10 are there; add this file"
            )


def _mnist_file(folder: Path, gz_name: str) -> Path | None:
    plain = gz_name.removesuffix(".gz")
    dotted = plain.replace("-idx", ".idx")  # the spelling that some mirrors use
    for candidate in (plain, gz_name, dotted, dotted + ".gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def _not_found(name: str, folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: this directory does not exist; pass --data-dir with a copy of {name}"
    if name == "mnist":
        for sub in _MNIST_FOLDERS:
            missing = [f for f in _MNIST_MD5 if _mnist_file(folder / sub, f) is None]
            if len(missing) < len(_MNIST_MD5):
                return f"{folder / sub / missing[0]}: missing (.gz or not), while others are there"
        wanted = ", ".join(_MNIST_MD5)
    else:
        wanted = f"{_CIFAR_ARCHIVE}, or {', '.join(_CIFAR_BATCHES)}"
    return f"{folder}: no {name} here or in its usual subfolders; expected {wanted}"


def _from_cache_or_site(name: str, folder: Path, allowed: bool, mirror: str | None) -> list[Path]:
    checksums = _MNIST_MD5 if name == "mnist" else _CIFAR_MD5
    if not allowed:
        files = _locate(name, folder) if folder.is_dir() else None
        if files is None:
            raise DataError(
                f"{name} is not in the cache ({folder}); pass --data-dir with your own copy, "
                "--download to fetch it, or use --data mnist-sample, which ships with the package"
            )
        return files
    site = (mirror or os.environ.get("SPARSE_KERNELS_MIRROR") or _MIRRORS[name]).rstrip("/")
    return [fetch.download(f"{site}/{f}", folder / f, md5) for f, md5 in checksums.items()]


def _parse_mnist(files: list[Path]) -> dict[str, np.ndarray]:
    train = formats.read_mnist_pair(files[0], files[1], _MNIST_COUNTS["train"])
    test = formats.read_mnist_pair(files[2], files[3], _MNIST_COUNTS["t10k"])
    return _as_arrays(train, test)


def _parse_cifar(files: list[Path]) -> dict[str, np.ndarray]:
    source = files[0] if len(files) == 1 else files[0].parent
    data = formats.read_cifar_batches(source, _CIFAR_BATCHES, _CIFAR_COUNT)
    parsed = [
        formats.parse_cifar(batch, source / name, _CIFAR_COUNT)
        for batch, name in zip(data, _CIFAR_BATCHES, strict=True)
    ]
    images = np.concatenate([p[0] for p in parsed[:-1]])
    labels = np.concatenate([p[1] for p in parsed[:-1]])
    return _as_arrays((images, labels), parsed[-1])


def _as_arrays(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    return dict(zip(_ARRAYS, (*train, *test), strict=True))


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(training, validation): a random ``fraction`` of ``split``, drawn by ``seed``, is held out.

    Raises ValueError unless 0 <= fraction < 1.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"held-out fraction: expected 0 <= fraction < 1, got {fraction}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    count = round(fraction * len(split))
    return split.select(order[count:]), split.select(order[:count])


class BatchLoader:
    """Normalised float32 batches [B, C, H, W] with labels int64 [B]; each pass is one epoch.

    With a ``seed`` every pass is shuffled (and augmented) by a generator of its own, so two
    contenders with equal seeds see equal batches; without, the order is that of the split. The last
    batch may be smaller, but a single left-over image is dropped when shuffling: batch norm cannot
    train on it.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.split, self.batch_size, self.augment = split, batch_size, augment
        self.mean, self.std = dataset.mean, dataset.std
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.position = 0  # batches of the present pass that were given out
        self._first = 0  # where the next pass begins: 0 unless it goes on with one of a checkpoint
        self._start = torch.Generator().manual_seed(seed or 0).get_state()

    def __len__(self) -> int:
        full, left = divmod(len(self.split), self.batch_size)
        drop_single = self.generator is not None and left == 1 and full > 0
        return full + (left > 0 and not drop_single)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, step = len(self.split), self.batch_size
        first, self._first = self._first, 0
        order = self._order(first, n) if self.generator is not None else None
        for i in range(first, len(self)):
            batch = self._batch(slice(i * step, min((i + 1) * step, n)), order)
            images = batch.images
            if self.augment and self.generator is not None:
                images = crop_and_flip(images, self.generator)
            self.position = i + 1
            yield normalize(images, self.mean, self.std), batch.labels

    def _batch(self, part: slice, order: Tensor | None) -> Split:
        """A part of the split, or of its order."""
        images, labels = self.split.images, self.split.labels
        if order is None:
            return Split(images[part], labels[part])
        # Indexing with brackets gives the same and takes longer.
        return Split(images.index_select(0, order[part]), labels.index_select(0, order[part]))

    def _order(self, first: int, n: int) -> Tensor:
        """The order of a pass. One that goes on draws it again, then goes on with its own state."""
        assert self.generator is not None
        if first == 0:
            self._start = self.generator.get_state()
            return torch.randperm(n, generator=self.generator)
        now = self.generator.get_state()
        self.generator.set_state(self._start)
        order = torch.randperm(n, generator=self.generator)
        self.generator.set_state(now)
        return order

    def state_dict(self, inside: bool) -> dict[str, Any]:
        """Where the data stand: inside of a pass after ``position`` batches, or between two."""
        if self.generator is None:
            raise ValueError("state_dict of a BatchLoader without a seed: expected one that draws")
        return {
            "position": self.position if inside else 0,
            "start": self._start,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on where ``state_dict`` was taken. Raises ValueError for another's."""
        position = state["position"]
        if self.generator is None or type(position) is not int or not 0 <= position <= len(self):
            raise ValueError(f"expected 0 to {len(self)} batches of a pass, got {position!r}")
        for name in ("start", "generator"):
            torch.Generator().set_state(state[name])  # raises for what is no state
        self._start = state["start"]
        self.generator.set_state(state["generator"])
        self.position = self._first = position
