"""Pictures that steer the drawing through the controls of the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...bundle import Bundle
from ...bundle.wiring import MODE, NAME, PICTURE, SCALE, STRENGTH, Wiring
from ...bundle.wiring import Control as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines.controlled import input_name
from ...families.control import mode_names
from ..control import Control, acts_at
from ..pictures.preprocess import Picture, control_pixels, open_image
from ..request import Request
from .condition import Condition, Fed, Job

_MOST_DIGITS = 4


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

    def pixels(self, request: Request, size: tuple[int, int], picture: Picture | None) -> dict[str, Array]:
        """The pictures of the request at (width, height), float32 (images, C, H, W) from 0 to 1, by control.

        picture: what is edited. Raises `RequestError` for a control that the bundle lacks, or a picture that cannot be
        read.
        """
        for control in request.control:
            self._mode(control)
        found: dict[str, list[Array]] = {}
        for control in request.control:
            wired = self._wired(control.name)
            if control.guess_mode and wired.kind == "adapter":
                raise RequestError(f"guess_mode has no effect on {control.name}, a T2I-Adapter: leave it out")
            unit = self._downscale * wired.multiple
            if any(each % unit for each in size):
                raise RequestError(
                    f"the control {control.name} takes sizes that are multiples of {unit}, found {size[0]}x{size[1]}: "
                    f"try {max(size[0] // unit, 1) * unit}x{max(size[1] // unit, 1) * unit}"
                )
            image = open_image(control.image, f"image of the control {control.name}")
            crop = None if picture is None else picture.crop
            if crop is not None and picture is not None and picture.original is not None:
                self._check_size(control.name, image.size, picture.original.size)
            pixels = control_pixels(image, *size, channels=wired.channels, crop=crop)
            found.setdefault(control.name, []).append(pixels)
        for name in found:
            of_one = [each for each in request.control if each.name == name]
            if len({each.guess_mode for each in of_one}) > 1:
                raise RequestError(f"the pictures of {name} differ in guess_mode: give all of them the same")
            modes = [self._mode(each) for each in of_one]
            if len(set(modes)) < len(modes):
                raise RequestError(f"the control {name} is given two pictures of one mode: give one of each")
        return {name: np.stack(each) for name, each in found.items()}

    @staticmethod
    def _check_size(name: str, found: tuple[int, int], due: tuple[int, int]) -> None:
        if found != due:
            raise RequestError(
                f"with padding_mask_crop the picture of the control {name} lies over the image: it is "
                f"{found[0]}x{found[1]} and the image {due[0]}x{due[1]}, give one of this size"
            )

    def check(self, jobs: Sequence[Job]) -> None:
        """The jobs of a batch must have as many pictures for a ControlNet-Union, or none."""
        for name in self._controls:
            counts = sorted({len(job.controls[name]) for job in jobs if name in job.controls})
            if len(counts) > 1:
                raise RequestError(
                    f"the requests of a batch must have as many pictures for the control {name}, found "
                    f"{', '.join(map(str, counts))}: run them on their own"
                )

    def used(self, jobs: Sequence[Job]) -> list[str]:
        """The components of the controls that these jobs use."""
        names = {control.name for job in jobs for control in job.request.control}
        return [wired.component for name, wired in self._controls.items() if name in names]

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """The picture and the scales of each control that one of the jobs uses."""
        names = {control.name for job in jobs for control in job.request.control}
        counts = {
            name: max(len(job.controls.get(name, ())) for job in jobs) for name in self._controls if name in names
        }
        return [self._fed(job, counts) for job in jobs]

    def _fed(self, job: Job, counts: Mapping[str, int]) -> Fed:
        """counts: how many pictures each control is given."""
        inputs: dict[str, Array] = {}
        steps: dict[str, tuple[Array, Array]] = {}
        width, height = job.size
        for name, count in counts.items():
            wired = self._controls[name]
            own = [control for control in job.request.control if control.name == name]
            pictures = job.controls.get(name, np.zeros((count, wired.channels, height, width), np.float32))
            many = wired.kind == "union"
            inputs[input_name(wired.component, PICTURE)] = pictures if many else pictures[0]
            whole = own[0] if own else None
            if len(own) > 1:  # which are scaled one by one, as diffusers does
                whole = replace(own[0], scale=1.0, interval=(0.0, 1.0))
            steps[input_name(wired.component, SCALE)] = scales(whole, wired, job.table.steps)
            if many:
                modes = [self._mode(control) for control in own]
                inputs[input_name(wired.component, MODE)] = _one_hot(modes, count, wired.modes)
                strengths = _strengths(own, count, job.table.steps)
                steps[input_name(wired.component, STRENGTH)] = strengths, strengths
        return Fed(
            inputs=inputs,
            prompt_steps={name: prompt for name, (prompt, _) in steps.items()},
            negative_steps={name: negative for name, (_, negative) in steps.items()},
        )

    def _mode(self, control: Control) -> int | None:
        """The number of its mode, None for a control that knows none."""
        wired, mode = self._wired(control.name), control.mode
        known = mode_names(wired.modes)
        if not known and mode is None:
            return None
        if not known:
            raise RequestError(f"the control {control.name} has no modes, found {mode!r:.60}: leave the mode out")
        number = int(mode) if isinstance(mode, str) and mode.isdecimal() and len(mode) < _MOST_DIGITS else mode
        if isinstance(number, int) and 0 <= number < len(known):
            return number
        if mode not in known:
            said = "no mode" if mode is None else f"the mode {mode!r:.60}"
            raise RequestError(
                f"the control {control.name} reads pictures of several modes, found {said}: say which one the picture "
                f"is of, {', '.join(known)}, as in --control {control.name}:{known[-1]}=PICTURE or mode={known[-1]!r}"
            )
        return known.index(str(mode))

    def _wired(self, name: str) -> Wired:
        before, _, after = name.partition(":")
        if name not in self._controls and before in self._controls:
            raise RequestError(
                f"{self._root} has no control {name!r:.60}: give the name {before!r} and mode={after!r:.60}"
            )
        if name not in self._controls:
            has = f"it has {', '.join(self._controls)}" if self._controls else "it has none"
            more = parts_again(self._wiring, "--controlnet", name)
            raise RequestError(
                f"{self._root} has no control {name!r:.60}, {has}: compile the checkpoint again with {more}"
            )
        return self._controls[name]


def parts_again(wiring: Wiring, option: str, name: str) -> str:
    """The options that `compile` takes for what a bundle has, and for one part more: those left out it would lose."""
    kinds = {"controlnet": "--controlnet", "union": "--controlnet", "adapter": "--t2i-adapter"}
    has = [(kinds[each.kind], known, "FOLDER") for known, each in wiring.controls.items()]
    has += [("--ip-adapter", known, "FILE") for known in wiring.image_prompts]
    named = name if NAME.fullmatch(name) else "NAME"
    has.append((option, named, "FILE" if option == "--ip-adapter" else "FOLDER"))
    return " ".join(f"{flag} {known}={what}" for flag, known, what in has)


def _one_hot(modes: Sequence[int | None], count: int, known: int) -> Array:
    """float32 (count, known); zeros where there are no pictures."""
    found = np.zeros((count, known), np.float32)
    for i, mode in enumerate(modes):
        found[i, mode] = 1
    return found


def _strengths(controls: Sequence[Control], count: int, steps: int) -> Array:
    """For each step a factor on each of `count` pictures, float32 (steps, count): 1 for one that is alone."""
    found = np.ones((steps, count), np.float32)
    if len(controls) > 1:
        for i, control in enumerate(controls):
            found[:, i] = [control.scale * acts_at(control.interval, k, steps) for k in range(steps)]
    return found


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
