"""Tiles through an autoencoder give what diffusers' `enable_tiling()` gives, one tile at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffoundry.runtime.pictures.tiling import Tiles, finished, in_tiles

SIZES = [(8, 8), (9, 8), (8, 9), (16, 16), (13, 22), (14, 21), (30, 7), (6, 31), (19, 33)]
"""Latents; a tile of 8 has a stride of 6, so these end in whole tiles, ragged ones, and ones of a single latent."""


def tiled_decode(decode, latents, *, tile, downscale, tiny=False):
    return finished(in_tiles(decode, latents, Tiles(tile, 1, downscale, tiny)))


def tiled_encode(encode, pixels, *, tile, downscale, tiny=False):
    return finished(in_tiles(encode, pixels, Tiles(tile, downscale, 1, tiny)))


tiled_decode_tiny, tiled_encode_tiny = partial(tiled_decode, tiny=True), partial(tiled_encode, tiny=True)


class Recorder:
    """A part of an autoencoder as a function of arrays, which notes the sizes it was given."""

    def __init__(self, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.part = part
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, array: np.ndarray) -> np.ndarray:
        self.sizes.append(array.shape[-2:])
        with torch.no_grad():
            return self.part(torch.from_numpy(array)).numpy()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    ).eval()


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    return vae


def decoder(vae: AutoencoderKL | AutoencoderTiny) -> Recorder:
    vae.disable_tiling()
    return Recorder(lambda latents: vae.decode(latents).sample)


def encoder(vae: AutoencoderKL | AutoencoderTiny) -> Recorder:
    vae.disable_tiling()
    if isinstance(vae, AutoencoderTiny):
        return Recorder(lambda pixels: vae.encode(pixels).latents)
    return Recorder(lambda pixels: vae.encode(pixels).latent_dist.parameters)


def tiled(vae: AutoencoderKL | AutoencoderTiny, part: Callable[[], Recorder], array: np.ndarray) -> np.ndarray:
    recorder = part(vae)
    vae.enable_tiling()
    try:
        return recorder(array)
    finally:
        vae.disable_tiling()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def close(ours: np.ndarray, expected: np.ndarray):
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_decode(vae, size):
    latents, decode = noise(1, 4, *size), decoder(vae)
    ours = tiled_decode(decode, latents, tile=8, downscale=4)
    close(ours, tiled(vae, decoder, latents))
    assert max(max(size) for size in decode.sizes) <= 8
    whole = decoder(vae)(latents)
    assert (len(decode.sizes) == 1) == (size == (8, 8)) == np.allclose(ours, whole, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_encode(vae, size):
    pixels, encode = noise(1, 3, size[0] * 4, size[1] * 4), encoder(vae)
    ours = tiled_encode(encode, pixels, tile=8, downscale=4)
    close(ours, tiled(vae, encoder, pixels))
    assert max(max(size) for size in encode.sizes) <= 32
    assert (len(encode.sizes) == 1) == (size == (8, 8))


@pytest.mark.parametrize("tile", [4, 12, 16])
def test_other_tiles(vae, monkeypatch, tile):
    monkeypatch.setattr(vae, "tile_latent_min_size", tile)
    monkeypatch.setattr(vae, "tile_sample_min_size", tile * 4)
    latents, pixels = noise(1, 4, 13, 22), noise(1, 3, 52, 88)
    ours = tiled_decode(decoder(vae), latents, tile=tile, downscale=4)
    close(ours, tiled(vae, decoder, latents))
    ours = tiled_encode(encoder(vae), pixels, tile=tile, downscale=4)
    close(ours, tiled(vae, encoder, pixels))


@pytest.mark.parametrize("tile", [1, 3, 6, 7, 9])
def test_tiles_that_no_whole_overlap_fits(vae, tile):
    """diffusers gives another size for these; ours covers the picture, with every latent where it belongs."""
    latents = noise(1, 3, 13, 22)
    assert tiled_decode(decoder(vae), noise(1, 4, 13, 22), tile=tile, downscale=4).shape == (1, 3, 52, 88)
    spread = Recorder(lambda part: part.repeat_interleave(4, -1).repeat_interleave(4, -2))
    expected = spread(torch.from_numpy(latents).numpy())
    close(tiled_decode(spread, latents, tile=tile, downscale=4), expected)
    gather = Recorder(lambda part: part[..., ::4, ::4].contiguous())
    close(tiled_encode(gather, expected, tile=tile, downscale=4), latents)


@pytest.mark.parametrize("size", [(16, 16), (8, 15), (17, 16), (30, 43), (29, 44)])
def test_tiny(tiny, size):
    latents, pixels = noise(1, 4, *size), noise(1, 3, size[0] * 8, size[1] * 8)
    decode, encode = decoder(tiny), encoder(tiny)
    close(tiled_decode_tiny(decode, latents, tile=16, downscale=8), tiled(tiny, decoder, latents))
    close(tiled_encode_tiny(encode, pixels, tile=16, downscale=8), tiled(tiny, encoder, pixels))
    assert max(max(size) for size in decode.sizes) <= 16
    assert max(max(size) for size in encode.sizes) <= 128
    assert len(decode.sizes) == len(encode.sizes) == len(range(0, size[0], 14)) * len(range(0, size[1], 14))


@pytest.mark.parametrize("tile", [1, 4, 9, 16])
def test_tiny_with_overlaps_too_small_to_rise_over(tile):
    """Of no latent, or of one: diffusers divides by -1 and by 0."""
    latents = noise(1, 3, 13, 22)
    spread = Recorder(lambda part: part.repeat_interleave(4, -1).repeat_interleave(4, -2))
    expected = spread(latents)
    close(tiled_decode_tiny(spread, latents, tile=tile, downscale=4), expected)
    gather = Recorder(lambda part: part[..., ::4, ::4].contiguous())
    close(tiled_encode_tiny(gather, expected, tile=tile, downscale=4), latents)


@pytest.mark.parametrize("decode", [tiled_decode, tiled_decode_tiny])
def test_several_rows_are_those_of_each_alone(vae, decode):
    latents = noise(2, 4, 13, 9)
    both = decode(decoder(vae), latents, tile=8, downscale=4)
    close(both, np.concatenate([decode(decoder(vae), row[None], tile=8, downscale=4) for row in latents]))


def test_what_was_given_and_returned_is_left_alone():
    latents, given = noise(1, 3, 20, 20), []

    def spread(part: np.ndarray) -> np.ndarray:
        assert part.flags.c_contiguous
        given.append(part.repeat(2, -1).repeat(2, -2))
        given[-1].flags.writeable = False  # as an engine's own buffer may be
        return given[-1]

    before = latents.copy()
    ours = tiled_decode(spread, latents, tile=8, downscale=2)
    np.testing.assert_array_equal(latents, before)
    np.testing.assert_allclose(ours, latents.repeat(2, -1).repeat(2, -2), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("decode", [tiled_decode, tiled_decode_tiny])
def test_the_dtype_is_that_of_the_tiles(dtype, decode):
    latents = noise(1, 3, 20, 20).astype(dtype)
    ours = decode(lambda part: part.repeat(2, -1).repeat(2, -2), latents, tile=8, downscale=2)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, latents.repeat(2, -1).repeat(2, -2), atol=3e-3 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize(("decode", "outputs", "rows"), [(tiled_decode, 3, 1 / 3), (tiled_decode_tiny, 4.5, 0)])
def test_memory(decode, outputs, rows):
    """Beyond the result, the peak is some outputs of one tile, and the lower edges of one row of tiles."""
    tile, downscale, height, width = 16, 8, 128, 160
    latents = noise(1, 4, height, width)

    def spread(part: np.ndarray) -> np.ndarray:
        return np.broadcast_to(part[:, :3, :, None, :, None], (1, 3, part.shape[2], 8, part.shape[3], 8)).reshape(
            1, 3, part.shape[2] * 8, part.shape[3] * 8
        )

    tracemalloc.start()
    try:
        result = decode(spread, latents, tile=tile, downscale=downscale)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_tile = 3 * (tile * downscale) ** 2 * 4
    one_row = 3 * tile * downscale * width * downscale * 4
    assert result.nbytes == 3 * height * width * 64 * 4
    assert peak - result.nbytes < outputs * one_tile + rows * one_row * 1.1
    assert peak - result.nbytes < result.nbytes / 10
