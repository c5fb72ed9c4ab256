"""The benchmarks of whole nets: checks, steps, epoch, patterns, inference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from workbench_support import SMALL, batch

from sparse_kernels.workbench import contenders, machine
from sparse_kernels.workbench.bench import (
    epoch,
    inference,
    nets,
    network_tables,
    networks,
    plots,
    results,
)
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.errors import WorkbenchError

LENET = dataclasses.replace(
    SMALL, net="lenet-5-caffe", batch_size=16, redistribution="none", update_every=None
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side; threads would only wait for each other
    yield
    torch.set_num_threads(before)


def complete(found: dict[str, Any], config: TrainConfig = LENET) -> dict[str, Any]:
    settings = {**config.as_dict()}
    return {"command": "c", "machine": machine.header(), "settings": settings, **found}


# ---- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["lenet-5-caffe", "wrn-28-2"])
def test_a_right_net_passes_and_keeps_its_state(net: str) -> None:
    contender = contenders.build_sparse(dataclasses.replace(LENET, net=net), 0, 100, 100)
    before = {name: t.clone() for name, t in contender.model.state_dict().items()}
    images = batch(dataclasses.replace(LENET, net=net))
    errors = nets.check_net(contender.model, (images[0][:4], images[1][:4]))
    assert errors["logits"] < 1e-4 and errors["layers' dvalues"] < 1e-4
    assert all(p.grad is None for p in contender.model.parameters())
    for name, tensor in contender.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("what", ["output", "dx", "dvalues"])
def test_a_net_with_a_wrong_layer_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = contenders.build_sparse(LENET, 0, 100, 100)
    real = nets.results_of

    def wrong(module: nn.Module, *rest: Any) -> dict[str, torch.Tensor]:
        found = real(module, *rest)
        if type(module).__name__ == "SparseConv2d" and found["output"].shape[1] == 50:
            found[what] = found[what] * 1.001
        return found

    monkeypatch.setattr(nets, "results_of", wrong)
    with pytest.raises(WorkbenchError, match=f"layer 3: {what}: differs from masked dense"):
        nets.check_net(contender.model, batch(LENET))


def test_other_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = contenders.build_sparse(LENET, 0, 100, 100)
    real = nets.densify

    def other(model: nn.Module) -> nn.Module:
        dense = real(model)
        with torch.no_grad():
            dense[9].weight.mul_(1.1)
        return dense

    monkeypatch.setattr(nets, "densify", other)
    with pytest.raises(WorkbenchError, match="the net's logits: differs"):
        nets.check_net(contender.model, batch(LENET))


def test_density_counts_blocks_where_the_block_does_not_divide() -> None:
    """The classifier's 10 rows end in half a block, which covers fewer elements."""
    contender = contenders.build_sparse(dataclasses.replace(LENET, block="4x1"), 0, 100, 100)
    nets.check_density(contender)


def test_density_and_counts_are_checked() -> None:
    contender = contenders.build_sparse(LENET, 0, 100, 100)
    nets.check_density(contender)
    contender.config = dataclasses.replace(LENET, density=0.2)
    with pytest.raises(WorkbenchError, match=r"0: expected .* blocks \(density 0.2\), got"):
        nets.check_density(contender)
    contender.config = LENET
    start = nets.stored_blocks(contender.model)
    nets.check_counts(contender, start)
    moved = {**start, "0": start["0"] + 1, "3": start["3"] - 1}
    with pytest.raises(WorkbenchError, match="0: 51 -> 50, 3: "):
        nets.check_counts(contender, moved)
    contender.config = dataclasses.replace(LENET, redistribution="momentum")
    nets.check_counts(contender, moved)
    with pytest.raises(WorkbenchError, match="the net's blocks changed from"):
        nets.check_counts(contender, {**start, "0": 1})


def test_random_data_come_in_the_loaders_format() -> None:
    data = nets.dataset_of(LENET, 40)
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape == (40, 1, 28, 28)
    sizes = [images.shape[0] for images, _ in nets.loader_of(data, LENET)]
    assert sizes == [16, 16, 8]
    endless = nets.endless(nets.loader_of(data, LENET))
    assert len([next(endless) for _ in range(7)]) == 7


