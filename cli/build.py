"""`diffoundry build`."""

from __future__ import annotations

from typing import Any

import click

from .goal import goal_options, show_result, take_goal
from .options import ENGINES, engine_option, json_option, precision_option
from .progress import progress


@click.command("build")
@click.argument("bundle", type=click.Path())
@engine_option(
    f"{ENGINES}; or auto: the fastest of those that are installed for this processor. [default: auto for a bundle that "
    "runs on the processor, unless a precision is named; else what the bundle was made for]"
)
@precision_option("Of weights and activations; what the lower ones would spoil stays in fp32. [default: the bundle's]")
@goal_options
@json_option
def build_command(bundle: str, as_json: bool, **options: Any) -> None:
    """Make a lower precision of BUNDLE, and TensorRT plans or graphs for CUDA, where it will run.

    Neither torch nor the checkpoint is needed. What is named here is what the bundle is run with by default from then
    on. A build that was stopped goes on where it was; what is finished is not done twice.
    """
    from ..calibration.build import build

    goal = take_goal(options)
    with progress("build", shown=not as_json) as report:
        made = build(bundle, progress=report, **goal, **options)
    held = f"{made.manifest.precision} for {made.manifest.engine}"
    show_result(made, f"{bundle} is ready: {held}", as_json, engine=made.manifest.engine)
