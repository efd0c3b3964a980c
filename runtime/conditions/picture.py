"""What a row starts from: noise, an image or latents with noise, or an image whose masked part is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Manifest, Role
from ...common.errors import RequestError
from ..loop.noise import Generator
from ..loop.sample import KeptRegion
from ..pictures.autoencoder import Autoencoder
from ..pictures.preprocess import image_pixels, latent_mask, mask_channels, picture_size
from ..request import Request
from .condition import Condition, Fed, Job, Start


class Picture(Condition):
    """An encoded image has as much noise as the schedule has there; see `condition.Condition`.

    What a mask leaves out is kept, or shown to a model that sees it. A model that edits sees the picture, and starts
    from noise.
    """

    loads: Role | None = "encoder"

    def __init__(self, manifest: Manifest, autoencoder: Autoencoder) -> None:
        self._autoencoder, self._wiring = autoencoder, manifest.wiring
        self._multiple = manifest.latents.multiple
        self._masked = bool(self._wiring.inputs_from("latents.masked"))
        self._filled = bool(self._wiring.inputs_from("latents.filled"))
        usual = 1.0 if self._wiring.flow is None else self._wiring.flow.usual_strength("inpaint")
        self._noise_alone = (None, 1.0) if usual == 1.0 else (1.0,)

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """The decoder, where pixels are asked for. Latents have a size of their own and are not encoded."""
        names = set() if request.output == "latent" else {"decoder", "tiled"}
        if request.image is not None and self._wiring.edits:
            names |= {"image", "tiled", *(() if self._wiring.picture_sizes else ("resize",))}
        elif request.image is not None:
            names |= {"image", "strength", "denoising_start"}
            names |= set() if request.starts_from_latents else {"resize", "tiled"}
            names |= set() if request.mask is None else {"mask", "padding_mask_crop", "resize"}
        return frozenset(names)

    def check(self, jobs: Sequence[Job]) -> None:
        """A model that sees a picture, or the image around the mask, must be given its pixels."""
        seen = self._masked or self._filled
        if seen and any(job.request.starts_from_latents for job in jobs):
            raise RequestError("this model sees the image around the mask: give the image itself, not latents")
        if self._wiring.edits and any(job.request.starts_from_latents for job in jobs):
            raise RequestError("this model sees the picture that it is given: give the picture itself, not latents")
        if len({self._seen(job) for job in jobs}) > 1:
            raise RequestError(
                "the pictures that the requests of a batch show must be of one shape: run others on their own"
            )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """What each job starts from; images are encoded."""
        return [self._edited(job) if self._wiring.edits else self._fed(job) for job in jobs]

    def _seen(self, job: Job) -> tuple[int, int] | None:
        """The width and height in which the model sees the picture of a job as tokens, None where there is none."""
        if job.picture is None or job.picture.original is None or not self._wiring.inputs_from("picture"):
            return None
        return picture_size(job.picture.original, self._wiring.picture_sizes)

    def _edited(self, job: Job) -> Fed:
        """Noise, and the picture beside it."""
        autoencoder, picture, scale = self._autoencoder, job.picture, np.float32(job.table.init_scale)
        shape, tiled = autoencoder.shape(job.size), job.request.tiled
        if picture is None and self._wiring.inputs_from("picture"):
            unseen = {"picture": np.zeros((shape[0], 0, self._multiple), np.float32)}
            return Fed(unseen, unseen, start=lambda i, generator: Start(generator.randn(1, *shape)[0] * scale))
        if picture is None or picture.original is None or picture.pixels is None:
            raise RequestError("this model sees a picture: give one as the image")
        if not self._wiring.inputs_from("picture"):
            encoded = autoencoder.encode(picture.pixels, tiled=tiled)

            def beside(i: int, generator: Generator) -> Start:
                channels = autoencoder.sample(encoded, generator)
                return Start(generator.randn(1, *shape)[0] * scale, channels=channels)

            return Fed(start=beside)
        pixels = image_pixels(picture.original, *picture_size(picture.original, self._wiring.picture_sizes))
        given = {"picture": autoencoder.mean(autoencoder.encode(pixels, tiled=tiled))}
        return Fed(given, given, start=lambda i, generator: Start(generator.randn(1, *shape)[0] * scale))

    def _fed(self, job: Job) -> Fed:
        """Noise is drawn in the order in which diffusers' pipelines draw it."""
        request, table, autoencoder = job.request, job.table, self._autoencoder
        pixels, mask = (None, None) if job.picture is None else (job.picture.pixels, job.picture.mask)
        shape, tiled = autoencoder.shape(job.size), request.tiled
        alpha, sigma = table.alpha_sigma[0].astype(np.float32)
        inpaints = mask is not None
        from_noise = inpaints and request.denoising_start is None and request.strength in self._noise_alone
        encoded = masked = None
        if pixels is not None and not (from_noise and self._masked):  # which needs what is around the mask alone
            encoded = autoencoder.encode(pixels, tiled=tiled)
        if pixels is not None and mask is not None:
            masked = autoencoder.encode(pixels * (mask < 0.5), tiled=tiled)

        def start(i: int, generator: Generator) -> Start:
            image = None
            if request.starts_from_latents:
                image = np.asarray(request.image[i], np.float32)
            elif encoded is not None:
                image = autoencoder.sample(encoded, generator, inpaints=inpaints)
            if image is not None and mask is None and request.denoising_start is not None:
                return Start(image)  # nothing is drawn
            noise = generator.randn(1, *shape)[0]
            if image is None or from_noise:
                x = noise * np.float32(table.init_scale)
            else:
                x = image if request.denoising_start is not None else alpha * image + sigma * noise
            if mask is None:
                return Start(x)
            small = latent_mask(mask, *shape[1:])
            # diffusers draws from the masked image even where nothing reads it, and later noise depends on that
            around = None if masked is None else autoencoder.sample(masked, generator, inpaints=True)
            if self._masked and around is not None:
                return Start(x, channels=np.concatenate([small, around]))
            if self._filled and around is not None:
                return Start(x, channels=np.concatenate([around, mask_channels(mask, *shape[1:])]))
            return Start(x, kept=None if image is None else KeptRegion(small, image, noise))

        return Fed(start=start)
