"""Score a bundle of pico on captions that training never saw:

python -m diffoundry.examples.pico.score build/pico.bundle
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ...bundle import EIGHT_BIT, PRECISIONS
from ...calibration import emulation
from ...calibration.eightbit.recipes import recipes
from ...calibration.quality import psnr
from ...common.arrays import Array
from ...runtime.pipeline import Pipeline, load
from .scorer import score
from .world import Scene, split_scenes

GUIDANCE = 4.0
"""Chosen once, of 4 and 7.5: the higher one saturates the colours of so small a model."""


@click.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--captions", default=200, show_default=True, type=click.IntRange(1, 200), help="Held-out captions to draw."
)
@click.option("--scheduler", default="dpm++2m", show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Round each value as an engine does in this type, and tell how far the pictures are from fp32.",
)
@click.option(
    "--recipes",
    "beside",
    is_flag=True,
    help="With int8 or fp8: a line for each way to quantize that ours is held against.",
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: str,
    captions: int,
    scheduler: str,
    steps: int,
    guidance: float,
    precision: str,
    beside: bool,
    sheet: Path | None,
    as_json: bool,
) -> None:
    """Draw held-out captions with BUNDLE and print the share of attributes that is right."""
    if beside and precision not in EIGHT_BIT:
        raise click.UsageError(f"--recipes goes with --precision {' or '.join(EIGHT_BIT)}")
    exact = load(bundle, engine="onnxruntime", precision="fp32")
    scenes = split_scenes()[1][:captions]

    def draw(pipeline: Pipeline) -> list[Array]:
        asked = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
        return [np.asarray(pipeline(str(scene), seed=i, **asked).images[0]) for i, scene in enumerate(scenes)]

    if beside:
        _beside(exact, precision, draw, scenes, as_json)
        return
    ratios: list[float] = []
    if precision == "fp32":
        pictures = draw(exact)
    else:
        pictures = draw(Pipeline(exact.bundle, engine="onnxruntime", engines=emulation(exact.bundle, precision)))
        ratios = [psnr(*pair) for pair in zip(pictures, draw(exact), strict=True)]
    shares = score(pictures, scenes)
    if sheet is not None:
        rows = [np.concatenate(pictures[i : i + 20], axis=1) for i in range(0, len(pictures) - 19, 20)]
        Image.fromarray(np.concatenate(rows)).save(sheet)
    if as_json:
        told = {"psnr_db": {"worst": min(ratios), "median": float(np.median(ratios))}} if ratios else {}
        print(json.dumps({"captions": captions, **shares, **told}))
    else:
        for name, share in shares.items():
            print(f"{name:<10} {100 * share:5.1f} %")
        if ratios:
            print(f"PSNR to fp32: worst {min(ratios):.1f} dB, median {np.median(ratios):.1f} dB")


def _beside(
    exact: Pipeline,
    precision: str,
    draw: Callable[[Pipeline], list[Array]],
    scenes: list[Scene],
    as_json: bool,
) -> None:
    """Print what each recipe gives, float32 first."""
    reference = draw(exact)
    rows: list[dict[str, Any]] = [{"recipe": "fp32", "score": score(reference, scenes)["all"]}]
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as folder:
        for recipe in recipes(exact.bundle, precision, Path(folder)):
            pipeline = Pipeline(exact.bundle, engine="onnxruntime", engines={"unet": recipe.load})
            pictures = draw(pipeline)
            near = [psnr(*pair) for pair in zip(pictures, reference, strict=True)]
            distance = {"worst": min(near), "median": float(np.median(near))}
            told = {"layers": recipe.layers, "share": recipe.share, "psnr_db": distance}
            rows.append({"recipe": recipe.name, **told, "score": score(pictures, scenes)["all"]})
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'recipe':<29}{'layers':>9}{'arithmetic':>12}{'PSNR':>9}{'worst':>9}{'score':>9}")
    for row in rows:
        figures = " " * 39
        if "layers" in row:
            near, (low, count) = row["psnr_db"], row["layers"]
            figures = (
                f"{f'{low}/{count}':>9}{100 * row['share']:>10.1f} %{near['median']:>6.1f} dB{near['worst']:>6.1f} dB"
            )
        print(f"{row['recipe']:<29}{figures}{100 * row['score']:>7.1f} %")


if __name__ == "__main__":
    main()
