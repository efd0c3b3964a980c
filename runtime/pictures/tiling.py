"""Large pictures through an autoencoder in overlapping tiles, so that its memory does not grow with the picture.

Each tile is encoded or decoded alone and faded into its neighbours where they overlap. The result is not that of one
call, because attention and group norms see a tile only; it is that of diffusers' `enable_tiling()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError

Call = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the tiles lie, in latents: a tile every `stride`, `blend` of which lies over the next.

    before, after: pixels a latent in what is worked through and in what comes out, one of them 1.
    diffusers rounds the overlap of pixels and that of latents down apart; where these differ (a tile of 6, of which
    1.5 latents overlap) its tiles do not meet, so here whole latents overlap. Elsewhere it is the same.
    """

    tile: int
    blend: int
    before: int
    after: int

    @property
    def stride(self) -> int:
        return self.tile - self.blend

    def starts(self, size: int) -> range:
        """First latents of the tiles along a side of `size` elements of what is worked through."""
        return range(0, size // self.before, self.stride)

    def cut(self, source: Array, top: int, left: int) -> Array:
        rows, columns = (slice(start * self.before, (start + self.tile) * self.before) for start in (top, left))
        return np.asarray(source[..., rows, columns], order="C")

    def shape(self, source: Array) -> tuple[int, int]:
        """Height and width of the whole result."""
        height, width = source.shape[-2:]
        return height // self.before * self.after, width // self.before * self.after


def tiled_decode(decode: Call, latents: Array, *, tile: int, downscale: int, overlap: float = 0.25) -> Array:
    """Pixels (1, 3, H · downscale, W · downscale) of `latents` (1, C, H, W), as `AutoencoderKL.tiled_decode`.

    decode: (1, C, h, w) to (1, 3, h · downscale, w · downscale), for h and w up to `tile` and ragged at the far edges.
    Latents that are no larger than a tile are decoded in one call.

    Memory beyond the result: what `decode` takes for one tile, twice its output, and the lower edges of one row of
    tiles, about overlap / (1 − overlap) · tile · downscale rows of the result (at the defaults, a third of a tile).
    Raises `RequestError` when `tile` is less than 1 or `overlap` not from 0 to below 1.
    """
    return _faded(decode, latents, _grid(tile, overlap, before=1, after=downscale))


def tiled_encode(encode: Call, pixels: Array, *, tile: int, downscale: int, overlap: float = 0.25) -> Array:
    """Moments (1, 2C, H / downscale, W / downscale) of `pixels` (1, 3, H, W), as `AutoencoderKL._tiled_encode`.

    encode: (1, 3, h, w) to (1, 2C, h / downscale, w / downscale). tile: in latents, as for `tiled_decode`, which says
    what it takes in memory. Raises `RequestError` as that does, and when H or W is no multiple of `downscale`.
    """
    _check_multiple(pixels, downscale)
    return _faded(encode, pixels, _grid(tile, overlap, before=downscale, after=1))


def tiled_decode_tiny(decode: Call, latents: Array, *, tile: int, downscale: int, overlap: float = 0.125) -> Array:
    """What `tiled_decode` does, as `AutoencoderTiny` does it: other weights, and always in tiles.

    Memory beyond the result: what `decode` takes for one tile, and less than five times its output.
    """
    return _laid_over(decode, latents, _grid(tile, overlap, before=1, after=downscale))


def tiled_encode_tiny(encode: Call, pixels: Array, *, tile: int, downscale: int, overlap: float = 0.125) -> Array:
    """What `tiled_encode` does, as `AutoencoderTiny` does it, which gives latents: (1, C, …)."""
    _check_multiple(pixels, downscale)
    return _laid_over(encode, pixels, _grid(tile, overlap, before=downscale, after=1))


def _grid(tile: int, overlap: float, *, before: int, after: int) -> _Grid:
    if tile < 1:
        raise RequestError(f"a tile must be at least 1 latent a side, found {tile}")
    if not 0 <= overlap < 1:
        raise RequestError(f"the overlap of tiles must be from 0 to below 1, found {overlap!r}")
    return _Grid(tile, int(tile * overlap), before, after)


def _check_multiple(pixels: Array, downscale: int) -> None:
    height, width = pixels.shape[-2:]
    if height % downscale or width % downscale:
        raise RequestError(f"pixels of {width}x{height} cannot be encoded: both must be multiples of {downscale}")


def _faded(call: Call, source: Array, grid: _Grid) -> Array:
    """Each tile fades from the tile above, which was already faded into its own neighbours, then from that at its left.

    A tile's lower and right edges are therefore kept apart: in the result, the tile after it overwrites them.
    """
    if max(source.shape[-2:]) <= grid.tile * grid.before:
        return call(source)
    lefts = grid.starts(source.shape[-1])
    above: dict[int, Array] = {}
    result: Array | None = None
    step, edge = grid.stride * grid.after, grid.blend * grid.after
    for i, top in enumerate(grid.starts(source.shape[-2])):
        beside: Array | None = None
        for j, left in enumerate(lefts):
            piece = np.array(call(grid.cut(source, top, left)))
            if i:
                _fade(above[j], piece)
            if beside is not None:
                _fade(_transposed(beside), _transposed(piece))
            above[j] = _last_rows(piece, edge)
            beside = _transposed(_last_rows(_transposed(piece), edge))
            if result is None:
                result = np.empty((*piece.shape[:-2], *grid.shape(source)), piece.dtype)
            result[..., i * step : (i + 1) * step, j * step : (j + 1) * step] = piece[..., :step, :step]
    assert result is not None
    return result


def _transposed(piece: Array) -> Array:
    """A view with rows and columns exchanged."""
    return piece.swapaxes(-1, -2)


def _last_rows(piece: Array, rows: int) -> Array:
    return piece[..., max(piece.shape[-2] - rows, 0) :, :].copy()


def _fade(above: Array, piece: Array) -> None:
    """Change the first rows of `piece` from the last rows of `above`, linearly."""
    rows = min(above.shape[-2], piece.shape[-2])
    weight = np.arange(rows)[:, None] / max(rows, 1)
    own, other = weight.astype(np.float32), (1 - weight).astype(np.float32)
    piece[..., :rows, :] = above[..., above.shape[-2] - rows :, :] * other + piece[..., :rows, :] * own


def _laid_over(call: Call, source: Array, grid: _Grid) -> Array:
    """Each tile is laid over the result of those before it, with weights that rise along its upper and left edges."""
    result: Array | None = None
    after = grid.after
    for top in grid.starts(source.shape[-2]):
        for left in grid.starts(source.shape[-1]):
            piece = call(grid.cut(source, top, left))
            if result is None:
                result = np.zeros((*piece.shape[:-2], *grid.shape(source)), piece.dtype)
            height, width = piece.shape[-2:]
            weight = _rising(height, top, grid)[:, None] * _rising(width, left, grid)
            place = result[..., top * after : top * after + height, left * after : left * after + width]
            place[...] = weight * piece + (1 - weight) * place
    assert result is not None
    return result


def _rising(length: int, start: int, grid: _Grid) -> Array:
    """0 to 1 over the overlap and 1 beyond it; 1 throughout at the edge of the picture."""
    weight = np.ones(length, np.float32)
    edge = grid.blend * grid.after
    if start and edge > 1:
        ramp = np.arange(min(edge, length), dtype=np.float32) / np.float32(edge - 1)
        weight[: len(ramp)] = ramp
    return weight
