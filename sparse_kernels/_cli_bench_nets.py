"""``sparse-kernels bench networks|inference``: whole nets."""

from __future__ import annotations

from typing import Any

import click

from ._cli_bench import (
    Run,
    batch_option,
    bench,
    block_option,
    common_options,
    density_option,
    fresh_option,
    out_option,
    rounds_option,
    seconds_option,
    threads_option,
    with_options,
)
from ._cli_errors import one_line_errors
from .workbench.config import DENSE_BASELINES, REDISTRIBUTIONS

INFERENCE_NETS = ("vgg16-d", "wrn-16-8", "alexnet-s", "wide-mlp", "lenet-5-caffe", "lenet-300-100")

_net_options = with_options(
    click.option("--dense-baseline", type=click.Choice(DENSE_BASELINES), default="auto",
                 show_default=True, help="auto: all that run here, the fastest counts."),
    click.option("--redistribution", type=click.Choice(REDISTRIBUTIONS), default="none",
                 show_default=True, help="none holds each layer's weights; momentum: the paper's."),
    click.option("--data-dir", default=None, help="The net's data set; default: random images."),
    click.option("--width", type=int, default=None, help="Width of wide-mlp's hidden layers."),
)  # fmt: skip


@click.command("networks")
@with_options(
    click.option("--net", "nets", multiple=True, default=("vgg16-d",), show_default=True,
                 help="Repeatable."),
    common_options, _net_options,
    click.option("--steps", type=click.IntRange(1), default=20, show_default=True,
                 help="At most so many of each contender, in turns."),
    seconds_option(75.0, "net"),
    click.option("--memory/--no-memory", default=True, show_default=True,
                 help="Peak memory, in processes apart."),
    click.option("--epoch", is_flag=True,
                 help="One whole epoch instead, from the loader's batch to updated weights."),
    click.option("--epoch-block", type=click.IntRange(1), default=22, show_default=True,
                 help="Steps of one contender before the other's turn."),
    click.option("--max-steps", type=click.IntRange(1), default=None,
                 help="A shorter epoch (to try the command out)."),
    click.option("--patterns", default=None, metavar="start,1,10",
                 help="Single steps instead, on the patterns after so many mask updates."),
    click.option("--update-every", type=click.IntRange(2), default=4, show_default=True,
                 help="Steps between the mask updates of --patterns."),
)  # fmt: skip
@one_line_errors
def networks_command(nets: tuple[str, ...], **options: Any) -> None:
    """Whole training steps by part, memory and mask update; --epoch; --patterns start,1,10.

    With the growth signal "window"; `bench signals` has the others."""
    from .workbench.config import TrainConfig
    from .workbench.errors import WorkbenchError

    if options["epoch"] and options["patterns"]:
        raise WorkbenchError("--epoch and --patterns: expected one of them; run them one by one")
    for net in nets:
        mine = {**options, "net": net}
        settings = ("net", "density", "block", "batch_size", "threads", "dense_baseline",
                    "redistribution", "data_dir", "width")  # fmt: skip
        # The window's steps are timed on their own; `bench signals` tells the signals apart.
        config = TrainConfig(signal="window", **{name: mine[name] for name in settings})
        config.check()
        if options["epoch"]:
            _run_epoch(config, mine)
        elif options["patterns"] is not None:
            _run_patterns(config, mine)
        else:
            _run_steps(config, mine)


def _tags(options: dict[str, Any]) -> tuple[str, ...]:
    """Parts of the files' name: net, width, redistribution unless none, a shortened epoch."""
    shift, steps = options["redistribution"], options["max_steps"] if options["epoch"] else None
    return (
        options["net"],
        "" if options["width"] is None else f"w{options['width']}",
        "" if shift == "none" else shift,
        "" if steps is None else f"{steps}steps",
    )


def _only(options: dict[str, Any], *unused: str) -> dict[str, Any]:
    """The options without those that this kind of run does not look at."""
    kinds = {"epoch", "patterns", *unused}
    return {name: value for name, value in options.items() if name not in kinds}


def _run_steps(config: Any, options: dict[str, Any]) -> None:
    from .workbench.bench import network_tables, networks, plots

    used = _only(options, "epoch_block", "max_steps", "update_every", "data_dir")
    run = Run("networks", used, *_tags(options))
    found = networks.run(
        config,
        steps=options["steps"],
        seconds=options["seconds"],
        memory=options["memory"],
        journal=run.journal,
    )
    run.finish(found, network_tables.steps, (("", plots.step_parts),))


