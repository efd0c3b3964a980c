"""What a row starts from: noise, an image with noise, or the latents that another model has begun."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Role
from ...common.arrays import Array
from ..job import Job
from ..loop.noise import Generator
from ..pictures.autoencoder import Autoencoder
from ..request import Request
from .condition import Fed, Start, Starter


class Noise:
    """Text to image starts from noise; see `condition.Condition`."""

    loads: Role | None = None

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """The decoder, where pixels are asked for."""
        return frozenset() if request.output == "latent" else frozenset({"decoder", "tiled"})

    def check(self, jobs: Sequence[Job]) -> None:
        """Noise can always be drawn."""

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """A start for each job without an image."""
        return [Fed(start=self._start(job)) if job.request.task == "txt2img" else Fed() for job in jobs]

    def _start(self, job: Job) -> Starter:
        shape = self._autoencoder.shape(job.size)

        def start(_: int, generator: Generator) -> Start:
            return Start(generator.randn(1, *shape)[0] * np.float32(job.table.init_scale))

        return start


class Picture:
    """Image to image starts from the encoded image, with as much noise as the schedule has there."""

    loads: Role | None = "encoder"

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Latents have a size of their own and are not encoded."""
        if request.image is None:
            return frozenset()
        names = {"image", "strength", "denoising_start"}
        return frozenset(names if request.starts_from_latents else names | {"resize", "tiled"})

    def check(self, jobs: Sequence[Job]) -> None:
        """An image was opened and brought to size when the job was made."""

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """Encode the image of each job that has one and no mask."""
        return [Fed(start=self._start(job)) if job.request.task == "img2img" else Fed() for job in jobs]

    def _start(self, job: Job) -> Starter:
        request, pixels = job.request, None if job.picture is None else job.picture.pixels
        encoded = None if pixels is None else self._autoencoder.encode(pixels, tiled=request.tiled)
        alpha, sigma = job.table.alpha_sigma[0].astype(np.float32)

        def start(i: int, generator: Generator) -> Start:
            image = latents_of(request, i) if encoded is None else self._autoencoder.sample(encoded, generator)
            if request.denoising_start is not None:
                return Start(image)
            return Start(alpha * image + sigma * generator.randn(1, *image.shape)[0])

        return start


def latents_of(request: Request, i: int) -> Array:
    """The latents that image i of a request starts from, float32 (C, h, w)."""
    return np.asarray(request.image[i], np.float32)
