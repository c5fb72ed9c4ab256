"""`sparse-kernels train --device`: on the GPU under the mark `gpu`; without one, that every tensor
goes to the contender's device, on torch's meta device, and that what cannot be is refused.
"""

from __future__ import annotations

import dataclasses
import json
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
    "train --data mnist-sample --density 0.1 --batch-size 200 --epochs 2 --holdout 0.8 "
    "--update-every 3 --compare dense --dense-baseline contiguous --name r --device cuda"
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
    config = TrainConfig(net=net, density=0.2, batch_size=8, device="meta")
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
    assert "A GPU" not in machine.one_line(found | {"device": "cpu"})
    assert machine.one_line(found | {"device": "cuda"}).startswith("A GPU, ")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU on this machine")
@pytest.mark.parametrize("net", ["lenet-300-100", "lenet-5-caffe"])
def test_a_net_trains_on_the_gpu_and_goes_on(net: str, tmp_path: Path) -> None:
    whole = invoke(tmp_path, "--net", net)
    assert whole.exit_code == 0, whole.output
    found = json.loads((tmp_path / "r" / "results.json").read_text())
    assert found["machine"]["device"] == "cuda"
    assert {run["contender"] for run in found["runs"]} == {"sparse", "dense"}
    on_cpu = invoke(tmp_path / "cpu", "--net", net, "--device", "cpu")
    assert on_cpu.exit_code == 0, on_cpu.output
    other = json.loads((tmp_path / "cpu" / "r" / "results.json").read_text())
    for run, cpu in zip(found["runs"], other["runs"], strict=True):
        first, expected = run["epochs"][0]["train_loss"], cpu["epochs"][0]["train_loss"]
        assert first == pytest.approx(expected, rel=1e-2)
        assert sum(x["nnz"] for x in run["layers"]) == sum(x["nnz"] for x in cpu["layers"])
    begun = invoke(tmp_path / "two", "--net", net, "--checkpoint-every", "2", "--epochs", "1")
    assert begun.exit_code == 0, begun.output
    again = invoke(tmp_path / "two", "--net", net, "--checkpoint-every", "2", "--epochs", "1",
                   "--resume")  # fmt: skip
    assert again.exit_code == 0 and "resuming from" in again.stdout, again.output


@dataclasses.dataclass
class Clock:
    waited: int = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_step_ends_when_the_gpu_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    contender = contenders.build_dense(TrainConfig(density=0.2), 0, "contiguous")
    batch = (torch.zeros(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
    contender.step(*batch)
    assert clock.waited == 0
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: self)
    contender.config = dataclasses.replace(contender.config, device="cuda")
    contender.step(*batch)
    assert clock.waited == 1
