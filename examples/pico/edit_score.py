"""Judge edits of pico's pictures: image-to-image by the attributes that a caption changes and those that it keeps,
inpainting by what is inside the mask and what is outside it.

A mask is bool of shape (64, 64), True where the picture is painted anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .scorer import read
from .world import ATTRIBUTES, SIDE, Scene

MARGIN = 8
"""Pixels around a mask that belong to neither side: one latent, whose picture follows from both."""

SLACK = 8.0
"""How far, of 255, an inpainted picture may be from its source outside the mask beyond what the autoencoder loses.

pico's decoder normalises over the whole picture, so a new colour inside the mask tints the rest: with the latents
outside exactly the source's, 95 of 100 pictures stay below 6.3. Another background begins at 26.
"""


@dataclass(frozen=True, slots=True)
class Edit:
    """What a result shows of an edit: for each attribute, whether it is the one that the new caption names."""

    changed: dict[str, bool]
    kept: dict[str, bool]

    @property
    def right(self) -> bool:
        """Whether every changed and every kept attribute is right."""
        return all(self.changed.values()) and all(self.kept.values())


def judge_edit(result: np.ndarray, before: Scene, after: Scene) -> Edit:
    """What `result`, uint8 (64, 64, 3), shows of the edit of a picture of `before` into one of `after`.

    Raises ValueError if the two scenes are the same, or as `scorer.read` does.
    """
    if before == after:
        raise ValueError(f"an edit changes an attribute, found {str(before)!r} twice")
    found = read(result)
    right = {name: found[name] == getattr(after, name) for name in ATTRIBUTES}
    changes = {name for name in ATTRIBUTES if getattr(before, name) != getattr(after, name)}
    return Edit(
        changed={name: right[name] for name in ATTRIBUTES if name in changes},
        kept={name: right[name] for name in ATTRIBUTES if name not in changes},
    )


def score_edits(results: Iterable[np.ndarray], edits: Iterable[tuple[Scene, Scene]]) -> dict[str, float]:
    """Shares over the results: of `changed` and of `kept` attributes that are right, and of pictures `right` in all.

    edits: the scenes before and after. Raises ValueError for another number of edits than of results.
    """
    judged = [judge_edit(result, *edit) for result, edit in zip(results, edits, strict=True)]
    return {
        "changed": float(np.mean([right for edit in judged for right in edit.changed.values()])),
        "kept": float(np.mean([right for edit in judged for right in edit.kept.values()])),
        "right": float(np.mean([edit.right for edit in judged])),
    }


def difference_outside(source: np.ndarray, result: np.ndarray, mask: np.ndarray, margin: int = MARGIN) -> float:
    """Mean absolute difference, of 255, of two uint8 pictures (64, 64, 3) further than `margin` pixels from the mask.

    Raises ValueError for another shape or dtype, and if nothing is left outside.
    """
    _check_mask(mask)
    for picture in (source, result):
        if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
            raise ValueError(
                f"a picture must be uint8 of shape ({SIDE}, {SIDE}, 3), found {picture.dtype} {picture.shape}"
            )
    around = np.lib.stride_tricks.sliding_window_view(np.pad(mask, margin), (2 * margin + 1,) * 2)
    outside = ~around.any(axis=(2, 3))
    if not outside.any():
        raise ValueError(f"the mask leaves no pixel further than {margin} pixels outside it")
    return float(np.abs(source[outside].astype(np.float64) - result[outside]).mean())


def is_kept_outside(
    source: np.ndarray, result: np.ndarray, mask: np.ndarray, round_trip: np.ndarray, slack: float = SLACK
) -> bool:
    """Whether `result` equals `source` outside the mask, but for what the autoencoder loses and `slack`, of 255.

    round_trip: `source` encoded and decoded, which is the measure of that loss. A pipeline that pastes the source back
    over the outside needs no slack. Raises as `difference_outside` does.
    """
    lost = difference_outside(source, round_trip, mask)
    return difference_outside(source, result, mask) <= lost + slack


def read_inside(result: np.ndarray, mask: np.ndarray) -> dict[str, str | None]:
    """The attributes, as `scorer.read` gives them, of what `result` shows inside the mask on its own background.

    Raises ValueError for a picture or a mask of another shape or dtype.
    """
    _check_mask(mask)
    border = np.concatenate([result[0], result[-1], result[1:-1, 0], result[1:-1, -1]])
    background = np.median(border, axis=0).round().astype(np.uint8)
    return read(np.where(mask[..., None], result, background))


def _check_mask(mask: np.ndarray) -> None:
    if mask.shape != (SIDE, SIDE) or mask.dtype != bool:
        raise ValueError(f"a mask must be bool of shape ({SIDE}, {SIDE}), found {mask.dtype} {mask.shape}")