def test_a_gradient_that_dense_float32_cannot_tell_is_left_to_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one layer of four, where float64 shows that the reference is wrong; never of two."""
    contender = contenders.build_sparse(LENET, 0, 100, 100)
    real, spoilt = nets._gradients, ["3"]

    def noisy(net: nn.Module, x: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        found = real(net, x, *rest)
        dense = next(net.parameters()).shape == (20, 1, 5, 5)
        for name in spoilt if dense and x.dtype == torch.float32 else ():
            found[f"weight gradients:{name}"] *= 2
        return found

    monkeypatch.setattr(nets, "_gradients", noisy)
    errors = nets.check_net(contender.model, batch(LENET))
    assert errors[nets.UNDETERMINED] == 1 and errors["weight gradients"] < 1e-4
    assert "Weight gradients of 1 layers" in network_tables._error_line(errors)
    spoilt.append("0")
    with pytest.raises(WorkbenchError, match="the net's weight gradients: differs"):
        nets.check_net(contender.model, batch(LENET))


def test_a_gradient_of_ours_that_is_wrong_is_refused_though_float64_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contender = contenders.build_sparse(LENET, 0, 100, 100)
    real = nets._gradients

    def wrong(net: nn.Module, *rest: Any) -> dict[str, torch.Tensor]:
        found = real(net, *rest)
        if nets.sparse_layers(net):
            found["weight gradients:3"] *= 2
        return found

    monkeypatch.setattr(nets, "_gradients", wrong)
    with pytest.raises(WorkbenchError, match="the net's weight gradients: differs"):
        nets.check_net(contender.model, batch(LENET))


# ---- steps -------------------------------------------------------------------------------------


def test_steps_have_parts_memory_and_updates(tmp_path: Path) -> None:
    found = networks.run(
        LENET, steps=10, seconds=60.0, memory=True, journal=results.Journal(None, {})
    )
    assert set(found["timings"]) == {"sparse", "sparse, signal", "contiguous"}
    for name, parts in found["parts"].items():
        assert sum(parts.values()) == pytest.approx(found["timings"][name]["median"])
        assert parts["convolutions"] > 0 and parts["linear"] > 0 and parts["pooling"] > 0
    assert found["memory"]["sparse"]["total"] < found["memory"]["contiguous"]["total"]
    assert found["update"]["updates_timed"] >= 1 and found["update"]["update_seconds"] > 0
    assert set(found["peak_memory"]) == {"sparse", "sparse, signal", "contiguous"}
    assert min(found["peak_memory"].values()) > 0
    assert found["memory"]["sparse"]["signal"] == 0
    assert found["memory"]["sparse, signal"]["signal"] > 0
    assert found["densities"]["density"] == pytest.approx(0.1, abs=1e-3)
    text = network_tables.steps(complete(found))
    for row in ("usual steps |", "signal and mask update |", "| growth signal, at most |",
                "Mask update:", "activations included (dense: contiguous)"):  # fmt: skip
        assert row in text
    assert plots.step_parts(complete(found), tmp_path / "f.png") is None
    assert (tmp_path / "f.png").read_bytes()[:8] == PNG


def test_a_dense_layout_that_does_not_run_is_missing_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    config = dataclasses.replace(LENET, dense_baseline="auto")
    found = networks.run(
        config, steps=1, seconds=9.0, memory=False, journal=results.Journal(None, {})
    )
    assert found["rejected"]["compile"] == "RuntimeError: no C++ compiler"
    text = network_tables.steps(complete(found))
    assert "compile: missing, does not run here (RuntimeError: no C++ compiler)." in text


# ---- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("redistribution", ["none", "momentum"])
def test_patterns_are_those_after_real_updates(tmp_path: Path, redistribution: str) -> None:
    config = dataclasses.replace(LENET, redistribution=redistribution)
    journal = results.Journal(tmp_path / "j.jsonl", {})
    settings = {"updates": (0, 1, 3), "every": 2, "steps": 2, "seconds": 9.0}
    found = networks.run_patterns(config, journal=journal, **settings)
    assert [row["updates"] for row in found["rows"]] == [0, 1, 3]
    start, *later = (row["densities"]["nnz"] for row in found["rows"])
    assert all(sum(nnz.values()) == sum(start.values()) for nnz in later)
    assert all((nnz == start) == (redistribution == "none") for nnz in later)
    assert found["speedup"] == min(row["speedup"] for row in found["rows"])
    text = network_tables.patterns(complete(found, config))
    assert "| after 3 |" in text and "The lowest counts" in text
    assert plots.patterns(complete(found, config), tmp_path / "f.png") is None
    again = results.Journal(tmp_path / "j.jsonl", {})
    taken_over = networks.run_patterns(config, journal=again, **settings)
    assert taken_over == json.loads(json.dumps(found))


# ---- epoch -------------------------------------------------------------------------------------

STEPS, WINDOW, BLOCK = 30, 22, 3


def run_epoch(folder: Path, config: TrainConfig = LENET) -> dict[str, Any]:
    journal = results.Journal(folder / "e.jsonl", {})
    return epoch.run(
        config, block_steps=BLOCK, max_steps=STEPS, journal=journal, state=folder / "e.pt"
    )


def test_an_epoch_is_timed_whole_with_window_and_update(tmp_path: Path) -> None:
    found = run_epoch(tmp_path)
    cuts = [(row["start"], row["stop"]) for row in found["blocks"]]
    assert cuts == [(0, 3), (3, 6), (6, 8), (8, 30)]
    assert [len(row["updates"]) for row in found["blocks"]] == [0, 0, 0, 1]
    orders = [row["order"][0] for row in found["blocks"]]
    assert set(orders) == {"sparse", "dense"}
    for name in ("sparse", "dense"):
        assert found["seconds"][name] == sum(row[name]["seconds"] for row in found["blocks"])
        assert all(sum(r[name]["steps"]) <= r[name]["seconds"] for r in found["blocks"])
    assert found["speedup"] == found["seconds"]["dense"] / found["seconds"]["sparse"]
    assert found["window_steps"] == WINDOW and not found["resumed"]
    assert list(found["densities"]["layers"].values()) == pytest.approx([0.1] * 4, abs=1e-3)
    text = network_tables.epoch(complete(found))
    assert "| whole epoch | 30 |" in text and "random images" in text
    assert plots.epoch(complete(found), tmp_path / "f.png") is None


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_epoch_goes_on_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    steps: list[tuple[str, float]] = []
    real = contenders.Contender.step

    def note(self: Any, images: Any, labels: Any) -> float:
        loss = real(self, images, labels)
        if self.masking is None or self.masking.config.update_every < 1000:
            steps.append((self.name, loss))
        return loss

    monkeypatch.setattr(contenders.Contender, "step", note)
    (tmp_path / "whole").mkdir()
    run_epoch(tmp_path / "whole")
    whole = {
        name: [loss for n, loss in steps if n == name][-STEPS:] for name in ("sparse", "dense")
    }
    steps.clear()
    block = epoch._run_block

    def stop(race: Any, start: int, *rest: Any) -> None:
        if start == [0, 3, 6, 8][after]:
            raise Interrupted
        block(race, start, *rest)

    (tmp_path / "cut").mkdir()
    monkeypatch.setattr(epoch, "_run_block", stop)
    with pytest.raises(Interrupted):
        run_epoch(tmp_path / "cut")
    monkeypatch.setattr(epoch, "_run_block", block)
    found = run_epoch(tmp_path / "cut")
    assert found["resumed"] and [r["stop"] for r in found["blocks"]] == [3, 6, 8, 30]
    assert [len(row["updates"]) for row in found["blocks"]] == [0, 0, 0, 1]
    for name, losses in whole.items():
        mine = [loss for n, loss in steps if n == name]
        assert mine[-STEPS:] == pytest.approx(losses, rel=1e-5)


def test_without_its_weights_an_interrupted_epoch_starts_over(tmp_path: Path) -> None:
    run_epoch(tmp_path)
    lines = (tmp_path / "e.jsonl").read_text().splitlines()
    (tmp_path / "e.jsonl").write_text("\n".join(lines[:4]) + "\n")  # up to the first block
    (tmp_path / "e.pt").unlink()
    found = run_epoch(tmp_path)
    assert [row["start"] for row in found["blocks"]] == [0, 3, 6, 8]


# ---- inference ---------------------------------------------------------------------------------


def test_inference_is_checked_and_timed_for_both_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "DENSE_LAYOUTS", ("contiguous", "channels_last"))
    journal = results.Journal(None, {})
    found = inference.run([LENET], steps=60, rounds=1, seconds=1.0, journal=journal)
    assert [row["batch"] for row in found["rows"]] == [1, 32]
    trained = found["rows"][0]["trained"]
    assert trained["steps"] == 60 and trained["test_accuracy"] > 0.3  # ten classes: chance is 0.1
    for row in found["rows"]:
        assert set(row["timings"]) == {"sparse", "contiguous", "channels_last"}
        assert max(row["errors"].values()) < 1e-4
    whole = complete(found)
    text = inference.tables(whole)
    assert "| lenet-5-caffe | 32 |" in text
    assert f"trained for 60 steps on {trained['data']}, test accuracy" in text
    assert plots.inference(whole, tmp_path / "f.png") is None
    monkeypatch.setattr(inference.contest, "relative_error", lambda *a: 0.5)
    with pytest.raises(WorkbenchError, match=r"logits differ .* 5\.0e-01"):
        inference.run([LENET], steps=4, rounds=1, seconds=1.0, journal=results.Journal(None, {}))


def test_a_net_without_data_is_trained_on_random_images_and_says_so() -> None:
    config = dataclasses.replace(LENET, net="wrn-28-2", batch_size=2)
    model, trained = inference._trained(config, 4)
    assert trained == {"steps": 4, "data": "random images", "test_accuracy": None}
    assert not model.training
    assert inference._training_line(trained) == "trained for 4 steps on random images."


def test_peak_memory_is_that_of_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    header = machine.header
    monkeypatch.setattr(networks.machine, "header", lambda: {**header(), "isa": "another"})
    with pytest.raises(WorkbenchError, match="expected a process with another kernels"):
        networks._peak(LENET, "contiguous")
