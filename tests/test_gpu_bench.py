"""The GPU benchmark, rehearsed on the CPU: rows, journal, refusals. Its kernels are the CPU's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Behind everything else, so that the package under test stays the installed one.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from tools.gpu_bench import __main__ as module

    return module


def arguments(folder: Path, *rest: str) -> list[str]:
    common = ["--device", "cpu", "--size", "small", "--rounds", "3"]
    return [*common, "--results", str(folder), "--journals", str(folder / "journals"), *rest]


def test_every_part_measures_and_resumes(bench: Any, tmp_path: Path, capsys: Any) -> None:
    assert bench.main(arguments(tmp_path, "--minutes", "0")) == bench.LEFT
    text = (tmp_path / "gpu-steps-small.md").read_text()
    assert "NOT COMPLETE" in text and "| step" not in text
    assert bench.main(arguments(tmp_path)) == 0
    first = {}
    for part in bench.parts():
        found = json.loads((tmp_path / f"gpu-{part}-small.json").read_text())
        assert found["complete"] and found["machine"]["commit"]
        first[part] = found["rows"]
        for row in found["rows"]:
            training = row["training"]
            assert training["missing"] == {}
            assert any(name.startswith("sparse 10% 16x16") for name in training["speedups"])
            assert training["dense_best"].startswith("dense")
    assert "MISSING" not in capsys.readouterr().out
    # A second run takes all rows over: even without time nothing is left.
    assert bench.main(arguments(tmp_path, "--minutes", "0")) == 0
    for part, rows in first.items():
        assert json.loads((tmp_path / f"gpu-{part}-small.json").read_text())["rows"] == rows


def test_a_wrong_layer_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.nn import SparseLinear
    from tools.gpu_bench import layers

    right = SparseLinear.to_dense

    def wrong(self: SparseLinear) -> nn.Module:
        dense = right(self)
        with torch.no_grad():
            dense.get_parameter("weight").mul_(1.01)
        return dense

    monkeypatch.setattr(SparseLinear, "to_dense", wrong)
    settings = layers.Settings(True, torch.device("cpu"), 3)
    _, make = next(layers.products(settings))
    training = make()["training"]
    assert training["speedups"] == {}
    assert "relative error" in training["missing"]["10% 16x16"]


def test_a_step_without_a_finite_loss_is_not_timed(bench: Any) -> None:
    from tools.gpu_bench.steps import training_step

    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        training_step(net, torch.ones(2, 4), 0, False)
