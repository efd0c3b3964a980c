"""`diffoundry bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import ENGINES, NAMES, NUMBERS, Number, engine_option, precision_option, threads_option
from .progress import progress
from .served import OPTIONS as OF_SERVE
from .served import bench_server, check_given

if TYPE_CHECKING:
    from ..bench.options import Options
    from ..bench.report import Report

_STDOUT = "-"
_GROUPS = {
    "What is measured": ("versus", "checkpoint", "scenario", "engine", "precision", "threads"),
    "The picture": (
        *("prompt", "negative_prompt", "seed", "width", "height"),
        *("steps", "guidance", "scheduler"),
    ),
    "How often": ("turns", "cold", "batch", "p99_s"),
    "What is written": ("json_path", "plot", "html"),
    "A server that runs": ("serve", "mix", "rates", "requests", "partial", "key_file"),
    "Other things to do": ("setup", "compare"),
}
_ALONE = ("setup", "compare")


class _Grouped(click.Command):
    """Shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        left = {param.name: record for param in options if (record := param.get_help_record(ctx))}
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([left.pop(name) for name in names])
        with formatter.section("Options"):
            formatter.write_dl(list(left.values()))


@click.command("bench", cls=_Grouped)
@click.argument("bundle", required=False, type=click.Path())
@click.option(
    "--vs",
    "versus",
    type=NAMES,
    help="Measure these too, turn by turn with ours: diffusers, compile (torch.compile), optimum, openvino-genai, "
    "sdcpp. Each runs in an environment of its own, which --setup makes.",
)
@click.option("--checkpoint", type=click.Path(), help="For --vs: the diffusers folder that BUNDLE was compiled from.")
@click.option(
    "--scenario",
    type=click.Choice(["single", "offline", "server"]),
    default="single",
    help="Beside single pictures: the largest throughput over batches, or the most requests a second within --p99.",
)
@engine_option(f"What runs our models: {ENGINES}. [default: what the bundle was made for]")
@precision_option("Of all systems. [default: what our engine takes for this bundle]")
@threads_option
@click.option("--prompt", help="[default: a large red star at the left on a navy background]")
@click.option("-n", "--negative", "--negative-prompt", "negative_prompt", help="What the picture should not show.")
@click.option("--seed", type=int, default=7, help="Of the first picture; picture i of a batch has seed + i.")
@click.option("--width", type=int, help="In pixels. [default: the checkpoint's]")
@click.option("--height", type=int, help="In pixels. [default: the checkpoint's]")
@click.option("--steps", "--num-inference-steps", "steps", type=int, help="[default: the bundle's]")
@click.option("--guidance", "--guidance-scale", "guidance", type=float, help="[default: the bundle's]")
@click.option("--scheduler", help="A name that `diffoundry schedulers` lists. [default: the checkpoint's own]")
@click.option(
    "--turns",
    type=click.IntRange(1, 10_000),
    help="Warm calls of each system. [default: as many as take a minute, from 5 to 100]",
)
@click.option("--cold", type=click.IntRange(0, 100), default=3, help="Starts of each system in a process of its own.")
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    help="Most pictures in one call of the scenarios offline and server. [default: 8]",
)
@click.option(
    "--p99",
    "p99_s",
    type=Number(0, 86_400, min_open=True),
    metavar="SECONDS",
    help="The scenario server, and --serve: what 99 of 100 requests must stay within. [default: three times a single "
    "picture]",
)
@click.option(
    "--json", "json_path", type=click.Path(), metavar="FILE", help="The report; - is standard output, and nothing else."
)
@click.option("--plot", type=click.Path(), metavar="FILE", help="Stages and latencies of all systems, PNG or SVG.")
@click.option("--html", type=click.Path(), metavar="FILE", help="The report as one page that needs nothing else.")
@click.option(
    "--serve",
    metavar="URL",
    help="Measure the server that runs there, by OpenAI's images API: latencies to the first picture and to the last, "
    "throughput, refusals, and the highest rate that --p99 allows.",
)
@click.option(
    "--mix",
    multiple=True,
    metavar="'[SHARE] FIELD=VALUE …'",
    help="A kind of request; repeat it for others. Of values with commas between them each request has one: '60% "
    "steps=4 size=512x512,768x512'. [default: what the server draws where nothing is said]",
)
@click.option("--rate", "rates", type=NUMBERS, help="Requests a second. [default: search for the highest within --p99]")
@click.option("--requests", type=click.IntRange(1, 100_000), help="Of each rate. [default: 100, more in a search]")
@click.option(
    "--partial-images",
    "partial",
    type=click.IntRange(0, 3),
    help="Pictures on their way that are asked for; 0 asks without a stream. [default: 1]",
)
@click.option("--api-key-file", "key_file", type=click.Path(), help="A key a line, used in turn. [default: no key]")
@click.option("--setup", metavar="PEER", help="Make the environment of a system of --vs, and do nothing else.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(),
    metavar="OLD NEW",
    help="Say what became slower or faster between two reports, beyond their noise; exit code 1 where ours is slower.",
)
def bench_command(setup: str | None, compare: tuple[str, str] | None, **asked: Any) -> None:
    """Measure BUNDLE: starts, single pictures, stages, and what share of the machine's limits they reach.

    Turns of the systems alternate, and ratios are taken pair by pair. A bundle that `verify` finds wrong is not timed.
    A system of --vs that is missing or fails is a row that says why.
    """
    if setup is not None or compare is not None:
        _check_alone(click.get_current_context())
        if setup is not None:
            _set_up(setup)
        elif compare is not None:
            _compare(*compare)
        return
    check_given(click.get_current_context())
    if asked["serve"] is not None:
        bench_server(asked)
        return
    asked = {name: value for name, value in asked.items() if name not in (*OF_SERVE, "serve")}
    from ..bench import table
    from ..bench.bench import measure

    outputs = {f"--{name}": asked.pop(key) for name, key in (("json", "json_path"), ("plot", "plot"), ("html", "html"))}
    options = _options(asked)
    _check_outputs(options.bundle, outputs)
    outputs = {
        option: text if text in (None, _STDOUT) else str(Path(text).resolve()) for option, text in outputs.items()
    }
    kept: list[Report] = []
    to_stdout = outputs["--json"] == _STDOUT

    def keep(report: Report) -> None:
        kept.append(report)
        try:
            _write_json(report, outputs["--json"])
        finally:  # what was measured is shown, too, where the disk is full
            if not to_stdout:
                from rich.console import Console

                table.show(report, Console(file=sys.stdout))
                sys.stdout.flush()

    try:
        with progress("bench", shown=not to_stdout) as show:
            report = measure(options, keep, show)
    except KeyboardInterrupt:
        if not kept:
            raise click.ClickException("interrupted before anything was measured") from None
        where = outputs["--json"]
        more = "" if where == _STDOUT else f"; it is in {where}" if where else "; --json FILE would keep it in a file"
        raise click.ClickException(f"interrupted: the report has what was measured until then{more}") from None
    _write_pictures(report, outputs)


