"""Checkpoints: bit-exact resume, and that nothing broken, foreign or hostile is ever used."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small_training import make_model, sparse, train
from torch import nn

from sparse_kernels.training import (
    CheckpointError,
    SparseMomentum,
    checkpoint_files,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sparse_kernels.training.state_tree import decode, encode, own_memory

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def build(name="sgd", sizes=(12, 16, 10, 4), density=0.3, block=(1, 1), **options):
    model = make_model(sizes, density=density, block=block)
    optimizer = OPTIMIZERS[name](model.parameters())
    defaults = {"total_steps": 40, "update_every": 7, "prune_rate": 0.5, "signal": "exact"}
    options = defaults | options
    return model, optimizer, SparseMomentum(model, optimizer, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("signal", ["exact", "window", "gradient", "random"])
def test_resume_gives_the_same_bits(optimizer, signal, tmp_path) -> None:
    options = {"signal": signal, "window_tolerance": 0.6, "block": (2, 1)}
    whole = build(optimizer, **options)
    train(*whole, 40)
    for stop in (5, 7, 13):  # inside a window, after an update, before one
        part = build(optimizer, **options)
        train(*part, stop)
        save_checkpoint(tmp_path, stop, *part)
        again = build(optimizer, density=0.6, **{k: v for k, v in options.items()})
        found = load_checkpoint(tmp_path, *again)
        assert found.step == stop and again[2].steps == stop
        train(*again, 40, skip=stop)
        assert equal(weights(whole[0]), weights(again[0]))
        assert [r.removed for r in again[2].history] == [r.removed for r in whole[2].history]


def test_schedulers_generators_plan_and_own_data_come_back(tmp_path) -> None:
    model, optimizer, masks = build()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    average = torch.optim.swa_utils.AveragedModel(model)
    sparse(model)[0].dense_above, sparse(model)[1].dense_above = 0.8, float("inf")
    sparse(model)[2].image_format = "contiguous"
    train(model, optimizer, masks, 3)
    scheduler.step()
    average.update_parameters(model)
    extra = {"place": (1, [2.5, None]), "loss": float("nan"), 3: torch.arange(3), "big": 2**100}
    others = {"scheduler": scheduler, "average": average}
    save_checkpoint(tmp_path, 3, model, optimizer, masks, others=others, extra=extra)
    drawn = [torch.rand(3), numpy.random.rand(3), random.random(), numpy.random.randn()]
    torch.manual_seed(1)
    fresh = build()
    schedule = torch.optim.lr_scheduler.StepLR(fresh[1], 5)
    mean = torch.optim.swa_utils.AveragedModel(build(density=0.9)[0])
    found = load_checkpoint(tmp_path, *fresh, others={"scheduler": schedule, "average": mean})
    again = [torch.rand(3), numpy.random.rand(3), random.random(), numpy.random.randn()]
    assert all(numpy.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert schedule.last_epoch == 1 and equal(weights(average), weights(mean))
    assert found.extra["place"] == (1, [2.5, None]) and found.extra["big"] == 2**100
    assert found.extra["loss"] != found.extra["loss"] and found.extra[3].tolist() == [0, 1, 2]
    assert [layer.dense_above for layer in sparse(fresh[0])] == [0.8, float("inf"), 0.5]
    assert sparse(fresh[0])[2].image_format == "contiguous"


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_generators_of_cuda_devices_come_back(devices, tmp_path, monkeypatch) -> None:
    """Two devices when it was written; of other machines those devices that both have."""
    held = [torch.full((16,), i, dtype=torch.uint8) for i in (3, 4)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: held)
    model = make_model()
    save_checkpoint(tmp_path, 1, model)
    found: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: found.update({device: state})
    )
    load_checkpoint(tmp_path, model, global_generators=False)
    assert found == {}
    load_checkpoint(tmp_path, model)
    assert sorted(found) == list(range(min(devices, 2)))
    assert all(torch.equal(state, held[i]) for i, state in found.items())


def test_a_scheduler_that_counts_its_milestones_goes_on(tmp_path) -> None:
    """MultiStepLR keeps them in a Counter, on whose methods it calls when another one wraps it."""
    kinds = torch.optim.lr_scheduler

    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        warm = kinds.LinearLR(optimizer, 0.1, total_iters=4)
        falls = kinds.MultiStepLR(optimizer, [2, 5, 5])
        return optimizer, kinds.SequentialLR(optimizer, [warm, falls], [4])

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    model, whole = make_model(), made()
    rates(*whole, 3)
    save_checkpoint(tmp_path, 3, model, whole[0], others={"schedule": whole[1]})
    again = made()
    load_checkpoint(tmp_path, model, again[0], others={"schedule": again[1]})
    assert rates(*again, 8) == rates(*whole, 8)


def test_trees_keep_layout_and_alias_nothing() -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    base = torch.randn(6)
    tree = {"image": image, "a": base[:3], "b": base[3:], "a.b": base, "$odd": [base.expand(2, 6)]}
    tensors: dict[str, torch.Tensor] = {}
    node = json.loads(json.dumps(encode(tree, tensors)))
    held = own_memory(tensors)
    assert len({t.untyped_storage().data_ptr() for t in held.values()}) == len(held)
    back = decode(node, held)
    assert back["image"].stride() == image.stride() and torch.equal(back["image"], image)
    assert torch.equal(back["a.b"], base) and torch.equal(back["$odd"][0], base.expand(2, 6))


@pytest.mark.parametrize("entry", [object(), {"a": [len]}, b"bytes", numpy.zeros(2), {1, 2}])
def test_what_is_no_plain_data_is_named(entry, tmp_path) -> None:
    with pytest.raises(TypeError, match="extra: checkpoint entry"):
        save_checkpoint(tmp_path, 1, make_model(), extra=entry)
    assert not list(tmp_path.glob("*-step*"))


# ---- files that are not what was written ------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(directory, its newest checkpoint of step 9, the weights of the one before, of step 8)."""
    model, optimizer, masks = build(signal="window")
    train(model, optimizer, masks, 8)
    save_checkpoint(tmp_path, 8, model, optimizer, masks)
    before = weights(model)
    train(model, optimizer, masks, 9, skip=8)
    return tmp_path, save_checkpoint(tmp_path, 9, model, optimizer, masks), before


