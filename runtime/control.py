"""`Control`: a picture that steers the drawing, by one of the controls of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bundle.wiring import MOST_MODES
from ..common.checks import is_number, whole_number
from ..common.errors import RequestError

_LARGEST_SCALE = 100.0
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """Zhang et al. 2023. name: of the control, as the bundle calls it. image: the condition itself, such as edges (a
    path, a PIL image, or an array (H, W, 3)); it is stretched to the size of the drawing, or cut to the part that
    `padding_mask_crop` draws.

    mask: of a control that inpaints, white where the picture is left out and drawn anew; of the size of the picture.
    scale: a factor on what the control adds. interval: the part of the steps, from 0 to 1, in which it acts.
    guess_mode: it acts on the rows of the prompt alone, and less in the outer layers, as diffusers' `guess_mode`.
    mode: of a ControlNet-Union, what the picture is of, by a name that `inspect` shows, or by its number; several
    controls of the same name and of different modes act together.
    """

    name: str
    image: Any
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guess_mode: bool = False
    mode: str | int | None = None
    mask: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RequestError(f"the name of a control must be a text, found {self.name!r:.80}")
        if self.image is None:
            raise RequestError(f"the control {self.name} needs an image: give a path, a PIL image or an array")
        if not is_number(self.scale) or not 0 <= self.scale <= _LARGEST_SCALE:
            raise RequestError(
                f"the scale of the control {self.name} must be from 0 to {_LARGEST_SCALE:g}, found {self.scale!r}"
            )
        if not isinstance(self.guess_mode, bool):
            raise RequestError(f"guess_mode must be true or false, found {self.guess_mode!r}")
        if self.mode is not None and not isinstance(self.mode, str):
            mode = whole_number(f"the mode of the control {self.name}", self.mode, 0, MOST_MODES)
            object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "interval", check_interval(f"the control {self.name}", self.interval))


def check_interval(whose: str, found: Any) -> tuple[float, float]:
    """`found` as two floats. Raises `RequestError` unless it is a part of the steps, from 0 to 1."""
    pair = isinstance(found, (tuple, list)) and len(found) == 2 and all(is_number(part) for part in found)
    if not pair or not 0 <= found[0] < found[1] <= 1:
        raise RequestError(f"the interval of {whose} must be two numbers 0 <= start < end <= 1, found {found!r}")
    return float(found[0]), float(found[1])


def acts_at(interval: tuple[float, float], k: int, steps: int) -> bool:
    """Whether call k of `steps` lies whole within the interval."""
    start, end = interval
    return k / steps >= start - _ROUNDING and (k + 1) / steps <= end + _ROUNDING


def read_controls(name: str, value: Any) -> tuple[Control, ...]:
    """`value`, a `Control` or several, as a tuple.

    Raises `RequestError` for anything else, or two of one name and mode.
    """
    controls = (value,) if isinstance(value, Control) else value
    if not isinstance(controls, (tuple, list)) or not all(isinstance(each, Control) for each in controls):
        raise RequestError(f"{name} takes a list of diffoundry.Control, found {type(value).__name__}")
    known = [(each.name, each.mode) for each in controls]
    twice = [name for name, mode in known if known.count((name, mode)) > 1]
    if twice:
        raise RequestError(
            f"the control {twice[0]} is given twice: give each picture a control of its own, or a mode where it is a "
            "ControlNet-Union"
        )
    return tuple(controls)
