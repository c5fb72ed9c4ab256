"""The log for TensorBoard: the records' scalars by step, once each; a clear word without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_kernels.workbench import tensorboard_log as board
from sparse_kernels.workbench.errors import WorkbenchError


def records(count: int) -> list[dict]:
    return [
        {"epoch": i, "step": 10 * i, "train_loss": 1.0 / i, "test_accuracy": None,
         "layers": {"0": 0.1 * i}}
        for i in range(1, count + 1)
    ]  # fmt: skip


class Writer:
    """Stands in for SummaryWriter where neither library is installed; one line per scalar."""

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        self.file = (Path(folder) / "events").open("w")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.file.write(f"{name} {value:g} {step}\n")


def test_every_epoch_is_there_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(board, "_writer", lambda: Writer)
    log = tmp_path / "log-sparse-seed0.csv"
    board.write_tensorboard(log, records(1))
    assert not (tmp_path / "tensorboard").exists()  # no log: not this process's run
    log.write_text("")
    for count in (1, 2, 3):
        board.write_tensorboard(log, records(count))
    lines = (tmp_path / "tensorboard" / "log-sparse-seed0" / "events").read_text().splitlines()
    assert "train_loss 0.5 20" in lines and "density/0 0.3 30" in lines and len(lines) == 6
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["log-sparse-seed0"]


def test_a_real_event_file_holds_the_scalars(tmp_path: Path) -> None:
    if board._writer() is None:
        pytest.skip("neither tensorboard nor tensorboardX is installed")
    log = tmp_path / "log.csv"
    log.write_text("")
    board.write_tensorboard(log, records(2))
    (events,) = (tmp_path / "tensorboard" / "log").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"train_loss" in content and b"density/0" in content and b"test_accuracy" not in content


def test_without_a_library_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(board, "_writer", lambda: None)
    with pytest.raises(WorkbenchError, match="pip install tensorboard"):
        board.require_tensorboard()
