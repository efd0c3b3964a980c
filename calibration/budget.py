"""How near the images in a lower precision must be to those in float32, by the measure that is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..common.arrays import Array
from ..common.checks import is_finite
from ..common.errors import DiffoundryError, RequestError, reason
from ..common.imports import imported
from ..common.machine import require_modules
from .quality import psnr

PSNR, SSIM = "psnr", "ssim"
_MOST = {PSNR: 120.0, SSIM: 1.0}
"""What a measure is at most."""
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FORM = "it is psnr=DB, ssim=FROM_0_TO_1 or module:function=NUMBER"

Function = Callable[[Sequence[Array], Sequence[Array], Sequence[str]], float]
"""`function(images, exact, prompts)`: how good images are, the more the better. Images are uint8 (H, W, 3)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The least value of a measure that images must reach.

    measure: `psnr` or `ssim` to the images in float32, the median of the prompts, or a function of the user's own, as
    `module:function`, see `Function`. Raises `RequestError` for another.
    """

    measure: str
    least: float

    def __post_init__(self) -> None:
        known = isinstance(self.measure, str) and (self.measure in (PSNR, SSIM) or _OWN.fullmatch(self.measure))
        if not known:
            raise RequestError(f"unknown measure {self.measure!r} of a budget: {_FORM}")
        if not is_finite(self.least):
            raise RequestError(f"the least {self.measure} of a budget must be a number, found {self.least!r}")
        most = _MOST.get(self.measure, math.inf)
        if self.measure in _MOST and not 0 <= self.least <= most:
            raise RequestError(f"the least {self.measure} of a budget is from 0 to {most:g}, found {self.least:g}")
        object.__setattr__(self, "least", float(self.least))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that `text` says, as in `ssim=0.9`. Raises `RequestError`."""
        measure, _, least = text.rpartition("=") if isinstance(text, str) else ("", "", "")
        try:
            return cls(measure.strip(), float(least))
        except ValueError:
            raise RequestError(f"{text!r} is no budget: {_FORM}") from None

    def check(self) -> None:
        """Raise `DiffoundryError` when the measure cannot be taken here. Nothing is measured."""
        if self.measure == SSIM:
            require_modules("the budget ssim", ["skimage"], "quality")
        elif self.measure != PSNR:
            self._function()

    def of(self, images: Sequence[Array], exact: Sequence[Array], prompts: Sequence[str]) -> float:
        """The measure of images beside those in float32. Raises `DiffoundryError` when a user's function fails."""
        if self.measure == PSNR:
            return median(psnr(*pair) for pair in zip(images, exact, strict=True))
        if self.measure == SSIM:
            from skimage import metrics

            ssim: Any = metrics.structural_similarity
            pairs = zip(images, exact, strict=True)
            return float(median(ssim(*pair, channel_axis=2, data_range=255) for pair in pairs))
        try:
            found: Any = self._function()(images, exact, prompts)
        except DiffoundryError:
            raise
        except Exception as error:
            raise DiffoundryError(f"the budget's {self.measure} fails: {reason(error)}") from None
        if not is_finite(found):
            raise DiffoundryError(f"the budget's {self.measure} gives {found!r:.80}: let it give a number")
        return float(found)

    def _function(self) -> Function:
        found = imported(self.measure, "the budget's", "a function")
        if not callable(found):
            raise DiffoundryError(f"the budget's {self.measure} is no function: name one of (images, exact, prompts)")
        return found  # type: ignore[no-any-return]
