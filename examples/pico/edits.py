"""Edit pictures of captions that training never saw with a bundle of pico, and score what changed and what stayed:

python -m diffoundry.examples.pico.edits build/pico.bundle

Image-to-image changes the colour; inpainting puts another shape of another colour in the place of the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ...runtime.pipeline import Pipeline, load
from .edit_score import difference_outside, is_kept_outside, read_inside, score_edits
from .score import GUIDANCE
from .world import ATTRIBUTES, COLORS, PLACES, SHAPES, SIDE, SIZES, Scene, render, split_scenes

STRENGTH = 0.8
"""Of image-to-image."""
_COLUMNS, _SCALE = 8, 2
_CELL = 8
"""Pixels a latent: a mask of whole ones means the same at both sizes."""


def recolored(scene: Scene, i: int) -> Scene:
    """The scene in another colour."""
    return replace(scene, color=_other(tuple(COLORS), scene.color, i))


def reshaped(scene: Scene, i: int) -> Scene:
    """The scene with another shape in another colour, at the same place."""
    return replace(recolored(scene, i), shape=_other(SHAPES, scene.shape, i))


def _other(known: tuple[str, ...], own: str, i: int) -> str:
    rest = [name for name in known if name != own]
    return rest[i % len(rest)]


def mask_of(scene: Scene) -> np.ndarray:
    """Where the shape of `scene` lies: bool (64, 64), whole latents."""
    dx, dy = PLACES[scene.place]
    reach = SIZES[scene.size]
    low = [int(np.floor((SIDE / 2 + d - reach) / _CELL)) * _CELL for d in (dy, dx)]
    high = [int(np.ceil((SIDE / 2 + d + reach) / _CELL)) * _CELL for d in (dy, dx)]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[max(low[0], 0) : high[0], max(low[1], 0) : high[1]] = True
    return mask


def image_to_image(pipeline: Pipeline, scenes: list[Scene], steps: int, strength: float) -> Iterator[np.ndarray]:
    """Each scene's picture in another colour."""
    for i, scene in enumerate(scenes):
        picture = Image.fromarray(render(scene))
        result = pipeline(
            str(recolored(scene, i)), image=picture, strength=strength, seed=i, steps=steps, guidance=GUIDANCE
        )
        yield np.asarray(result.images[0])


def inpaint(pipeline: Pipeline, scenes: list[Scene], steps: int) -> Iterator[np.ndarray]:
    """Each scene's picture with another shape in its place."""
    for i, scene in enumerate(scenes):
        picture, mask = Image.fromarray(render(scene)), Image.fromarray(mask_of(scene))
        result = pipeline(str(reshaped(scene, i)), image=picture, mask=mask, seed=i, steps=steps, guidance=GUIDANCE)
        yield np.asarray(result.images[0])


def score_inpainting(pipeline: Pipeline, scenes: list[Scene], results: list[np.ndarray]) -> dict[str, float]:
    """Shares of attributes right `inside` the mask and of pictures `kept` outside it, and how far these are off."""
    right, kept, differences = [], [], []
    for i, (scene, result) in enumerate(zip(scenes, results, strict=True)):
        source, mask, wanted = render(scene), mask_of(scene), reshaped(scene, i)
        found = read_inside(result, mask)
        right += [found[name] == getattr(wanted, name) for name in ATTRIBUTES]
        kept.append(is_kept_outside(source, result, mask, round_trip(pipeline, source)))
        differences.append(difference_outside(source, result, mask))
    return {"inside": float(np.mean(right)), "kept": float(np.mean(kept)), "difference": float(np.mean(differences))}


def round_trip(pipeline: Pipeline, picture: np.ndarray) -> np.ndarray:
    """The picture encoded and decoded: a mask of nothing leaves all of it."""
    nothing = Image.fromarray(np.zeros((SIDE, SIDE), bool))
    result = pipeline("", image=Image.fromarray(picture), mask=nothing, seed=0, steps=1, guidance=1)
    return np.asarray(result.images[0])


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--captions", default=100, show_default=True, type=click.IntRange(1, 200), help="Held-out captions.")
@click.option("--steps", default=20, show_default=True)
@click.option("--strength", default=STRENGTH, show_default=True, help="Of image-to-image.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write sources and results as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(bundle: str, captions: int, steps: int, strength: float, sheet: Path | None, as_json: bool) -> None:
    """Edit pictures with BUNDLE and print what changed as it should, and what stayed."""
    pipeline = load(bundle)
    _, scenes = split_scenes()
    scenes = scenes[:captions]
    recolorings = list(image_to_image(pipeline, scenes, steps, strength))
    edits = [(scene, recolored(scene, i)) for i, scene in enumerate(scenes)]
    inpaintings = list(inpaint(pipeline, scenes, steps))
    shares = {
        "img2img": score_edits(recolorings, edits),
        "inpaint": score_inpainting(pipeline, scenes, inpaintings),
    }
    if sheet is not None:
        shown = slice(0, _COLUMNS)
        rows = [[render(scene) for scene in scenes[shown]], recolorings[shown], inpaintings[shown]]
        picture = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
        size = picture.width * _SCALE, picture.height * _SCALE
        picture.resize(size, Image.Resampling.BICUBIC).save(sheet)
    if as_json:
        print(json.dumps({"captions": captions, **shares}))
    else:
        for task, found in shares.items():
            figures = [f"{name} {100 * share:.1f} %" for name, share in found.items() if name != "difference"]
            figures += [
                f"difference outside {share:.1f} of 255" for name, share in found.items() if name == "difference"
            ]
            print(f"{task}: {', '.join(figures)}")


if __name__ == "__main__":
    main()
