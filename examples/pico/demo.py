"""Draw eight captions with a bundle of pico and lay them out on one sheet: the picture in the README."""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from ...runtime.pipeline import load
from .score import GUIDANCE

CAPTIONS = (
    "a large red star at the left on a navy background",
    "a small yellow circle at the top on a maroon background",
    "a large purple heart in the center on a beige background",
    "a large white ring at the bottom on a forest background",
    "a large cyan diamond at the right on a black background",
    "a large green cross at the top on a gray background",
    "a small orange square at the bottom on a navy background",
    "a large blue triangle in the center on a beige background",
)
_SCALE, _COLUMNS, _MARGIN, _TEXT = 3, 4, 12, 34


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=7, show_default=True)
@click.option("--steps", default=20, show_default=True)
def main(bundle: str, out: Path, seed: int, steps: int) -> None:
    """Draw the sheet with BUNDLE and write it to OUT."""
    pipeline = load(bundle)
    side = pipeline.bundle.manifest.default_width * _SCALE
    cell_width, cell_height = side + _MARGIN, side + _TEXT + _MARGIN
    rows = -(-len(CAPTIONS) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, text in enumerate(CAPTIONS):
        picture = pipeline(text, seed=seed, steps=steps, guidance=GUIDANCE).images[0]
        x, y = _MARGIN + i % _COLUMNS * cell_width, _MARGIN + i // _COLUMNS * cell_height
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.multiline_text((x, y + side + 3), _wrapped(text, draw, font, side), fill="black", font=font, spacing=2)
    sheet.save(out)
    print(f"wrote {out}")


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
