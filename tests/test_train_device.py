"""`sparse-kernels train --device`: on the GPU under the mark `gpu`; without one, that every tensor
goes to the contender's device, on torch's meta device, and that what cannot be is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sparse_kernels import cli
from sparse_kernels.workbench import account, contenders, machine, models
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.contenders import Contender

WORDS = (
    "train --data mnist-sample --density 0.1 --batch-size 100 --epochs 2 --holdout 0.8 "
    "--update-every 7 --compare dense --dense-baseline contiguous --name r --device cuda"
)
HAS_GPU = torch.cuda.is_available()


def invoke(out: Path, *words: str) -> Any:
    return CliRunner().invoke(cli.main, [*WORDS.split(), "--out", str(out), *words])


@pytest.mark.skipif(HAS_GPU, reason="this machine has what the test misses")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    done = invoke(tmp_path)
    assert done.exit_code == 1 and "sees no CUDA device" in done.stderr
    assert not (tmp_path / "r" / "results.json").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.workbench import loop, ranks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "header", lambda: pytest.fail("expected no training"))
    two = ranks.Ranks()
    two.world = 2
    config = TrainConfig(data="mnist-sample", device="cuda")
    with pytest.raises(contenders.WorkbenchError, match="job of 2 processes"):
        loop.train(config, tmp_path, ranks=two)


@pytest.mark.parametrize("net", ["lenet-300-100", "lenet-5-caffe"])
@pytest.mark.parametrize("kind", ["sparse", "contiguous", "channels_last"])
def test_everything_goes_to_the_device(net: str, kind: str) -> None:
    """A meta tensor beside a CPU tensor raises, so a move that was forgotten shows."""
    config = TrainConfig(net=net, density=0.2, batch_size=8, device="meta", cost_weight=0.5)
    if kind == "sparse":
        on_device: Contender = contenders.build_sparse(config, 0, 10, 5)
    else:
        on_device = contenders.build_dense(config, 0, kind)
    for group in on_device.optimizer.param_groups:
        group["fused"] = False  # torch has no fused SGD for meta tensors
    tensors = [*on_device.model.parameters(), *on_device.model.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    shape = models.spec(net).input_shape
    images, labels = torch.zeros(8, *shape), torch.zeros(8, dtype=torch.long)
    losses: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:  # a meta loss has no number
        patch.setattr(torch.Tensor, "item", lambda self: losses.append(self) or 1.0)
        patch.setattr(contenders.finite, "gradients_finite", lambda model: True)
        on_device.step(images, labels)
    assert [loss.device.type for loss in losses] == ["meta"]
    assert account.output_positions(on_device.model, shape)
    for parameter in on_device.model.parameters():
        assert parameter.grad is not None and parameter.grad.device.type == "meta"


def test_accuracy_moves_images_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(density=0.2, device="meta")
    contender = contenders.build_dense(config, 0, "contiguous")
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: {"meta": 5}[self.device.type])
    batch = (torch.zeros(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
    assert contender.accuracy([batch]) == 5 / 8


def test_the_gpu_is_in_the_line_of_the_machine() -> None:
    found = machine.header() | {"gpu": "A GPU"}
    assert "A GPU" not in machine.one_line(found | machine.device_header("cpu"))
    line = machine.one_line(found | machine.device_header("cuda"))
    assert re.match(r"A GPU \(float32 of torch: conv \w+, matmul \w+\), ", line)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # keeps the test honest where there is no GPU
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("net", ["lenet-300-100", "lenet-5-caffe"])
def test_a_net_learns_as_on_the_cpu_and_goes_on(
    net: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--net", net, "--init", "scaled", "--lr", "0.02", "--holdout", "0.5")
    runs = {}
    for name in dict.fromkeys(("cpu", device)):
        done = invoke(tmp_path / name, *words, "--device", name)
        assert done.exit_code == 0, done.output
        runs[name] = json.loads((tmp_path / name / "r" / "results.json").read_text())
    assert runs[device]["machine"]["device"] == device
    for ours, theirs in zip(runs[device]["runs"], runs["cpu"]["runs"], strict=True):
        first, last = (epoch["train_loss"] for epoch in ours["epochs"])
        assert last < 0.95 * first
        assert last == pytest.approx(theirs["epochs"][1]["train_loss"], rel=1e-2)
        assert sum(x["nnz"] for x in ours["layers"]) == sum(x["nnz"] for x in theirs["layers"])

    step = Contender.step

    def struck(self: Contender, *arguments: Any) -> float:
        if self.name == "sparse" and self.steps_done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Contender, "step", struck)
        stopped = invoke(tmp_path / "two", *words, "--device", device)
    assert stopped.exit_code == 143 and "stopped at step 2" in stopped.stderr, stopped.output
    resumed = invoke(tmp_path / "two", *words, "--device", device, "--resume")
    assert resumed.exit_code == 0 and "(step 2)" in resumed.stdout, resumed.output
    found = json.loads((tmp_path / "two" / "r" / "results.json").read_text())
    for ours, whole in zip(found["runs"], runs[device]["runs"], strict=True):
        for epoch, other in zip(ours["epochs"], whole["epochs"], strict=True):
            assert epoch["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def test_a_gpu_has_ended_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before accuracies in front of a mask update, which are timed apart, and after the step."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    contender = contenders.build_sparse(TrainConfig(density=0.2), 0, 10, 1)
    assert contender.masking is not None
    monkeypatch.setattr(contender.masking, "step", lambda: happened.append("masks"))
    batch = (torch.zeros(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
    contender.step(*batch, lambda: happened.append("look"))
    assert happened == ["look", "masks"]
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: self)
    contender.config = dataclasses.replace(contender.config, device="cuda")
    happened.clear()
    contender.step(*batch, lambda: happened.append("look"))
    assert happened == ["wait", "look", "masks", "wait"]


def test_block_auto_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = invoke(tmp_path, "--block", "auto")
    assert done.exit_code == 1 and "--device cuda with --block auto" in done.stderr


def test_memory_that_does_not_suffice_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(contenders.SparseMomentum, "step", fails)
    done = invoke(tmp_path, "--device", "cpu")
    assert done.exit_code == 1 and "not enough memory (CUDA out of memory" in done.stderr
