"""Pixels to latents and back, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...bundle import Bundle, Role
from ...common.arrays import Array
from ...common.errors import BundleError, RequestError
from ...engines import Engine
from ..loop.noise import Generator
from .tiling import Parts, Tiles, finished, in_tiles

DECODERS: dict[str, Role] = {"full": "decoder", "tiny": "preview"}
"""The role of the component behind each choice of decoder."""
_TINY_SIDE = 512
"""Pixels a tile of an `AutoencoderTiny`, whatever the checkpoint; diffusers' value."""
_LOGVAR_RANGE = -30.0, 20.0


def check_decoder(bundle: Bundle, choice: str) -> None:
    """Raise `RequestError` when the bundle lacks the decoder `choice`."""
    if choice not in DECODERS or not bundle.manifest.named(DECODERS[choice]):
        raise RequestError(
            f"{bundle.root} has no {choice} decoder: compile the checkpoint again with "
            "--component vae_tiny=FOLDER, the folder of an AutoencoderTiny"
        )


class Autoencoder:
    """The encoder and decoders of a bundle. One image is in the works at a time, whatever the batch."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._latents, self._engine = bundle.manifest.latents, engine
        self._tiny = self._latents.encoded == "sample"
        mean, std = (np.array(part, np.float32)[:, None, None] for part in (self._latents.mean, self._latents.std))
        shifted = np.array(self._latents.shift_factor, np.float32), np.array(1, np.float32)
        self._mean, self._std = (mean, std) if self._latents.mean else shifted
        self._encoder = bundle.manifest.named("encoder")
        self._decoders = {name: bundle.manifest.named(role) for name, role in DECODERS.items()}

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape of the latents of one picture, (C, h, w). size: width and height in pixels."""
        width, height = (side // self._latents.downscale for side in size)
        return self._latents.channels, height, width

    def decode(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale).

        Raises `BundleError` for a decoder that gives another size.
        """
        parts = [finished(self.decoding(latents[i : i + 1], decoder, tiled=tiled)) for i in range(len(latents))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decoding(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Parts[Array]:
        """`decode` of one picture, latents (1, C, H/downscale, W/downscale). It can be left between tiles."""
        name, tiny, down = self._decoders[decoder], decoder == "tiny" or self._tiny, self._latents.downscale
        latents = latents * self._std / np.float32(self._latents.scaling_factor) + self._mean
        tiles = Tiles(self._tile(tiny), 1, down, tiny) if tiled else None
        return self._run(name, latents, tiles, (3, latents.shape[2] * down, latents.shape[3] * down))

    def encode(self, pixels: Array, *, tiled: bool = False) -> Array:
        """What the encoder gives for pixels in [-1, 1], float32 (3, H, W): see `sample`.

        Raises `BundleError` where that has another size than latents have.
        """
        tiles = Tiles(self._tile(self._tiny), self._latents.downscale, 1, self._tiny) if tiled else None
        channels, *sides = self.shape((pixels.shape[2], pixels.shape[1]))
        shape = (channels if self._tiny else 2 * channels, *sides)
        encoded: Array = finished(self._run(self._encoder, pixels[None], tiles, shape))[0]
        return encoded

    def sample(self, encoded: Array, generator: Generator, *, inpaints: bool = False) -> Array:
        """Scaled latents, float32 (C, h, w), drawn from mean and log variance (2C, h, w).

        Where the encoder gives latents themselves, nothing is drawn. inpaints: whether the picture is inpainted, for
        which some pipelines of diffusers scale in another way.
        """
        if self._tiny:
            latents = encoded.astype(np.float32)
        else:
            mean, logvar = np.split(encoded.astype(np.float32), 2)
            deviation = np.exp(np.float32(0.5) * np.clip(logvar, *_LOGVAR_RANGE))
            latents = mean + deviation * generator.randn(1, *mean.shape)[0]
        factor = np.float32(self._latents.scaling_factor)
        if inpaints and self._latents.inpaint_by_factor:
            return (latents - np.float32(self._latents.shift_factor)) * factor
        return (latents - self._mean) * factor / self._std

    def mean(self, encoded: Array, *, shifted: bool = True) -> Array:
        """Scaled latents, float32 (C, h, w), of which none are likelier. shifted: whether they are shifted as well."""
        mean = encoded.astype(np.float32) if self._tiny else np.split(encoded.astype(np.float32), 2)[0]
        shift = self._mean if shifted else np.float32(0)
        return (mean - shift) * np.float32(self._latents.scaling_factor) / self._std

    def _tile(self, tiny: bool) -> int:
        """The side of a tile, in latents."""
        return max(_TINY_SIDE // self._latents.downscale, 1) if tiny else self._latents.tile

    def _run(self, component: str, source: Array, tiles: Tiles | None, shape: tuple[int, ...]) -> Parts[Array]:
        engine = self._engine(component)
        name, output, dtype = engine.inputs[0].name, engine.outputs[0].name, engine.inputs[0].dtype

        def call(part: Array) -> Array:
            return self._engine(component)({name: part})[output]  # which may have been dropped since the last tile

        source = np.asarray(source, dtype, order="C")
        made = call(source) if tiles is None else (yield from in_tiles(call, source, tiles))
        if made.shape[1:] != shape:
            raise BundleError(
                f"{component} makes {made.shape[1:]} of {source.shape[1:]}, and by the manifest it must make {shape}: "
                "compile the bundle again"
            )
        return made
