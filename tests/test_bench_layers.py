"""The benchmarks of single layers and operators: layers, ops, scaling, peers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_kernels.plan import use_backend
from sparse_kernels.workbench import machine
from sparse_kernels.workbench.bench import (
    contest,
    layers,
    ops,
    peer_entries,
    peers,
    plots,
    results,
    scaling,
    shapes,
)
from sparse_kernels.workbench.errors import WorkbenchError

CEILING = {"fma_per_second": 1e11, "bytes_per_second": 1e10, "how": "made up"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side; threads would only wait for each other
    yield
    torch.set_num_threads(before)


def complete(found: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What the command line adds to results before tables and figures see them."""
    return {"command": "c", "machine": machine.header(), "settings": settings, **found}


def run_layers(journal: results.Journal) -> dict[str, Any]:
    journal.row("ceiling", lambda: CEILING)
    return layers.run(
        names=("conv-small", "linear-small"), density=0.1, block="1x1", batch_size=8, rounds=2,
        seconds=1.0, compiled=False, journal=journal,
    )  # fmt: skip


def test_layers_have_speedup_roofline_and_figures(tmp_path: Path) -> None:
    found = run_layers(results.Journal(None, {}))
    for row in found["rows"]:
        timings = row["both"]["timings"]
        best = timings[row["both"]["dense_best"]]["median"]
        assert row["both"]["speedup"] == best / timings["sparse"]["median"]
        assert row["met"] == (row["both"]["speedup"] >= row["roofline"]["target"])
        assert len(timings["sparse"]["samples"]) == 2
    assert found["summary"]["layers"] == 2 and found["summary"]["geomean_wide_3x3"] is None
    whole = complete(found, density=0.1, block="1x1", batch_size=8, rounds=2)
    text = layers.tables(whole)
    assert "| conv-small | 33 |" in text and "Geometric mean" in text and "made up" in text
    for draw in (plots.layer_speedups, plots.roofline):
        assert draw(whole, tmp_path / "f.png") is None
        assert (tmp_path / "f.png").read_bytes()[:8] == PNG


def test_an_interrupted_run_of_layers_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j.jsonl"
    whole = run_layers(results.Journal(path, {}))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")  # identity, ceiling, first layer
    made = []
    measure = layers._measure

    def note(shape: shapes.LayerShape, *rest: Any) -> dict[str, Any]:
        made.append(shape.name)
        return measure(shape, *rest)

    monkeypatch.setattr(layers, "_measure", note)
    again = run_layers(results.Journal(path, {}))
    assert made == ["linear-small"]
    assert again["rows"][0] == json.loads(json.dumps(whole["rows"][0]))


def test_the_geometric_mean_is_over_wide_3x3_layers() -> None:
    rows = [
        {"forward": {"speedup": 2.0}, "both": {"speedup": s}, "wide_3x3": w, "met": w}
        for s, w in ((2.0, True), (8.0, True), (1.0, False))
    ]
    found = layers.summary(rows)
    assert found["geomean_wide_3x3"] == pytest.approx(4.0)
    assert found["geomean"] == pytest.approx(16 ** (1 / 3)) and found["met"] == 2


def test_ops_measure_each_pass_and_norm_and_pooling() -> None:
    found = ops.run(
        names=(), size="small", density=0.1, blocks=("1x1", "4x1"), batch_size=4, rounds=1,
        seconds=1.0, device="cpu", journal=results.Journal(None, {}),
    )  # fmt: skip
    operators = {row["operator"] for row in found["rows"]}
    for kind in ("conv2d", "linear"):
        assert {kind, f"{kind}_dgrad", f"{kind}_wgrad"} <= operators
    for kind in ("batch_norm+relu", "max_pool2d", "avg_pool2d"):
        assert {f"{kind} forward", f"{kind} backward"} <= operators
    assert len(found["rows"]) == 2 * 2 * 3 + 6
    for row in found["rows"]:
        assert row["gbytes_per_second"] > 0 and max(row["errors"].values()) < 1e-5
        assert (row["gflops"] > 0) == (row["block"] != "")
    text = ops.tables(complete(found, density=0.1))
    assert text.count("| conv2d_wgrad |") == 2 and "missing" not in text


def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.pass_call

    def wrong(module: nn.Module, *rest: Any) -> Any:
        call = real(module, *rest)
        return (lambda: call() * 1.01) if type(module) is nn.Linear else call

    monkeypatch.setattr(ops, "pass_call", wrong)
    with pytest.raises(WorkbenchError, match="linear_dgrad on linear-small, contiguous: relative"):
        ops.product(shapes.SMALL[1], "dgrad", 0.1, "1x1", 4, torch.device("cpu"))


