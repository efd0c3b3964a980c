"""Large pictures through an autoencoder in overlapping tiles, so that its memory does not grow with the picture.

Each tile is encoded or decoded alone and faded into its neighbours where they overlap. The result is not that of one
call, because attention and group norms see a tile only; it is that of diffusers' `enable_tiling()`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ...common.arrays import Array

T = TypeVar("T")
Call = Callable[[Array], Array]
Parts = Generator[None, None, T]
"""Work that can be left between its parts, and what it makes in the end."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where the tiles lie, in latents: a tile every `stride`, `blend` of which lies over the next.

    before, after: pixels a latent in what is worked through and in what comes out, one of them 1.
    tiny: as `AutoencoderTiny` does it: with less overlap and other weights, and always in tiles.
    diffusers rounds the overlap of pixels and that of latents down apart; where these differ (a tile of 6, of which
    1.5 latents overlap) its tiles do not meet, so here whole latents overlap. Elsewhere it is the same.
    """

    tile: int
    before: int
    after: int
    tiny: bool = False

    @property
    def blend(self) -> int:
        return self.tile // (8 if self.tiny else 4)

    @property
    def stride(self) -> int:
        return self.tile - self.blend

    def starts(self, size: int) -> range:
        """First latents of the tiles along a side of `size` elements of what is worked through."""
        return range(0, size // self.before, self.stride)

    def cut(self, source: Array, top: int, left: int) -> Array:
        rows, columns = (slice(start * self.before, (start + self.tile) * self.before) for start in (top, left))
        return np.asarray(source[..., rows, columns], order="C")

    def result(self, source: Array, piece: Array) -> Array:
        """Room for the whole result, of which `piece` is one tile."""
        sides = (side // self.before * self.after for side in source.shape[-2:])
        return np.zeros((*piece.shape[:-2], *sides), piece.dtype)


def finished(parts: Parts[T]) -> T:
    """What comes of all the parts, one after the other."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            made: T = end.value
            return made


def in_tiles(call: Call, source: Array, tiles: Tiles) -> Parts[Array]:
    """What an autoencoder makes of `source`, latents or pixels (1, C, H, W), as `AutoencoderKL` and `AutoencoderTiny`.

    It can be left between tiles. call: the encoder or decoder, for sides up to a tile and ragged ones at the far edges.
    What is no larger than a tile goes through in one call, unless the autoencoder is tiny.

    Memory beyond the result: what `call` takes for one tile, twice its output, and the lower edges of one row of tiles,
    a third of a tile high; with a tiny one what `call` takes for one tile, and less than five times its output.
    """
    if tiles.tiny:
        return (yield from _laid_over(call, source, tiles))
    if max(source.shape[-2:]) <= tiles.tile * tiles.before:
        return call(source)
    return (yield from _faded(call, source, tiles))


def _faded(call: Call, source: Array, tiles: Tiles) -> Parts[Array]:
    """Each tile fades from the tile above, which was already faded into its own neighbours, then from that at its left.

    A tile's lower and right edges are therefore kept apart: in the result, the tile after it overwrites them.
    """
    above: dict[int, Array] = {}
    step, edge = tiles.stride * tiles.after, tiles.blend * tiles.after
    for i, top in enumerate(tiles.starts(source.shape[-2])):
        beside: Array | None = None
        for j, left in enumerate(tiles.starts(source.shape[-1])):
            if i or j:
                yield
            piece = np.array(call(tiles.cut(source, top, left)))
            if not i and not j:
                result = tiles.result(source, piece)
            if i:
                _fade(above[j], piece)
            if beside is not None:
                _fade(beside.swapaxes(-1, -2), piece.swapaxes(-1, -2))
            height, width = piece.shape[-2:]
            above[j] = piece[..., max(height - edge, 0) :, :].copy()
            beside = piece[..., max(width - edge, 0) :].copy()
            result[..., i * step : (i + 1) * step, j * step : (j + 1) * step] = piece[..., :step, :step]
    return result


def _fade(above: Array, piece: Array) -> None:
    """Change the first rows of `piece` from the last rows of `above`, linearly."""
    rows = min(above.shape[-2], piece.shape[-2])
    weight = np.arange(rows)[:, None] / max(rows, 1)
    own, other = weight.astype(np.float32), (1 - weight).astype(np.float32)
    piece[..., :rows, :] = above[..., above.shape[-2] - rows :, :] * other + piece[..., :rows, :] * own


def _laid_over(call: Call, source: Array, tiles: Tiles) -> Parts[Array]:
    """Each tile is laid over the result of those before it, with weights that rise along its upper and left edges."""
    after = tiles.after
    for top in tiles.starts(source.shape[-2]):
        for left in tiles.starts(source.shape[-1]):
            if top or left:
                yield
            piece = call(tiles.cut(source, top, left))
            if not top and not left:
                result = tiles.result(source, piece)
            height, width = piece.shape[-2:]
            weight = _rising(height, top, tiles)[:, None] * _rising(width, left, tiles)
            beneath = result[..., top * after : top * after + height, left * after : left * after + width]
            beneath[...] = weight * piece + (1 - weight) * beneath
    return result


def _rising(length: int, start: int, tiles: Tiles) -> Array:
    """0 to 1 over the overlap and 1 beyond it; 1 throughout at the edge of the picture."""
    weight = np.ones(length, np.float32)
    edge = tiles.blend * tiles.after
    if start and edge > 1:
        ramp = np.arange(min(edge, length), dtype=np.float32) / np.float32(edge - 1)
        weight[: len(ramp)] = ramp
    return weight
