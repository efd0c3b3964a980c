"""`diffoundry serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..common.errors import RequestError
from .options import GIB, Number, engine_option, precision_option, read_pairs, threads_option


@click.command("serve")
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE…")
@click.option("--host", default="127.0.0.1", help="The address to listen on; 0.0.0.0 is all of this machine.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes any that is free.")
@click.option(
    "--max-rows", "rows", default=8, type=click.IntRange(1, 4096), help="Most images that are stepped together."
)
@click.option("--queue", default=64, type=click.IntRange(0, 100_000), help="Most images that wait; more are refused.")
@click.option(
    "--patience",
    default=3.0,
    type=Number(1.0),
    help="Refuse what would take longer than so many times its time in a full batch; inf for nothing.",
)
@click.option(
    "--memory",
    type=GIB,
    help="Of the models in memory; those that are not used make room for others. [default: all that there is]",
)
@click.option(
    "--api-key-file",
    "keys",
    type=click.Path(),
    help="A file with a key a line, and after a space the most priority that it may ask for. [default: no keys]",
)
@click.option(
    "--lora", "loras", multiple=True, metavar="NAME=FILE", help="A LoRA that requests may name. May be repeated."
)
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="A site whose pages may ask from a browser.")
@click.option(
    "--no-page",
    "page",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    help="Without the page to draw in at /.",
)
@click.option("--warm", is_flag=True, help="Load the models and draw once before the first request is taken.")
@click.option(
    "--drain",
    default=300.0,
    type=Number(0, 86_400),
    help="Seconds for what is drawn when the server is told to end.",
)
@click.option("--ray", "on_ray", is_flag=True, help="Draw with several replicas, by Ray Serve: see --replicas.")
@click.option(
    "--replicas",
    metavar="N|MIN-MAX",
    help="With --ray: how many, each with a GPU, or with --threads cores. [default: 1 to as many as have room]",
)
@engine_option()
@precision_option("Of the models. [default: what the bundle was compiled for; fp32 on the CPU]")
@threads_option
def serve_command(
    bundles: tuple[str, ...],
    keys: str | None,
    loras: tuple[str, ...],
    on_ray: bool,
    replicas: str | None,
    **how: Any,
) -> None:
    """Draw for others, by OpenAI's images API and by jobs.

    Each BUNDLE is a model, called by the name before it or by that of its folder; the first one is meant where a
    request names none. Ends when what it draws is done, on SIGTERM or Ctrl-C.
    """
    from .. import __version__

    if replicas is not None and not on_ray:
        raise RequestError("--replicas is for --ray: give both, or neither")
    try:
        from ..serve.server import Options, named, serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "prometheus_client"):
            raise
        raise RequestError("serving needs the extra serve: pip install 'diffoundry[serve]'") from None
    options = Options(
        version=__version__,
        bundles=named(bundles),
        keys=None if keys is None else Path(keys),
        loras=read_pairs("--lora", loras, "NAME=FILE"),
        **how,
    )
    if not on_ray:
        serve(options, say)
        return
    from ..serve import ray
    from ..serve.cluster import Replicas

    ray.serve(options, None if replicas is None else Replicas.parse(replicas), say)


def say(line: str) -> None:
    """Show a line on standard error."""
    click.echo(line, err=True)
