"""``sparse-kernels bench``: what all benchmarks share, and those of single layers.

What is measured and how stands in ``workbench/bench``; here are the options, the journal of rows
that lets an interrupted run go on, and the names of the files. Whole nets: ``_cli_bench_nets``;
figures of earlier results: ``_cli_bench_figures``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ._cli_errors import one_line_errors

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULT_OUT = "benchmarks/results"
DEFAULT_BATCH = 128


@click.group()
def bench() -> None:
    """Measure sparse against the best dense PyTorch, validated first.

    Each command writes JSON, a Markdown table and figures to benchmarks/results/<machine>
    (--out), goes on where an interrupted run of the same command stopped, and names itself in what
    it writes.
    """


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


out_option = click.option("--out", default=None, help="Directory of the results.  [default: "
                    f"{DEFAULT_OUT}/<machine>]")  # fmt: skip
fresh_option = click.option(
    "--fresh", is_flag=True, help="Forget what an interrupted run has left."
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="Default: torch's own."
)
batch_option = click.option(
    "--batch-size", type=click.IntRange(1), default=DEFAULT_BATCH, show_default=True
)
block_option = click.option("--block", default="1x1", show_default=True, help="Rows x columns.")
density_option = click.option("--density", type=float, default=0.05, show_default=True)
common_options = with_options(
    density_option, block_option, batch_option, threads_option, out_option, fresh_option
)
_layers = click.option(
    "--layer", "names", multiple=True,
    help="A layer, or the beginning of names: vgg, wrn-128 (repeatable).",
)  # fmt: skip
_compile = click.option(
    "--compile/--no-compile", "compiled", default=False, show_default=True,
    help="torch.compile of single layers too: it has nothing to fuse.",
)  # fmt: skip


def rounds_option(default: int) -> Callable[[Command], Command]:
    return click.option("--rounds", type=click.IntRange(1), default=default, show_default=True,
                        help="At most so many, in turns.")  # fmt: skip


def seconds_option(default: float, of: str) -> Callable[[Command], Command]:
    return click.option("--seconds", type=click.FloatRange(0.0), default=default, show_default=True,
                        help=f"No new round begins after so long, per {of}; at least three are "
                        "made.")  # fmt: skip


class Run:
    """One benchmark: its settings, its journal, and where its files go."""

    def __init__(self, kind: str, options: dict[str, Any], *tags: str) -> None:
        """``tags``: what else the files' name must tell, so that no result replaces another."""
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
        header = machine.header()
        isa = header["isa"] if device.type == "cpu" else device.type
        block = options.get("block") or "+".join(options.get("blocks", ()))
        batch = options.get("batch_size", DEFAULT_BATCH)
        parts = [kind, *tags, f"d{100 * density:g}", block,
                 f"b{batch}" if batch != DEFAULT_BATCH else "",
                 f"{torch.get_num_threads()}t", isa.replace(" ", "-"),
                 machine.allocator_tag(header["environment"])]  # fmt: skip
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
        from .workbench.bench import index, results

        complete = {
            "command": command_line(click.get_current_context()),
            "machine": machine.header(),
            "settings": {name: _public(name, v) for name, v in self.settings.items()},
            **found,
        }
        shown = text(complete)
        files, missing = results.publish(self.folder, self.name, complete, shown, draw)
        listed = index.refresh(self.folder.parent)
        files += [listed] if listed else []
        self.journal.remove()
        click.echo("\n" + shown + "\n")
        for reason in missing:
            click.echo(reason)
        click.echo("written: " + ", ".join(str(path) for path in files))


def command_line(context: click.Context) -> str:
    """The command that repeats this one, every option spelled out, what it was told in front."""
    import torch

    from .workbench import machine

    words: list[str] = []
    here: click.Context | None = context
    while here is not None and here.parent is not None:
        words.insert(0, str(here.info_name))
        here = here.parent
    # Not the root's name: it may have been started as a module or by a test.
    words.insert(0, "sparse-kernels")
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name in (None, "fresh", "help"):
            continue
        value = _public(option.name, context.params.get(option.name))
        if option.name == "threads" and value is None:
            value = torch.get_num_threads()
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
    front = [f"{name}={shlex.quote(value)}" for name, value in machine.environment().items()]
    return " ".join([*front, shlex.join(words)])


def _public(name: str | None, value: Any) -> Any:
    """The value of an option as results tell it: where somebody's data lie is nobody's business."""
    return "DIR" if name == "data_dir" and value is not None else value


def _chosen(names: Sequence[str]) -> str:
    """The part of a file's name that tells which layers were asked for; "" for the usual list."""
    return "+".join(names)


@bench.command("ops")
@with_options(
    _layers,
    click.option("--size", type=click.Choice(["core", "all", "small"]), default="core",
                 show_default=True, help="Which layers, unless --layer names them."),
    density_option,
    click.option("--block", "blocks", multiple=True, default=("1x1", "4x1"), show_default=True),
    batch_option, rounds_option(9), seconds_option(2.0, "operator"),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."),
    threads_option, out_option, fresh_option,
)  # fmt: skip
@one_line_errors
def ops_command(**options: Any) -> None:
    """Each operator's forward, dgrad and wgrad, norm and pooling: GFLOP/s and GB/s."""
    from .workbench.bench import ops

    size = "" if options["size"] == "core" else options["size"]
    run = Run("ops", options, size, _chosen(options["names"]))
    run.finish(ops.run(**options, journal=run.journal), ops.tables, ())


@bench.command("layers")
@with_options(_layers, common_options, rounds_option(9), seconds_option(3.0, "layer"), _compile)
@one_line_errors
def layers_command(**options: Any) -> None:
    """Layers of VGG16-D, WRN-16-8, ResNet-50 and linear ones: forward + backward, with roofline."""
    from .workbench.bench import layers, plots

    run = Run("layers", options, _chosen(options["names"]))
    draw = (("", plots.layer_speedups), ("-roofline", plots.roofline))
    run.finish(layers.run(**options, journal=run.journal), layers.tables, draw)


@bench.command("scaling")
@with_options(
    _layers,
    click.option("--axis", "axes", multiple=True,
                 type=click.Choice(["density", "batch", "width", "threads"]),
                 help="Default: all (repeatable)."),
    common_options, rounds_option(7), seconds_option(2.0, "point"), _compile,
)  # fmt: skip
@one_line_errors
def scaling_command(**options: Any) -> None:
    """The gain over density (with break-even), batch, width and threads."""
    from .workbench.bench import plots, scaling

    run = Run("scaling", options, _chosen(options["names"]), _chosen(options["axes"]))
    draw = (("-density", plots.density), ("", plots.scaling))
    run.finish(scaling.run(**options, journal=run.journal), scaling.tables, draw)


@bench.command("peers")
@with_options(
    _layers, density_option, batch_option, rounds_option(9), seconds_option(6.0, "layer"),
    threads_option, out_option, fresh_option,
)  # fmt: skip
@one_line_errors
def peers_command(**options: Any) -> None:
    """Against sparseprop, sparselab, torch.sparse and scipy.sparse, where they are installed."""
    from .workbench.bench import peers, plots

    run = Run("peers", options, _chosen(options["names"]))
    run.finish(peers.run(**options, journal=run.journal), peers.tables, (("", plots.peers),))
