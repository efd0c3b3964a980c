"""Pictures of a conversion beside those in float32: one sheet, a row for each prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...common.arrays import Array

ROWS = 4
"""Prompts that are shown."""
GAIN = 4
"""What differences are multiplied with, to be seen."""
_SIDE = 256


def sheet(exact: Sequence[Array], images: Sequence[Array]) -> bytes:
    """A PNG of the first images, uint8 (H, W, 3): float32, the other, and `GAIN` times the difference."""
    rows = []
    for a, b in list(zip(exact, images, strict=True))[:ROWS]:
        off = np.abs(a.astype(np.int16) - b.astype(np.int16)) * GAIN
        rows.append(np.concatenate([a, b, np.minimum(off, 255).astype(np.uint8)], axis=1))
    whole = Image.fromarray(np.concatenate(rows))
    height, width, _ = exact[0].shape
    shrunk = min(1.0, _SIDE / max(height, width))
    if shrunk < 1:
        whole = whole.resize((round(whole.width * shrunk), round(whole.height * shrunk)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    whole.save(file, "PNG", optimize=True)
    return file.getvalue()
