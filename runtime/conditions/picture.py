"""What a row starts from: noise, an image with noise, or the latents that another model has begun."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Role
from ..loop.noise import Generator
from ..pictures.autoencoder import Autoencoder
from ..request import Request
from .condition import Condition, Fed, Job, Start, Starter


class Picture(Condition):
    """Noise, or the encoded image with as much noise as the schedule has there; see `condition.Condition`."""

    loads: Role | None = "encoder"

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """The decoder, where pixels are asked for. Latents have a size of their own and are not encoded."""
        names = set() if request.output == "latent" else {"decoder", "tiled"}
        if request.image is not None:
            names |= {"image", "strength", "denoising_start"}
            names |= set() if request.starts_from_latents else {"resize", "tiled"}
        return frozenset(names)

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """A start for each job without a mask; images are encoded."""
        return [Fed(start=self._start(job)) if job.request.mask is None else Fed() for job in jobs]

    def _start(self, job: Job) -> Starter:
        request, pixels = job.request, None if job.picture is None else job.picture.pixels
        encoded = None if pixels is None else self._autoencoder.encode(pixels, tiled=request.tiled)
        shape = self._autoencoder.shape(job.size)
        alpha, sigma = job.table.alpha_sigma[0].astype(np.float32)

        def start(i: int, generator: Generator) -> Start:
            if request.image is None:
                return Start(generator.randn(1, *shape)[0] * np.float32(job.table.init_scale))
            if encoded is None:
                image = np.asarray(request.image[i], np.float32)
            else:
                image = self._autoencoder.sample(encoded, generator)
            if request.denoising_start is not None:
                return Start(image)
            return Start(alpha * image + sigma * generator.randn(1, *shape)[0])

        return start
