"""The log of a run for TensorBoard, beside the CSV log and from the same records."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from pathlib import Path
from typing import Any

from .errors import WorkbenchError

_NOT_SHOWN = ("epoch", "step", "layers")


def _writer() -> Any:
    """torch's SummaryWriter, or tensorboardX's, which writes the same files without TensorBoard."""
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).SummaryWriter
    return None


def require_tensorboard() -> None:
    """Raise WorkbenchError if neither library is installed."""
    if _writer() is None:
        raise WorkbenchError(
            "--tensorboard: expected the package tensorboard or tensorboardX, found neither; "
            "`pip install tensorboard`, or leave the option out (the CSV log holds the same)"
        )


def write_tensorboard(log: Path, epochs: list[dict[str, Any]]) -> None:
    """Scalars of all epochs so far, by step, to ``tensorboard/<name of the log>`` beside ``log``.

    Written anew each time, a record or some hundreds, so that a run that was resumed or cut off
    leaves no steps twice.
    """
    if not log.is_file():  # ranks other than 0 have no log
        return
    folder = log.parent / "tensorboard" / log.stem
    fresh = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    with _writer()(str(fresh)) as writer:
        for record in epochs:
            shown = {k: v for k, v in record.items() if k not in _NOT_SHOWN and v is not None}
            shown |= {f"density/{name}": value for name, value in record["layers"].items()}
            for name, value in shown.items():
                writer.add_scalar(name, value, record["step"])
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
