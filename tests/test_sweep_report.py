"""Reports of sweeps: means, spreads and tests over seeds are right, and the page stands alone."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner
from sweep_support import MACHINE, row

from sparse_kernels import cli
from sparse_kernels.workbench import machine, sweep_report, sweep_tables


def test_the_report_names_every_machine_and_commit(tmp_path: Path) -> None:
    later = {**MACHINE, "commit": "d", "date": "2026-11-22"}
    other = {**MACHINE, "cpu": "z"}
    headers = [later, other, MACHINE, MACHINE]
    text = machine.several(headers)
    assert text.count("x, 1 threads") == 1 and "(c, d), 2026-11-22" in text
    assert "z, 1 threads" in text and text.count("(c)") == 1
    rows = [{**row("set", i, 0.9), "machine": header} for i, header in enumerate(headers)]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sweep_report.write(tmp_path)
    assert text in (tmp_path / "sweep.md").read_text()


def test_means_errors_and_paired_tests() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the paired test is scipy's")
    ours, theirs = [0.95, 0.96, 0.97], [0.90, 0.93, 0.93]
    rows = [row("sparse-momentum", i, a) for i, a in enumerate(ours)]
    rows += [row("set", i, a) for i, a in enumerate(theirs)] + [row("set", 0, 0.5, 0.1)]
    head, *lines = sweep_tables.table(rows)
    found = {(line[1], line[2]): dict(zip(head, line, strict=True)) for line in lines}
    base = found["5 %", "sparse-momentum"]
    error = statistics.stdev([5.0, 4.0, 3.0]) / 3**0.5
    assert base["n"] == "3" and base["test error in %"] == f"4.00 +- {error:.2f}"
    other = found["5 %", "set"]
    assert other["error minus sparse-momentum"] == "+4.00 (n = 3)"
    p = stats.ttest_rel(theirs, ours).pvalue
    assert other["p (paired t)"] == f"{p:.3g}"
    head, line = sweep_tables.pooled(rows)
    over = dict(zip(head, line, strict=True))
    assert (over["method"], over["seeds"]) == ("set", "3")
    bound = 4.0 + stats.t.ppf(0.95, 2) * statistics.stdev([5.0, 3.0, 4.0]) / 3**0.5
    assert over["95 % bound"] == f"< {bound:+.3f}"
    assert over["error of sparse-momentum relative to it"] == f"{100 * (4 / 8 - 1):+.1f} %"
    lone = found["10 %", "set"]
    assert lone["test error in %"] == "50.00" and lone["p (paired t)"] == ""


def test_densities_of_one_seed_are_one_pair() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the paired test is scipy's")
    errors = {0.02: ([5.0, 4.0, 3.0], [7.0, 7.0, 5.0]), 0.05: ([2.0, 2.0, 1.0], [2.0, 3.0, 1.0])}
    rows = [
        row(method, seed, 1.0 - error / 100, density)
        for density, both in errors.items()
        for method, listed in zip(("sparse-momentum", "set"), both, strict=True)
        for seed, error in enumerate(listed)
    ]
    test = sweep_tables.paired([r for r in rows if r["method"] == "set"],
                               [r for r in rows if r["method"] != "set"])  # fmt: skip
    means = [1.0, 2.0, 1.0]  # of (2, 0), (3, 1), (2, 0)
    assert test is not None and test.pairs == 3
    assert test.difference == pytest.approx(statistics.fmean(means))
    assert test.p == pytest.approx(stats.ttest_1samp(means, 0.0).pvalue)
    assert test.ratio == pytest.approx(17.0 / 25.0)


def test_differences_that_cannot_be_tested_are_shown() -> None:
    pytest.importorskip("scipy.stats", reason="the paired test is scipy's")
    # Equal but for rounding: .98 - .95, .97 - .94 and .93 - .90 differ in floating point.
    ours, theirs = (0.98, 0.97, 0.93), (0.95, 0.94, 0.90)
    rows = [row("sparse-momentum", seed, a) for seed, a in enumerate(ours)]
    rows += [row("set", seed, a) for seed, a in enumerate(theirs)]
    assert len({100 * (1 - a) - 100 * (1 - b) for a, b in zip(ours, theirs, strict=True)}) > 1
    assert sweep_tables.table(rows)[-1][-2:] == ["+3.00 (n = 3)", ""]
    base = [row("sparse-momentum", seed, 0.75) for seed in (0, 1)]
    for others in ([row("set", 0, 0.5), row("set", 1, 0.5)], [row("set", 1, 0.5)]):
        rows, n = base + others, str(len(others))
        assert sweep_tables.table(rows)[-1][-2:] == [f"+25.00 (n = {n})", ""]
        assert sweep_tables.pooled(rows)[-1][1:] == ["set", n, "+25.000", "", "", "-50.0 %"]


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    rows = [row(m, s, 0.9 + s / 100) for m in ("set", "sparse-momentum") for s in (0, 1)]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, written, missing = sweep_report.write(tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in page
    assert "&lt;&amp;&gt;" in page and page.count("<tr>") == 5
    assert page.count("data:image/png;base64,") == (0 if missing else 2)
    assert all(path.is_file() for path in written)


def test_a_label_that_no_run_has_is_refused(tmp_path: Path) -> None:
    rows = [row("set", 0, 0.9), row("rigl", 0, 0.9, variant="prune-rate=0.5")]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    told = CliRunner().invoke(cli.main, ["report", str(tmp_path), "--against", "rigl"])
    assert told.exit_code == 1
    assert "expected one of rigl prune-rate=0.5, set, got 'rigl'" in told.stderr
    assert CliRunner().invoke(cli.main, ["report", str(tmp_path)]).exit_code == 0
    assert (
        CliRunner().invoke(cli.main, ["report", str(tmp_path), "--against", "set"]).exit_code == 0
    )


def test_sensitivity_is_of_options_varied_alone(tmp_path: Path) -> None:
    rows = []
    for value, accuracy in (("0.5", 0.98), ("0.2", 0.96)):
        for seed in (0, 1):
            varied = f"prune-rate={value}"
            rows.append(row("sparse-momentum", seed, accuracy + seed / 100, variant=varied))
    for variant in ("signal=exact", "signal=window momentum=0.5"):
        rows.append(row("sparse-momentum", 0, 0.9, variant=variant))
    rows.append(row("sparse-momentum", 0, 0.97))
    (lines,) = sweep_tables.sensitivity(rows).values()
    (points,) = lines.values()
    assert [p[0] for p in points] == [0.2, 0.5]
    assert [p[1] for p in points] == pytest.approx([3.5, 1.5])
    assert [p[2] for p in points] == pytest.approx([0.5, 0.5])
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    against = "sparse-momentum prune-rate=0.5"
    shown, written, missing = sweep_report.write(tmp_path, against)
    assert f"error minus {against}" in shown and "+2.00 (n = 2)" in shown
    assert missing or tmp_path / "sweep-sensitivity.png" in written
    head, *lines = sweep_tables.table(rows, against)
    found = {line[2]: dict(zip(head, line, strict=True)) for line in lines}
    assert found[against][head[-2]] == "" and set(found) == {
        against, "sparse-momentum prune-rate=0.2", "sparse-momentum signal=exact",
        "sparse-momentum signal=window momentum=0.5", "sparse-momentum",
    }  # fmt: skip
