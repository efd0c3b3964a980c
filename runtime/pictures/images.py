"""Decoded samples to pictures, and PNG files that say how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...common.arrays import Array
from ...common.errors import OverflowedError, RequestError
from ...common.files import replacing

_LONGEST_NAME = 200
_METADATA_KEY = "diffoundry"
"""The PNG text chunk that holds, as JSON, everything needed to make the picture again."""


def to_image(sample: Array) -> Image.Image:
    """A decoded sample, float (3, H, W) in [-1, 1], as an RGB picture, rounded as diffusers rounds."""
    if not np.isfinite(sample).all():
        raise OverflowedError(
            "the decoded image is not finite (NaN or infinity): the VAE overflowed; use a bundle of higher precision"
        )
    unit = np.clip(sample.astype(np.float32) / 2 + np.float32(0.5), 0, 1)
    return Image.fromarray(np.round(unit * 255).astype(np.uint8).transpose(1, 2, 0))


def output_paths(path: Path, count: int) -> list[Path]:
    """Where to write `count` images: `path` itself, or path-0.png, path-1.png … for several.

    Raises `RequestError` when the folder does not exist or the format is not PNG.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(
            f"the output {path} must be a name that ends in .png: only PNG keeps the record of how it was made"
        )
    if not path.parent.is_dir():
        raise RequestError(f"the folder {path.parent} does not exist: make it, or choose another --output")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"no permission to write in {path.parent}: choose another --output")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]
    for each in paths:
        if each.is_dir():
            raise RequestError(f"the output {each} is a folder: give another file name")
        if len(os.fsencode(each.name)) > _LONGEST_NAME:
            raise RequestError(f"the output name {each.name[:20]}… is too long: at most {_LONGEST_NAME} bytes")
    return paths


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `image` beside `path` with its metadata, then rename it into place."""
    with replacing(path) as beside:
        image.save(beside, format="PNG", pnginfo=png_info(metadata))


def png_info(metadata: Mapping[str, Any]) -> PngInfo:
    """The text chunk with the metadata, as JSON."""
    info = PngInfo()
    info.add_itxt(_METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    return info
