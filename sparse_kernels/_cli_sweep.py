"""``sparse-kernels sweep``: many trainings, resumable; options after ``--`` go to ``train``."""

from __future__ import annotations

from pathlib import Path

import click

from ._cli_errors import one_line_errors
from ._cli_train import settings_of


@click.command("sweep", context_settings={"ignore_unknown_options": True})
@click.option("--net", "nets", multiple=True, default=("lenet-300-100",), show_default=True,
              help='Repeatable; with its own options: "wide-mlp width=256".')  # fmt: skip
@click.option("--method", "methods", multiple=True, default=("sparse-momentum",), show_default=True)
@click.option("--density", "densities", type=float, multiple=True, default=(0.05,),
              show_default=True)  # fmt: skip
@click.option("--seeds", default="0", show_default=True, help="A list: 0,1,2.")
@click.option(
    "--vary",
    multiple=True,
    metavar="OPTION=V1,V2",
    help="A run per value of an option of train; repeatable, one changed at a time.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar='"OPTION=V ..."',
    help='Options changed together; "" is the method as it is. Repeatable.',
)
@click.option("--jobs", type=click.IntRange(1), default=None,
              show_default="the cores", help="Runs at a time, one thread each.")  # fmt: skip
@click.option("--out", default="runs/sweep", show_default=True, help="Directory of the sweep.")
@click.option("--reuse", "others", multiple=True, type=click.Path(file_okay=False),
              help="Directory of another sweep: what it has of these runs is not trained again. "
              "Repeatable.")  # fmt: skip
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
@one_line_errors
def sweep_command(
    context: click.Context,
    nets: tuple[str, ...],
    methods: tuple[str, ...],
    densities: tuple[float, ...],
    seeds: str,
    vary: tuple[str, ...],
    variants: tuple[str, ...],
    jobs: int | None,
    out: str,
    others: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    """Train nets x methods x densities x seeds x variants; started again, it skips what is done.

    Example: sparse-kernels sweep --method rigl --method set --density 0.05 --seeds 0,1,2 --
    --data mnist-sample --epochs 5
    """
    from .workbench import machine, sweep, sweep_lines, sweep_report
    from .workbench.errors import WorkbenchError

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError as error:
        raise WorkbenchError(f"--seeds: expected a list such as 0,1,2, got {seeds!r}") from error
    wanted = sweep.tasks(nets, methods, densities, numbers, options,
                         sweep.parse_variants(vary, variants))  # fmt: skip
    for task in wanted:  # before hours of training, not after them
        try:
            settings_of(task.words(Path(out))[1:])
        except (click.UsageError, WorkbenchError) as error:
            raise WorkbenchError(f"{task.name}: {getattr(error, 'message', error)}") from error
    for other in others:
        count = sweep.reuse(Path(out), wanted, Path(other), settings_of)
        click.echo(f"{count} runs taken over from {other}")
    failures = sweep.run(
        Path(out), wanted, jobs or machine.available_cores(), settings_of, click.echo
    )
    if len(failures) < len(wanted):
        show(*sweep_report.write(Path(out)))
    done = {row["name"] for row in sweep_lines.held(Path(out))}
    stopped = sum(task.name not in done for task in wanted) - len(failures)
    if failures:
        click.echo(f"{len(failures)} runs failed; the same command tries them again", err=True)
    if stopped:
        click.echo(f"{stopped} runs were stopped; the same command goes on with them", err=True)
    if failures or stopped:
        context.exit(1)


def show(table: str, written: list[Path], missing: str | None) -> None:
    """Print a sweep's table and the files written."""
    click.echo("\n" + table)
    if missing:
        click.echo(missing)
    click.echo("written: " + ", ".join(str(path) for path in written))
