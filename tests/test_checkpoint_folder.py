"""The folder of checkpoints: what stays, what goes, and in which order things reach the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_kernels.training import checkpoint_files


def steps(directory: Path) -> list[int]:
    return [int(p.name.split("step")[1]) for p in checkpoint_files.checkpoint_folders(directory)]


def test_the_last_whole_ones_are_kept(tmp_path) -> None:
    for step in (5, 10, 15, 10):  # a rewound run takes step 10 again
        checkpoint_files.write(tmp_path, step, {"extra": step}, keep=2)
    assert steps(tmp_path) == [10, 15]
    (checkpoint_files.checkpoint_folders(tmp_path)[0] / "state.json").write_text("")
    checkpoint_files.write(tmp_path, 20, {"extra": 20}, keep=2)
    assert steps(tmp_path) == [20, 10, 15]  # the broken one does not count
    for bad in ({"keep": 0}, {"step": -1}, {"state": {"a/b": 1}}):
        with pytest.raises(ValueError):
            checkpoint_files.write(**{"directory": tmp_path, "step": 1, "state": {}, **bad})


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch) -> None:
    checkpoint_files.write(tmp_path, 5, {"extra": 5})

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint_files.write(tmp_path, 6, {"extra": 6})
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["000001-step5"]


def test_leftovers_of_killed_writers_go(tmp_path) -> None:
    first = checkpoint_files.write(tmp_path, 5, {"extra": 5})
    shutil.copytree(first, tmp_path / ".writing-000002-step9")
    shutil.copytree(first, tmp_path / ".removing-000000-step1")
    assert steps(tmp_path) == [5]
    checkpoint_files.write(tmp_path, 6, {"extra": 6})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "000001-step5",
        "000002-step6",
    ]


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_rename(source: Path, target: Path) -> None:
        happened.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    checkpoint_files.write(tmp_path, 5, {"model": {"a": torch.ones(2)}})
    assert happened == [
        "model.safetensors",
        "state.json",
        "manifest.json",
        ".writing-000001-step5",
        "-> 000001-step5",
        tmp_path.name,
    ]
