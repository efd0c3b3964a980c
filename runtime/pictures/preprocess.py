"""Pictures to pixels, masks to zeros and ones, and the way back: the numbers of diffusers' `VaeImageProcessor`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...common.arrays import Array
from ...common.errors import RequestError

ImageLike = str | os.PathLike[str] | Image.Image | Array
"""A path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4): uint8, bool, or float from 0 to 1."""
Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; x2 and y2 lie outside."""

_CHANNELS = (1, 3, 4)
_MOST_PIXELS = 1 << 30
"""More than any picture that may be asked for needs on its way."""
_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True, slots=True)
class Picture:
    """The image and the mask of a request, opened and brought to size.

    pixels: float32 (3, H, W) in [-1, 1], or None where the request brings latents. mask: float32 (1, H, W) of 0 and 1.
    crop: the part of the original that is drawn, where only a part is.
    """

    original: Image.Image | None
    pixels: Array | None
    mask_image: Image.Image | None = None
    mask: Array | None = None
    crop: Box | None = None

    def finish(self, image: Image.Image) -> Image.Image:
        """The drawn part laid over the original where only a part was drawn."""
        if self.crop is None or self.original is None or self.mask_image is None:
            return image
        return overlay(self.mask_image, self.original, image, self.crop)


def open_originals(image: ImageLike | None, mask: ImageLike | None) -> tuple[Image.Image | None, Image.Image | None]:
    """An image and its mask, opened. Raises `RequestError` when one cannot be read or their sizes differ."""
    image = None if image is None else open_image(image)
    mask = None if mask is None else open_image(mask, "mask")
    if image is not None and mask is not None and image.size != mask.size:
        raise RequestError(
            f"the mask is {mask.width}x{mask.height} and the image {image.width}x{image.height}: "
            f"draw the mask over the image, or resize it to {image.width}x{image.height}"
        )
    return image, mask


def bring_to_size(
    image: Image.Image | None, mask: Image.Image | None, size: tuple[int, int], mode: str, pad: int | None
) -> Picture:
    """The picture at (width, height). mode: see `image_pixels`. pad: pixels around the masked part, drawn alone."""
    width, height = size
    crop = None
    if pad is not None and mask is not None:
        crop, mode = crop_region(mask, width, height, pad), "fill"
    return Picture(
        original=image,
        pixels=None if image is None else image_pixels(image, width, height, crop=crop, resize_mode=mode),
        mask_image=mask,
        mask=None if mask is None else mask_pixels(mask, width, height, crop=crop, resize_mode=mode),
        crop=crop,
    )


def open_image(value: ImageLike, name: str = "image") -> Image.Image:
    """The picture upright and in RGB, as diffusers' `load_image` gives it.

    The orientation in its EXIF data is applied. Like `convert("RGB")`, it leaves the alpha channel out rather than
    compositing it, clips values of 16 and 32 bits at 255, and takes the first frame of several.
    Raises `RequestError`, which calls it `name`, for what is no picture or a damaged one.
    """
    if isinstance(value, np.ndarray):
        return _from_array(value, name).convert("RGB")
    what = f"the {name}"
    if not isinstance(value, Image.Image):
        if not isinstance(value, (str, os.PathLike)):
            raise RequestError(f"{what} must be a path, a PIL image or an array, found {type(value).__name__}")
        what = f"{what} {os.fspath(value)!r}"
        if _is_special(os.fspath(value)):
            raise RequestError(f"{what} is no file: give the path of a picture")
    try:
        with contextlib.nullcontext(value) if isinstance(value, Image.Image) else Image.open(value) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # the same colours, without Pillow's warning
            upright = upright.convert("RGB")
    except FileNotFoundError:
        raise RequestError(f"{what} does not exist: give the path of a picture") from None
    except UnidentifiedImageError:
        raise RequestError(f"{what} is no picture of a known format: give a PNG or JPEG file") from None
    except Exception as error:  # Pillow raises whatever a damaged file leads its readers to
        raise _unreadable(what, error) from None
    if not upright.width or not upright.height:
        raise RequestError(f"{what} has no pixels: it is {upright.width}x{upright.height}")
    return upright


def _is_special(path: str) -> bool:
    """Whether it is there and no file: a folder, or a pipe that would be waited for."""
    with contextlib.suppress(OSError, ValueError):
        return bool(path) and Path(path).exists() and not Path(path).is_file()
    return False


