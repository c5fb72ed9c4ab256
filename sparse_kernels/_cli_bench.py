"""``sparse-kernels bench ops|layers|networks|peers|scaling|inference``: options and files.

What is measured and how stands in ``workbench/bench``; here are the options, the journal of rows
that lets an interrupted run go on, and the names of the files.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ._cli_errors import one_line_errors
from .workbench.config import DENSE_BASELINES, REDISTRIBUTIONS

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULT_OUT = "benchmarks/results"
INFERENCE_NETS = ("vgg16-d", "wrn-16-8", "alexnet-s", "wide-mlp", "lenet-5-caffe", "lenet-300-100")


@click.group()
def bench() -> None:
    """Measure sparse against the best dense PyTorch, validated first.

    Each command writes JSON, a Markdown table and figures to benchmarks/results/<machine>
    (--out), goes on where an interrupted run of the same command stopped, and names itself in what
    it writes.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_out = click.option("--out", default=None, help="Directory of the results.  [default: "
                    f"{DEFAULT_OUT}/<machine>]")  # fmt: skip
_fresh = click.option("--fresh", is_flag=True, help="Forget what an interrupted run has left.")
_threads = click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="Default: torch's own."
)
_batch = click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
_block = click.option("--block", default="1x1", show_default=True, help="Rows x columns.")
_density = click.option("--density", type=float, default=0.05, show_default=True)
_common = _options(_density, _block, _batch, _threads, _out, _fresh)
_layers = click.option(
    "--layer", "names", multiple=True,
    help="A layer, or the beginning of names: vgg, wrn-128 (repeatable).",
)  # fmt: skip
_compile = click.option(
    "--compile/--no-compile", "compiled", default=False, show_default=True,
    help="torch.compile of single layers too: it has nothing to fuse.",
)  # fmt: skip


def _rounds(default: int) -> Callable[[Command], Command]:
    return click.option("--rounds", type=click.IntRange(1), default=default, show_default=True,
                        help="At most so many, in turns.")  # fmt: skip


def _seconds(default: float, of: str) -> Callable[[Command], Command]:
    return click.option("--seconds", type=click.FloatRange(0.0), default=default, show_default=True,
                        help=f"No new round begins after so long, per {of}; at least three are "
                        "made.")  # fmt: skip


class Run:
    """One benchmark: its settings, its journal, and where its files go."""

    def __init__(self, kind: str, options: dict[str, Any], tag: str = "") -> None:
        import torch

        from .workbench import machine
        from .workbench.bench import results
        from .workbench.errors import WorkbenchError

        self.out, fresh = options.pop("out"), options.pop("fresh")
        threads = options.pop("threads", None)
        if threads is not None:
            torch.set_num_threads(threads)
        density = options.get("density", 0.05)
        if not 0 < density <= 1:
            raise WorkbenchError(
                f"--density: expected a number above 0 and at most 1, got {density}"
            )
        device = torch.device(options.get("device", "cpu"))
        self.folder = (
            Path(self.out) if self.out else Path(DEFAULT_OUT) / results.machine_folder(device)
        )
        self.settings = {key: value for key, value in options.items() if value is not None}
        isa = machine.header()["isa"] if device.type == "cpu" else device.type
        block = options.get("block") or "+".join(options.get("blocks", ()))
        parts = [kind, tag, f"d{100 * density:g}", block,
                 f"{torch.get_num_threads()}t", isa.replace(" ", "-")]  # fmt: skip
        self.name = "-".join(part for part in parts if part)
        journal = self.folder / f"{self.name}.jsonl"
        if fresh:
            journal.unlink(missing_ok=True)
        self.journal = results.Journal(journal, self.settings)
        if self.journal.resumed:
            click.echo(f"note: going on after {self.journal.resumed} rows in {journal}")

    def finish(self, found: dict[str, Any], text: Callable[[dict[str, Any]], str],
               draw: Sequence[tuple[str, Any]]) -> None:  # fmt: skip
        """Write and print the results; the journal has done its work then."""
        from .workbench import machine
        from .workbench.bench import results

        complete = {
            "command": command_line(click.get_current_context()),
            "machine": machine.header(),
            "settings": self.settings,
            **found,
        }
        shown = text(complete)
        files, missing = results.publish(self.folder, self.name, complete, shown, draw)
        self.journal.remove()
        click.echo("\n" + shown + "\n")
        for reason in missing:
            click.echo(reason)
        click.echo("written: " + ", ".join(str(path) for path in files))


def command_line(context: click.Context) -> str:
    """The command that repeats this one, every option spelled out, variables of ours in front."""
    words = context.command_path.split()
    words = ["sparse-kernels", *words[1:]]
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name in (None, "fresh", "help"):
            continue
        value = context.params.get(option.name)
        if option.is_flag:
            if value:
                words.append(option.opts[0])
            elif option.secondary_opts:
                words.append(option.secondary_opts[0])
        elif option.multiple:
            for item in value or ():
                words += [option.opts[0], str(item)]
        elif value is not None:
            words += [option.opts[0], str(value)]
    ours = {name: v for name, v in os.environ.items() if name.startswith("SPARSE_KERNELS_")}
    kept = ("SPARSE_KERNELS_ISA", "SPARSE_KERNELS_BACKEND")
    front = [f"{name}={shlex.quote(ours[name])}" for name in kept if name in ours]
    return " ".join([*front, shlex.join(words)])


