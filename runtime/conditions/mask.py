"""Inpainting: an image of which only the masked part is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Manifest, Role
from ...common.errors import RequestError
from ..loop.noise import Generator
from ..loop.sample import KeptRegion
from ..pictures.autoencoder import Autoencoder
from ..pictures.preprocess import latent_mask
from ..request import Request
from .condition import Condition, Fed, Job, Start


class Mask(Condition):
    """Keeps what the mask leaves out, or shows it to a model that sees it; see `condition.Condition`."""

    loads: Role | None = "encoder"

    def __init__(self, manifest: Manifest, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._seen = bool(manifest.wiring.inputs_from("latents.masked"))

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """A mask goes with an image."""
        if request.image is None or request.mask is None:
            return frozenset()
        return frozenset({"mask", "padding_mask_crop", "strength", "resize"})

    def check(self, jobs: Sequence[Job]) -> None:
        """A model that sees the image around the mask must be given its pixels."""
        if self._seen and any(job.request.starts_from_latents for job in jobs):
            raise RequestError("this model sees the image around the mask: give the image itself, not latents")

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """Encode the image and the masked image of each job that has a mask."""
        return [self._fed(job) for job in jobs]

    def _fed(self, job: Job) -> Fed:
        """Noise is drawn in the order in which diffusers' pipelines draw it."""
        request, table, picture, autoencoder = job.request, job.table, job.picture, self._autoencoder
        if picture is None or picture.mask is None:
            return Fed()
        shape = autoencoder.shape(job.size)
        mask = latent_mask(picture.mask, *shape[1:])
        alpha, sigma = table.alpha_sigma[0].astype(np.float32)
        whole = request.denoising_start is None and request.strength in (None, 1.0)
        encoded = masked = None
        if picture.pixels is not None:
            if not (self._seen and whole):  # a model that sees the image around the mask starts from noise alone
                encoded = autoencoder.encode(picture.pixels, tiled=request.tiled)
            masked = autoencoder.encode(picture.pixels * (picture.mask < 0.5), tiled=request.tiled)

        def start(i: int, generator: Generator) -> Start:
            image = None
            if request.starts_from_latents:
                image = np.asarray(request.image[i], np.float32)
            elif encoded is not None:
                image = autoencoder.sample(encoded, generator, inpaints=True)
            noise = generator.randn(1, *shape)[0]
            if request.denoising_start is not None and image is not None:
                x = image
            elif whole or image is None:
                x = noise * np.float32(table.init_scale)
            else:
                x = alpha * image + sigma * noise
            # diffusers draws from the masked image even where nothing reads it, and later noise depends on that
            around = None if masked is None else autoencoder.sample(masked, generator, inpaints=True)
            if self._seen and around is not None:
                return Start(x, channels=np.concatenate([mask, around]))
            return Start(x, kept=None if image is None else KeptRegion(mask, image, noise))

        return Fed(start=start)
