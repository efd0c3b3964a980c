"""Score pico's ControlNet and IP-Adapter beside pico alone, on scenes that training never saw:

diffoundry compile examples/pico -o build/pico-control.bundle --controlnet outline=examples/pico/controlnet \\
    --ip-adapter look=examples/pico/ip_adapter
python -m diffoundry.examples.pico.control_score build/pico-control.bundle

- ControlNet: captions name colour and shape only. The outline is that of a held-out scene, and once more that of its
  shape moved and resized freely (whose shape is not read: the scorer knows the sizes of the world only). IoU is the
  intersection over union of the shape drawn and of the one outlined.
- IP-Adapter: captions are empty, the reference is the picture of a held-out scene.

A picture's seed is its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ...bundle import Bundle
from ...common.arrays import Array
from .score import GUIDANCE
from .scorer import read, read_mask
from .world import (
    SIDE,
    Scene,
    caption,
    free_pose,
    mask_of,
    outline,
    pose,
    render,
    split_scenes,
)

Draw = Callable[[list[str], list[Array], list[int]], list[Array]]
"""From captions, the outline or reference of each, and seeds to pictures; all pictures are uint8 (64, 64, 3)."""

_BATCH = 50
_COLUMNS = 6
_GAP = 8


@dataclass(frozen=True, slots=True)
class Drawers:
    """What is held against each other: pico alone, which looks at no picture, with outlines and with references."""

    alone: Draw
    outlines: Draw
    references: Draw


def outlined(count: int, moved: bool) -> tuple[list[Scene], list[Array]]:
    """Held-out scenes and the `coverage` of their shapes, which are where the scene says or, `moved`, anywhere."""
    scenes = split_scenes()[1][:count]
    rng = np.random.default_rng(14)
    return scenes, [mask_of(scene, free_pose(rng) if moved else pose(scene, rng)) for scene in scenes]


def referred(count: int) -> tuple[list[Scene], list[Array]]:
    """Held-out scenes and pictures of them."""
    scenes = split_scenes()[1][:count]
    rng = np.random.default_rng(15)
    return scenes, [render(scene, rng) for scene in scenes]


def short_caption(scene: Scene) -> str:
    """A caption that names colour and shape only."""
    return caption(scene, frozenset({"color", "shape"}))


def iou(drawn: Array, wanted: Array) -> float:
    """Intersection over union of two bool masks; 0 if both are empty."""
    union = int((drawn | wanted).sum())
    return float((drawn & wanted).sum() / union) if union else 0.0


def score_outlines(draw: Draw, count: int, moved: bool = False) -> dict[str, float]:
    """Mean IoU, and the shares of pictures that have the colour named and, unless `moved`, the shape outlined."""
    scenes, masks = outlined(count, moved)
    pictures = draw([short_caption(scene) for scene in scenes], [outline(mask) for mask in masks], list(range(count)))
    found = [read(picture) for picture in pictures]
    figures = {
        "iou": float(np.mean([iou(read_mask(one), mask > 0.5) for one, mask in zip(pictures, masks, strict=True)])),
        "color": _share(found, scenes, "color"),
    }
    return figures if moved else {**figures, "shape": _share(found, scenes, "shape")}


def score_references(draw: Draw, count: int) -> dict[str, float]:
    """The shares of pictures that have the colour of the reference, its shape, and both."""
    scenes, pictures = referred(count)
    found = [read(picture) for picture in draw([""] * count, pictures, list(range(count)))]
    return {
        "color": _share(found, scenes, "color"),
        "shape": _share(found, scenes, "shape"),
        "both": _share(found, scenes, "shape", "color"),
    }


def _share(found: list[dict[str, str | None]], scenes: list[Scene], *names: str) -> float:
    pairs = zip(found, scenes, strict=True)
    return float(np.mean([all(one[name] == getattr(scene, name) for name in names) for one, scene in pairs]))


def sheet(drawers: Drawers) -> Image.Image:
    """Pictures of held-out scenes. Left: outlines (half of them moved), drawn with a short caption, with none, and the
    short caption without the ControlNet. Right: references, drawn with two seeds, and the seed without the IP-Adapter.
    """
    half = _COLUMNS // 2
    kinds = [outlined(half, moved=False), outlined(_COLUMNS, moved=True)]
    scenes, masks = kinds[0][0] + kinds[1][0][half:], kinds[0][1] + kinds[1][1][half:]
    edges, pictures = [outline(mask) for mask in masks], referred(2 * _COLUMNS)[1][_COLUMNS:]
    captions, nothing = [short_caption(scene) for scene in scenes], [""] * _COLUMNS
    seeds, others = list(range(_COLUMNS)), list(range(_COLUMNS, 2 * _COLUMNS))
    left = [
        edges,
        drawers.outlines(captions, edges, seeds),
        drawers.outlines(nothing, edges, others),
        drawers.alone(captions, edges, seeds),
    ]
    right = [
        pictures,
        drawers.references(nothing, pictures, seeds),
        drawers.references(nothing, pictures, others),
        drawers.alone(nothing, pictures, seeds),
    ]
    rows = [
        np.concatenate([_row(one), np.full((SIDE, 2 * _GAP, 3), 255, np.uint8), _row(other)], axis=1)
        for one, other in zip(left, right, strict=True)
    ]
    spaced = [part for row in rows for part in (row, np.full((_GAP, row.shape[1], 3), 255, np.uint8))][:-1]
    pixels = np.concatenate(spaced)
    return Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), Image.Resampling.NEAREST)


def _row(pictures: list[Array]) -> Array:
    gap = np.full((SIDE, _GAP // 2, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def drawers_of(bundle: Path, steps: int, guidance: float) -> Drawers:
    """What a bundle draws that has pico's ControlNet as `outline` and its IP-Adapter as `look`."""
    from ... import Control, ImagePrompt, Request, load

    pipe = load(bundle)

    def drawn(captions: list[str], seeds: list[int], told: list[dict[str, Any]]) -> list[Array]:
        requests = [
            Request(text, seed=seed, steps=steps, guidance_scale=guidance, **more)
            for text, seed, more in zip(captions, seeds, told, strict=True)
        ]
        results = pipe.generate_many(requests, batch=_BATCH)
        return [np.asarray(result.images[0]) for result in results]

    def alone(captions: list[str], pictures: list[Array], seeds: list[int]) -> list[Array]:
        return drawn(captions, seeds, [{} for _ in seeds])

    def outlines(captions: list[str], pictures: list[Array], seeds: list[int]) -> list[Array]:
        return drawn(captions, seeds, [{"control": (Control("outline", picture),)} for picture in pictures])

    def references(captions: list[str], pictures: list[Array], seeds: list[int]) -> list[Array]:
        return drawn(captions, seeds, [{"image_prompt": (ImagePrompt("look", picture),)} for picture in pictures])

    return Drawers(alone, outlines, references)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--count",
    default=200,
    show_default=True,
    type=click.IntRange(1, 200),
    help="Held-out scenes to draw, of each kind.",
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1))
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option("--sheet", "sheet_file", type=click.Path(path_type=Path), help="Write a few of the pictures as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(
    bundle: Path,
    count: int,
    steps: int,
    guidance: float,
    sheet_file: Path | None,
    as_json: bool,
) -> None:
    """Draw held-out scenes with BUNDLE and print how well outline and reference are followed, pico alone beside."""
    wiring = Bundle.open(bundle).manifest.wiring
    if "outline" not in wiring.controls or "look" not in wiring.image_prompts:
        raise click.ClickException(
            f"{bundle} has no control `outline` and IP-Adapter `look`: compile pico with "
            "--controlnet outline=examples/pico/controlnet --ip-adapter look=examples/pico/ip_adapter"
        )
    drawers = drawers_of(bundle, steps, guidance)
    if sheet_file is not None:
        sheet(drawers).save(sheet_file, optimize=True)
    table = {
        "outlines": {
            "alone": score_outlines(drawers.alone, count),
            "ControlNet": score_outlines(drawers.outlines, count),
        },
        "outlines, moved": {
            "alone": score_outlines(drawers.alone, count, moved=True),
            "ControlNet": score_outlines(drawers.outlines, count, moved=True),
        },
        "references": {
            "alone": score_references(drawers.alone, count),
            "IP-Adapter": score_references(drawers.references, count),
        },
    }
    if as_json:
        print(json.dumps({"count": count, **table}))
        return
    for kind, rows in table.items():
        for name, figures in rows.items():
            told = "  ".join(f"{figure} {100 * value:5.1f} %" for figure, value in figures.items())
            print(f"{kind:<17}{name:<12}{told}")


if __name__ == "__main__":
    main()
