"""Pictures that come in, within limits that hold before they are decoded, and pictures that go out."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..runtime.pictures.images import png_info
from .errors import FieldError

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""What pictures are read as and sent as, and their media types."""
_MOST_PIXELS = 4096 * 4096
_DATA_URL = "data:image/"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that came with a request."""

    data: bytes


def part_error(name: str, message: str) -> FieldError:
    """An error in a picture. name: of a field, or `part of field`."""
    return FieldError(name.rpartition(" of ")[2], message)


def picture(name: str, value: Any) -> Image.Image:
    """The picture of an upload or of base64. Raises `FieldError` for anything else: nothing is opened by its name."""
    if isinstance(value, Upload):
        data = value.data
    elif isinstance(value, str):
        text = value.partition(",")[2] if value.startswith(_DATA_URL) else value
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise part_error(
                name, f"{name} must be an upload or base64: no path and no address of a picture is opened here"
            ) from None
    else:
        raise part_error(name, f"{name} must be an upload or base64, found {type(value).__name__}")
    return _decoded(name, data)


def _decoded(name: str, data: bytes) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(data), formats=[each.upper() for each in FORMATS])
        if opened.width * opened.height > _MOST_PIXELS:
            raise part_error(
                name, f"{name} has {opened.width}x{opened.height} pixels, {_MOST_PIXELS} are the most: make it smaller"
            )
        opened.load()
    except FieldError:
        raise
    except Image.DecompressionBombError:
        raise part_error(
            name, f"{name} has far more than {_MOST_PIXELS} pixels, which are the most: make it smaller"
        ) from None
    except Exception:  # Pillow raises whatever a damaged file leads its readers to
        raise part_error(name, f"{name} is no whole picture: give a PNG, JPEG or WebP file") from None
    return opened


def mask(name: str, value: Any) -> Image.Image:
    """A mask as `Request` takes it: bright where the picture is drawn anew.

    Where it has an alpha channel, it says what OpenAI's masks say: drawn anew is what is fully transparent.
    """
    given = picture(name, value)
    if given.mode not in ("RGBA", "LA", "PA") and "transparency" not in given.info:
        return given
    return given.convert("RGBA").getchannel("A").point([255, *[0] * 255])


def encoded(image: Image.Image, form: str, compression: int | None, record: Mapping[str, Any] | None) -> bytes:
    """A picture as a file. compression: from 0 to 100, of JPEG and WebP. record: how it was made, for a PNG."""
    file = io.BytesIO()
    if form == "png":
        image.save(file, format="PNG", pnginfo=None if record is None else png_info(record))
    else:
        image.save(file, format=form.upper(), quality=100 if compression is None else compression)
    return file.getvalue()
