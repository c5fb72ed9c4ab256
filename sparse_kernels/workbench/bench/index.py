"""The index of committed results: one line per table, with its headline and its command.

It stands between two marks in the README.md beside the machines' folders, is written anew whenever
a benchmark writes results there, and a test compares it with the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from .. import sweep_lines
from ..errors import WorkbenchError
from ..fetch import write_atomically
from .results import markdown

BEGIN, END = "<!-- index: begin -->", "<!-- index: end -->"
_README = "README.md"


def refresh(root: Path, *, required: bool = False) -> Path | None:
    """Write the index of the results below ``root`` into its README.md; returns that file.

    None where there is no README.md with both marks; with ``required`` WorkbenchError instead.
    """
    readme = root / _README
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN not in text or END not in text:
        if required:
            raise WorkbenchError(
                f"{readme}: expected a file with the lines {BEGIN} and {END}, between which the "
                "index is written; found none"
            )
        return None
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    new = "\n".join([f"{before}{BEGIN}", "", *lines(root), "", f"{END}{after}"])

    def fill(file: BinaryIO) -> None:
        file.write(new.encode())

    if new != text:
        write_atomically(readme, fill)
    return readme


def lines(root: Path) -> list[str]:
    """The index: a Markdown table per machine, one row per table of results."""
    made: list[str] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        rows = [_row(table, folder.name) for table in sorted(folder.glob("*.md"))]
        rows += [
            _sweep(path.parent, root) for path in sorted(folder.glob(f"*/{sweep_lines.LINES}"))
        ]
        if rows:
            made += [f"### {folder.name}", ""]
            made += [*markdown(["result", "what", "of", "command"], rows, left=4), ""]
    return made[:-1]


def _row(table: Path, folder: str) -> list[str]:
    link = f"[{table.stem}]({folder}/{table.name})"
    path = table.with_suffix(".json")
    if not path.is_file():
        text = table.read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip("# ").replace("**", "").replace("|", "/")
        title = title.split(", seeds")[0]
        found = re.findall(r"`((?:sparse-kernels|python) .*?)`", text)
        date = re.findall(r"\d{4}-\d{2}-\d{2}", text)
        return [link, title, date[-1] if date else "", _code(found[-1] if found else None)]
    results = json.loads(path.read_text(encoding="utf-8"))
    header = results["machine"]
    of = f"{header['date'][:10]}, {header['commit']}"
    return [link, headline(table.stem, results), of, _code(results.get("command"))]


def _sweep(folder: Path, root: Path) -> list[str]:
    """Of a sweep's directory, as `sparse-kernels sweep` leaves it (without its runs)."""
    runs = sweep_lines.read(folder)
    nets = sorted({row["net"].split()[0] for row in runs})
    machines = [row["machine"] for row in runs]
    commits = sorted({header["commit"] for header in machines})
    of = f"{max(header['date'][:10] for header in machines)}, {', '.join(commits)}"
    link = f"[{folder.name}]({folder.relative_to(root).as_posix()}/sweep.md)"
    text = f"sweep: {len(runs)} runs of {', '.join(nets)}"
    return [link, text, of, f"`sparse-kernels report {folder.name}`"]


def _code(command: str | None) -> str:
    return "not recorded" if command is None else f"`{command}`"


def headline(name: str, results: dict[str, Any]) -> str:
    """What a result found, in a few words. ``name``: of its files, whose beginning is its kind."""
    kind, settings = name.split("-")[0], results["settings"]
    if kind == "epoch":
        return f"an epoch of {settings['net']}: {results['speedup']:.2f}x"
    if kind == "patterns":
        return f"steps of {settings['net']} by pattern: at least {results['speedup']:.2f}x"
    if kind == "layers":
        summed = results["summary"]
        return f"{summed['layers']} layers: geometric mean {summed['geomean']:.2f}x"
    if kind == "peers":
        every = results["summary"].get("all but scipy")
        return f"peers: geometric mean {every['geomean']:.2f}x" if every else "peers: none ran"
    if "parts" in results:
        return f"steps of {settings['net']}: {_step_speedup(results['timings']):.2f}x"
    if kind == "signals":
        epochs = {row["signal"]: row["epoch_seconds"] for row in results["rows"]}
        shown = (f"{signal} {took:.3g} s" for signal, took in epochs.items() if took is not None)
        return f"growth signals, an epoch of {settings['net']}: {', '.join(shown)}"
    ratios = [row["speedup"] for row in results.get("rows", ()) if "speedup" in row]
    if not ratios:
        return f"{kind} of {settings['net']}" if "net" in settings else kind
    return f"{kind}: {len(ratios)} measurements, {min(ratios):.2f}x to {max(ratios):.2f}x"


def _step_speedup(timings: dict[str, Any]) -> float:
    dense = min(t["median"] for name, t in timings.items() if not name.startswith("sparse"))
    return float(dense / timings["sparse"]["median"])
