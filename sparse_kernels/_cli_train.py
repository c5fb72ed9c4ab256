"""``sparse-kernels train``, and what its words say: the settings of one training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ._cli_errors import one_line_errors
from .training.methods import METHODS
from .workbench.config import (
    COSTS,
    DENSE_BASELINES,
    DEVICES,
    DISTRIBUTIONS,
    INITS,
    PRUNE_SCHEDULES,
    REDISTRIBUTIONS,
    SIGNALS,
    TrainConfig,
    method_settings,
)
from .workbench.models import NETS, spec

# `--preset demo`: what `make demo` trains. Wide enough for the gain to be real, few enough epochs
# for two cores; the hold-out is nothing because the sample's own 1,000 test images are the measure.
DEMO = {
    "net": "wide-mlp",
    "data": "mnist-sample",
    "density": 0.05,
    "init": "scaled",
    "compare": "dense",
    "epochs": 20,
    "lr": 0.1,
    "lr_decay_every": 500,
    "update_every": 80,
    "holdout": 0.0,
    "name": "demo",
}


def _parse_seeds(context: click.Context, option: click.Parameter, value: tuple[str, ...]) -> Any:
    try:
        seeds = tuple(int(part) for text in value for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"expected whole numbers such as 0,1,2, got {','.join(value)!r}"
        ) from error
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise click.BadParameter(f"expected numbers from 0 to 2**63 - 1, got {seeds}")
    return seeds


@click.command("train")
@click.option(
    "--preset", type=click.Choice(["demo"]), help="Settings of `make demo`; other options override."
)
@click.option("--method", default=None, help=f"Settings of a method: {', '.join(METHODS)} "
              "(docs/training.md); other options override.")  # fmt: skip
@click.option("--net", default="lenet-300-100", show_default=True,
              help=", ".join(NETS) + ".")  # fmt: skip
@click.option(
    "--data", default=None, help="mnist, mnist-sample (shipped) or cifar10; default: the net's."
)
@click.option(
    "--data-dir", default=None, help="Directory of the data set's files, in any usual layout."
)
@click.option("--download", is_flag=True, help="Fetch the data set if it is not in the cache.")
@click.option(
    "--width", type=int, default=None, help="Width of wide-mlp's hidden layers.  [default: 4096]"
)
@click.option("--hidden-layers", type=int, default=None, help="Of wide-mlp.  [default: 2]")
@click.option(
    "--density", type=float, default=0.05, show_default=True, help="Share of the weights kept."
)
@click.option(
    "--block", default="1x1", show_default=True,
    help="Block of the pattern, rows x columns; auto: the largest that suits each layer.",
)  # fmt: skip
@click.option(
    "--distribution", type=click.Choice(DISTRIBUTIONS), default="uniform", show_default=True
)
@click.option("--init", type=click.Choice(INITS), default="dense", show_default=True,
              help="First weights: the dense net's, or scaled to the fewer inputs.")  # fmt: skip
@click.option(
    "--compare", type=click.Choice(["dense"]), default=None, help="Train the dense net beside it."
)
@click.option("--dense-baseline", type=click.Choice(DENSE_BASELINES),
              default="auto", show_default=True, help="auto: the fastest here.")  # fmt: skip
@click.option("--epochs", type=int, default=100, show_default="the net's")
@click.option("--batch-size", type=int, default=100, show_default="the net's")
@click.option("--lr", type=float, default=0.1, show_default=True, help="Learning rate of SGD.")
@click.option(
    "--lr-decay-every", type=int, default=25_000, show_default="the net's", help="Steps per x0.1."
)
@click.option("--momentum", type=float, default=0.9, show_default=True, help="Nesterov momentum.")
@click.option("--weight-decay", type=float, default=5e-4, show_default=True)
@click.option("--seed", "--seeds", "seeds", multiple=True, default=("0",), callback=_parse_seeds,
              show_default=True, help="Repeatable, or a list: 0,1,2.")  # fmt: skip
@click.option(
    "--prune-rate", type=float, default=0.5, show_default=True, help="Of the first mask update."
)
@click.option(
    "--prune-schedule", type=click.Choice(PRUNE_SCHEDULES), default="cosine", show_default=True
)
@click.option(
    "--redistribution", type=click.Choice(REDISTRIBUTIONS), default="momentum", show_default=True,
    help="Which layers regrow what is pruned; none: each its own.",
)  # fmt: skip
@click.option("--signal", type=click.Choice(SIGNALS), default="gradient", show_default=True,
              help="What grows: exact: dense momentum of all steps, as the paper; window: of the "
              "last; sampled: at a sample of the places; gradient: by the last gradient, as RigL; "
              "random: as SET.")  # fmt: skip
@click.option("--sample-share", type=float, default=0.1, show_default=True,
              help="Share of the free places that sampled draws.")  # fmt: skip
@click.option("--window-tolerance", type=float, default=0.1, show_default=True,
              help="Share of the momentum that the window may miss: 0.1 takes the last 22 steps "
              "before an update at momentum 0.9, 0.35 the last 10.")  # fmt: skip
@click.option(
    "--update-every",
    type=int,
    default=None,
    help="Steps between mask updates.  [default: an epoch]",
)
@click.option("--prune", default="magnitude", show_default=True,
              help="What goes: magnitude, set, global_magnitude, fan_in, groups:M.")  # fmt: skip
@click.option("--growth", default="momentum", show_default=True,
              help="What comes: momentum, gradient, random, neuron, fan_in, groups:M.")  # fmt: skip
@click.option("--spare-dense/--no-spare-dense", default=True, show_default="the method's",
              help="Prune nearly dense layers of importance at a lower rate.")  # fmt: skip
@click.option("--final-prune-rate", type=float, default=0.005, show_default=True)
@click.option("--update-until", type=float, default=1.0, show_default=True,
              help="Share of the training after which masks stay.")  # fmt: skip
@click.option("--start-density", type=float, default=None,
              help="Gradual pruning, from this density to --density.")  # fmt: skip
@click.option("--cost-weight", type=float, default=0.0, show_default=True,
              help="Power of a weight's cost that importance is divided by.")  # fmt: skip
@click.option("--cost", type=click.Choice(COSTS), default="flops", show_default=True,
              help="What a weight costs: FLOPs, or time, measured before training.")  # fmt: skip
@click.option("--flops-budget", "--cost-budget", "flops_budget", default=None,
              help="Share of the sparse layers' dense cost never to exceed, or start.")  # fmt: skip
@click.option(
    "--holdout", type=float, default=0.1, show_default=True, help="Share held out for validation."
)
@click.option(
    "--augment/--no-augment", default=False, show_default="the net's", help="Crop and flip."
)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True,
              help="Where both nets train; batches are made on the CPU.")  # fmt: skip
@click.option(
    "--threads", type=int, default=None, help="Threads for both contenders.  [default: torch's]"
)
@click.option("--max-steps", type=int, default=None, help="Stop after so many steps (smoke tests).")
@click.option("--out", default="runs", show_default=True, help="Where runs/<name> is made.")
@click.option("--name", default=None, help="Name of the run.  [default: net-data-density]")
@click.option("--tensorboard", is_flag=True,
              help="Log for TensorBoard in runs/<name>/tensorboard, too.")  # fmt: skip
@click.option("--resume", is_flag=True,
              help="Go on from the newest good checkpoint, with the same options.")  # fmt: skip
@click.option(
    "--checkpoint-dir", default=None, help="Directory of checkpoints.  [default: in runs/<name>]"
)
@click.option("--checkpoint-every", type=int, default=None,
              help="Steps between checkpoints.  [default: an epoch, and a minute]")  # fmt: skip
@click.option("--keep", type=int, default=3, show_default=True, help="Checkpoints that stay.")
@click.pass_context
@one_line_errors
def train_command(context: click.Context, preset: str | None, resume: bool, **options: Any) -> None:
    """Train a net sparse from scratch, and dense beside it, and write table, figure and logs.

    Example: sparse-kernels train --net lenet-300-100 --data mnist --density 0.05 --compare dense
    """
    from .workbench import ranks, report
    from .workbench.errors import TrainingStopped
    from .workbench.loop import train as run_training
    from .workbench.session import folder_to_resume, only_begun

    config = configure(context, preset, options)
    config.check()
    demo = preset == "demo" and config.run_name() == DEMO["name"]

    def choose_folder() -> Path:
        found = folder_to_resume(config) if resume else None
        if found is None:
            folder = Path(config.out) / config.run_name()
            # Cut off before its first checkpoint: begun again in its place, not beside it.
            again = resume and only_begun(folder)
            found = _run_folder(folder, overwrite=demo or again)
        found.mkdir(parents=True, exist_ok=True)
        return found

    results: dict[str, Any] = {}
    exit_code = 0
    with ranks.of_environment() as job:
        folder = job.on_rank_0(choose_folder)
        try:
            results = run_training(config, folder, resume, job)
        except TrainingStopped as stopped:  # all ranks do, after the same step
            click.echo(str(stopped), err=True)
            exit_code = stopped.exit_code
    if exit_code:
        context.exit(exit_code)
    if job.rank:
        return
    written = report.write_run(folder, results)
    click.echo("\n" + report.table(results))
    click.echo("written: " + ", ".join(str(path) for path in written))


def _run_folder(folder: Path, *, overwrite: bool) -> Path:
    """Make the directory of a run: ``folder``, or with -2, -3, ... if an earlier run lies there.

    ``overwrite`` takes it all the same, and says so: what `make demo` makes can be made again.
    """
    chosen, number = folder, 1
    while chosen.is_dir() and any(chosen.iterdir()) and not overwrite:
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    if chosen != folder:
        click.echo(f"note: {folder} holds an earlier run and is kept; this one goes to {chosen}")
    elif chosen.is_dir() and any(chosen.iterdir()):
        click.echo(f"note: overwriting {chosen}")
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def configure(context: click.Context, preset: str | None, options: dict[str, Any]) -> TrainConfig:
    """TrainConfig from its defaults, the net's, the preset's, the method's, the options; the later
    wins."""
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    of_preset = DEMO if preset == "demo" else {}
    entry = spec({**of_preset, **given}.get("net", TrainConfig.net))
    of_method = method_settings(given["method"]) if "method" in given else {}
    chosen = {**entry.defaults, **of_preset, **of_method, **given}
    return TrainConfig(**{"data": entry.default_data, **chosen})


def settings_of(words: Sequence[str]) -> TrainConfig:
    """What ``sparse-kernels train`` with these words would train with, checked.

    Raises click.UsageError for wrong options, WorkbenchError for wrong settings.
    """
    with train_command.make_context("train", list(words)) as context:
        options = dict(context.params)
        preset = options.pop("preset")
        del options["resume"]
        config = configure(context, preset, options)
    config.check()
    return config