def _run_epoch(config: Any, options: dict[str, Any]) -> None:
    from .workbench.bench import epoch, network_tables, plots

    used = _only(options, "steps", "seconds", "memory", "update_every")
    run = Run("epoch", used, *_tags(options))
    state = run.folder / f"{run.name}.state.pt"
    found = epoch.run(
        config,
        block_steps=options["epoch_block"],
        max_steps=options["max_steps"],
        journal=run.journal,
        state=state,
    )
    run.finish(found, network_tables.epoch, (("", plots.epoch),))
    state.unlink(missing_ok=True)


def _run_patterns(config: Any, options: dict[str, Any]) -> None:
    from .workbench.bench import network_tables, networks, plots

    used = _only(options, "memory", "epoch_block", "max_steps")
    run = Run("patterns", {**used, "patterns": options["patterns"]}, *_tags(options))
    found = networks.run_patterns(
        config,
        updates=_updates(options["patterns"]),
        every=options["update_every"],
        steps=options["steps"],
        seconds=options["seconds"],
        journal=run.journal,
    )
    run.finish(found, network_tables.patterns, (("", plots.patterns),))


def _updates(text: str) -> tuple[int, ...]:
    """(0, 1, 10) from "start,1,10". Raises WorkbenchError."""
    from .workbench.errors import WorkbenchError

    try:
        counts = [0 if part.strip() == "start" else int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 0 or sorted(set(counts)) != counts:
        raise WorkbenchError(
            "--patterns: expected start and increasing numbers of mask updates such as start,1,10, "
            f"got {text!r}"
        )
    return tuple(counts)


@bench.command("signals")
@with_options(
    click.option("--net", default="lenet-300-100", show_default=True),
    common_options,
    click.option("--width", type=int, default=None, help="Width of wide-mlp's hidden layers."),
    click.option("--updates", type=click.IntRange(1), default=5, show_default=True,
                 help="Mask updates of each signal."),
    click.option("--update-every", type=click.IntRange(2), default=40, show_default=True,
                 help="Steps between them; longer than the window."),
    click.option("--window-tolerance", type=float, default=0.1, show_default=True),
    click.option("--sample-share", type=float, default=0.1, show_default=True),
)  # fmt: skip
@one_line_errors
def signals_command(net: str, **options: Any) -> None:
    """Growth signals: bytes held, steps outside and inside of their windows, updates.

    The weights of each layer are held."""
    from .workbench.bench import signals
    from .workbench.config import TrainConfig

    settings = ("density", "block", "batch_size", "threads", "width", "window_tolerance",
                "sample_share")  # fmt: skip
    # Each layer keeps its number of weights: what redistribution does to the steps would hide the
    # signals, and differ between them.
    config = TrainConfig(
        net=net, redistribution="none", **{name: options[name] for name in settings}
    )
    config.check()
    run = Run("signals", {"net": net, **options}, net)
    found = signals.run(config, updates=options["updates"], update_every=options["update_every"])
    run.finish(found, signals.table, ())


@click.command("inference")
@with_options(
    click.option("--net", "nets", multiple=True, default=INFERENCE_NETS, show_default=True),
    density_option, block_option,
    click.option("--steps", type=click.IntRange(4), default=None,
                 help="Training steps before, with three mask updates.  [default: 300 on real data,"
                 " 8 on random images]"),
    click.option("--data-dir", default=None, help="Real data of the nets.  [default: the shipped "
                 "sample of MNIST; random images in CIFAR's shape]"),
    batch_option, rounds_option(15), seconds_option(4.0, "net and batch"),
    threads_option, out_option, fresh_option,
)  # fmt: skip
@one_line_errors
def inference_command(nets: tuple[str, ...], **options: Any) -> None:
    """Forward in evaluation mode, batch 1 and 32, against dense and compiled dense."""
    from .workbench.bench import inference, plots
    from .workbench.config import TrainConfig

    configs = [
        TrainConfig(net=net, density=options["density"], block=options["block"],
                    batch_size=options["batch_size"], data_dir=options["data_dir"],
                    redistribution="none", signal="window")
        for net in nets
    ]  # fmt: skip
    chosen = "" if nets == INFERENCE_NETS else "+".join(nets)
    run = Run("inference", {**options, "nets": nets}, chosen)
    found = inference.run(
        configs,
        steps=options["steps"],
        rounds=options["rounds"],
        seconds=options["seconds"],
        journal=run.journal,
    )
    run.finish(found, inference.tables, (("", plots.inference),))
