"""What is made of committed results: README's figure, parts before and after, the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sparse_kernels import cli
from sparse_kernels.workbench.bench import index, overview
from sparse_kernels.workbench.errors import WorkbenchError

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
ZEN3 = RESULTS / "amd-epyc-zen3-2cores"
BEFORE, AFTER = ZEN3 / "bench-step-vgg16-d.json", ZEN3 / "networks-vgg16-d-d5-1x1-2t-avx2.json"
PNG = b"\x89PNG\r\n\x1a\n"


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["bench", *map(str, words)])


def changed(source: Path, to: Path, **parts: dict[str, Any]) -> Path:
    """A copy of a result in which keys of "settings" or "machine" are others."""
    results = json.loads(source.read_text())
    for part, values in parts.items():
        results[part].update(values)
    to.write_text(json.dumps(results))
    return to


# ---- figures -----------------------------------------------------------------------------------


def test_the_readme_figure_comes_from_the_newest_committed_results(tmp_path: Path) -> None:
    done = invoke("figure", "readme", "--from", ZEN3, "--to", tmp_path / "speed.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "speed.png").read_bytes()[:8] == PNG
    epoch = overview.newest(ZEN3, "epoch", net="vgg16-d", density=0.05)
    assert epoch["speedup"] == epoch["seconds"]["dense"] / epoch["seconds"]["sparse"]


def test_the_newest_whole_run_with_the_usual_allocator_counts(tmp_path: Path) -> None:
    source = ZEN3 / "epoch-vgg16-d-d5-1x1-2t-avx2.json"
    old, new, later = ({"date": f"2026-0{month}-01T00:00:00"} for month in (1, 2, 3))
    changed(source, tmp_path / "epoch-a.json", machine={**new, "commit": "wanted"})
    changed(source, tmp_path / "epoch-b.json", machine=old)
    changed(source, tmp_path / "epoch-c.json", machine=later, settings={"max_steps": 24})
    changed(source, tmp_path / "epoch-d.json", machine=later, settings={"block": "4x1"})
    changed(source, tmp_path / "epoch-e.json",
            machine={**later, "environment": {"THP_MEM_ALLOC_ENABLE": "1"}})  # fmt: skip
    found = overview.newest(tmp_path, "epoch", net="vgg16-d", block="1x1")
    assert found["machine"]["commit"] == "wanted"
    done = invoke("figure", "readme", "--from", tmp_path, "--to", tmp_path / "f.png")
    assert (
        done.exit_code == 1 and "expected a result layers-*.json with density 0.05" in done.stderr
    )


def test_parts_before_and_after_are_drawn(tmp_path: Path) -> None:
    to = tmp_path / "parts.png"
    done = invoke("figure", "parts", BEFORE, AFTER, "--label", "old", "--label", "new", "--to", to)
    assert done.exit_code == 0, done.output
    assert to.read_bytes()[:8] == PNG


def test_parts_of_other_nets_or_machines_do_not_stand_side_by_side(tmp_path: Path) -> None:
    for part, values in (("settings", {"density": 0.1}), ("machine", {"threads": 8})):
        other = changed(AFTER, tmp_path / "other.json", **{part: values})
        with pytest.raises(WorkbenchError, match=f"expected {next(iter(values))} .* got"):
            overview.parts([BEFORE, other], ["a", "b"], tmp_path / "f.png")
    layers = ZEN3 / "layers-d5-1x1-2t-avx2.json"
    for words, message in (
        ((BEFORE, AFTER, "--label", "one"), "--label: expected one per file, 2; got 1"),
        ((layers,), "expected results with timings, parts"),
        ((tmp_path / "nowhere.json",), "expected the JSON results of `sparse-kernels bench`"),
    ):
        done = invoke("figure", "parts", *words, "--to", tmp_path / "f.png")
        assert done.exit_code == 1 and message in done.stderr
    assert not (tmp_path / "f.png").exists()


# ---- the index ---------------------------------------------------------------------------------


def test_the_committed_index_lists_what_lies_there() -> None:
    text = (RESULTS / "README.md").read_text()
    between = text.split(index.BEGIN)[1].split(index.END)[0].strip()
    assert between == "\n".join(index.lines(RESULTS)), "run `sparse-kernels bench index`"
    tables = [*RESULTS.glob("*/*.md"), *RESULTS.glob("*/*/sweep.md")]
    for table in tables:
        assert f"]({table.relative_to(RESULTS).as_posix()})" in between


def test_an_index_tells_result_headline_and_command(tmp_path: Path) -> None:
    (tmp_path / "some-cpu").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{index.BEGIN}\nold\n{index.END}\nafter\n")
    rows = {"rows": [{"speedup": 2.0}, {"why": "none"}, {"speedup": 3.0}]}
    header = {"date": "2026-01-02T03:04:05", "commit": "abc"}
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "ops-d5": (rows, "ops: 2 measurements, 2.00x to 3.00x"),
        "scaling-d5": (rows, "scaling: 2 measurements, 2.00x to 3.00x"),
        "patterns-x": ({"speedup": 4.0}, "steps of net by pattern: at least 4.00x"),
        "peers-d5": ({"summary": {}}, "peers: none ran"),
        "signals-net": (
            {
                "rows": [
                    {"signal": "exact", "epoch_seconds": 276.2},
                    {"signal": "window", "epoch_seconds": None},
                    {"signal": "random", "epoch_seconds": 0.871},
                ]
            },
            "growth signals, an epoch of net: exact 276 s, random 0.871 s",
        ),
        "workers-net": ({}, "workers of net"),
    }
    for name, (found, _) in kinds.items():
        whole = {"machine": header, "settings": {"net": "net"}, "command": f"do {name}", **found}
        (tmp_path / "some-cpu" / f"{name}.md").write_text("table")
        (tmp_path / "some-cpu" / f"{name}.json").write_text(json.dumps(whole))
    made = tmp_path / "some-cpu" / "mnist"
    made.mkdir()
    run = {"name": "a", "net": "wide-mlp width=8", "machine": header}
    (made / "sweep.jsonl").write_text(json.dumps(run) + "\n" + json.dumps({**run, "name": "b"}))
    assert invoke("index", tmp_path).exit_code == 0
    text = readme.read_text()
    assert (
        "| [mnist](some-cpu/mnist/sweep.md) | sweep: 2 runs of wide-mlp | 2026-01-02, abc |" in text
    )
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for name, (_, headline) in kinds.items():
        row = f"| [{name}](some-cpu/{name}.md) | {headline} | 2026-01-02, abc | `do {name}` |"
        assert row in text
    assert index.refresh(tmp_path) == readme and readme.read_text() == text


def test_without_a_marked_readme_there_is_no_index(tmp_path: Path) -> None:
    assert index.refresh(tmp_path) is None
    done = invoke("index", tmp_path)
    assert done.exit_code == 1 and "README.md: expected a file with the lines" in done.stderr
