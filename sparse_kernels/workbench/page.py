"""Tables, figures and commands as one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}img{max-width:100%}"
)


def page(
    title: str,
    tables: Sequence[Sequence[Sequence[str]]],
    note: str,
    images: Sequence[Path],
    commands: Sequence[str],
) -> str:
    """tables: lines of cells, the first line is the head; images: PNG files, which are embedded."""
    name = html.escape(title)
    pictures = [
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    ]
    listed = [f"<li><code>{html.escape(command)}</code></li>" for command in commands]
    return "\n".join(
        ["<!doctype html>", f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
         f"<style>{_STYLE}</style></head><body>", f"<h1>{name}</h1>", *map(_table, tables),
         f"<p>{html.escape(note)}</p>", *pictures, "<h2>Commands</h2>", "<ol>", *listed, "</ol>",
         "</body></html>", ""]
    )  # fmt: skip


def _table(lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "\n".join(
        ["<table>", row(lines[0], "th"), *(row(line, "td") for line in lines[1:]), "</table>"]
    )