def _check_alone(ctx: click.Context) -> None:
    """Raise `click.UsageError` where more was given than --setup, or --compare."""
    given = [
        param
        for param in ctx.command.params
        if param.name is not None and ctx.get_parameter_source(param.name) == click.core.ParameterSource.COMMANDLINE
    ]
    names = [next((text for text in param.opts if text.startswith("--")), "BUNDLE") for param in given]
    if len(names) > 1:
        (first, *_) = (name for name in names if name.lstrip("-") in _ALONE)
        raise click.UsageError(
            f"{first} is given alone: leave out {', '.join(name for name in names if name != first)}"
        )


def _set_up(name: str) -> None:
    from ..bench import peers

    _check_peer(name)
    try:
        with progress("bench") as show:
            peers.setup(name, show)
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted: what was made of the environment of {name} is removed") from None
    click.echo(f"{name} is ready: diffoundry bench BUNDLE --vs {name}")


def _compare(old: str, new: str) -> None:
    from ..bench.compare import compare, text
    from ..bench.report import load
    from ..common.errors import BenchError

    comparison = compare(load(Path(old)), load(Path(new)))
    click.echo(text(comparison))
    if comparison.lost:
        raise BenchError(f"{new} has no turns of ours, {old} has: see why in its own table")
    if comparison.slower:
        raise BenchError(f"{new} is slower than {old} by more than the noise of both")


