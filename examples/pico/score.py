"""Score a bundle of pico on captions that training never saw:

python -m diffoundry.examples.pico.score build/pico.bundle
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ...bundle import PRECISIONS
from ...calibration import emulation
from ...calibration.quality import psnr
from ...common.arrays import Array
from ...runtime.pipeline import Pipeline, load
from .scorer import score
from .world import split_scenes

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
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: str,
    captions: int,
    scheduler: str,
    steps: int,
    guidance: float,
    precision: str,
    sheet: Path | None,
    as_json: bool,
) -> None:
    """Draw held-out captions with BUNDLE and print the share of attributes that is right."""
    exact = load(bundle, engine="onnxruntime", precision="fp32")
    scenes = split_scenes()[1][:captions]

    def draw(pipeline: Pipeline) -> list[Array]:
        asked = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
        return [np.asarray(pipeline(str(scene), seed=i, **asked).images[0]) for i, scene in enumerate(scenes)]

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


if __name__ == "__main__":
    main()
