"""Tables of a benchmark's journal, Markdown and JSON: on the GPU machine or anywhere else."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from sparse_kernels.workbench import machine
from sparse_kernels.workbench.bench import results
from sparse_kernels.workbench.bench.results import markdown, milliseconds
from tools.gpu_bench.state import HEADER, ROOT, gpu_journal

PASSES = ("forward", "dgrad", "wgrad", "forward+wgrad", "training")
FLOOR_NOTE = (
    "Of roofline: the least time of a kernel on the plain fp32 cores whose activations come out of "
    "shared memory (tools/gpu_roofline.py). Tensor cores are not in it: a kernel that multiplies "
    "on them may pass 100 %."
)
PARTS = ("elements", "products", "update", "steps", "vgg", "wrn", "resnet", "tuned", "ops")


def summary(entry: Any) -> str:
    """A row in one line: speedups over the best dense, and why contenders are missing."""
    row = entry.row
    if entry.outcome == "failed":
        return f"FAILED: {row['why']}"
    if "update" in row:
        return f"{row['update']['milliseconds']:.2f} ms"
    if "operator" in row:
        found = row["operator"]
        return f"missing: {found['why']}" if "why" in found else f"{found['speedup']:.2f}x"
    cells = []
    for which in PASSES:
        found = row.get(which, {})
        gains = [f"{name} {value:.2f}x" for name, value in found.get("speedups", {}).items()]
        gains += [f"{name} MISSING ({why})" for name, why in found.get("missing", {}).items()]
        if "why" in found:
            gains.append(f"missing: {found['why']}")
        if gains and (which != "forward" or "training" not in row):
            cells.append(f"{which}: {', '.join(gains)}")
    return "; ".join(cells)


def publish(journal: Any, options: argparse.Namespace, device: torch.device) -> list[Path]:
    """gpu-<part>.json and .md of every part that has rows, and <state>/report.md with all tables.

    A table says if rows are left. Returns the files written.
    """
    folder = options.results or ROOT / "benchmarks/results" / results.machine_folder(device)
    return _publish(journal, folder, journal.path.parent / "report.md")


def from_folder(state: Path, folder: Path | None) -> list[Path]:
    """Tables of the journal that a GPU machine has sent back. Raises FileNotFoundError, ValueError
    where nothing is in it.
    """
    journal = gpu_journal.last_of(state / "bench.jsonl", ("sources",))
    header = journal.entries[HEADER].row
    name = header["gpu"] or header["cpu"]
    if folder is None:
        folder = ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return _publish(journal, folder, state / "report.md")


def _publish(journal: Any, folder: Path, everything: Path) -> list[Path]:
    header = journal.entries[HEADER].row
    small = journal.identity["size"] == "small"
    texts, files = [], []
    for part in PARTS:
        prefix = f"{part}: "
        entries = [e for key, e in journal.entries.items() if key.startswith(prefix)]
        if not entries and prefix not in journal.totals:
            continue
        found = {
            "machine": header,
            "command": f"python -m tools.gpu_bench --part {part}",
            "complete": len(entries) == journal.totals.get(prefix),
            "sources": sorted({entry.sources for entry in entries}),
            "rows": [{"key": e.key, **e.row} for e in entries],
        }
        text = table(part, found)
        texts.append(text)
        name = f"gpu-{part}" + ("-small" if small else "")
        files += results.publish(folder, name, found, text, [])[0]
    everything.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return [*files, everything]


def table(part: str, found: dict[str, Any]) -> str:
    """Markdown: a line per row, pass and contender."""
    lines: list[list[str]] = []
    missing: list[str] = []
    notes: list[str] = []
    for row in found["rows"]:
        if "shape" not in row and "operator" not in row:
            missing.append(f"{row['key']}: {row['why']}")
        elif "update" in row:
            lines.append(_update_line(row))
        elif "operator" in row:
            _operator_lines(row, lines, missing)
        else:
            _row_lines(row, lines, missing)
        if "tuned" in row:
            notes.append(_tuned_note(row))
    head = ["layer or net", "precision", "pass", "contender", "ms", "speedup", "of roofline"]
    state = "" if found["complete"] else " NOT COMPLETE: rows are left."
    if len(found["sources"]) > 1:
        state += f" Rows of several sources: {', '.join(found['sources'])}."
    header = found["machine"]
    return "\n".join([
        f"GPU part {part}: milliseconds, median [quartiles].{state}",
        f"GPU {header['gpu']}; {machine.one_line(header)}",
        "",
        *markdown(head, lines, left=4),
        "",
        *([FLOOR_NOTE] if part == "elements" else []),
        *notes,
        *(f"Missing: {line}." for line in missing),
    ])  # fmt: skip


def _row_lines(row: dict[str, Any], lines: list[list[str]], missing: list[str]) -> None:
    """A layer or a net: every pass and contender; of dense the best."""
    place = f"{row['shape']} {row['precision']}"
    for which in PASSES:
        entry = row.get(which)
        if entry is None:
            continue
        if "why" in entry:
            missing += [f"{place} {which}: {entry['why']}"] if entry["why"] else []
            continue
        for name, timing in entry["timings"].items():
            gain = entry["speedups"].get(name)
            if gain is None and name != entry["dense_best"]:
                continue
            # The bound is of our kind of kernel: it says nothing about dense.
            share = None if gain is None else entry.get("shares", {}).get(name)
            lines.append([
                row["shape"], row["precision"], which, name.removesuffix(" forward"),
                milliseconds(timing), f"{gain:.2f}x" if gain else "best dense",
                f"{100 * share:.0f} % ({entry['floor']['bound']})" if share else "",
            ])  # fmt: skip
        missing += [f"{place} {which} {n}: {w}" for n, w in entry["missing"].items()]


def _update_line(row: dict[str, Any]) -> list[str]:
    found = row["update"]
    low, high = found["quartiles"]
    text = f"{found['milliseconds']:.4g} [{low:.4g}, {high:.4g}]"
    return [row["shape"], row["precision"], "mask update", "sparse", text, "", ""]


def _operator_lines(row: dict[str, Any], lines: list[list[str]], missing: list[str]) -> None:
    found = row["operator"]
    place = f"{found['shape']} {found['block']}"
    if "why" in found:
        missing.append(f"{found['operator']} {place}: {found['why']}")
        return
    for name in ("sparse", found["dense_best"]):
        gain = f"{found['speedup']:.2f}x" if name == "sparse" else "best dense"
        time = milliseconds(found["timings"][name])
        lines.append([place, "fp32", found["operator"], name, time, gain, ""])


def _tuned_note(row: dict[str, Any]) -> str:
    made = row["tuned"]
    variants = ", ".join(f"{name} {how[0]}" for name, how in made["variants"].items()) or "defaults"
    return (
        f"{row['key']}: tune took {made['seconds']:.1f} s, chose {made['storage']} "
        f"({made['settled']}), {variants}."
    )