def _check_peer(name: str) -> None:
    from ..bench import peers

    if name not in peers.PEERS:
        raise click.UsageError(f"unknown system {name!r}: choose one of {', '.join(peers.PEERS)}")


def _options(asked: dict[str, Any]) -> Options:
    """What is to be measured. Raises `click.UsageError` for what does not go together."""
    from ..bench import peers
    from ..bench.options import Options

    if asked["bundle"] is None:
        raise click.UsageError("name the bundle to measure, or give --serve, --setup or --compare")
    scenario, versus = asked["scenario"], tuple(asked.pop("versus") or ())
    if asked["batch"] is not None and scenario == "single":
        raise click.UsageError("--batch goes with --scenario offline or server")
    if asked["p99_s"] is not None and scenario != "server":
        raise click.UsageError("--p99 goes with --scenario server")
    for name in versus:
        _check_peer(name)
    checkpoint = asked.pop("checkpoint")
    needy = [name for name in versus if peers.needs_checkpoint(name)]
    if needy and checkpoint is None:
        raise click.UsageError(f"{', '.join(needy)} reads a checkpoint: give --checkpoint FOLDER, that of the bundle")
    if checkpoint is not None and not versus:
        raise click.UsageError("--checkpoint goes with --vs")
    if needy and not Path(checkpoint, "model_index.json").is_file():
        raise click.UsageError(
            f"{checkpoint} has no model_index.json, which a folder in the diffusers layout has: give --checkpoint the "
            "folder that the bundle was compiled from"
        )
    given = {name: value for name, value in asked.items() if value is not None}
    given |= {"bundle": Path(asked["bundle"]), "checkpoint": None if checkpoint is None else Path(checkpoint)}
    return Options(**given, versus=versus, command=shlex.join(["diffoundry", *sys.argv[1:]]))


def _check_outputs(bundle: Path, outputs: dict[str, str | None]) -> None:
    """Raise `DiffoundryError` for a file that could not be written, before anything is measured."""
    from ..families import open_bundle
    from .outputs import check_beside, check_output

    for option, text in outputs.items():
        if text == "" or (text == _STDOUT and option != "--json"):
            raise click.UsageError(f"{option} needs the name of a file; only the JSON can go to standard output")
    paths = {option: Path(text) for option, text in outputs.items() if text and (option, text) != ("--json", _STDOUT)}
    if len({path.absolute() for path in paths.values()}) < len(paths):
        raise click.UsageError(f"{' and '.join(paths)} name one file: give each its own")
    for option, path in paths.items():
        check_output(path, option)
    if "--plot" in paths:
        from ..bench.plot import check

        check(paths["--plot"])
    check_beside(open_bundle(bundle), [(path, option) for option, path in paths.items()])


def _write_json(report: Report, where: str | None) -> None:
    from ..bench.report import save, to_json

    if where == _STDOUT:
        print(json.dumps(to_json(report)), flush=True)
    elif where:
        save(report, Path(where))


def _write_pictures(report: Report, outputs: dict[str, str | None]) -> None:
    if outputs["--plot"]:
        from ..bench.plot import plot

        plot(report, Path(outputs["--plot"]))
    if outputs["--html"]:
        from ..bench.page import write

        write(report, Path(outputs["--html"]))
