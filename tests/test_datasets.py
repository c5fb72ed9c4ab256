"""Readers, cache and download: on files made here and the shipped sample."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import lzma
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_kernels.workbench import datasets, fetch, formats
from sparse_kernels.workbench.datasets import DataError, load

TRAIN, TEST = 30, 10


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist_files(seed: int = 0) -> dict[str, bytes]:
    """Raw idx files by name, with TRAIN and TEST random images."""
    generator = np.random.default_rng(seed)
    files = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = generator.integers(0, 256, (count, 28, 28))
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(np.arange(count) % 10)
    return files


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The counts of the published sets are demanded; here the sets are small."""
    monkeypatch.setattr(datasets, "_MNIST_COUNTS", {"train": TRAIN, "t10k": TEST})
    monkeypatch.setattr(datasets, "_CIFAR_COUNT", TEST)
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_KERNELS_MIRROR", raising=False)


def write_files(folder: Path, files: dict[str, bytes], zipped: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (name + ".gz" if zipped else name)).write_bytes(
            gzip.compress(data) if zipped else data
        )
    return folder


@pytest.mark.parametrize("sub", ["", "mnist", "MNIST/raw", "raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_from_the_usual_layouts(tmp_path: Path, sub: str, zipped: bool) -> None:
    files = mnist_files()
    write_files(tmp_path / "data" / sub, files, zipped)
    data = load("mnist", tmp_path / "data")
    raw = np.frombuffer(files["train-images-idx3-ubyte"][16:], np.uint8).reshape(TRAIN, 1, 28, 28)
    assert np.array_equal(data.train.images.numpy(), raw)
    assert data.train.labels.tolist() == [i % 10 for i in range(TRAIN)]
    assert data.test.images.shape == (TEST, 1, 28, 28)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))


def test_dotted_names_and_unpacked_files_with_gz_names_are_read(tmp_path: Path) -> None:
    for name, data in mnist_files().items():
        (tmp_path / name.replace("-idx", ".idx")).write_bytes(data)
    assert len(load("mnist", tmp_path).train) == TRAIN
    other = tmp_path / "other"
    other.mkdir()
    for name, data in mnist_files().items():
        (other / f"{name}.gz").write_bytes(data)  # a browser unpacked it and kept the name
    assert len(load("mnist", other).train) == TRAIN


