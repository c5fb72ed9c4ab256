"""Checkpoints on disk: one folder each, whole or not there, checked to the last bit when read.

    <directory>/000007-step4200/
        state.json          everything that is no tensor (state_tree.py)
        <part>.safetensors  the tensors of one part of the state (model, optimizer, ...)
        manifest.json       format, versions, size and SHA-256 of each file; of itself, too

A folder is written under a temporary name, every file and the folder are synced, and it is renamed;
only then older ones are removed.  The number in front counts checkpoints, so that the newest is the
newest whatever steps a rewound run takes again.  A process killed at any moment leaves each
checkpoint as it was, and at most a temporary folder, which the next write removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_kernels.nn._checkpoint import CheckpointError

from .state_tree import decode, encode, own_memory

FORMAT = "sparse_kernels checkpoint"
FORMAT_VERSION = 1
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
_FOLDER = re.compile(r"(\d{6,18})-step(\d{1,18})")
_PART = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEMPORARY, _TRASH = ".writing-", ".removing-"


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint that was read and found whole."""

    path: Path
    step: int
    state: dict[str, Any]
    versions: dict[str, str]


def checkpoint_folders(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `directory`, newest first, whole or not; empty if there is none."""
    try:
        found = [p for p in Path(directory).iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


# ---- writing ---------------------------------------------------------------------------------


def write(
    directory: str | os.PathLike[str], step: int, state: Mapping[str, Any], keep: int = 3
) -> Path:
    """Write `state`, part by part, as the newest checkpoint; the newest `keep` whole ones stay.

    state: dict from the name of a part to plain data and tensors.  Returns the new folder.
    Raises ValueError for a bad keep, step or name, TypeError for what is not plain data,
    OSError if the disk does not take it: the checkpoints that were there are then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    if not 0 <= step < 10**18:
        raise ValueError(f"step must be a count of steps, at least 0, got {step}")
    files = _contents(state)
    files[MANIFEST] = _manifest(step, files)
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home):
        _sweep(home)
        newest = max(map(_number, checkpoint_folders(home)), default=0)
        name = f"{newest + 1:06d}-step{step}"
        _write_folder(home / (_TEMPORARY + name), home / name, files)
        _rotate(home, keep)
    return home / name


def _write_folder(temporary: Path, final: Path, files: Mapping[str, bytes]) -> None:
    try:
        temporary.mkdir()
        for name, content in files.items():  # the manifest is the last
            _write_file(temporary / name, content)
        _sync_folder(temporary)
        os.rename(temporary, final)
    except BaseException:  # a full disk needs the space back now, not at the next write
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(final.parent)


def _contents(state: Mapping[str, Any]) -> dict[str, bytes]:
    save = _safetensors().save
    files: dict[str, bytes] = {}
    nodes: dict[str, Any] = {}
    for part, tree in state.items():
        if not _PART.fullmatch(part):
            raise ValueError(f"a part's name must be letters, digits, _ and -, got {part!r}")
        tensors: dict[str, Tensor] = {}
        try:
            nodes[part] = encode(tree, tensors)
        except TypeError as error:
            raise TypeError(f"{part}: {error}") from None
        if tensors:
            files[part + SUFFIX] = save(own_memory(tensors))
    files[STATE] = json.dumps(nodes, allow_nan=False).encode()
    return files


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    return json.dumps({**content, "sha256": _own_hash(content)}, indent=1).encode()


def versions() -> dict[str, str]:
    """Versions that a checkpoint names: other ones may round otherwise."""
    from sparse_kernels import __version__

    return {
        "sparse_kernels": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a rename is not on the disk before its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rotate(home: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` that look whole; broken ones do not count."""
    good = 0
    for folder in checkpoint_folders(home):
        if good >= keep:
            _remove(folder)
        elif _looks_whole(folder):
            good += 1


def _looks_whole(folder: Path) -> bool:
    """Whether the manifest is right and every file has its size (no hash: that reads all)."""
    try:
        sizes = {name: entry["bytes"] for name, entry in _read_manifest(folder)["files"].items()}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, CheckpointError):
        return False


def _remove(folder: Path) -> None:
    """Renamed first: a half-removed checkpoint must not look like one."""
    trash = folder.with_name(_TRASH + folder.name)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _sweep(home: Path) -> None:
    """Remove what killed processes left; the lock says that no living one is at it."""
    for left in home.iterdir():
        if left.name.startswith((_TEMPORARY, _TRASH)) and left.is_dir():
            shutil.rmtree(left)


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock of a process that was killed."""
    import fcntl  # POSIX only, as is the sync of a folder; the rest of the package is not

    with (home / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- reading ---------------------------------------------------------------------------------


def read(folder: str | os.PathLike[str]) -> CheckpointFiles:
    """Read one checkpoint and check every byte of it before anything is used.

    Raises CheckpointError naming file and fault: truncated, changed, missing, of another program
    or of a newer format.
    """
    path = Path(folder)
    manifest = _read_manifest(path)
    data = {name: _checked_bytes(path / name, e) for name, e in manifest["files"].items()}
    try:
        nodes = json.loads(data.pop(STATE))
        # Copies: what the reader returns lies unaligned in the file's bytes.
        tensors = {
            name: {key: tensor.clone() for key, tensor in _safetensors().load(content).items()}
            for name, content in data.items()
        }
        if not isinstance(nodes, dict):
            raise CheckpointError(f"expected an object, got {type(nodes).__name__}")
        state = {part: decode(node, tensors.get(part + SUFFIX, {})) for part, node in nodes.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, RecursionError, _safetensors_error()) as error:
        raise CheckpointError(
            f"{path}: its checksums are right, but it cannot be read ({error})"
        ) from error
    return CheckpointFiles(path, manifest["step"], state, manifest["versions"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path}: expected the folder of a checkpoint with {MANIFEST} in it, found none; give "
            "a folder that save_checkpoint wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: truncated or changed ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: not the manifest of a {FORMAT}")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version}, this sparse_kernels reads up to {FORMAT_VERSION}; update "
            "sparse_kernels to load it"
        )
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _own_hash(content) or version != FORMAT_VERSION:
        raise CheckpointError(f"{path / MANIFEST}: changed since it was written (its SHA-256)")
    if not _well_formed(content):
        raise CheckpointError(f"{path / MANIFEST}: entries are missing or of the wrong kind")
    return content


def _well_formed(content: Mapping[str, Any]) -> bool:
    files, step = content.get("files"), content.get("step")
    if not isinstance(files, dict) or STATE not in files or type(step) is not int or step < 0:
        return False
    if not isinstance(content.get("versions"), dict):
        return False
    parts = [name.removesuffix(SUFFIX) for name in files if name != STATE]
    # No separators in names: a foreign manifest must not lead outside of the folder.
    named = all(name.endswith(SUFFIX) for name in files if name != STATE)
    if not named or not all(_PART.fullmatch(part) for part in parts):
        return False
    return all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def _checked_bytes(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            fault = "truncated" if size < entry["bytes"] else "too long"
            raise CheckpointError(f"{path}: {fault}, expected {entry['bytes']} bytes, got {size}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise CheckpointError(
            f"{path}: changed since it was written: expected SHA-256 {entry['sha256'][:12]}..., "
            f"got {found[:12]}..."
        )
    return content


def require_safetensors() -> None:
    """Raise CheckpointError, before hours of training, if the package is not there."""
    _safetensors()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "checkpoints need the package safetensors, which is not installed: "
            "pip install safetensors"
        ) from error
    return safetensors.torch


def _safetensors_error() -> type[Exception]:
    _safetensors()
    from safetensors import SafetensorError

    return SafetensorError
