"""What txt2img, img2img and inpainting start from, and where in the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..common.arrays import Array
from ..common.errors import RequestError
from .autoencoder import Autoencoder
from .loop.noise import Generator
from .loop.sample import KeptRegion
from .preprocess import (
    Box,
    check_same_size,
    crop_region,
    image_pixels,
    latent_mask,
    mask_pixels,
    open_image,
    overlay,
)
from .request import Request
from .schedulers import Steps, Table

_STRENGTH = {"img2img": 0.8, "inpaint": 1.0}


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of a picture: of the image, of the masked image, and the mask at the latents' size."""

    image: Array | None = None
    masked: Array | None = None
    mask: Array | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What a row starts with; see `loop.sample.Sample`."""

    latents: Array
    kept: KeptRegion | None = None
    channels: Array | None = None


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


def schedule(
    request: Request, steps: Steps, make: Callable[[Steps], Table], train_steps: int, *, by_strength: bool
) -> Table:
    """The part of the schedule that the request runs. Raises `RequestError` when nothing of it is left.

    by_strength: the model's sampler takes the strength itself and makes all the steps asked for (consistency models).
    """
    table = make(steps)
    if request.denoising_start is not None:
        table = _from_part(request.denoising_start, steps, table, make, train_steps)
    elif request.image is not None:
        strength = _STRENGTH[request.task] if request.strength is None else request.strength
        kept = min(int(steps.count * strength), steps.count)
        if by_strength and request.task == "img2img" and steps.timesteps is None:
            table = make(replace(steps, strength=strength))
        elif kept < 1:
            least = math.ceil(1000 / steps.count) / 1000
            raise RequestError(
                f"strength {strength:g} leaves no step of {steps.count}: raise it to {least:g} or more, or add steps"
            )
        elif kept < steps.count:
            table = make(replace(steps, start=steps.count - kept))
    if request.denoising_end is not None:
        calls = int((table.timesteps >= _cut(request.denoising_end, train_steps)).sum())
        if not calls:
            raise RequestError(f"denoising_end {request.denoising_end:g} leaves no step of {steps.count}: add steps")
        table = table.until(calls)
    return table


def _from_part(part: float, steps: Steps, full: Table, make: Callable[[Steps], Table], train_steps: int) -> Table:
    """The calls whose timesteps lie below the cut; of a step of two calls, both or none."""
    before = int((full.timesteps >= _cut(part, train_steps)).sum())
    if before == full.steps:
        raise RequestError(f"denoising_start {part:g} leaves no step of {steps.count}: add steps")
    if not before:
        return full
    calls_of_first = full.steps - make(replace(steps, start=1)).steps
    return make(replace(steps, start=before // calls_of_first)) if before >= calls_of_first else full


def _cut(part: float, train_steps: int) -> int:
    return round(train_steps - part * train_steps)


def encode(request: Request, picture: Picture, autoencoder: Autoencoder, *, inpaints: bool, downscale: int) -> Encoded:
    """Run the encoder on what the request needs of it. inpaints: whether the U-Net sees the masked image."""
    mask = picture.mask
    small = None if mask is None else latent_mask(mask, mask.shape[1] // downscale, mask.shape[2] // downscale)
    if picture.pixels is None:
        return Encoded(mask=small)
    image = masked = None
    if mask is None or not (inpaints and _is_whole(request)):
        image = autoencoder.encode(picture.pixels, tiled=request.tiled)
    if mask is not None:
        # the draw from it moves the stream of noise on even where nobody looks at it
        masked = autoencoder.encode(picture.pixels * (mask < 0.5), tiled=request.tiled)
    return Encoded(image, masked, small)


def start(
    request: Request,
    table: Table,
    encoded: Encoded | None,
    latents: Array | None,
    autoencoder: Autoencoder,
    generator: Generator,
    shape: tuple[int, int, int],
    *,
    inpaints: bool,
) -> Start:
    """What one image starts with, its noise drawn in the order in which diffusers' pipelines draw it.

    latents: those of the request for this image. shape: of latents, (C, h, w).
    """
    if encoded is None:
        return Start(generator.randn(1, *shape)[0] * np.float32(table.init_scale))
    image = (
        latents
        if encoded.image is None
        else autoencoder.sample(encoded.image, generator, inpaints=encoded.mask is not None)
    )
    first_alpha, first_sigma = table.levels[0].astype(np.float32)
    continues = request.denoising_start is not None
    whole = _is_whole(request)
    if encoded.mask is None:
        if image is None:
            raise RequestError("an image to start from is missing: give one")
        if continues:
            return Start(image)
        return Start(first_alpha * image + first_sigma * generator.randn(1, *shape)[0])
    noise = generator.randn(1, *shape)[0]
    if continues and image is not None:
        x = image
    elif whole or image is None:
        x = noise * np.float32(table.init_scale)
    else:
        x = first_alpha * image + first_sigma * noise
    masked = None if encoded.masked is None else autoencoder.sample(encoded.masked, generator, inpaints=True)
    if inpaints:
        if masked is None:
            raise RequestError("this model sees the image around the mask: give the image itself, not latents")
        return Start(x, channels=np.concatenate([encoded.mask, masked]))
    if image is None:
        raise RequestError("an image to inpaint is missing: give one")
    return Start(x, kept=KeptRegion(encoded.mask, image, noise))


def _is_whole(request: Request) -> bool:
    """Whether inpainting starts from noise alone."""
    return request.denoising_start is None and request.strength in (None, 1.0)