def _unreadable(what: str, error: Exception) -> RequestError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return RequestError(f"{what} has too many pixels ({most} are the most that is opened): save it smaller first")
    if isinstance(error, OSError) and error.strerror:
        return RequestError(f"{what} cannot be read ({error.strerror}): give the path of a picture")
    reason = " ".join(str(error).split()) or type(error).__name__
    return RequestError(f"{what} is damaged or of an unknown kind ({reason}): give another picture")


def _from_array(array: Array, name: str) -> Image.Image:
    planes = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if not planes or not array.size:
        raise RequestError(
            f"the array of the {name} must be (height, width), (height, width, 3) or (height, width, 4), "
            f"found {array.shape}"
        )
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # so that NaN is refused too
            raise RequestError(f"the array of the {name} must hold floats from 0 to 1, found {low:g} to {high:g}")
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise RequestError(f"the array of the {name} must be uint8, bool or float, found {array.dtype}")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def image_pixels(
    image: Image.Image, width: int, height: int, *, crop: Box | None = None, resize_mode: str = "default"
) -> Array:
    """Pixels in [-1, 1], float32 (3, height, width), of the part `crop` of `image`: what an autoencoder encodes.

    As diffusers' `VaeImageProcessor.preprocess`, which first rounds the size down to multiples of the autoencoder's
    downscale; here it is taken as it is. resize_mode: `default` stretches, `fill` keeps the aspect ratio and repeats
    the edges around it, `crop` keeps it and cuts the rest off.
    Raises `RequestError` for a picture so narrow that nothing of it is left.
    """
    fitted = _fit(image, width, height, crop, resize_mode).convert("RGB")
    unit = np.asarray(fitted).astype(np.float32) / np.float32(255)
    pixels = np.float32(2) * unit - np.float32(1)
    return np.asarray(pixels.transpose(2, 0, 1), order="C")


def control_pixels(image: Image.Image, width: int, height: int, *, channels: int = 3, crop: Box | None = None) -> Array:
    """Pixels from 0 to 1, float32 (channels, height, width), of a picture that steers the drawing.

    As the `control_image_processor` of diffusers' pipelines. channels: 3, or 1 for shades of grey. crop: the part of
    it that is drawn.
    """
    fitted = _fit(image, width, height, crop, "fill" if crop else "default").convert("RGB" if channels == 3 else "L")
    unit = np.asarray(fitted).astype(np.float32) / np.float32(255)
    return np.asarray(unit.transpose(2, 0, 1) if channels == 3 else unit[None], order="C")


def mask_pixels(
    mask: Image.Image, width: int, height: int, *, crop: Box | None = None, resize_mode: str = "default"
) -> Array:
    """1 where `mask` is to be repainted (its grey is 128 or more) and 0 elsewhere, float32 (1, height, width).

    As the `mask_processor` of diffusers' inpainting pipelines; see `image_pixels` for the options and errors.
    """
    fitted = _fit(mask, width, height, crop, resize_mode).convert("L")
    return (np.asarray(fitted) >= 128).astype(np.float32)[None]


def latent_mask(mask: Array, height: int, width: int) -> Array:
    """`mask` (1, H, W) at the size of the latents, (1, height, width), by torch's `interpolate` to the nearest."""
    rows, columns = _nearest(mask.shape[1], height), _nearest(mask.shape[2], width)
    return mask[:, rows[:, None], columns]


def mask_channels(mask: Array, height: int, width: int) -> Array:
    """`mask` (1, H, W) with the pixels of each latent as channels, (H/height · W/width, height, width)."""
    rows, columns = mask.shape[1] // height, mask.shape[2] // width
    blocks = mask.reshape(height, rows, width, columns).transpose(1, 3, 0, 2)
    return np.asarray(blocks.reshape(rows * columns, height, width), order="C")


_UNIT = 16
"""The sides of a picture whose shape is compared are rounded down to multiples of it; diffusers' value."""