def refused_and_passed_over(saved, message: str) -> None:
    directory, newest, before = saved
    trained = build(signal="window")
    untouched = weights(trained[0])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(newest, *trained)
    assert equal(untouched, weights(trained[0])) and trained[2].steps == 0
    with pytest.warns(RuntimeWarning, match="passed over a newer checkpoint"):
        found = load_checkpoint(directory, *trained)
    assert found.step == 8 and equal(before, weights(trained[0])) and len(found.rejected) == 1
    assert latest_checkpoint(directory) == found.path != newest


FILES = ["model.safetensors", "optimizer.safetensors", "masks.safetensors",
         "generators.safetensors", "state.json", "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "emptied", "missing", "longer"])
def test_a_file_of_another_length(name, how, saved) -> None:
    path = saved[1] / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        cut = {"truncated": content[:-1], "emptied": b"", "longer": content + b"\0"}
        path.write_bytes(cut[how])
    refused_and_passed_over(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(name, saved) -> None:
    path, draw = saved[1] / name, random.Random(name)
    content = path.read_bytes()
    for _ in range(60):
        bit = draw.randrange(8 * len(content))
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=str(saved[1])):
            checkpoint_files.read(saved[1])
    refused_and_passed_over(saved, str(saved[1]))


def sign(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and make its own checksum right again."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": checkpoint_files._own_hash(content)}))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda m: m.update(format_version=2), "format 2.*update sparse_kernels"),
    "foreign": (lambda m: m.update(format="other"), "not the manifest"),
    "older": (lambda m: m.update(format_version=0), "changed"),
    "step": (lambda m: m.update(step="9"), "wrong kind"),
    "outside": (lambda m: m["files"].update({"../x.safetensors": {}}), "wrong kind"),
    "no state": (lambda m: m["files"].pop("state.json"), "wrong kind"),
    "no size": (lambda m: m["files"]["state.json"].pop("bytes"), "wrong kind"),
    "no files": (lambda m: m.update(files=None), "wrong kind"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_newer_foreign_and_forged_manifests(name, saved) -> None:
    change, message = MANIFESTS[name]
    sign(saved[1], change)
    refused_and_passed_over(saved, message)


def test_other_folders_are_no_checkpoints(tmp_path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None and latest_checkpoint(tmp_path) is None
    torch.save({"a": 1}, tmp_path / "model.pt")
    (tmp_path / "000001-step1x").mkdir()
    for path in (tmp_path, tmp_path / "model.pt", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="expected the folder of a checkpoint"):
            load_checkpoint(path, make_model())
    (tmp_path / "000001-step1").mkdir()
    with pytest.raises(CheckpointError, match="no good checkpoint among 1"):
        load_checkpoint(tmp_path, make_model())


def rewritten(saved, part: str, change: Callable[[Any], Any]) -> Path:
    """The newest checkpoint with another `part` and right checksums, as an attacker writes it."""
    read = checkpoint_files.read(saved[1])
    state = copy.deepcopy(read.state)
    state[part] = change(state[part]) or state[part]
    return checkpoint_files.write(saved[0], read.step, state)


def into(entry: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(part: dict[str, Any]) -> None:
        new = change(part[entry])
        part[entry] = part[entry] if new is None else new

    return apply


def fill(start: int, value: int) -> Callable[[torch.Tensor], None]:
    """Set what begins at `start`, in place."""

    def change(tensor: torch.Tensor) -> None:
        assert tensor[start:].numel()
        tensor[start:] = value

    return change


def buffers(masks: dict[str, Any]) -> dict[str, Any]:
    return masks["signals"]["0"]["buffers"]


HOSTILE: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "column out of range": ("model", into("0.col_indices", lambda c: c.fill_(999)), "col"),
    "negative column": ("model", into("0.col_indices", lambda c: c.fill_(-1)), "col"),
    "unsorted": ("model", into("0.col_indices", lambda c: c.flip(0)), "col"),
    "rows too many": ("model", into("0.crow_indices", fill(-1, 10**6)), "crow"),
    "rows too few": ("model", into("0.crow_indices", lambda c: c[:-1]), "crow"),
    "values of another block": ("model", into("0.values", lambda v: v.expand(-1, 2, 1)), "block"),
    "dtype": ("model", into("0.values", lambda v: v.float()), "float64, got torch.float32"),
    "text": ("model", into("0.values", lambda v: "text"), "tensor"),
    "bias": ("model", into("0.bias", lambda b: b[:-1]), "expected shape"),
    "lacks": ("model", lambda m: m.__delitem__("2.bias"), "lacks"),
    "unknown": ("model", lambda m: m.update(more=torch.zeros(1)), "besides"),
    "no layer": ("model", lambda m: {k: v for k, v in m.items() if k[0] != "2"}, "'2': no entry"),
    "momentum": ("optimizer", lambda o: o["state"][0].update(momentum_buffer=torch.zeros(2)),
                 "parameter's shape"),
    "momentum's kind": ("optimizer", lambda o: o["state"].update({0: 5}), "expected a dict"),
    "groups": ("optimizer", lambda o: o["param_groups"].append({"params": []}), "param groups"),
    "no groups": ("optimizer", lambda o: o.pop("param_groups") and None, "param_groups"),
    "params": ("optimizer", lambda o: o["param_groups"][0].pop("params") and None, "no params"),
    "momentum's value": ("optimizer", lambda o: o["state"][0].update(momentum_buffer="x"),
                         "tensor or a number"),
    "no momentum": ("optimizer", lambda o: o["param_groups"][0].update(momentum=None),
                    "momentum is None"),
    "momentum of 1": ("optimizer", lambda o: o["param_groups"][0].update(momentum=1.0), "not in"),
    "rate": ("optimizer", lambda o: o["param_groups"][0].update(lr=float("nan")), "lr is nan"),
    "momentum is missing": ("optimizer", lambda o: o["param_groups"][0].__delitem__("momentum"),
                            "missing"),
    "settings": ("masks", lambda m: m.update(config=3), "config must be"),
    "steps": ("masks", lambda m: m.update(steps=-3), "counts"),
    "layers": ("masks", lambda m: m["signals"].pop("0") and None, "sparse layers"),
    "signal": ("masks", lambda m: buffers(m).update(momentum_buffer=torch.ones(3)), "must be"),
    "signal's name": ("masks", lambda m: buffers(m).update(x=torch.ones(3)), "signal buffer 'x'"),
    "history": ("masks", lambda m: m["history"].append({"a": 1}), "fault"),
    "generator": ("masks", lambda m: m.update(generator=torch.zeros(7, dtype=torch.uint8)),
                  "generator"),
    "plan": ("plan", lambda p: p["0"].update(dense_above=float("nan")), "dense_above"),
    "torch's generator": ("generators", lambda g: g.update(torch=torch.zeros(9).byte()), "random"),
    "CUDA's generator": ("generators", lambda g: g.update(cuda=[torch.zeros(16)]), "uint8"),
    "CUDA's generators": ("generators", lambda g: g.update(cuda=5), "random"),
    "numpy's generator": ("generators", lambda g: g["numpy"].update(keys=[1]), "random"),
    "python's generator": ("generators", lambda g: g.update(python=(3, (1,), None)), "random"),
    "no optimizer": ("optimizer", lambda o: "none", "holds no optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_with_right_checksums_changes_nothing(name, saved) -> None:
    part, change, message = HOSTILE[name]
    path = rewritten(saved, part, change)
    trained = build(signal="window")
    untouched, generator = weights(trained[0]), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, *trained)
    assert equal(untouched, weights(trained[0])) and not trained[1].state
    assert trained[2].steps == 0 and torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize(
    "node",
    [
        {"model": {"$tensor": "nothing"}},
        {"model": {"$call": "os.system"}},
        {"model": {"$float": "1"}},
        {"model": {"$items": [1]}},
        {"model": {"$items": [[[], 1]]}},
        {"model": {"$counter": [[[], 1]]}},
        {"model": {"$counter": 3}},
        {"model": {"$tensor": "0.bias", "order": [1]}},
        {"model": {"$tensor": "0.bias", "order": ["0"]}},
        [],
        "text",
    ],
)
def test_state_that_was_never_written(node, saved) -> None:
    path = saved[1] / "state.json"
    path.write_text(json.dumps(node))
    data = path.read_bytes()
    entry = {"bytes": len(data), "sha256": checkpoint_files.hashlib.sha256(data).hexdigest()}
    sign(saved[1], lambda m: m["files"].update({"state.json": entry}))
    refused_and_passed_over(saved, str(saved[1]))


def test_indices_past_the_stored_blocks_are_cleared(saved) -> None:
    model = build()[0]
    state = checkpoint_files.read(saved[1]).state["model"]
    stored = int(state["0.crow_indices"][-1])
    path = rewritten(saved, "model", into("0.col_indices", fill(stored, 1000)))
    load_checkpoint(path, model)
    model[0].pattern.validate()
    assert model[0].col_indices.numel() > model[0].pattern.nnzb


def test_a_model_of_another_kind_is_named(saved) -> None:
    other = make_model((12, 16, 4))
    with pytest.raises(CheckpointError, match="besides|crow"):
        load_checkpoint(saved[1], other)
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="average"):
        load_checkpoint(saved[1], build()[0], others={"average": optimizer})


def test_other_settings_are_told(saved) -> None:
    with pytest.warns(RuntimeWarning, match="update_every 7 -> 5"):
        load_checkpoint(saved[0], *build(signal="window", update_every=5))
