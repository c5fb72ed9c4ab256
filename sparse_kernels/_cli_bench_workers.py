"""``sparse-kernels bench workers``: where data parallel training stops to scale."""

from __future__ import annotations

from typing import Any

import click

from ._cli_errors import one_line_errors


@click.command("workers")
@click.option("--net", default="vgg16-d", show_default=True)
@click.option("--density", type=float, default=0.05, show_default=True)
@click.option("--block", default="1x1", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=None, help="[default: torch's]")
@click.option("--update-every", type=click.IntRange(1), default=390, show_default=True,
              help="Steps between mask updates, which send the dense signal.")  # fmt: skip
@click.option("--bandwidth", "bandwidths", type=click.FloatRange(0, min_open=True), multiple=True,
              default=(1.0, 10.0, 100.0), show_default=True,
              help="Gbit/s of a link; repeatable.")  # fmt: skip
@click.option("--latency", type=click.FloatRange(0), default=20.0, show_default=True,
              help="Microseconds of one round of the ring.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(3), default=10, show_default=True,
              help="Steps of each net, in turns.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True,
              help="No new round after so long.")  # fmt: skip
@one_line_errors
def workers_command(bandwidths: tuple[float, ...], **options: Any) -> None:
    """Measure a step, count the bytes that ranks exchange, compute where scaling ends."""
    from .workbench.bench import workers
    from .workbench.config import TrainConfig

    settings = ("net", "density", "block", "batch_size", "threads")
    config = TrainConfig(**{name: options[name] for name in settings})
    config.check()
    found = workers.run(
        config,
        rounds=options["rounds"],
        seconds=options["seconds"],
        update_every=options["update_every"],
        bandwidths=[given * workers.GIGABIT for given in bandwidths],
        latency=options["latency"] * 1e-6,
    )
    click.echo(workers.table(found))