def picture_size(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) of `sizes` that has nearest to the shape of `image`."""
    width, height = (max(side - side % _UNIT, 1) for side in image.size)
    return min(((abs(width / height - w / h), w, h) for w, h in sizes))[1:]


def _nearest(size: int, wanted: int) -> Array:
    """The source index of each of `wanted` pixels, in float32 as torch computes it."""
    scale = np.float32(size) / np.float32(wanted)
    index: Array = np.floor(np.arange(wanted, dtype=np.float32) * scale).astype(np.int64)
    return index.clip(max=size - 1)


def crop_region(mask_image: Image.Image, width: int, height: int, pad: int) -> Box:
    """The part of the picture to work on: what the mask covers, `pad` pixels around it, at the ratio width / height.

    It is widened along one axis to have that ratio, as far as the picture goes. As `VaeImageProcessor.get_crop_region`.
    Raises `RequestError` for a mask that is black throughout.
    """
    covered = mask_image.convert("L").getbbox()
    if covered is None:
        raise RequestError("the mask is black throughout, so nothing would be repainted: paint that part white")
    x1, y1 = (max(low - pad, 0) for low in covered[:2])
    x2, y2 = (min(high + pad, side) for high, side in zip(covered[2:], mask_image.size, strict=True))
    wanted = width / height
    if (x2 - x1) / (y2 - y1) > wanted:
        y1, y2 = _widened(y1, y2, (x2 - x1) / wanted, mask_image.height)
    else:
        x1, x2 = _widened(x1, x2, (y2 - y1) * wanted, mask_image.width)
    return x1, y1, x2, y2


def _widened(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """The span of `length` around low … high, moved into 0 … limit, and cut where it is longer than that."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    over = max(high - limit, 0)
    low, high = low - over, high - over
    return max(low, 0), min(high - min(low, 0), limit)


def overlay(
    mask_image: Image.Image, original: Image.Image, generated: Image.Image, crop: Box | None = None
) -> Image.Image:
    """`original` with `generated` where the mask is white, blended where it is grey, in RGB.

    generated: of the size of `original`, or, with `crop`, of any size: it is fitted into that part.
    As `VaeImageProcessor.apply_overlay`.
    """
    # premultiplied alpha (RGBa), or the colour of what is cut out would bleed into the soft edge
    kept = Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask_image.convert("L")))
    if crop is not None:
        x1, y1, x2, y2 = crop
        canvas = Image.new("RGBA", original.size)
        canvas.paste(_fit_over(generated, x2 - x1, y2 - y1), (x1, y1))
        generated = canvas.convert("RGB")
    result = generated.convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")


def _fit(image: Image.Image, width: int, height: int, crop: Box | None, resize_mode: str) -> Image.Image:
    image = image if crop is None else image.crop(crop)
    if resize_mode == "default":
        return image.resize((width, height), _LANCZOS)
    return (_fit_within if resize_mode == "fill" else _fit_over)(image, width, height)


def _fit_within(image: Image.Image, width: int, height: int) -> Image.Image:
    """All of `image`, in the middle; the bars beside it repeat its edges."""
    scaled, canvas, (left, top) = _scaled(image, width, height, wide=width / height < image.width / image.height)
    if top > 0:
        for y, edge in ((0, 0), (top + scaled.height, scaled.height)):
            canvas.paste(scaled.resize((width, top), box=(0, edge, width, edge)), (0, y))
    if left > 0:
        for x, edge in ((0, 0), (left + scaled.width, scaled.width)):
            canvas.paste(scaled.resize((left, height), box=(edge, 0, edge, height)), (x, 0))
    return canvas


def _fit_over(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of `image`, as large as it gets."""
    return _scaled(image, width, height, wide=width / height > image.width / image.height)[1]


def _scaled(
    image: Image.Image, width: int, height: int, *, wide: bool
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """`image` at its own ratio, as wide as the canvas or else as high; the canvas with it in the middle; its corner."""
    size = (width, image.height * width // image.width) if wide else (image.width * height // image.height, height)
    if not all(size) or size[0] * size[1] > _MOST_PIXELS:
        raise RequestError(
            f"a picture of {image.width}x{image.height} is too narrow to be scaled to {width}x{height}: crop it first"
        )
    scaled = image.resize(size, _LANCZOS)
    canvas = Image.new("RGB", (width, height))
    corner = (width // 2 - scaled.width // 2, height // 2 - scaled.height // 2)
    canvas.paste(scaled, corner)
    return scaled, canvas, corner
