"""`diffoundry bench --serve`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.errors import BenchError
from .outputs import check_output
from .progress import progress

if TYPE_CHECKING:
    from ..bench.served import Options, Report

OPTIONS = ("mix", "rates", "requests", "partial", "key_file")
"""Those that go with --serve alone."""
_SHARED = ("serve", "p99_s", "prompt", "seed", "json_path")
_STDOUT = "-"
_MOST_RATE = 10_000.0
_REQUESTS, _PARTIAL = 100, 1


def check_given(ctx: click.Context) -> None:
    """Raise `click.UsageError` where options of --serve stand without it, or others beside it."""
    given = {
        param.name: next((text for text in param.opts if text.startswith("--")), "BUNDLE")
        for param in ctx.command.params
        if param.name is not None and ctx.get_parameter_source(param.name) == click.core.ParameterSource.COMMANDLINE
    }
    if "serve" not in given:
        for name in OPTIONS:
            if name in given:
                raise click.UsageError(f"{given[name]} goes with --serve URL")
        return
    wrong = [text for name, text in given.items() if name not in (*_SHARED, *OPTIONS)]
    if wrong:
        raise click.UsageError(
            f"--serve measures a server as it is: leave out {', '.join(wrong)}; fields of requests stand in --mix, as "
            "in --mix 'steps=20 size=512x512'"
        )


def bench_server(asked: dict[str, Any]) -> None:
    """Measure the server, and show and write the report. Raises `DiffoundryError` and `click.UsageError`."""
    from ..bench.served import measure, save, to_json
    from ..bench.served_table import show

    options, where = _options(asked), asked["json_path"]
    if where == "":
        raise click.UsageError("--json needs the name of a file, or - for standard output")
    if where not in (None, _STDOUT):
        check_output(Path(where), "--json")
    kept: list[Report] = []

    def keep(report: Report) -> None:
        kept.append(report)
        if where == _STDOUT:
            print(json.dumps(to_json(report)), flush=True)
            return
        try:
            if where:
                save(report, Path(where))
        finally:  # what was measured is shown, too, where the disk is full
            from rich.console import Console

            show(report, Console(file=sys.stdout))
            sys.stdout.flush()

    try:
        with progress("bench", shown=where != _STDOUT) as told:
            measure(options, keep, told)
    except KeyboardInterrupt:
        more = "the report has what was measured until then" if kept else "nothing was measured yet"
        raise click.ClickException(f"interrupted: {more}") from None


def _options(asked: dict[str, Any]) -> Options:
    from ..bench.client import base_of
    from ..bench.mix import read_mix
    from ..bench.served import Options

    p99 = asked["p99_s"]
    return Options(
        base=base_of(asked["serve"]),
        kinds=read_mix(asked["mix"]),
        rates=_rates(asked["rates"] or ()),
        requests=asked["requests"] or _REQUESTS,
        p99_s=p99,
        partial=_PARTIAL if asked["partial"] is None else asked["partial"],
        keys=tuple(_keys(asked["key_file"])),
        prompt=asked["prompt"],
        seed=asked["seed"],
        command=shlex.join(["diffoundry", *sys.argv[1:]]),
    )


def _rates(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < number <= _MOST_RATE for number in numbers):
        raise click.UsageError(f"--rate takes requests a second above 0 and up to {_MOST_RATE:g}")
    return numbers


def _keys(path: str | None) -> list[str]:
    """The keys in a file as `serve --api-key-file` reads it; [""] without one. Raises `BenchError`."""
    if path is None:
        return [""]
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no plain text"
        raise BenchError(f"the key file {path} cannot be read ({why}): give a file with a key a line") from None
    keys = [line.split()[0] for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise BenchError(f"the key file {path} has no keys: write one a line")
    return keys
