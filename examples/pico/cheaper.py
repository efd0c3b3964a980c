"""What steps that cost less lose on pico: guidance in a part of the steps, forecasts, and fewer steps in equal time.

python -m diffoundry.examples.pico.cheaper build/pico.bundle --plot cheaper.png
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np

from ...calibration.quality import psnr
from ...common.arrays import Array
from ...common.errors import DiffoundryError
from ...common.files import replacing
from ...common.machine import require_modules
from ...runtime.loop.batch import Batch
from ...runtime.loop.guidance import Guidance
from ...runtime.loop.host import HostStepper
from ...runtime.loop.noise import TorchGenerator
from ...runtime.loop.sample import Sample
from ...runtime.pictures.images import to_image
from ...runtime.pipeline import Pipeline, load
from ...runtime.schedulers import Steps, Table, make_table
from ...runtime.schedulers.forecast import LEAST_STEPS, OFFERED, Pattern, with_forecasts
from .score import GUIDANCE
from .scorer import score
from .world import Scene, split_scenes

FEWER, INTERVAL, FORECAST = "fewer steps", "guidance interval", "forecast"
_LEAST, _COUNTS = 8, 11
"""The fewest steps that are drawn, and how many counts from there to all but one."""
_INTERVALS = ((0.0, 0.9), (0.0, 0.8), (0.0, 0.6), (0.1, 1.0), (0.1, 0.9), (0.2, 0.8))
_PATTERNS = (OFFERED, Pattern(5), Pattern(8), Pattern(degree=2), Pattern(degree=3), Pattern(every=3))
_ROWS = 8
"""Pictures in one batch."""


@dataclass(frozen=True, slots=True)
class Row:
    """kind, what: the setting. calls: of the model with both halves of guidance; a call without one is half of it.

    psnr_db, low_db: to the picture of all steps from the same noise, the median and what a tenth is under.
    score: the share of attributes that are right.
    """

    kind: str
    what: str
    calls: float
    psnr_db: float
    low_db: float
    score: float


def rows(pipe: Pipeline, scenes: list[Scene], scheduler: str, steps: int, guidance: float) -> Iterator[Row]:
    """A row for each setting, all steps first."""
    texts = pipe.encode([*map(str, scenes), ""])[0]
    config, plain = pipe.bundle.scheduler_config(), Guidance(guidance)
    whole = make_table(config, Steps(steps), scheduler)
    if whole.steps != steps:
        raise DiffoundryError(f"{scheduler} calls the model more than once a step: choose another --scheduler")
    settings: list[tuple[str, str, Table, Guidance]] = [("all steps", f"{steps}", whole, plain)]
    for count in sorted({round(float(each)) for each in np.linspace(_LEAST, steps - 1, _COUNTS)}):
        settings.append((FEWER, f"{count}", make_table(config, Steps(count), scheduler), plain))
    for low, high in _INTERVALS:
        settings.append((INTERVAL, f"{low:g} to {high:g}", whole, replace(plain, interval=(low, high))))
    for pattern in _PATTERNS:
        what = f"first {pattern.first}, then 1 in {pattern.every}, degree {pattern.degree}"
        settings.append((FORECAST, what, with_forecasts(whole, pattern), plain))
    reference: list[Array] = []
    for kind, what, table, guided in settings:
        pictures = _draw(pipe, texts, table, guided)
        reference = reference or pictures
        near = [psnr(*pair) for pair in zip(pictures, reference, strict=True)]
        calls = sum((2 if guided.at(k, table.steps) else 1) / 2 for k in range(table.steps) if table.calls[k])
        right = score(pictures, scenes)["all"]
        yield Row(kind, what, calls, float(np.median(near)), float(np.percentile(near, 10)), right)


def beats(row: Row, found: list[Row]) -> bool:
    """Whether a setting is nearer to all steps than fewer steps in equal time, in the median and where it is far."""
    fewer = sorted((each for each in found if each.kind == FEWER), key=lambda each: each.calls)
    calls = [each.calls for each in fewer]
    median = np.interp(row.calls, calls, [each.psnr_db for each in fewer])
    low = np.interp(row.calls, calls, [each.low_db for each in fewer])
    return bool(row.psnr_db > median and row.low_db > low and row.calls <= calls[-1])


def _draw(pipe: Pipeline, texts: Array, table: Table, guidance: Guidance) -> list[Array]:
    *prompts, negative = [{"encoder_hidden_states": each} for each in texts]
    latents = []
    for start in range(0, len(prompts), _ROWS):
        batch = Batch(HostStepper(pipe.engine("unet")))
        handles = []
        for seed, prompt in enumerate(prompts[start : start + _ROWS], start):
            generator = TorchGenerator(seed)
            first = generator.randn(4, 8, 8) * np.float32(table.init_scale)
            handles.append(batch.add(Sample(table, guidance, generator, prompt, negative, first)))
        while batch:
            batch.step()
        latents += [batch.take(handle) for handle in handles]
    return [np.asarray(to_image(sample)) for sample in pipe.decode(np.stack(latents))]


def plot(found: list[Row], path: Path, title: str) -> None:
    """Calls of the model against distance to the picture of all steps. path: ends in .png or .svg."""
    require_modules("cheaper --plot", ["matplotlib"], "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour, style in ((FEWER, "#004488", "o-"), (INTERVAL, "#bb5566", "s"), (FORECAST, "#ddaa33", "D")):
        own = sorted((row for row in found if row.kind == kind), key=lambda row: row.calls)
        axes.plot([row.calls for row in own], [row.psnr_db for row in own], style, color=colour, label=kind)
    axes.set(xlabel="calls of the model (one without guidance is half)", ylabel="PSNR to all steps, dB", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=120)


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--captions", default=40, show_default=True, type=click.IntRange(1, 200), help="Held-out captions.")
@click.option("--scheduler", default="dpm++2m", show_default=True)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(LEAST_STEPS, 1000))
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option("--plot", "drawing", type=click.Path(path_type=Path), help="Draw calls against distance: PNG or SVG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: str, captions: int, scheduler: str, steps: int, guidance: float, drawing: Path | None, as_json: bool
) -> None:
    """Draw held-out captions with BUNDLE in ways that cost less, and tell what they lose."""
    try:
        if drawing is not None and drawing.suffix not in (".png", ".svg"):
            raise DiffoundryError(f"the drawing {drawing} must have a name that ends in .png or .svg")
        pipe = load(bundle, engine="onnxruntime", precision="fp32")
        found = list(rows(pipe, split_scenes()[1][:captions], scheduler, steps, guidance))
        if drawing is not None:
            plot(found, drawing, f"pico, {captions} captions, {steps} steps of {scheduler}, guidance {guidance:g}")
    except DiffoundryError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        print(json.dumps([{**asdict(row), "beats": beats(row, found)} for row in found]))
        return
    print(f"{'':<20}{'':<34}{'calls':>6}{'PSNR':>9}{'tenth':>9}{'score':>9}  nearer than fewer steps")
    for row in found:
        judged = row.kind in (INTERVAL, FORECAST)
        verdict = ("yes" if beats(row, found) else "no") if judged else ""
        print(
            f"{row.kind:<20}{row.what:<34}{row.calls:>6.1f}{row.psnr_db:>6.1f} dB{row.low_db:>6.1f} dB"
            f"{100 * row.score:>7.1f} %  {verdict}".rstrip()
        )


if __name__ == "__main__":
    main()
