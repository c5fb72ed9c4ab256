"""Readers of the two binary formats: MNIST's idx and CIFAR-10's records. Strict, with named errors.

Sources: http://yann.lecun.com/exdb/mnist (idx), https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np

from .errors import DataError

CIFAR_RECORD = 1 + 3 * 32 * 32
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UINT8 = 0x08


def _read_maybe_gzip(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        # The content decides, not the name: browsers unpack .gz files and keep the name.
        return gzip.decompress(data) if data[:2] == _GZIP_MAGIC else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip stream is damaged or cut short ({error}); fetch this file again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); check the path and permissions"
        ) from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, raw or gzip: uint8 array of ``dimensions`` axes.

    Raises DataError on a damaged gzip stream, a wrong magic number or a wrong length.
    """
    data = _read_maybe_gzip(path)
    header = 4 + 4 * dimensions
    expected = _IDX_UINT8 << 8 | dimensions
    if len(data) < header:
        raise DataError(
            f"{path}: expected {header} bytes of idx header, got {len(data)}; fetch it again"
        )
    (magic,) = struct.unpack(">I", data[:4])
    if magic != expected:
        raise DataError(
            f"{path}: expected the idx magic number 0x{expected:08x} ({dimensions} axes of bytes), "
            f"got 0x{magic:08x}; this is not the file its name says: fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    size = math.prod(shape)
    if len(data) - header != size:
        raise DataError(
            f"{path}: its header announces {shape} = {size} bytes, {len(data) - header} follow; "
            "the file is cut short or padded: fetch it again"
        )
    try:
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
    except ValueError as error:  # no bytes, but sides beyond what an array can have
        raise DataError(
            f"{path}: its header announces {shape}, which no array can have; fetch it again"
        ) from error


def read_mnist_pair(
    images_path: Path, labels_path: Path, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 1, 28, 28] and labels uint8 [count] of one MNIST split.

    Raises DataError where shapes, counts or labels (0 to 9) are not those of MNIST.
    """
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape != (count, 28, 28):
        raise DataError(
            f"{images_path}: expected {count} images of 28 x 28, got shape {images.shape}; "
            "fetch the original file"
        )
    if labels.shape != (count,):
        raise DataError(
            f"{labels_path}: expected {count} labels, got {labels.shape[0]}; fetch the original"
        )
    _check_labels(labels, labels_path)
    return images[:, None], labels


def parse_cifar(data: bytes, name: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 3, 32, 32] and labels uint8 [count] of one CIFAR-10 binary batch.

    Each record is the label and 3072 bytes in the order red, green, blue. Raises DataError.
    """
    if len(data) != count * CIFAR_RECORD:
        raise DataError(
            f"{name}: expected {count} records = {count * CIFAR_RECORD} bytes, "
            f"got {len(data)}; it is cut short or not CIFAR-10's binary version: fetch it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(count, CIFAR_RECORD)
    labels = records[:, 0].copy()
    _check_labels(labels, name)
    return records[:, 1:].reshape(count, 3, 32, 32).copy(), labels


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.size and labels.max() > 9:
        where = int(np.argmax(labels > 9))
        raise DataError(
            f"{path}: label {int(labels[where])} at position {where} is not in 0..9; fetch it again"
        )


def read_cifar_batches(source: Path, names: list[str], count: int) -> list[bytes]:
    """The bytes of the named batches from a directory of .bin files or the published tar.gz.

    Raises DataError naming the archive or the missing member.
    """
    if source.is_dir():
        return [_read_member_file(source / name) for name in names]
    wanted = {name: b"" for name in names}
    try:
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                name = Path(member.name).name
                # The size test bounds what a hostile archive can make us read.
                if name in wanted and member.isfile() and member.size <= count * CIFAR_RECORD:
                    stream = archive.extractfile(member)
                    wanted[name] = stream.read() if stream else b""
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(f"{source}: the archive is damaged ({error}); fetch it again") from error
    for name, data in wanted.items():
        if not data:
            raise DataError(
                f"{source}: member {name} is missing or has a wrong size; fetch it again"
            )
    return [wanted[name] for name in names]


def _read_member_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); CIFAR-10's binary version has it"
        ) from error
