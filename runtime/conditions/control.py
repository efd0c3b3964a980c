"""Pictures that steer the drawing through the controls of the bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Bundle
from ...bundle.wiring import PICTURE, SCALE
from ...bundle.wiring import Control as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines.controlled import input_name
from ..control import Control, acts_at
from ..pictures.preprocess import control_pixels, open_image
from ..request import Request
from .condition import Condition, Fed, Job


class ControlCondition(Condition):
    """The pictures, and for each step the scales; see `condition.Condition`.

    Where one job of a batch has a control, the others are given an empty picture and scales of zero.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._root, self._controls = bundle.root, bundle.manifest.wiring.controls

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Any control, of any bundle: `pixels` says which it lacks."""
        return frozenset({"control"})

    def pixels(self, request: Request, size: tuple[int, int]) -> dict[str, Array]:
        """The pictures of the request at (width, height), float32 (C, H, W) from 0 to 1, by the names of controls.

        Raises `RequestError` for a control that the bundle lacks, or a picture that cannot be read.
        """
        for control in request.control:
            self._wired(control.name)
        if request.control and request.padding_mask_crop is not None:
            raise RequestError("a control is a picture of the whole drawing: leave padding_mask_crop out")
        found = {}
        for control in request.control:
            image = open_image(control.image, f"image of the control {control.name}")
            found[control.name] = control_pixels(image, *size, channels=self._wired(control.name).channels)
        return found

    def used(self, jobs: Sequence[Job]) -> list[str]:
        """The components of the controls that these jobs use."""
        names = {control.name for job in jobs for control in job.request.control}
        return [wired.component for name, wired in self._controls.items() if name in names]

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The picture and the scales of each control that one of the jobs uses."""
        names = {control.name for job in jobs for control in job.request.control}
        return [self._fed(job, [name for name in self._controls if name in names]) for job in jobs]

    def _fed(self, job: Job, names: Sequence[str]) -> Fed:
        inputs: dict[str, Array] = {}
        steps: dict[str, tuple[Array, Array]] = {}
        given = {control.name: control for control in job.request.control}
        width, height = job.size
        for name in names:
            wired = self._controls[name]
            empty = np.zeros((wired.channels, height, width), np.float32)
            inputs[input_name(wired.component, PICTURE)] = job.controls.get(name, empty)
            steps[input_name(wired.component, SCALE)] = scales(given.get(name), wired, job.table.steps)
        return Fed(
            inputs=inputs,
            prompt_steps={name: prompt for name, (prompt, _) in steps.items()},
            negative_steps={name: negative for name, (_, negative) in steps.items()},
        )

    def _wired(self, name: str) -> Wired:
        if name not in self._controls:
            has = f"it has {', '.join(self._controls)}" if self._controls else "it has none"
            named = "".join(f" --controlnet {each}=FOLDER" for each in (*self._controls, name))
            raise RequestError(
                f"{self._root} has no control {name!r}, {has}: compile the checkpoint again with{named}, "
                "nothing else is done twice"
            )
        return self._controls[name]


def scales(control: Control | None, wired: Wired, steps: int) -> tuple[Array, Array]:
    """For each step the factors of the residuals, float32 (steps, residuals), for rows with and without the prompt.

    In guess mode they rise from a tenth, and rows with the negative prompt get none (Zhang et al. 2023, section 3.4).
    """
    prompt = np.zeros((steps, wired.residuals), np.float32)
    if control is None:
        return prompt, prompt
    acts = [acts_at(control.interval, k, steps) for k in range(steps)]
    guess = control.guess_mode or wired.global_pool
    rising = control.guess_mode and not wired.global_pool
    factors = np.logspace(-1, 0, wired.residuals, dtype=np.float32) if rising else np.float32(1)
    prompt[acts] = factors * np.float32(control.scale)
    return prompt, np.zeros_like(prompt) if guess else prompt
