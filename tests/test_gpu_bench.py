"""The GPU benchmark, rehearsed on the CPU: rows, journal, refusals. Its kernels are the CPU's."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
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
    return [*common, "--results", str(folder), "--state", str(folder / "state"), *rest]


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    found = json.loads((folder / f"gpu-{part}-small.json").read_text())
    assert found["complete"] and found["machine"]["commit"] and len(found["sources"]) == 1
    return list(found["rows"])


def test_every_part_measures_and_resumes(bench: Any, tmp_path: Path, capsys: Any) -> None:
    assert bench.main(arguments(tmp_path, "--minutes", "0")) == bench.LEFT
    text = (tmp_path / "gpu-steps-small.md").read_text()
    assert "NOT COMPLETE" in text and "| step" not in text
    assert bench.main(arguments(tmp_path, "--part", "targets")) == 0
    assert bench.main(arguments(tmp_path)) == 0
    assert "MISSING" not in capsys.readouterr().out
    parts = bench.OF_PARTS[:-1]
    first = {part: rows(tmp_path, part) for part in parts}
    for part in ("products", "steps", "vgg", "wrn", "resnet", "tuned"):
        for row in first[part]:
            training = row["training"]
            assert training["missing"] == {}
            assert any(name.startswith("sparse 10% 16x16") for name in training["speedups"])
            assert training["dense_best"].startswith("dense")
    for row in first["elements"]:
        for name in ("forward", "dgrad", "wgrad", "forward+wgrad"):
            assert "sparse cpu" in row[name]["speedups"] and row[name]["shares"]["sparse cpu"] > 0
            assert not any(contender.startswith("dense") for contender in row[name]["shares"])
        assert len(row["errors"]) == 3 and max(row["errors"].values()) < 2e-5
    assert {row["update"]["updates"] for row in first["update"]} == {3}
    table = (tmp_path / "gpu-elements-small.md").read_text()
    assert "may pass 100 %" in table
    assert all(line.endswith(" |  |") for line in table.splitlines() if "best dense" in line)
    tuned = first["tuned"][0]
    assert tuned["tuned"]["seconds"] > 0
    assert tuned["tuned"]["storage"] in ("compressed", "dense-masked")
    assert "sparse 10% 16x16 tuned" in tuned["training"]["speedups"]
    assert "tune took" in (tmp_path / "gpu-tuned-small.md").read_text()
    # A second run takes all rows over: even without time nothing is left.
    assert bench.main(arguments(tmp_path, "--minutes", "0")) == 0
    assert first == {part: rows(tmp_path, part) for part in parts}
    # What a machine has sent back becomes the same tables elsewhere.
    other = tmp_path / "elsewhere"
    report = ["--report", str(tmp_path / "state"), "--results", str(other)]
    assert bench.main(report) == 0
    assert first == {part: rows(other, part) for part in parts}


@pytest.mark.slow
def test_single_operators_go_on_too(bench: Any, tmp_path: Path) -> None:
    assert bench.main(arguments(tmp_path, "--part", "ops", "--minutes", "0.05")) in (0, bench.LEFT)
    before = (tmp_path / "state" / "bench.jsonl").read_text()
    assert bench.main(arguments(tmp_path, "--part", "ops")) == 0
    assert (tmp_path / "state" / "bench.jsonl").read_text().startswith(before)
    assert all(row["operator"]["speedup"] > 0 for row in rows(tmp_path, "ops"))


# Its third row never ends: however slow the process that kills it is, it comes before the end.
HELD = """
import sys, time
from tools.gpu_bench import __main__ as bench, elements
row, made = elements.element_row, []
def held(*rest):
    made.append(None)
    while len(made) > 2:
        time.sleep(1)
    return row(*rest)
elements.element_row = held
sys.exit(bench.main())
"""


def test_a_killed_benchmark_goes_on_and_times_no_row_twice(tmp_path: Path) -> None:
    path = tmp_path / "state" / "bench.jsonl"
    rest = ["--part", "elements", *arguments(tmp_path)]
    line = [sys.executable, "-m", "tools.gpu_bench", *rest]
    held = [sys.executable, "-c", HELD, *rest]
    process = subprocess.Popen(held, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and finished(path)["elements"] < 1:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(path)["elements"]
    assert 1 <= before < 3
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(path)["elements"] == len(rows(tmp_path, "elements")) == 4
    assert done.stdout.count("elements: ") == 4 - before + 1  # its rows, and the last line


def finished(path: Path) -> Counter[str]:
    """Lines of finished rows, by part."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return Counter(entry["key"].partition(":")[0] for entry in found if "key" in entry)


def test_rows_count_for_all_sources_that_make_them(bench: Any) -> None:
    """What the benchmark imports from this repository is in its fingerprint."""
    from tools.gpu_bench import state

    imported: set[str] = set()
    for file in (ROOT / "tools" / "gpu_bench").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
                imported.add(node.module or "")
    places = [ROOT / f"{folder}{name.replace('.', '/')}.py" for name in imported
              for folder in ("", "tools/", "tests/")]  # fmt: skip
    found = {path.relative_to(ROOT) for path in places if path.is_file()}
    assert {Path("tools/gpu_roofline.py"), Path("tools/gpu_journal.py")} <= found
    assert Path("tests/cases.py") in found
    for path in found:
        assert any(path.is_relative_to(source) for source in state.SOURCES), path


