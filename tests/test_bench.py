"""The benchmark suite below the command line: timing, journal, shapes, checks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_kernels.workbench import machine, timing
from sparse_kernels.workbench.bench import contest, results, roofline, shapes
from sparse_kernels.workbench.errors import WorkbenchError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side; threads would only wait for each other
    yield
    torch.set_num_threads(before)


# ---- timing ------------------------------------------------------------------------------------


def test_interleave_takes_turns_after_warming_up() -> None:
    calls: list[str] = []
    timings = timing.interleave(
        {name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warmup=2
    )
    assert "".join(calls) == "aabb" + "ababab"
    assert all(t.rounds == 3 and 0 <= t.low <= t.median <= t.high for t in timings.values())


def test_interleave_repeats_short_calls_and_keeps_to_its_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def lasts(seconds: float) -> Any:
        def call() -> None:
            now[0] += seconds

        return call

    timings = timing.interleave(
        {"short": lasts(0.001), "long": lasts(2.0)}, rounds=9, min_seconds=0.01, budget=5.0
    )
    # 0.01 + 2 seconds a round: 5 seconds are over after the third.
    assert [t.rounds for t in timings.values()] == [3, 3]
    assert timings["short"].median == pytest.approx(0.001)
    assert timings["long"].median == pytest.approx(2.0)
    assert timing.interleave({"long": lasts(9.0)}, rounds=2, budget=0.0)["long"].rounds == 2


def test_summarize_gives_median_and_quartiles() -> None:
    five = timing.summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert five == timing.Timing(3.0, 2.0, 4.0, 5, (4.0, 1.0, 3.0, 2.0, 5.0))
    assert timing.summarize([2.0]) == timing.Timing(2.0, 2.0, 2.0, 1, (2.0,))
    with pytest.raises(ValueError, match="at least one"):
        timing.summarize([])


# ---- journal and files -------------------------------------------------------------------------


def test_a_journal_takes_over_what_an_interrupted_run_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    settings = {"nets": ("a", "b"), "density": 0.05}
    first = results.Journal(path, settings)
    first.row("one", lambda: {"x": 1})
    first.row("two", lambda: {"x": 2})
    with path.open("a") as file:
        file.write('{"key": "three", "ro')  # cut off while it was being written
    second = results.Journal(path, settings)
    assert second.resumed == 2
    assert second.row("one", lambda: pytest.fail("made twice")) == {"x": 1}
    second.row("three", lambda: {"x": 3})
    assert set(results.Journal(path, settings).rows) == {"one", "two", "three"}
    other = results.Journal(path, {**settings, "density": 0.1})
    assert other.resumed == 0 and not other.rows
    other.remove()
    assert not path.exists()


def test_a_journal_of_another_commit_or_of_garbage_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j.jsonl"
    results.Journal(path, {}).add("one", {})
    monkeypatch.setattr(machine, "commit", lambda: "another")
    assert results.Journal(path, {}).resumed == 0
    path.write_text("no json\n")
    assert results.Journal(path, {}).resumed == 0
    assert json.loads(path.read_text().splitlines()[0])["commit"] == "another"


def test_publish_writes_files_that_name_the_command(tmp_path: Path) -> None:
    def draw(_: dict[str, Any], path: Path) -> str | None:
        path.write_bytes(PNG)
        return None

    found = {"command": "sparse-kernels bench x", "rows": [1]}
    files, missing = results.publish(
        tmp_path, "x", found, "| a |", [("", draw), ("-y", lambda *a: "no figure")]
    )
    assert [f.name for f in files] == ["x.json", "x.md", "x.png"] and missing == ["no figure"]
    assert json.loads(files[0].read_text()) == found
    text = files[1].read_text()
    assert "| a |" in text and "![x](x.png)" in text and "`sparse-kernels bench x`" in text


# ---- the machine -------------------------------------------------------------------------------


def test_the_header_tells_what_allocator_and_threads_were_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in machine.environment():
        monkeypatch.delenv(name)
    assert machine.environment() == {} and machine.allocator_tag({}) == ""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("LD_PRELOAD", "/some/where/libjemalloc.so.2 libx.so")
    monkeypatch.setenv("SECRET", "x")
    header = machine.header()
    assert header["environment"] == {
        "LD_PRELOAD": "libjemalloc.so.2:libx.so", "OMP_WAIT_POLICY": "active",
        "THP_MEM_ALLOC_ENABLE": "1",
    }  # fmt: skip
    assert machine.allocator_tag(header["environment"]) == "thp-jemalloc-x"
    assert ", allocator thp-jemalloc-x, " in machine.one_line(header)
    assert machine.allocator_tag({"MALLOC_ARENA_MAX": "1"}) == "malloc"
    assert machine.allocator_tag({"THP_MEM_ALLOC_ENABLE": "0"}) == ""
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(machine, "_HUGE_PAGES", pages)
    assert machine.huge_pages() == "madvise"
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "none")
    assert machine.huge_pages() is None


def test_a_journal_of_another_allocator_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results.Journal(tmp_path / "j", {}).add("one", {})
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert results.Journal(tmp_path / "j", {}).resumed == 0


# ---- shapes and roofline -----------------------------------------------------------------------


def test_the_list_has_what_the_targets_name() -> None:
    assert len({shape.name for shape in shapes.LAYERS}) == len(shapes.LAYERS)
    for net in ("VGG16-D", "WRN-16-8", "ResNet-50", "linear"):
        assert any(shape.net == net for shape in shapes.LAYERS)
    resnet = [shape for shape in shapes.LAYERS if shape.net == "ResNet-50"]
    assert {shape.kernel for shape in resnet} == {1, 3, 7}
    assert {shape.stride for shape in resnet} == {1, 2} and {s.batch for s in resnet} == {32}
    assert sum(shape.is_wide_3x3 for shape in shapes.LAYERS) >= 10
    assert {s.name for s in shapes.CORE} >= {"vgg-64-64-32", "vgg-512-512-2", "linear-4096"}


@pytest.mark.parametrize("shape", [*shapes.SMALL, *shapes.LAYERS[-12:-3:4]], ids=lambda s: s.name)
def test_shapes_count_what_their_layers_do(shape: shapes.LayerShape) -> None:
    layer = shape.dense()
    assert layer.weight.numel() == shape.weights
    assert (layer.bias is not None) == shape.bias
    y = layer(torch.zeros(shape.input_shape(2)))
    assert y.numel() == 2 * shape.rows * shape.positions


def test_layers_are_chosen_by_name_or_beginning() -> None:
    assert shapes.choose((), "core") == shapes.CORE
    assert [s.name for s in shapes.choose(("linear-1024",), "all")] == ["linear-1024"]
    assert {s.net for s in shapes.choose(("vgg", "vgg-64"), "all")} == {"VGG16-D"}
    assert "linear-small" not in [s.name for s in shapes.choose(("linear",), "all")]
    with pytest.raises(WorkbenchError, match="expected one of vgg-3-64-32.*got 'conv-1'"):
        shapes.choose(("conv-1",), "all")


def test_the_roofline_is_the_larger_of_arithmetic_and_memory() -> None:
    shape = shapes.LayerShape("x", 100, 200)
    nnz, batch = 1000, 8
    moved = shapes.compulsory_bytes(shape, batch, nnz)
    x, y = 4 * 8 * 200, 4 * 8 * 100
    assert moved["forward"] == x + y + 8 * nnz
    # Backward: grad-output, x and dx, values read and written, one index.
    assert moved["total"] == moved["forward"] + y + 2 * x + 12 * nnz
    fast = {"fma_per_second": 1e15, "bytes_per_second": 1e6}
    limit = roofline.limits(shape, batch, nnz, 1.0, fast)
    assert limit["bound"] == "memory" and limit["fma"] == 3 * nnz * batch
    assert limit["roofline_gain"] == pytest.approx(1e6 / moved["total"])
    assert limit["target"] == roofline.TARGET_SPEEDUP
    slow = roofline.limits(shape, batch, nnz, 1.0, {**fast, "fma_per_second": 12_000.0})
    assert slow["bound"] == "arithmetic" and slow["roofline_gain"] == pytest.approx(0.5)
    assert slow["target"] == pytest.approx(0.35)


def test_the_ceiling_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SIDES", (64, 128))
    monkeypatch.setattr(roofline, "_STREAM_FLOATS", 2**16)
    found = roofline.measure()
    assert found["fma_per_second"] > 1e6 and found["bytes_per_second"] > 1e6
    assert "64, 128" in found["how"]


# ---- contests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize("block", [(1, 1), (4, 1)])
def test_every_contender_computes_the_masked_layer(
    shape: shapes.LayerShape, block: tuple[int, int]
) -> None:
    race = contest.set_up(shape, 0.2, block, 5)
    assert race.x.shape[0] == 33  # the layer's own batch
    race.admit(contest.sparse_entry(race))
    names = [entry.name for entry in contest.dense_entries(race, compiled=False)]
    assert names == (["contiguous", "channels_last"] if shape.size else ["contiguous"])
    assert set(race.errors) == {"sparse", *names}
    assert all(0 <= e < 1e-5 for errors in race.errors.values() for e in errors.values())
    with torch.no_grad():
        race.sparse.values[0] += 0.1
    with pytest.raises(WorkbenchError, match=rf"{shape.name}, sparse: output .* not timed"):
        race.admit(contest.sparse_entry(race))


@pytest.mark.parametrize("key", ["output", "dx", "dvalues"])
def test_a_wrong_result_of_any_kind_is_refused(key: str) -> None:
    race = contest.set_up(shapes.SMALL[1], 0.2, (1, 1), 5)
    entry = contest.sparse_entry(race)
    right = entry.check()
    wrong = {**right, key: right[key] * 1.001}
    with pytest.raises(WorkbenchError, match=f"sparse: {key} differs"):
        race.admit(dataclasses.replace(entry, check=lambda: wrong))
    nan = {**right, key: right[key] * float("nan")}
    assert race.invite("peer", lambda: dataclasses.replace(entry, check=lambda: nan)) is None
    assert key in race.missing["peer"]


def test_a_pattern_of_another_density_is_refused() -> None:
    layer = contest.make_sparse(shapes.SMALL[1].dense(), 0.2, (1, 1))
    contest.check_nnz(layer, 0.2, "layer")
    with pytest.raises(WorkbenchError, match="layer: expected 672 of 6720 blocks stored, got 1344"):
        contest.check_nnz(layer, 0.1, "layer")


def test_relative_error_is_never_nan() -> None:
    one, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert contest.relative_error(one, one) == 0.0
    assert contest.relative_error(bad, one) == float("inf")
    assert contest.relative_error(one * 1.1, one) == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="expected shape"):
        contest.relative_error(torch.ones(1), one)


def test_a_compiled_layer_that_does_not_run_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    race = contest.set_up(shapes.SMALL[0], 0.2, (1, 1), 5)
    names = [entry.name for entry in contest.dense_entries(race, compiled=True)]
    assert names == ["contiguous", "channels_last"]
    assert race.missing["compile"] == "RuntimeError: no C++ compiler"
