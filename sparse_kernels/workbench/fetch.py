"""Cache and download: nothing half-written is ever seen, nothing unverified is ever used."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import lzma
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import DataError

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir``, else $SPARSE_KERNELS_CACHE, else ~/.cache/sparse_kernels (or XDG's)."""
    if cache_dir:
        return Path(cache_dir)
    if os.environ.get("SPARSE_KERNELS_CACHE"):
        return Path(os.environ["SPARSE_KERNELS_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse_kernels"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write(file)`` fill a temporary neighbour of ``path``, then rename it into place.

    Whatever ``write`` raises is passed on and leaves neither the file nor its temporary behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".part"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def md5_of(path: Path) -> str:
    """The MD5 of a file as hexadecimal digits (the checksum that both data sets publish)."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, target: Path, md5: str) -> Path:
    """Fetch ``url`` to ``target`` unless a file with this MD5 is there; rename only once verified.

    Raises DataError if the server cannot be reached or the checksum differs; nothing is left.
    """
    if target.is_file() and md5_of(target) == md5:
        return target

    def transfer(file: BinaryIO) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            while chunk := response.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != md5:
            raise DataError(
                f"{url}: expected MD5 {md5}, got {digest.hexdigest()}; the download was "
                "damaged or the server has another file: try again, or pass --data-dir"
            )

    try:
        write_atomically(target, transfer)
    except DataError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataError(
            f"{url}: download failed ({error}); check the network, set SPARSE_KERNELS_MIRROR to "
            "another address, or pass --data-dir with your own copy"
        ) from error
    return target


def fingerprint(paths: list[Path]) -> str:
    """A key that changes when a file does: of their paths, sizes and modification times."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


# What numpy, zipfile and the unpackers behind it raise for a file that is not a sound .npz. The
# last three: a single array in place of an archive, a compression or encryption unknown here.
NPZ_ERRORS = (
    OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    TypeError, AttributeError, RuntimeError,
)  # fmt: skip


def read_npz(file: BinaryIO, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an .npz; raises one of NPZ_ERRORS, KeyError where one is missing."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}


def cached_arrays(
    path: Path, names: Iterable[str], parse: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays ``names`` stored at ``path`` (.npz), or those of ``parse()``, which are stored.

    A cache file that is damaged or lacks an array is rebuilt; a cache that cannot be written is
    done without.
    """
    # Opened here, because numpy leaves the file open when it turns out to be damaged.
    with contextlib.suppress(*NPZ_ERRORS), path.open("rb") as file:
        return read_npz(file, names)
    arrays = parse()
    # A full or read-only disk costs the next start a second, not the run.
    with contextlib.suppress(OSError):
        write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return arrays
