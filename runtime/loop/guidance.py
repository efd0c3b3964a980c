"""Classifier-free guidance: which rows a model call has, and how they are combined."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

import numpy as np

from ...common.arrays import Array
from ...common.checks import is_number, is_whole
from ...common.errors import RequestError

MODES = ("joint", "split", "off")
SKIPPING = (
    "skip_guidance_layers",
    *("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
)
"""The fields of skip-layer guidance."""
_LARGEST_SCALE = 1e6
_ROUNDING = 1e-9
"""0.28 of 25 steps is 7 of them, though 0.28 * 25 is a little more than 7."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """Ho & Salimans 2022, equation 6: m = m_negative + scale · (m_prompt − m_negative).

    scale: None is the bundle's default. mode: `joint` runs both halves in one call, `split` in two calls of half the
    memory, `off` runs the prompt alone.
    interval: the part of the steps, from 0 to 1, in which guidance is on (Kynkäänniemi et al. 2024).
    true_cfg_scale: the scale of guidance by the loop in a model that is given another as an input (FLUX.1 [dev]);
    1 is none.
    rescale: φ from 0 to 1, the part of m that gets the deviation of m_prompt (Lin et al. 2023, section 3.4).
    skip_guidance_layers: layers without which a third prediction is made, as diffusers' `StableDiffusion3Pipeline`
    does it: m + skip_layer_guidance_scale · (m_prompt − m_skipped), in the guided steps k of n with
    skip_layer_guidance_start · n < k < skip_layer_guidance_stop · n.
    """

    scale: float | None = None
    mode: str = "joint"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    true_cfg_scale: float = 1.0
    skip_guidance_layers: tuple[int, ...] = ()
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_start: float = 0.01
    skip_layer_guidance_stop: float = 0.2

    def __post_init__(self) -> None:
        if self.scale is not None:
            if not is_number(self.scale) or not 0 <= self.scale <= _LARGEST_SCALE:
                raise RequestError(f"guidance must be a number from 0 to {_LARGEST_SCALE:g}, found {self.scale!r}")
            object.__setattr__(self, "scale", float(self.scale))
        true = self.true_cfg_scale
        if not is_number(true) or not 1 <= true <= _LARGEST_SCALE:
            raise RequestError(
                f"true_cfg_scale must be a number from 1, which is none, to {_LARGEST_SCALE:g}, found {true!r}"
            )
        object.__setattr__(self, "true_cfg_scale", float(true))
        if self.mode == "off" and true > 1:
            raise RequestError("guidance is off, and true_cfg_scale asks for some: leave one of them out")
        if self.mode not in MODES:
            raise RequestError(f"unknown guidance mode {self.mode!r}: choose one of {', '.join(MODES)}")
        found = self.interval
        pair = isinstance(found, (tuple, list)) and len(found) == 2 and all(is_number(part) for part in found)
        if not pair or not 0 <= found[0] <= found[1] <= 1:
            raise RequestError(f"the guidance interval must be two numbers 0 <= start <= end <= 1, found {found!r}")
        object.__setattr__(self, "interval", (float(found[0]), float(found[1])))
        if not is_number(self.rescale) or not 0 <= self.rescale <= 1:
            raise RequestError(f"the guidance rescale must be a number from 0 to 1, found {self.rescale!r}")
        object.__setattr__(self, "rescale", float(self.rescale))
        self._check_skipping()

    def _check_skipping(self) -> None:
        layers = () if self.skip_guidance_layers is None else self.skip_guidance_layers
        if not isinstance(layers, (tuple, list)) or not all(is_whole(each) and each >= 0 for each in layers):
            raise RequestError(
                "skip_guidance_layers must be a list of numbers of layers, counted from 0, as in (7, 8, 9), found "
                f"{layers!r:.80}"
            )
        object.__setattr__(self, "skip_guidance_layers", tuple(sorted({int(each) for each in layers})))
        scale, start, stop = (getattr(self, name) for name in SKIPPING[1:])
        if not is_number(scale) or not abs(scale) <= _LARGEST_SCALE:
            raise RequestError(
                f"skip_layer_guidance_scale must be a number from -{_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}, found "
                f"{scale!r}"
            )
        if not (is_number(start) and is_number(stop)) or not 0 <= start <= stop <= 1:
            raise RequestError(
                "skip_layer_guidance_start and skip_layer_guidance_stop must be two numbers 0 <= start <= stop <= 1, "
                f"found {start!r} and {stop!r}"
            )
        for item in fields(self):
            if item.name in SKIPPING[1:]:
                value = float(getattr(self, item.name))
                if not layers and value != item.default:
                    raise RequestError(f"{item.name} goes with skip_guidance_layers: give both, or leave it out")
                object.__setattr__(self, item.name, value)

    def raised(self, added: float) -> Guidance:
        """This with `added` to its scale, which may then be above the largest that can be asked for."""
        made = copy(self)
        object.__setattr__(made, "scale", (self.scale or 0.0) + added)
        return made

    @property
    def active(self) -> bool:
        """Whether any negative rows are needed at all."""
        return self.mode != "off" and (self.scale is None or self.scale > 1)

    @property
    def skips(self) -> bool:
        """Whether there is a third prediction in some steps."""
        return self.active and bool(self.skip_guidance_layers)

    @property
    def split(self) -> bool:
        """Whether the two halves are two calls."""
        return self.active and self.mode == "split"

    def at(self, k: int, steps: int) -> bool:
        """Whether step k of `steps` is guided."""
        low, high = self.interval
        return self.active and low * steps - _ROUNDING <= k < high * steps - _ROUNDING


def combine(prompt: Array, negative: Array, guidances: list[Guidance]) -> Array:
    """The guided model output of n rows, float32 (n, …), from both halves and the guidance of each row."""
    guided: Array = prompt - negative if prompt.dtype == np.float32 else np.subtract(prompt, negative, dtype=np.float32)
    scale = guidances[0].scale
    if all(guidance.scale == scale for guidance in guidances):
        guided *= np.float32(scale)
    else:
        scales = np.array([guidance.scale for guidance in guidances], np.float32)
        guided *= scales.reshape(-1, *(1,) * (guided.ndim - 1))
    guided += negative
    for row, guidance in enumerate(guidances):
        if guidance.rescale:
            wanted = prompt[row]
            # φ · m · (σ_prompt / σ_m) + (1 − φ) · m; their ratio is the same with any denominator of the variance
            ratio = wanted.std(dtype=np.float64) / guided[row].std(dtype=np.float64)
            guided[row] *= np.float32(guidance.rescale * ratio + 1 - guidance.rescale)
    return guided


def skip_guidance(prompt: Array, skipped: Array, scales: list[float]) -> Array:
    """What skip-layer guidance adds to n rows, float32 (n, …), from both predictions and the scale of each row."""
    difference: Array = np.subtract(prompt, skipped, dtype=np.float32)
    difference *= np.array(scales, np.float32).reshape(-1, *(1,) * (difference.ndim - 1))
    return difference
