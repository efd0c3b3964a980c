"""`diffoundry build`."""

from __future__ import annotations

from typing import Any

import click

from .goal import goal_options, scan_of, show_result, target_of
from .options import PRECISIONS, engine_option, json_option
from .progress import progress


@click.command("build")
@click.argument("bundle", type=click.Path())
@engine_option
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of weights and activations; what the lower ones would spoil stays in fp32. [default: the bundle's]",
)
@goal_options
@json_option
def build_command(bundle: str, engine: str | None, precision: str | None, as_json: bool, **options: Any) -> None:
    """Make a lower precision and TensorRT plans of BUNDLE, where it will run.

    Neither torch nor the checkpoint is needed. What is named here is what the bundle is run with by default from then
    on. A build that was stopped goes on where it was; what is finished is not done twice.
    """
    from ..calibration.build import build

    target, scan = target_of(options), scan_of(options)
    with progress("build", shown=not as_json) as report:
        made = build(bundle, engine=engine, precision=precision, target=target, scan=scan, progress=report)
    held = f"{made.manifest.precision} for {made.manifest.engine}"
    show_result(made, f"{bundle} is ready: {held}", as_json, engine=made.manifest.engine)