BREAKS = {
    "cut short": ("train-images-idx3-ubyte", lambda d: d[:-5], "cut short"),
    "padded": ("t10k-images-idx3-ubyte", lambda d: d + b"\0", "padded"),
    "only a header's start": ("t10k-labels-idx1-ubyte", lambda d: d[:3], "idx header"),
    "empty": ("train-labels-idx1-ubyte", lambda d: b"", "idx header"),
    "wrong magic": ("train-images-idx3-ubyte", lambda d: b"\0\0\x0d\3" + d[4:], "magic"),
    "labels for images": ("train-images-idx3-ubyte", lambda d: idx_bytes(np.zeros(9)), "magic"),
    "too few images": (
        "train-images-idx3-ubyte",
        lambda d: idx_bytes(np.zeros((TRAIN - 1, 28, 28))),
        f"expected {TRAIN} images",
    ),
    "other image size": (
        "t10k-images-idx3-ubyte",
        lambda d: idx_bytes(np.zeros((TEST, 27, 28))),
        "28 x 28",
    ),
    "too few labels": (
        "train-labels-idx1-ubyte",
        lambda d: idx_bytes(np.zeros(TRAIN - 1)),
        f"expected {TRAIN} labels",
    ),
    "label out of range": (
        "t10k-labels-idx1-ubyte",
        lambda d: d[:-1] + b"\x0a",
        f"label 10 at position {TEST - 1}",
    ),
    "bad gzip": ("train-images-idx3-ubyte", lambda d: gzip.compress(d)[:-20], "gzip"),
    "gzip of rubbish": ("train-images-idx3-ubyte", lambda d: b"\x1f\x8b" + d[:50], "gzip"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_mnist_file_is_named(tmp_path: Path, case: str) -> None:
    name, damage, message = BREAKS[case]
    files = mnist_files()
    files[name] = damage(files[name])
    write_files(tmp_path, files, zipped=False)
    with pytest.raises(DataError, match=message) as error:
        load("mnist", tmp_path)
    assert name in str(error.value)


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no mnist here"):
        load("mnist", tmp_path)
    files = mnist_files()
    del files["t10k-labels-idx1-ubyte"]
    write_files(tmp_path, files, zipped=True)
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)
    with pytest.raises(DataError, match="--download"):
        load("mnist")
    with pytest.raises(DataError, match="unknown data set 'fashion'"):
        load("fashion")


def cifar_batches() -> dict[str, bytes]:
    generator = np.random.default_rng(1)
    batches = {}
    for name in datasets._CIFAR_BATCHES:
        records = generator.integers(0, 256, (TEST, formats.CIFAR_RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(TEST) % 10
        batches[name] = records.tobytes()
    return batches


def cifar_archive(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_cifar_is_the_same_from_directory_and_archive(tmp_path: Path) -> None:
    batches = cifar_batches()
    folder = tmp_path / "unpacked" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, data in batches.items():
        (folder / name).write_bytes(data)
    archive = cifar_archive(tmp_path / "cifar-10-binary.tar.gz", batches)
    sets = [load("cifar10", p) for p in (folder, folder.parent, tmp_path, archive)]
    record = np.frombuffer(batches["data_batch_2.bin"], np.uint8)[: formats.CIFAR_RECORD]
    for data in sets:
        assert data.train.images.shape == (5 * TEST, 3, 32, 32)
        assert np.array_equal(data.train.images[TEST].numpy().ravel(), record[1:])
        assert data.test.labels.tolist() == [i % 10 for i in range(TEST)]
        assert torch.equal(data.train.images, sets[0].train.images)


def test_broken_cifar_files_are_named(tmp_path: Path) -> None:
    batches = cifar_batches()
    for name, data in batches.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "data_batch_3.bin").write_bytes(batches["data_batch_3.bin"][:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*cut short"):
        load("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" + batches["data_batch_3.bin"][1:])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*label 11 at position 0"):
        load("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: missing"):
        load("cifar10", tmp_path)


def _flip(data: bytes) -> bytes:
    """The bytes with those in the middle inverted."""
    middle = len(data) // 2
    return data[:middle] + bytes(255 - b for b in data[middle : middle + 64]) + data[middle + 64 :]


def test_broken_cifar_archives_are_named(tmp_path: Path) -> None:
    batches = cifar_batches()
    whole = cifar_archive(tmp_path / "whole.tar.gz", batches).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.tar\.gz.*damaged"):
        load("cifar10", cut)
    rubbish = tmp_path / "rubbish.tar.gz"
    rubbish.write_bytes(b"no archive at all" * 99)
    with pytest.raises(DataError, match=r"rubbish\.tar\.gz.*damaged"):
        load("cifar10", rubbish)
    packed = lzma.compress(whole)
    for name, data in {"cut.xz": packed[: len(packed) // 2], "bad.xz": _flip(packed)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}.*damaged"):
            load("cifar10", tmp_path / name)
    del batches["test_batch.bin"]
    lacking = cifar_archive(tmp_path / "lacking.tar.gz", batches)
    with pytest.raises(DataError, match=r"test_batch\.bin is missing"):
        load("cifar10", lacking)


def test_the_cache_is_used_rebuilt_when_damaged_and_bound_to_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "data", mnist_files(), zipped=True)
    first = load("mnist", folder)
    (cached,) = (tmp_path / "cache" / "parsed").glob("*.npz")
    with monkeypatch.context() as context:
        context.setattr(datasets, "_parse_mnist", lambda files: pytest.fail("parsed again"))
        assert torch.equal(load("mnist", folder).train.images, first.train.images)
    whole, lacking, other = cached.read_bytes(), io.BytesIO(), io.BytesIO()
    np.savez(lacking, train_images=first.train.images.numpy())
    np.save(other, np.zeros(3))
    stale = (lacking.getvalue(), other.getvalue())
    for damaged in (b"PK\3\4 broken", b"", whole[:5000], _flip(whole), *stale):
        cached.write_bytes(damaged)
        assert torch.equal(load("mnist", folder).train.images, first.train.images)
        assert cached.read_bytes() == whole
    write_files(folder, mnist_files(seed=7), zipped=True)
    assert not torch.equal(load("mnist", folder).train.images, first.train.images)
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "data", mnist_files(), zipped=False)
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(blocker))
    assert len(load("mnist", folder).train) == TRAIN


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder it shows."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def md5s(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_download_verifies_renames_and_is_done_once(
    site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = site
    write_files(folder, mnist_files(), zipped=True)
    sums = md5s(folder)
    monkeypatch.setattr(datasets, "_MNIST_MD5", {n: sums[n] for n in datasets._MNIST_MD5})
    monkeypatch.setenv("SPARSE_KERNELS_MIRROR", url + "/")
    assert len(load("mnist", download=True).train) == TRAIN
    for path in folder.iterdir():
        path.unlink()
    assert len(load("mnist", download=True).train) == TRAIN  # from the cache: the site is empty
    assert len(load("mnist").train) == TRAIN


def test_a_download_with_a_wrong_checksum_leaves_nothing(
    site: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = site
    write_files(folder, mnist_files(), zipped=True)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected MD5"):
        load("mnist", download=True, mirror=url)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_an_unreachable_server_or_missing_file_is_a_named_error(site: tuple[str, Path]) -> None:
    url, _ = site
    with pytest.raises(DataError, match=r"train-images.*download failed.*404.*--data-dir"):
        load("mnist", download=True, mirror=url)
    with pytest.raises(DataError, match="download failed"):
        load("cifar10", download=True, mirror="http://127.0.0.1:1")
    with pytest.raises(DataError, match="download failed"):
        load("cifar10", download=True, mirror="no-address")


def test_atomic_writing_keeps_the_old_file_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "file"
    fetch.write_atomically(target, lambda file: file.write(b"old") and None)

    def fails(file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch.write_atomically(target, fails)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_shipped_sample_is_balanced_distinct_and_looks_like_mnist() -> None:
    data = load("mnist-sample")
    assert data.train.labels.bincount().tolist() == [400] * 10
    assert data.test.labels.bincount().tolist() == [100] * 10
    images = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert torch.unique(images, dim=0).shape[0] == 5000
    scaled = images.float() / 255
    assert abs(scaled.mean().item() - 0.1307) < 0.005
    assert abs(scaled.std().item() - 0.3081) < 0.005
    # The classes are where they should be: the nearest class mean is right for most test images.
    train = data.train.images.flatten(1).float()
    means = torch.stack([train[data.train.labels == d].mean(0) for d in range(10)])
    nearest = torch.cdist(data.test.images.flatten(1).float(), means).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.75
