"""`diffoundry schedulers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import json_option, read_options

if TYPE_CHECKING:
    from ..runtime.schedulers import Sampler, Table

_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""The noise schedule that the published Stable Diffusion 1.x, 2.x and XL checkpoints were trained with."""


@click.command("schedulers")
@click.argument("name", required=False)
@click.option("--steps", type=int, help="Show the table of this many steps. [default: 20]")
@click.option("--start", default=0, type=int, help="The first step to make, as image-to-image does.")
@click.option("--bundle", type=click.Path(), help="Take the noise schedule of this bundle, not Stable Diffusion's.")
@click.option(
    "--scheduler-option", "options", multiple=True, metavar="KEY=VALUE", help="As in a scheduler_config.json."
)
@click.option("--plot", type=click.Path(), help="Draw sigmas, timesteps and coefficients into this PNG or SVG file.")
@json_option
def schedulers_command(
    name: str | None,
    steps: int | None,
    start: int,
    bundle: str | None,
    options: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """List the schedulers, or show the table of NAME.

    NAME is a short name or a diffusers class. The table has one row for each call of the model. Of a --bundle
    whose schedule shifts with the size of the picture it is that of the default size.
    """
    from ..families import open_bundle
    from ..runtime.schedule import Schedules
    from ..runtime.schedulers import Steps, find_sampler, is_known, make_table
    from ..runtime.schedulers.stored import to_json

    if name is None:
        if plot or options or bundle or steps is not None or start:
            raise click.UsageError("name the scheduler whose table is meant")
        _list(as_json)
        return
    count = 20 if steps is None else steps
    asked, chosen = Steps(count, start), read_options(options)
    if bundle:
        opened = open_bundle(bundle)
        schedules = Schedules(opened)
        task, size = opened.manifest.tasks[0], (opened.manifest.default_width, opened.manifest.default_height)
        key, asked = schedules.named(name), schedules.for_size(asked, size, task, name, chosen)
        table = schedules.table(asked, task, name, chosen)
    else:
        key, table = find_sampler(_STABLE_DIFFUSION, name)[0], make_table(_STABLE_DIFFUSION, asked, name, chosen)
    sampler = find_sampler(_STABLE_DIFFUSION, key)[1] if is_known(key) else None
    title = f"{key}, {count} steps ({sampler.class_name if sampler else 'read off its code'})"
    if plot:
        _plot(table, title, Path(plot))
    if as_json:
        print(json.dumps({"name": key, **(_described(sampler) if sampler else {}), **to_json(table)}))
    elif plot:
        click.echo(plot)
    else:
        _show(table, title)


def _list(as_json: bool) -> None:
    from ..runtime.schedulers import SAMPLERS

    if as_json:
        print(json.dumps({name: _described(each) | {"summary": each.summary} for name, each in SAMPLERS.items()}))
        return
    width = max(map(len, SAMPLERS))
    for name, sampler in SAMPLERS.items():
        click.echo(f"{name:{width}}  {sampler.summary} ({sampler.paper}; {sampler.class_name})")


def _described(sampler: Sampler) -> dict[str, str]:
    return {"class": sampler.class_name, "paper": sampler.paper}


def _columns(table: Table) -> list[str]:
    return ["x", *(f"r{i}" for i in range(1, table.registers)), "m", "noise", "x0"]


def _show(table: Table, title: str) -> None:
    """The rows, as far as they make the next x; `--json` has all."""
    used = [i for i in range(table.registers + 3) if table.weights[:, 0, i].any()]
    names = _columns(table)
    lines = [["call", "timestep", "alpha", "sigma", "input", *(f"x' of {names[i]}" for i in used)]]
    for k in range(table.steps):
        numbers = [table.timesteps[k], *table.alpha_sigma[k], table.input_scale[k], *table.weights[k, 0, used]]
        lines.append([str(k), *(f"{number:.6g}" for number in numbers)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    click.echo(f"{title}: {table.steps} calls, registers: {table.registers}, first x = {table.init_scale:.6g} * noise")
    for line in lines:
        click.echo("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _plot(table: Table, title: str, path: Path) -> None:
    from ..common.errors import DiffoundryError, RequestError
    from ..common.files import replacing

    if path.suffix.lower() not in (".png", ".svg"):
        raise RequestError(f"the plot {path} must be a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise RequestError(f"the folder {path.parent} does not exist: make it, or choose another --plot")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DiffoundryError("--plot needs matplotlib: run `pip install 'diffoundry[plot]'`") from None
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(title)
    (sigmas, timesteps), (state, output) = figure.subplots(2, 2)
    calls, dots = range(table.steps), {"marker": "o", "markersize": 3}
    sigmas.semilogy(calls, table.alpha_sigma[:, 1] / table.alpha_sigma[:, 0].clip(1e-12), **dots)
    timesteps.plot(calls, table.timesteps, **dots)
    for i, name in enumerate(_columns(table)):
        if table.weights[:, 0, i].any():
            axes = state if i < table.registers else output
            axes.plot(calls, table.weights[:, 0, i], label=name, **dots)
            axes.legend()
    labels = ("noise to signal, σ/α", "timestep", "weight of the registers in x'", "weight of m, noise and x0 in x'")
    for axes, label in zip((sigmas, timesteps, state, output), labels, strict=True):
        axes.set(xlabel="call of the model", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format=path.suffix[1:].lower())