def test_an_operator_without_backend_is_missing_with_the_reason() -> None:
    with use_backend("torch"):  # it multiplies by no sparse weight
        found = ops.product(shapes.SMALL[1], "forward", 0.1, "1x1", 4, torch.device("cpu"))
    assert isinstance(found, dict) and "no backend" in found["why"]
    whole = complete({"rows": [found]}, density=0.1)
    assert f"missing ({found['why']})" in ops.tables(whole)


def test_scaling_varies_one_thing_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, values in (("DENSITIES", (0.1, 0.5)), ("BATCHES", (3, 9)), ("WIDTHS", (8, 16))):
        monkeypatch.setattr(scaling, name, values)
    found = scaling.run(
        names=("conv-small",), axes=(), density=0.2, block="1x1", batch_size=5, rounds=1,
        seconds=1.0, compiled=False, journal=results.Journal(None, {}),
    )  # fmt: skip
    points = [(row["axis"], row["value"], row["batch"]) for row in found["rows"]]
    assert points == [
        ("density", 0.1, 5), ("density", 0.5, 5), ("batch", 3, 3), ("batch", 9, 9),
        ("width", 8, 5), ("width", 16, 5), ("threads", 1, 5),
    ]  # fmt: skip
    assert [round(r["density"], 2) for r in found["rows"]] == [0.1, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2]
    whole = complete(found, density=0.2, batch_size=5, block="1x1")
    text = scaling.tables(whole)
    assert "Break-even density of conv-small" in text and "| layer | threads |" in text
    for draw in (plots.density, plots.scaling):
        assert draw(whole, tmp_path / "f.png") is None
    assert "not measured" in str(plots.density({**whole, "rows": []}, tmp_path / "f.png"))


def test_break_even_is_where_the_ratio_crosses_one() -> None:
    def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"density": d, "speedup": s} for d, s in pairs]

    assert scaling.break_even(rows((0.4, 0.5), (0.2, 1.5))) == pytest.approx(0.3)
    assert scaling.break_even(rows((0.2, 3.0), (0.4, 1.5))) is None
    assert scaling.break_even(rows((0.2, 0.5))) is None


def run_peers() -> dict[str, Any]:
    return peers.run(
        names=("conv-small", "linear-small"), density=0.1, batch_size=8, rounds=1, seconds=1.0,
        journal=results.Journal(None, {}),
    )  # fmt: skip


def test_peers_that_are_not_installed_are_missing_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sparseprop", "sparseprop.modules.conv2d", "sparseprop.modules.linear",
                 "sparselab", "scipy"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
    found = run_peers()
    conv, linear = found["rows"]
    assert {"sparseprop", "sparselab", "scipy.sparse"} <= linear["missing"].keys()
    assert "import of sparselab" in linear["missing"]["sparselab"]
    assert "no convolution" in conv["missing"]["torch.sparse"]
    assert set(linear["forward"]["against"]) == {"torch.sparse"}
    assert set(found["summary"]) == {"torch.sparse", "all but scipy"}
    whole = complete(found, density=0.1, batch_size=8)
    text = peers.tables(whole)
    assert "Missing: sparselab (" in text and "Against torch.sparse: geometric mean" in text
    assert plots.peers(whole, tmp_path / "f.png") is None


def test_a_peer_that_computes_something_else_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = peer_entries._torch_csr

    def wrong(race: contest.Contest) -> contest.Entry:
        entry = real(race)
        return dataclasses.replace(entry, check=lambda: {"output": race.reference["output"] + 1})

    monkeypatch.setattr(peer_entries, "_torch_csr", wrong)
    linear = run_peers()["rows"][1]
    assert "torch.sparse: output differs" in linear["missing"]["torch.sparse"]
    assert "torch.sparse" not in linear["forward"]["timings"]


@pytest.mark.parametrize("name", peer_entries.NAMES)
@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
def test_installed_peers_agree_with_masked_dense(name: str, shape: shapes.LayerShape) -> None:
    package = name.split(",")[0].split(".")[0]
    pytest.importorskip(package, reason=f"the optional extra `peers` ({package}) is not installed")
    # 32, not the 33 of these shapes: sparseprop 0.1.14 leaves out what is beyond a multiple of 8.
    race = contest.set_up(dataclasses.replace(shape, batch=32), 0.2, (1, 1), 32)
    try:
        entry = peer_entries.make(name, race)
    except peer_entries.Unsupported as error:
        assert shape.size or name == "sparseprop, over the row", error
        return
    race.admit(entry)
    assert set(race.errors[name]) == (
        {"output"} if name in peer_entries.FORWARD_ONLY else {"output", "dx", "dvalues"}
    )


def test_sparseprop_counts_by_its_faster_way() -> None:
    row = {
        "both": {"against": {"sparseprop": 3.0, "sparseprop, over the row": 2.0}},
        "missing": {},
    }
    peers._keep_faster_variant(row)
    assert row["both"]["against"] == {"sparseprop": 2.0}
