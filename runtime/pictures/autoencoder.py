"""Pixels to latents and back, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...bundle import Bundle, Manifest, Role
from ...common.arrays import Array
from ...engines import Engine
from ..loop.noise import Generator
from .tiling import tiled_decode, tiled_decode_tiny, tiled_encode, tiled_encode_tiny

DECODERS: dict[str, Role] = {"full": "decoder", "tiny": "preview"}
"""The role of the component behind each choice of decoder."""
_TINY_SIDE = 512
"""Pixels a tile of an `AutoencoderTiny`, whatever the checkpoint; diffusers' value."""
_LOGVAR_RANGE = -30.0, 20.0


def decoder_of(manifest: Manifest, choice: str) -> str:
    """The component that is the decoder `choice`, "" where the bundle has none."""
    return manifest.named(DECODERS[choice]) if choice in DECODERS else ""


class Autoencoder:
    """The encoder and decoders of a bundle. One image is in the works at a time, whatever the batch."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        self._latents, self._engine = bundle.manifest.latents, engine
        self._tiny = self._latents.encoded == "sample"
        self._encoder = bundle.manifest.named("encoder")
        self._decoders = {name: decoder_of(bundle.manifest, name) for name in DECODERS}

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape of the latents of one picture, (C, h, w). size: width and height in pixels."""
        width, height = (side // self._latents.downscale for side in size)
        return self._latents.channels, height, width

    def decode(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale)."""
        engine = self._engine(self._decoders[decoder])
        name, output, dtype = engine.inputs[0].name, engine.outputs[0].name, engine.inputs[0].dtype

        def run(part: Array) -> Array:
            made: Array = engine({name: part})[output]
            return made

        unscaled = self._unscaled(latents)
        parts = [np.asarray(unscaled[i : i + 1], dtype, order="C") for i in range(len(unscaled))]
        down = self._latents.downscale
        if tiled and (decoder == "tiny" or self._tiny):
            decoded = [tiled_decode_tiny(run, part, tile=_TINY_SIDE // down, downscale=down) for part in parts]
        elif tiled:
            decoded = [tiled_decode(run, part, tile=self._latents.tile, downscale=down) for part in parts]
        else:
            decoded = [run(part) for part in parts]
        return decoded[0] if len(decoded) == 1 else np.concatenate(decoded)

    def encode(self, pixels: Array, *, tiled: bool = False) -> Array:
        """What the encoder gives for pixels in [-1, 1], float32 (3, H, W): see `sample`."""
        engine = self._engine(self._encoder)
        name, output, dtype = engine.inputs[0].name, engine.outputs[0].name, engine.inputs[0].dtype

        def run(part: Array) -> Array:
            made: Array = engine({name: part})[output]
            return made

        part = np.asarray(pixels[None], dtype, order="C")
        down = self._latents.downscale
        if not tiled:
            encoded = run(part)
        elif self._tiny:
            encoded = tiled_encode_tiny(run, part, tile=_TINY_SIDE // down, downscale=down)
        else:
            encoded = tiled_encode(run, part, tile=self._latents.tile, downscale=down)
        first: Array = encoded[0]
        return first

    def sample(self, encoded: Array, generator: Generator, *, inpaints: bool = False) -> Array:
        """Scaled latents, float32 (C, h, w), drawn from mean and log variance (2C, h, w).

        Where the encoder gives latents themselves, nothing is drawn. inpaints: whether the picture is inpainted, for
        which some pipelines of diffusers scale in another way.
        """
        by_factor = inpaints and self._latents.inpaint_by_factor
        if self._tiny:
            return self._scaled(encoded.astype(np.float32), by_factor)
        mean, logvar = np.split(encoded.astype(np.float32), 2)
        deviation = np.exp(np.float32(0.5) * np.clip(logvar, *_LOGVAR_RANGE))
        return self._scaled(mean + deviation * generator.randn(1, *mean.shape)[0], by_factor)

    def _unscaled(self, latents: Array) -> Array:
        settings = self._latents
        if settings.mean:
            mean, std = (np.array(part, np.float32)[:, None, None] for part in (settings.mean, settings.std))
            return latents * std / np.float32(settings.scaling_factor) + mean
        return latents / np.float32(settings.scaling_factor) + np.float32(settings.shift_factor)

    def _scaled(self, latents: Array, by_factor: bool) -> Array:
        settings = self._latents
        if settings.mean and not by_factor:
            mean, std = (np.array(part, np.float32)[:, None, None] for part in (settings.mean, settings.std))
            return (latents - mean) * np.float32(settings.scaling_factor) / std
        return (latents - np.float32(settings.shift_factor)) * np.float32(settings.scaling_factor)
