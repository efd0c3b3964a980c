"""The image and the mask of a request, opened and brought to size."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ...common.arrays import Array
from ..request import Request
from .preprocess import Box, check_same_size, crop_region, image_pixels, mask_pixels, open_image, overlay


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


def open_originals(request: Request) -> tuple[Image.Image | None, Image.Image | None]:
    """The image and the mask of a request. Raises `RequestError` when one cannot be read or their sizes differ."""
    if request.image is None:
        return None, None
    image = None if request.starts_from_latents else open_image(request.image)
    mask = None if request.mask is None else open_image(request.mask, "mask")
    if image is not None and mask is not None:
        check_same_size(image, mask)
    return image, mask


def bring_to_size(
    request: Request, image: Image.Image | None, mask: Image.Image | None, size: tuple[int, int]
) -> Picture:
    """The picture at (width, height)."""
    width, height = size
    crop, mode = None, request.resize
    if request.padding_mask_crop is not None and mask is not None:
        crop, mode = crop_region(mask, width, height, request.padding_mask_crop), "fill"
    return Picture(
        original=image,
        pixels=None if image is None else image_pixels(image, width, height, crop=crop, resize_mode=mode),
        mask_image=mask,
        mask=None if mask is None else mask_pixels(mask, width, height, crop=crop, resize_mode=mode),
        crop=crop,
    )