def test_built_in_rules_serve_again_after_a_tuned_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_kernels.backends import _cuda_variants
    from tools.gpu_bench import tuned

    monkeypatch.setattr(_cuda_variants, "_table", {"a site": _cuda_variants.STAGED})
    tuned.forget_choices()
    assert _cuda_variants._table == {}


def test_a_dense_form_that_broke_the_context_is_left_out(bench: Any) -> None:
    from tools.gpu_bench import elements, layers

    settings = layers.Settings(True, torch.device("cpu"), 3)
    settings.faults = {"dense contiguous": "it broke"}
    row = elements.element_row(elements.Kind(elements.SMALL[1], 4, "fp32", 1, 0.1), settings)
    for name in (*elements.PASSES, elements.BOTH):
        assert row[name]["dense_best"] == "dense channels_last"
        assert "dense contiguous" not in row[name]["timings"]
        assert row[name]["missing"]["dense contiguous"] == "it broke"


def test_the_order_of_targets_names_rows_that_there_are(bench: Any) -> None:
    from tools.gpu_bench.layers import Settings

    full = Settings(False, torch.device("cuda"), 7)
    assert [key for key, _ in bench.tasks(bench.TARGETS, full)] == list(bench.ORDER)
    for part in bench.OF_PARTS:
        keys = [key for key, _ in bench.tasks(part, full)]
        assert len(set(keys)) == len(keys), part


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


def test_a_wrong_pass_of_elements_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.backends import cpu
    from tools.gpu_bench import elements, layers

    right = cpu.linear_dgrad
    monkeypatch.setattr(cpu, "linear_dgrad", lambda *args: right(*args) * 1.01)
    settings = layers.Settings(True, torch.device("cpu"), 3)
    _, make = next(elements.elements(settings))
    row = make()
    assert "relative error" in row["dgrad"]["missing"]["sparse cpu"]
    assert row["dgrad"]["speedups"] == {} and "sparse cpu" in row["wgrad"]["speedups"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_cusparse_is_called_as_it_computes(bench: Any) -> None:
    """torch's CSR products, which are cuSPARSE's on a GPU, are right on the CPU for each pass."""
    from tools.gpu_bench import elements

    kind = elements.Kind(elements.SMALL[0], 8, "fp32", 1, 0.2)
    work = elements.Work(kind, torch.device("cpu"), torch.float32)
    for name in elements.PASSES:
        found = work.cusparse(name)()
        assert elements._error(work, name, "cuSPARSE", found, work.expected(name)) < 1e-6


def test_a_step_without_a_finite_loss_is_not_timed(bench: Any) -> None:
    from tools.gpu_bench.steps import training_step

    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        training_step(net, torch.ones(2, 4), 0, False)


def test_a_contender_that_breaks_the_context_is_left_out(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The row is tried again without it; the others are timed and the table names it."""
    from tools.gpu_bench import layers, measure

    calls: list[str] = []

    def wrong(label: str, *rest: Any) -> None:
        calls.append(label)
        raise RuntimeError("an illegal memory access")

    def broken(label: str, error: BaseException) -> None:
        raise measure.Broken(label, error) from error

    monkeypatch.setattr(layers, "check_layer", wrong)
    monkeypatch.setattr(layers, "still_works", broken)
    line = arguments(tmp_path, "--part", "products")
    assert bench.main(line) == bench.BROKEN
    assert bench.main(line) == 0
    (row,) = rows(tmp_path, "products")
    assert "illegal memory access" in row["training"]["missing"]["10% 16x16"]
    assert row["training"]["dense_best"] == "dense contiguous"
    assert calls == ["10% 16x16"]


# -- smoke -----------------------------------------------------------------------------------------


@pytest.mark.slow  # CI runs the same as a part of `make gpu-check`
def test_smoke_runs_every_operator_once(bench: Any, tmp_path: Path, capsys: Any) -> None:
    from sparse_kernels import ops
    from tools.gpu_bench import smoke

    assert smoke.operators_covered() == set(ops.OPERATORS)
    line = arguments(tmp_path, "--part", "smoke")
    assert bench.main([*line, "--minutes", "0"]) == bench.LEFT
    assert bench.main(line) == 0
    assert "'failed': 0" in capsys.readouterr().out
    text = (tmp_path / "state" / "smoke.jsonl").read_text()
    assert bench.main(line) == 0
    assert (tmp_path / "state" / "smoke.jsonl").read_text() == text, "a case ran twice"
    passed = [json.loads(x)["key"] for x in text.splitlines() if '"outcome": "passed"' in x]
    for op in ("linear_wgrad 16x16 fp32", "conv2d_dgrad 1x1 fp32", "batch_norm bf16", "dropout"):
        assert any(op in key for key in passed), op


def test_smoke_finds_a_wrong_operator(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from sparse_kernels.backends import cpu
    from tools.gpu_bench import smoke

    every = smoke.cases
    monkeypatch.setattr(smoke, "cases", lambda *a: [c for c in every(*a) if "_wgrad 1x1" in c[0]])
    right = cpu.conv2d_wgrad
    monkeypatch.setattr(cpu, "conv2d_wgrad", lambda *args: right(*args) + 1e-3)
    line = arguments(tmp_path, "--part", "smoke")
    assert bench.main(line) == 1
    out = capsys.readouterr().out
    assert "FAILED cpu conv2d_wgrad 1x1 fp32: AssertionError: conv2d_wgrad: relative error" in out
    monkeypatch.setattr(cpu, "conv2d_wgrad", right)
    assert bench.main(line) == 1, "a failure is told again, not run again"
    assert bench.main([*line, "--again"]) == 0
