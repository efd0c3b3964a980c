"""`Job`: a request held against a bundle, with all that its images need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .loop.guidance import Guidance
from .pictures.picture import Picture
from .request import Request
from .schedulers import Table


@dataclass(frozen=True, slots=True)
class Job:
    """A request checked against a bundle, with all that the loop needs.

    guidance: classifier-free guidance of the loop. guidance_input: the scale that the model is given as an input, None
    for other models. size: width and height in pixels. record: the request as JSON values, to ask for it again.
    """

    request: Request
    table: Table
    guidance: Guidance
    guidance_input: float | None
    picture: Picture | None
    seeds: list[int]
    size: tuple[int, int]
    record: dict[str, Any]
