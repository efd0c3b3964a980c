"""Score pico's LoRAs on scenes that training never saw:

diffoundry compile examples/pico -o build/pico-lora.bundle --lora-rank 32 --lora-layers all
python -m diffoundry.examples.pico.lora_score build/pico-lora.bundle

- new: captions of `lora.split_new`, with the LoRA that brings what they name and without it;
- old: captions of pico's world, at several strengths;
- both: small moons twice, with both LoRAs at once, which neither was trained for.

A picture's seed is its number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from ...common.arrays import Array
from ...runtime.lora import Lora
from ...runtime.pipeline import Pipeline, load
from ...runtime.request import Request
from .score import GUIDANCE
from .scorer import score
from .world import BACKGROUNDS, COLORS, NEW_SHAPES, TWICE, Scene, split_scenes

HOME = Path(__file__).parent / "lora"
OLD = (0.0, 0.25, 0.5, 1.0)
"""Strengths at which pico's own world is scored."""
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
_BATCH, _GAP = 50, 8
_STEPS: dict[str, Any] = {"steps": 20, "scheduler": "dpm++2m", "guidance": GUIDANCE}


def draw(pipe: Pipeline, scenes: list[Scene], loras: list[Lora]) -> list[Array]:
    """A picture of each scene, uint8 (64, 64, 3), drawn with these LoRAs."""
    pipe.set_loras(loras)
    requests = [Request(str(scene), seed=i, **_STEPS) for i, scene in enumerate(scenes)]
    made = pipe.generate_many(requests, batch=_BATCH)
    return [np.asarray(result.images[0]) for result in made]


def both_scenes() -> list[Scene]:
    """Small moons, twice."""
    return [Scene("small", color, NEW_SHAPES[0], TWICE, background) for color in COLORS for background in BACKGROUNDS]


def sheet(pipe: Pipeline, home: Path) -> Image.Image:
    """Rows of pictures: one caption at rising strengths, of each LoRA; both at once; a batch of three sets."""
    moon, twice = home / "moon.safetensors", home / "twice.safetensors"
    scenes = Scene("large", "yellow", "moon", "in the center", "navy"), Scene("small", "red", "heart", TWICE, "beige")
    rows = []
    for file, scene in zip((moon, twice), scenes, strict=True):
        rows.append([draw(pipe, [scene], [Lora(file, strength)])[0] for strength in STRENGTHS])
    rows.append(draw(pipe, both_scenes()[:: len(both_scenes()) // len(STRENGTHS)], [Lora(moon), Lora(twice)]))
    pipe.set_loras([])
    caption = "a small green moon twice on a black background"
    sets: list[tuple[Lora, ...]] = [(), (Lora(moon),), (Lora(twice),), (Lora(moon), Lora(twice))]
    made = pipe.generate_many([Request(caption, seed=7, loras=each, **_STEPS) for each in sets])
    rows.append([np.asarray(result.images[0]) for result in made])
    side, most = rows[0][0].shape[0], max(map(len, rows))
    page = Image.new("RGB", (most * (side + _GAP) - _GAP, len(rows) * (side + _GAP) - _GAP), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row[:most]):
            page.paste(Image.fromarray(picture), (j * (side + _GAP), i * (side + _GAP)))
    return page.resize((2 * page.width, 2 * page.height), Image.Resampling.NEAREST)


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--count", default=100, type=click.IntRange(1, 100), show_default=True, help="Captions of each kind.")
@click.option("--loras", type=click.Path(path_type=Path), default=HOME, help="Their folder.  [default: lora]")
@click.option("--sheet", "page", type=click.Path(path_type=Path), help="Write pictures as one PNG.")
@click.option("--json", "as_json", is_flag=True)
def main(bundle: str, count: int, loras: Path, page: Path | None, as_json: bool) -> None:
    """Print the shares of attributes that are right, of BUNDLE with each LoRA in LORAS."""
    from .lora import LORAS, split_new

    pipe = load(bundle, engine="onnxruntime", precision="fp32")
    rows: list[dict[str, Any]] = []

    def add(name: str, scenes: list[Scene], *used: tuple[str, float]) -> None:
        files = [Lora(loras / f"{each}.safetensors", strength) for each, strength in used]
        rows.append({"what": name, **score(draw(pipe, scenes, files), scenes, new=True)})

    for name in LORAS:
        scenes = split_new(name)[1][:count]
        add(f"new, {name} off", scenes)
        add(f"new, {name} 1", scenes, (name, 1.0))
        for strength in OLD:
            add(f"old, {name} {strength:g}", split_scenes()[1][:count], (name, strength))
    add("both at once", both_scenes()[:count], *((name, 1.0) for name in LORAS))
    if page is not None:
        sheet(pipe, loras).save(page)
    if as_json:
        print(json.dumps(rows))
        return
    names = [name for name in rows[0] if name != "what"]
    print(f"{'':<18}" + "".join(f"{name:>12}" for name in names))
    for row in rows:
        print(f"{row['what']:<18}" + "".join(f"{100 * row[name]:>10.1f} %" for name in names))


if __name__ == "__main__":
    main()
