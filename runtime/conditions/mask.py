"""Inpainting: an image of which only the masked part is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Manifest, Role
from ...common.arrays import Array
from ...common.errors import RequestError
from ..loop.noise import Generator
from ..loop.sample import KeptRegion
from ..pictures.autoencoder import Autoencoder
from ..pictures.preprocess import latent_mask
from ..request import Request
from .condition import Condition, Fed, Job, Start, Starter
from .picture import latents_of


class Mask(Condition):
    """Keeps what the mask leaves out, or shows it to a model that sees it; see `condition.Condition`."""

    loads: Role | None = "encoder"

    def __init__(self, manifest: Manifest, autoencoder: Autoencoder) -> None:
        self._autoencoder, self._downscale = autoencoder, manifest.latents.downscale
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
        return [Fed(start=self._start(job)) if job.request.task == "inpaint" else Fed() for job in jobs]

    def _start(self, job: Job) -> Starter:
        """Noise is drawn in the order in which diffusers' pipelines draw it."""
        request, table, sample = job.request, job.table, self._autoencoder.sample
        shape = self._autoencoder.shape(job.size)
        alpha, sigma = table.alpha_sigma[0].astype(np.float32)
        whole = request.denoising_start is None and request.strength in (None, 1.0)
        encoded, masked, mask = self._encoded(job, whole)

        def start(i: int, generator: Generator) -> Start:
            image = latents_of(request, i) if request.starts_from_latents else None
            if encoded is not None:
                image = sample(encoded, generator, inpaints=True)
            noise = generator.randn(1, *shape)[0]
            if request.denoising_start is not None and image is not None:
                x = image
            elif whole or image is None:
                x = noise * np.float32(table.init_scale)
            else:
                x = alpha * image + sigma * noise
            # diffusers draws from the masked image even where nothing reads it, and later noise depends on that
            around = None if masked is None else sample(masked, generator, inpaints=True)
            if self._seen and around is not None:
                return Start(x, channels=np.concatenate([mask, around]))
            return Start(x, kept=None if image is None else KeptRegion(mask, image, noise))

        return start

    def _encoded(self, job: Job, whole: bool) -> tuple[Array | None, Array | None, Array]:
        """The image, the masked image, and the mask at the size of the latents, float32 (1, h, w).

        A model that sees the masked image and starts from noise alone does not need the image itself.
        """
        if job.picture is None or job.picture.mask is None:
            raise RequestError("a mask to inpaint is missing: give one")
        pixels, mask, tiled = job.picture.pixels, job.picture.mask, job.request.tiled
        small = latent_mask(mask, mask.shape[1] // self._downscale, mask.shape[2] // self._downscale)
        if pixels is None:
            return None, None, small
        image = None if self._seen and whole else self._autoencoder.encode(pixels, tiled=tiled)
        return image, self._autoencoder.encode(pixels * (mask < 0.5), tiled=tiled), small
