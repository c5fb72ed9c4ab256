"""``sparse-kernels bench figure|index``: from results that lie on disk; nothing is timed."""

from __future__ import annotations

from pathlib import Path

import click

from ._cli_bench import DEFAULT_OUT
from ._cli_errors import one_line_errors


@click.group()
def figure() -> None:
    """Draw figures from earlier results; nothing is timed."""


@figure.command("readme")
@click.option("--from", "folder", type=click.Path(file_okay=False), default=None,
              help=f"Results of a machine.  [default: {DEFAULT_OUT}/<machine>]")  # fmt: skip
@click.option("--to", default="docs/figures/speed.png", show_default=True)
@one_line_errors
def readme_command(folder: str | None, to: str) -> None:
    """README's figure: an epoch of VGG16-D and single layers, from the newest results."""
    from .workbench.bench import overview, results

    place = Path(folder) if folder else Path(DEFAULT_OUT) / results.machine_folder()
    _tell(overview.readme(place, Path(to)), to)


@figure.command("parts")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--label", "labels", multiple=True,
              help="One per file, in their order.  [default: the files' names]")  # fmt: skip
@click.option("--to", required=True, help="The PNG to write.")
@one_line_errors
def parts_command(files: tuple[str, ...], labels: tuple[str, ...], to: str) -> None:
    """A sparse step by part as stacked bars, from results of `bench networks`: before, after.

    Example: sparse-kernels bench figure parts before.json after.json --to parts.png
    """
    from .workbench.bench import overview
    from .workbench.errors import WorkbenchError

    paths = [Path(name) for name in files]
    names = list(labels) or [path.stem for path in paths]
    if len(names) != len(paths):
        raise WorkbenchError(f"--label: expected one per file, {len(paths)}; got {len(names)}")
    _tell(overview.parts(paths, names, Path(to)), to)


@click.command("index")
@click.argument("root", default=DEFAULT_OUT, type=click.Path(file_okay=False))
@one_line_errors
def index_command(root: str) -> None:
    """Write the list of all results into ROOT/README.md, between its two marks."""
    from .workbench.bench import index

    click.echo(f"written: {index.refresh(Path(root), required=True)}")


def _tell(reason: str | None, to: str) -> None:
    click.echo(f"written: {to}" if reason is None else reason)
