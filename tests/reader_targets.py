"""Every reader of files, as a function of bytes: what the fuzzers and the core tests feed.

A target returns quietly for what it accepts and for a clear refusal (the reader's own error class);
any other exception, a warning of numpy's or torch's, or a crash is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_kernels.nn import SparseLinear
from sparse_kernels.plan_cache import PlanCache, _warned
from sparse_kernels.training import SparseMomentum, checkpoint, checkpoint_files
from sparse_kernels.workbench import formats
from sparse_kernels.workbench.config import TrainConfig, parse_block
from sparse_kernels.workbench.errors import DataError, WorkbenchError

_HOME = tempfile.TemporaryDirectory(
    prefix="readers-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
)
_FOLDER = Path(_HOME.name)


def _file(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def idx(data: bytes) -> None:
    """MNIST's idx files, raw or gzip, of one and of three axes."""
    path = _file("idx", data)
    for axes in (1, 3):
        try:
            array = formats.read_idx(path, axes)
        except DataError:
            continue
        assert array.dtype == np.uint8 and array.ndim == axes


def cifar(data: bytes) -> None:
    """CIFAR's records, and the archive around them."""
    for count in (1, 2):
        try:
            images, labels = formats.parse_cifar(data, Path("batch"), count)
            assert images.shape == (count, 3, 32, 32) and labels.max(initial=0) <= 9
        except DataError:
            pass
    with contextlib.suppress(DataError):
        formats.read_cifar_batches(_file("cifar.tar.gz", data), ["a.bin"], 1)


