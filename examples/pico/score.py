"""Score a bundle of pico on captions that training never saw:

python -m diffoundry.examples.pico.score build/pico.bundle
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ...runtime.pipeline import load
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
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the pictures as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: str, captions: int, scheduler: str, steps: int, guidance: float, sheet: Path | None, as_json: bool
) -> None:
    """Draw held-out captions with BUNDLE and print the share of attributes that is right."""
    pipeline = load(bundle)
    _, scenes = split_scenes()
    pictures = [
        np.asarray(pipeline(str(scene), seed=i, steps=steps, scheduler=scheduler, guidance=guidance).images[0])
        for i, scene in enumerate(scenes[:captions])
    ]
    shares = score(pictures, scenes[:captions])
    if sheet is not None:
        rows = [np.concatenate(pictures[i : i + 20], axis=1) for i in range(0, len(pictures) - 19, 20)]
        Image.fromarray(np.concatenate(rows)).save(sheet)
    if as_json:
        print(json.dumps({"captions": captions, **shares}))
    else:
        for name, share in shares.items():
            print(f"{name:<10} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
