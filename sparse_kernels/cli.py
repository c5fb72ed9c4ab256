"""The command line: ``sparse-kernels train | sweep | bench | report | info``.

A user's mistake is one line and exit code 1 (2 for a wrong option), never a traceback.
"""

from __future__ import annotations

from pathlib import Path

import click

from . import __version__
from ._cli_bench import bench
from ._cli_bench_figures import figure, index_command
from ._cli_bench_nets import inference_command, networks_command
from ._cli_bench_workers import workers_command
from ._cli_errors import one_line_errors
from ._cli_sweep import show, sweep_command
from ._cli_train import train_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sparse-kernels")
def main() -> None:
    """Train sparse neural networks from scratch, faster than dense ones."""


@main.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.option("--against", default=None, show_default="sparse-momentum",
              help="Of a sweep: what its methods and variants are compared with.")  # fmt: skip
@one_line_errors
def report(run: str, against: str | None) -> None:
    """Render table and figure of runs/<name>, or of a sweep's directory, again from its results."""
    from .workbench import report as reports
    from .workbench import sweep_lines, sweep_report

    if (Path(run) / sweep_lines.LINES).is_file():
        show(*sweep_report.write(Path(run), against))
        return

    results, written = reports.render_again(Path(run))
    click.echo(reports.table(results))
    click.echo("written: " + ", ".join(str(path) for path in written))


@main.command()
@one_line_errors
def info() -> None:
    """What was built, what serves which operator on this machine, and why not another."""
    from .info import describe

    click.echo(describe())


for command in (networks_command, inference_command, workers_command, figure, index_command):
    bench.add_command(command)
for command in (train_command, sweep_command, bench):
    main.add_command(command)


if __name__ == "__main__":
    main()
