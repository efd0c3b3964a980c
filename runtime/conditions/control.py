"""Pictures that steer the drawing through the controls of the bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...bundle import Bundle
from ...bundle.wiring import PICTURE, SCALE, Wiring
from ...bundle.wiring import Control as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines.controlled import input_name
from ..control import Control, acts_at
from ..pictures.preprocess import control_pixels, open_image
from ..request import Request
from .condition import Condition, Fed, Job

_NAME = re.compile(r"[A-Za-z0-9]\w{0,39}", re.ASCII)


class ControlCondition(Condition):
    """The pictures, and for each step the scales; see `condition.Condition`.

    Where one job of a batch has a control, the others are given an empty picture and scales of zero.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._root, self._controls = bundle.root, bundle.manifest.wiring.controls
        self._wiring = bundle.manifest.wiring
        self._downscale = bundle.manifest.latents.downscale

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
            if control.guess_mode and self._wired(control.name).kind == "adapter":
                raise RequestError(f"guess_mode has no effect on {control.name}, a T2I-Adapter: leave it out")
            unit = self._downscale * self._wired(control.name).multiple
            if any(each % unit for each in size):
                raise RequestError(
                    f"the control {control.name} takes sizes that are multiples of {unit}, found {size[0]}x{size[1]}: "
                    f"try {max(size[0] // unit, 1) * unit}x{max(size[1] // unit, 1) * unit}"
                )
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
            more = parts_again(self._wiring, "--controlnet", name)
            raise RequestError(
                f"{self._root} has no control {name!r:.60}, {has}: compile the checkpoint again with {more}"
            )
        return self._controls[name]


def parts_again(wiring: Wiring, option: str, name: str) -> str:
    """The options that `compile` takes for what a bundle has, and for one part more: those left out it would lose."""
    kinds = {"controlnet": "--controlnet", "adapter": "--t2i-adapter"}
    has = [(kinds[each.kind], known, "FOLDER") for known, each in wiring.controls.items()]
    has += [("--ip-adapter", known, "FILE") for known in wiring.image_prompts]
    named = name if _NAME.fullmatch(name) else "NAME"
    has.append((option, named, "FILE" if option == "--ip-adapter" else "FOLDER"))
    return " ".join(f"{flag} {known}={what}" for flag, known, what in has)


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