@bench.command("ops")
@_options(
    _layers,
    click.option("--size", type=click.Choice(["core", "all", "small"]), default="core",
                 show_default=True, help="Which layers, unless --layer names them."),
    _density,
    click.option("--block", "blocks", multiple=True, default=("1x1", "4x1"), show_default=True),
    _batch, _rounds(9), _seconds(2.0, "operator"),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."),
    _threads, _out, _fresh,
)  # fmt: skip
@one_line_errors
def ops_command(**options: Any) -> None:
    """Each operator's forward, dgrad and wgrad, norm and pooling: GFLOP/s and GB/s."""
    from .workbench.bench import ops

    run = Run("ops", options, "" if options["size"] == "core" else options["size"])
    run.finish(ops.run(**options, journal=run.journal), ops.tables, ())


@bench.command("layers")
@_options(_layers, _common, _rounds(9), _seconds(3.0, "layer"), _compile)
@one_line_errors
def layers_command(**options: Any) -> None:
    """Layers of VGG16-D, WRN-16-8, ResNet-50 and linear ones: forward + backward, with roofline."""
    from .workbench.bench import layers, plots

    run = Run("layers", options)
    draw = (("", plots.layer_speedups), ("-roofline", plots.roofline))
    run.finish(layers.run(**options, journal=run.journal), layers.tables, draw)


@bench.command("scaling")
@_options(
    _layers,
    click.option("--axis", "axes", multiple=True,
                 type=click.Choice(["density", "batch", "width", "threads"]),
                 help="Default: all (repeatable)."),
    _common, _rounds(7), _seconds(2.0, "point"), _compile,
)  # fmt: skip
@one_line_errors
def scaling_command(**options: Any) -> None:
    """The gain over density (with break-even), batch, width and threads."""
    from .workbench.bench import plots, scaling

    run = Run("scaling", options)
    draw = (("-density", plots.density), ("", plots.scaling))
    run.finish(scaling.run(**options, journal=run.journal), scaling.tables, draw)


@bench.command("peers")
@_options(_layers, _density, _batch, _rounds(9), _seconds(6.0, "layer"), _threads, _out, _fresh)
@one_line_errors
def peers_command(**options: Any) -> None:
    """Against sparseprop, sparselab, torch.sparse and scipy.sparse, where they are installed."""
    from .workbench.bench import peers, plots

    run = Run("peers", options)
    run.finish(peers.run(**options, journal=run.journal), peers.tables, (("", plots.peers),))


_net_options = _options(
    click.option("--dense-baseline", type=click.Choice(DENSE_BASELINES), default="auto",
                 show_default=True, help="auto: all that run here, the fastest counts."),
    click.option("--redistribution", type=click.Choice(REDISTRIBUTIONS), default="none",
                 show_default=True, help="none holds each layer's weights; momentum: the paper's."),
    click.option("--data-dir", default=None, help="The net's data set; default: random images."),
    click.option("--width", type=int, default=None, help="Width of wide-mlp's hidden layers."),
)  # fmt: skip


@bench.command("networks")
@_options(
    click.option("--net", "nets", multiple=True, default=("vgg16-d",), show_default=True,
                 help="Repeatable."),
    _common, _net_options,
    click.option("--steps", type=click.IntRange(1), default=20, show_default=True,
                 help="At most so many of each contender, in turns."),
    _seconds(75.0, "net"),
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
    """Whole training steps by part, memory and mask update; --epoch; --patterns start,1,10."""
    from .workbench.config import TrainConfig
    from .workbench.errors import WorkbenchError

    if options["epoch"] and options["patterns"]:
        raise WorkbenchError("--epoch and --patterns: expected one of them; run them one by one")
    for net in nets:
        mine = {**options, "net": net}
        settings = ("net", "density", "block", "batch_size", "threads", "dense_baseline",
                    "redistribution", "data_dir", "width")  # fmt: skip
        config = TrainConfig(**{name: mine[name] for name in settings})
        config.check()
        if options["epoch"]:
            _run_epoch(config, mine)
        elif options["patterns"] is not None:
            _run_patterns(config, mine)
        else:
            _run_steps(config, mine)


def _tag(options: dict[str, Any]) -> str:
    shift = options["redistribution"]
    return options["net"] if shift == "none" else f"{options['net']}-{shift}"


def _only(options: dict[str, Any], *unused: str) -> dict[str, Any]:
    """The options without those that this kind of run does not look at."""
    kinds = {"epoch", "patterns", *unused}
    return {name: value for name, value in options.items() if name not in kinds}


def _run_steps(config: Any, options: dict[str, Any]) -> None:
    from .workbench.bench import network_tables, networks, plots

    used = _only(options, "epoch_block", "max_steps", "update_every", "data_dir")
    run = Run("networks", used, _tag(options))
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
    run = Run("epoch", used, _tag(options))
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
    run = Run("patterns", {**used, "patterns": options["patterns"]}, _tag(options))
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


@bench.command("inference")
@_options(
    click.option("--net", "nets", multiple=True, default=INFERENCE_NETS, show_default=True),
    _density, _block,
    click.option("--steps", type=click.IntRange(2), default=8, show_default=True,
                 help="Training steps before, a mask update in their middle."),
    _batch, _rounds(15), _seconds(5.0, "net and batch"), _threads, _out, _fresh,
)  # fmt: skip
@one_line_errors
def inference_command(nets: tuple[str, ...], **options: Any) -> None:
    """Forward in evaluation mode, batch 1 and 32, against dense and compiled dense."""
    from .workbench.bench import inference, plots
    from .workbench.config import TrainConfig

    configs = [
        TrainConfig(net=net, density=options["density"], block=options["block"],
                    batch_size=options["batch_size"], redistribution="none", signal="window")
        for net in nets
    ]  # fmt: skip
    run = Run("inference", {**options, "nets": nets} | {k: options[k] for k in ("out", "fresh")})
    found = inference.run(
        configs,
        steps=options["steps"],
        rounds=options["rounds"],
        seconds=options["seconds"],
        journal=run.journal,
    )
    run.finish(found, inference.tables, (("", plots.inference),))
