"""``sparse-kernels bench``: every command from options to files, and mistakes in one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from sparse_kernels import _cli_bench_nets, cli
from sparse_kernels.workbench import machine
from sparse_kernels.workbench.bench import index, layers, roofline

CEILING = {"fma_per_second": 1e11, "bytes_per_second": 1e10, "how": "made up"}
QUICK = "--rounds 1 --seconds 0 --threads 1"
COMMANDS = {
    "ops": f"ops --size small --block 4x1 {QUICK}",
    "layers": f"layers --layer linear-small --layer conv-small --block 4x1 {QUICK}",
    "scaling": f"scaling --layer linear-small --axis threads {QUICK}",
    "peers": f"peers --layer linear-small {QUICK}",
    "networks": "networks --net lenet-300-100 --net lenet-5-caffe --batch-size 8 --steps 1 "
    "--seconds 0 --threads 1 --no-memory --dense-baseline contiguous",
    "epoch": "networks --net lenet-300-100 --batch-size 8 --epoch --max-steps 24 --threads 1 "
    "--dense-baseline contiguous --redistribution momentum",
    "patterns": "networks --net lenet-300-100 --batch-size 8 --patterns start,1 --steps 1 "
    "--threads 1 --dense-baseline contiguous",
    "inference": f"inference --net lenet-300-100 --batch-size 8 --steps 4 {QUICK}",
}  # fmt: skip
FIGURES = {"ops": 0, "layers": 2, "scaling": 1, "peers": 1, "networks": 1}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roofline, "measure", lambda: CEILING)
    for name in machine.environment():  # a command is told with what stands there
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def invoke(words: str) -> Result:
    return CliRunner().invoke(cli.main, ["bench", *shlex.split(words)])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_writes_json_table_and_figures_that_name_it(name: str, tmp_path: Path) -> None:
    if name == "inference":
        torch._dynamo.reset()
    done = invoke(f"{COMMANDS[name]} --out {shlex.quote(str(tmp_path))}")
    assert done.exit_code == 0, done.output
    written = sorted(path.name for path in tmp_path.iterdir())
    tables = [f for f in written if f.endswith(".md")]
    assert len(tables) == (2 if name == "networks" else 1)
    assert all(table.startswith(f"{name}-") for table in tables)
    # Neither a journal nor weights nor half a file stays.
    assert {Path(f).suffix for f in written} <= {".json", ".md", ".png"}
    assert len([f for f in written if f.endswith(".png")]) == FIGURES.get(name, 1) * len(tables)
    for table in tables:
        results = json.loads((tmp_path / table).with_suffix(".json").read_text())
        kind = "networks" if name in ("epoch", "patterns") else name
        assert results["command"].startswith(f"sparse-kernels bench {kind} ")
        assert {"cpu", "isa", "threads", "torch", "commit"} <= results["machine"].keys()
        assert f"`{results['command']}`" in (tmp_path / table).read_text()


def test_the_command_in_the_results_is_accepted_and_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def remember(**settings: Any) -> dict[str, Any]:
        seen.append({k: v for k, v in settings.items() if k != "journal"})
        return {"rows": [], "summary": {}, "ceiling": {}}

    monkeypatch.setattr(layers, "run", remember)
    monkeypatch.setattr(layers, "tables", lambda results: "table")
    for draw in ("layer_speedups", "roofline"):
        monkeypatch.setattr(f"sparse_kernels.workbench.bench.plots.{draw}", lambda *a: "none")
    monkeypatch.setenv("SPARSE_KERNELS_ISA", "baseline")
    out = shlex.quote(str(tmp_path / "a b"))
    assert (
        invoke(f"layers --layer wrn --layer vgg --compile --density 0.1 --out {out}").exit_code == 0
    )
    (path,) = (tmp_path / "a b").glob("*.json")
    command = json.loads(path.read_text())["command"]
    assert command.startswith("SPARSE_KERNELS_ISA=baseline sparse-kernels bench layers ")
    assert invoke(command.split(" bench ", 1)[1]).exit_code == 0
    assert seen[0] == seen[1] and seen[0]["names"] == ("wrn", "vgg") and seen[0]["compiled"]


def test_results_go_below_the_machine_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_name", lambda: "Some (R) CPU @ 2.50GHz")
    monkeypatch.chdir(tmp_path)
    assert invoke(f"ops --size small --block 1x1 {QUICK}").exit_code == 0
    (table,) = (tmp_path / "benchmarks/results/some-r-cpu-2-50ghz").glob("*.md")
    assert table.name.startswith("ops-small-d5-1x1-1t-")


def test_results_of_other_settings_have_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"peers --layer linear-small {QUICK} --out {tmp_path}"
    assert invoke(words).exit_code == 0 and invoke(f"{words} --batch-size 8").exit_code == 0
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert invoke(words).exit_code == 0
    isa = machine.header()["isa"].replace(" ", "-")
    names = sorted(path.stem for path in tmp_path.glob("*.json"))
    plain = f"1t-{isa}"
    assert names == sorted(
        f"peers-linear-small-d5-{end}" for end in (plain, f"b8-{plain}", f"{plain}-thp")
    )
    (thp,) = tmp_path.glob("*-thp.json")
    assert json.loads(thp.read_text())["command"].startswith(
        "THP_MEM_ALLOC_ENABLE=1 sparse-kernels bench peers --layer linear-small "
    )


def test_a_lower_instruction_set_holds_for_worker_processes(tmp_path: Path) -> None:
    """As a process of its own: the set is chosen when the module is loaded."""
    words = "networks --net lenet-300-100 --batch-size 8 --steps 1 --seconds 0 --threads 1 "
    words += f"--dense-baseline contiguous --out {shlex.quote(str(tmp_path / 'r' / 'cpu'))}"
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "README.md").write_text(f"{index.BEGIN}\n{index.END}\n")
    environment = {name: v for name, v in os.environ.items() if name not in machine.environment()}
    done = subprocess.run(
        [sys.executable, "-m", "sparse_kernels.cli", "bench", *shlex.split(words)],
        env={**environment, "SPARSE_KERNELS_ISA": "baseline",
             "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "r" / "cpu").glob("*.json")
    assert path.stem == "networks-lenet-300-100-d5-1x1-b8-1t-baseline"
    found = json.loads(path.read_text())
    assert found["machine"]["isa"] == "baseline"
    assert set(found["peak_memory"]) == {"sparse", "sparse, signal", "contiguous"}
    assert found["command"].startswith(
        "SPARSE_KERNELS_ISA=baseline sparse-kernels bench networks --net lenet-300-100 "
    )
    # A benchmark puts itself into the index beside its machine's folder.
    assert f"[{path.stem}](cpu/{path.stem}.md)" in (tmp_path / "r" / "README.md").read_text()


def test_an_interrupted_benchmark_goes_on_unless_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"layers --layer linear-small --layer conv-small {QUICK} --out {tmp_path}"
    real, made = layers._measure, []

    def cut_off(shape: Any, *rest: Any) -> Any:
        made.append(shape.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(shape, *rest)

    monkeypatch.setattr(layers, "_measure", cut_off)
    assert invoke(words).exit_code != 0
    (journal,) = tmp_path.glob("*.jsonl")
    kept = journal.read_text()
    done = invoke(words)
    assert done.exit_code == 0 and "going on after 2 rows" in done.output
    assert made == ["linear-small", "conv-small", "conv-small"] and not journal.exists()
    journal.write_text(kept)
    assert "going on" not in invoke(f"{words} --fresh").output
    assert made[3:] == ["linear-small", "conv-small"]


MISTAKES = {
    "layers --layer conv-1": "--layer: expected one of vgg-3-64-32",
    "layers --density 0": "--density: expected a number above 0",
    "layers --block four --layer linear-small": "--block: expected rows x columns",
    "networks --net resnet": "unknown net 'resnet'",
    "networks --epoch --patterns start": "expected one of them",
    "networks --net lenet-300-100 --patterns 1,start": "--patterns: expected start and increasing",
    "networks --net lenet-300-100 --patterns soon": "--patterns: expected start and increasing",
    "networks --net lenet-300-100 --epoch --data-dir nowhere": "nowhere: this directory",
    "inference --net lenet-300-100 --block 512x512": "no layer of lenet-300-100 can be sparse",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words: str, tmp_path: Path) -> None:
    done = invoke(f"{words} --threads 1 --out {tmp_path}")
    assert done.exit_code == 1, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and MISTAKES[words] in errors[0]
    assert not list(tmp_path.glob("*.json"))


def test_pattern_names_are_numbers_of_updates() -> None:
    assert _cli_bench_nets._updates("start,1,10") == (0, 1, 10)
    assert _cli_bench_nets._updates("3") == (3,)
