"""Edges of a photograph, as the picture that a ControlNet for edges is given."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...common.errors import RequestError
from ...common.machine import require_modules
from .preprocess import ImageLike, open_image

CANNY = "canny"
DETECTORS = {
    "depth": "MiDaS or Depth Anything",
    "hed": "HED",
    "lineart": "the lineart model",
    "mlsd": "M-LSD",
    "normal": "a model of surface normals",
    "openpose": "OpenPose",
    "scribble": "HED or PiDiNet",
    "seg": "a model of segmentation",
    "softedge": "PiDiNet",
}
"""Detectors that need a model of their own, and which."""
_LOW, _HIGH = 100, 200
_LARGEST = 10_000


def canny(image: ImageLike, low: float = _LOW, high: float = _HIGH) -> Image.Image:
    """White edges on black, RGB, of the size of `image`: what `cv2.Canny(image, low, high)` finds.

    Raises `RequestError` for what is no picture, and `DiffoundryError` where OpenCV is not installed.
    """
    opened = open_image(image)
    if not 0 <= low <= high <= _LARGEST:
        raise RequestError(f"the thresholds of edges must be 0 <= low <= high <= {_LARGEST}, found {low} and {high}")
    require_modules("canny", ["cv2"], "control")
    import cv2

    found = cv2.Canny(np.asarray(opened), low, high)
    return Image.fromarray(np.repeat(found[..., None], 3, axis=2))


def check_detector(name: str) -> None:
    """Raise `RequestError` for a detector that is not here, with what to do."""
    if name == CANNY:
        return
    if name in DETECTORS:
        raise RequestError(
            f"the detector {name} needs a model of its own ({DETECTORS[name]}), which is not part of a bundle: run it "
            "yourself, for instance with the package controlnet_aux, and give the picture that it makes"
        )
    raise RequestError(f"unknown detector {name!r:.80}: {CANNY} is here")