class _Checkpoints:
    """One folder of a whole checkpoint, of which a target replaces one file each time.

    A fuzzer comes here millions of times: only what changes is written, and the model is made
    anew only where a load changed it.
    """

    def __init__(self, name: str, step: int, files: dict[str, bytes]) -> None:
        self.folder = _FOLDER / name
        self.folder.mkdir(exist_ok=True)
        for file, content in files.items():
            (self.folder / file).write_bytes(content)
        self.manifest = json.loads(checkpoint_files._manifest(step, files))
        del self.manifest["sha256"]
        self._fresh()

    def _fresh(self) -> None:
        self.model = _model()
        self.before = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.plan = (self.model.dense_above, self.model.image_format, self.model.storage)

    def put(self, name: str, data: bytes) -> Path:
        """`name` holds `data`, and its checksums are right: what a hostile writer would give."""
        (self.folder / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content = {**self.manifest, "files": {**self.manifest["files"], name: entry}}
        content["sha256"] = checkpoint_files._own_hash(content)
        (self.folder / checkpoint_files.MANIFEST).write_text(json.dumps(content))
        return self.folder

    def read_with(self, name: str, data: bytes) -> None:
        """Load with other content of a file."""
        self.put(name, data)
        self._load(name == checkpoint_files.STATE and b'"generators"' in data)

    def read(self, manifest: bytes) -> None:
        """Load with another manifest."""
        (self.folder / checkpoint_files.MANIFEST).write_bytes(manifest)
        self._load(False)

    def _load(self, generators: bool) -> None:
        """A refusal changes nothing, and what is taken is a layer that can be used."""
        model, before = self.model, self.before
        try:
            checkpoint.load_checkpoint(self.folder, model, global_generators=generators)
        except checkpoint.CheckpointError:
            after = model.state_dict()
            same = after.keys() == before.keys() and all(
                torch.equal(before[name], after[name]) for name in before
            )
            plan = (model.dense_above, model.image_format, model.storage)
            assert same and plan == self.plan, "a refusal changed the model"
            return
        self._fresh()
        model.pattern.validate()
        assert torch.isfinite(model(torch.zeros(2, 5))).all() or not all(
            p.isfinite().all() for p in model.parameters()
        )


def _model() -> SparseLinear:
    return SparseLinear(5, 4, density=0.5, generator=torch.Generator().manual_seed(0))


def manifest(data: bytes) -> None:
    """A checkpoint's manifest, beside whole files."""
    _CHECKPOINTS.read(data)


def manifest_rehashed(data: bytes) -> None:
    """The same with its own checksum made right: only the kinds of its entries are wrong."""
    try:
        content = json.loads(data)
        content.pop("sha256", None)
        content["sha256"] = checkpoint_files._own_hash(content)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return
    _CHECKPOINTS.read(json.dumps(content).encode())


def state_json(data: bytes) -> None:
    """A checkpoint's state.json with right checksums."""
    _HOSTILE_STATE.read_with(checkpoint_files.STATE, data)


def training_state(data: bytes) -> None:
    """The state.json of a training: optimizer, masks' counters, history, costs and start."""
    parts = _training()
    state = {key: parts[2].state_dict()[key] for key in ("steps", "costs", "start")}
    folder = _HOSTILE_TRAINING.put(checkpoint_files.STATE, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SparseMomentum goes on with other", RuntimeWarning)
        warnings.filterwarnings("ignore", "the checkpoint was written before", RuntimeWarning)
        try:
            checkpoint.load_checkpoint(folder, *parts, global_generators=False)
        except checkpoint.CheckpointError:
            after = parts[2].state_dict()
            assert all(after[key] == state[key] for key in state), "a refusal changed the masks"
            return
    held = parts[2].state_dict()
    assert 0 < held["costs"][""] < float("inf") and held["steps"] >= 0
    parts[2]._limits.at(held["steps"] + 1)  # what an update reads of it


def _training() -> tuple[SparseLinear, torch.optim.Optimizer, SparseMomentum]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings: dict[str, Any] = {
        "signal": "exact",
        "cost": {"": 2.0},
        "cost_weight": 1.0,
        "cost_budget": "start",
    }
    return (
        model,
        optimizer,
        SparseMomentum(model, optimizer, total_steps=9, update_every=2, **settings),
    )


def tensors(data: bytes) -> None:
    """A checkpoint's tensors with right checksums: hostile indices, shapes and headers."""
    _HOSTILE_TENSORS.read_with("model.safetensors", data)


def plan_cache(data: bytes) -> None:
    """The plan cache: ignored with one warning, or read."""
    cache = PlanCache(_FOLDER, {"cpu": "fuzz"})
    cache.path.write_bytes(data)
    _warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the plan cache", RuntimeWarning)
        found = cache.get("a")
    assert found is None or isinstance(found, dict)


def configuration(data: bytes) -> None:
    """Settings of an experiment, of any kind and content that JSON can say."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = {"block": data.decode("utf-8", "replace"), "name": data.decode("latin-1")}
    if not isinstance(fields, dict):
        return
    known = TrainConfig().as_dict()
    # The command line converts numbers; here each field keeps its kind.
    fields = {k: v for k, v in fields.items() if k in known and type(v) is type(known[k])}
    if "seeds" in fields:
        return
    try:
        config = TrainConfig(**fields)
        config.check()
        assert config.command() and config.run_name()
        parse_block(config.block)
    except WorkbenchError:
        pass


def _whole_checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as home:
        folder = checkpoint.save_checkpoint(home, 7, _model(), extra={"a": (1, 2.5, None)})
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def _whole_training() -> dict[str, bytes]:
    """After three steps and an update."""
    model, optimizer, masks = _training()
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 5), float(step))).square().sum().backward()
        optimizer.step()
        masks.step()
    with tempfile.TemporaryDirectory() as home:
        folder = checkpoint.save_checkpoint(home, 3, model, optimizer, masks)
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def _without_generators(state: bytes) -> bytes:
    """A hundredth of the size: most changes of it then reach the model's own entries."""
    content = json.loads(state)
    return json.dumps({part: content[part] for part in ("model", "plan", "extra")}).encode()


def _tar(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo("cifar/a.bin")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


_WHOLE = _whole_checkpoint()
_TRAINED = _whole_training()
_CHECKPOINTS, _HOSTILE_STATE, _HOSTILE_TENSORS = (
    _Checkpoints(name, 7, _WHOLE) for name in ("checkpoint", "state", "tensors")
)
_HOSTILE_TRAINING = _Checkpoints("training", 3, _TRAINED)
_STATE = _WHOLE[checkpoint_files.STATE]
_RECORD = bytes([3]) + bytes(3072)
_PLAN = {
    "format": 1,
    "identity": {"cpu": "fuzz"},
    "entries": {"a": {"dense": 0.25, "points": {"5%": {"ratio": 1.5}}}},
}
#: name: (target, inputs that the reader accepts)
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "idx": (
        idx,
        [
            bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 6]),
            bytes([0, 0, 8, 3]) + bytes(12),
            bytes.fromhex("00000803fffff9ffffffff0000000000"),
        ],
    ),
    "cifar": (cifar, [_RECORD, 2 * _RECORD, _tar(_RECORD)]),
    "manifest": (manifest, [checkpoint_files._manifest(7, _WHOLE)]),
    "manifest-rehashed": (manifest_rehashed, [checkpoint_files._manifest(7, _WHOLE)]),
    "state-json": (state_json, [_STATE, _without_generators(_STATE)]),
    "training-state": (training_state, [_TRAINED[checkpoint_files.STATE]]),
    "tensors": (tensors, [_WHOLE["model.safetensors"]]),
    "plan-cache": (plan_cache, [json.dumps(_PLAN).encode()]),
    "configuration": (configuration, [json.dumps(TrainConfig().as_dict()).encode()]),
}


def digest(data: bytes) -> str:
    """Name of a finding's file."""
    return hashlib.sha256(data).hexdigest()[:12]
