"""Pictures that steer the drawing through the controls of the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...bundle import Bundle, Role
from ...bundle.wiring import MODE, NAME, PICTURE, SCALE, STRENGTH, Wiring
from ...bundle.wiring import Control as Wired
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines.controlled import input_name
from ...families.control import mode_names
from ..control import Control, acts_at
from ..loop.noise import Generator
from ..pictures.autoencoder import Autoencoder
from ..pictures.preprocess import Picture, control_pixels, latent_mask, mask_pixels, open_image
from ..request import Request
from .condition import Condition, Fed, Job

_MOST_DIGITS = 4


class ControlCondition(Condition):
    """The pictures, and for each step the scales; see `condition.Condition`.

    Where one job of a batch has a control, the others are given an empty picture and scales of zero.
    """

    def __init__(self, bundle: Bundle, autoencoder: Autoencoder) -> None:
        self._root, self._controls = bundle.root, bundle.manifest.wiring.controls
        self._wiring, self._autoencoder = bundle.manifest.wiring, autoencoder
        self.loads: Role | None = "encoder" if any(each.encoded for each in self._controls.values()) else None
        self._downscale = bundle.manifest.latents.downscale

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Any control, of any bundle: `pixels` says which it lacks."""
        return frozenset({"control", *(["tiled"] if self._encodes([request]) else [])})

    def pixels(self, request: Request, size: tuple[int, int], picture: Picture | None) -> dict[str, Array]:
        """The pictures of the request at (width, height), float32 (images, C, H, W) from 0 to 1, by control.

        picture: what is edited. Those of a control that inpaints have the mask as a last channel.
        Raises `RequestError` for a control that the bundle lacks, or a picture that cannot be read.
        """
        for control in request.control:
            self._mode(control)
        found: dict[str, list[Array]] = {}
        for control in request.control:
            wired = self._wired(control.name)
            self._check_asked(control, wired, size)
            image = open_image(control.image, f"image of the control {control.name}")
            crop = None if picture is None else picture.crop
            if crop is not None and picture is not None and picture.original is not None:
                self._check_size(control.name, image.size, picture.original.size)
            pixels = control_pixels(image, *size, channels=3 if wired.encoded else wired.channels, crop=crop)
            if wired.masked:
                mask = open_image(control.mask, f"mask of the control {control.name}")
                if mask.size != image.size:
                    raise RequestError(
                        f"the mask of the control {control.name} is {mask.width}x{mask.height} and its picture "
                        f"{image.width}x{image.height}: give a mask of that size"
                    )
                mode = "fill" if crop else "default"
                pixels = np.concatenate([pixels, mask_pixels(mask, *size, crop=crop, resize_mode=mode)])
            found.setdefault(control.name, []).append(pixels)
        for name in found:
            of_one = [each for each in request.control if each.name == name]
            if len({each.guess_mode for each in of_one}) > 1:
                raise RequestError(f"the pictures of {name} differ in guess_mode: give all of them the same")
            modes = [self._mode(each) for each in of_one]
            if len(set(modes)) < len(modes):
                raise RequestError(f"the control {name} is given two pictures of one mode: give one of each")
        return {name: np.stack(each) for name, each in found.items()}

    def _check_asked(self, control: Control, wired: Wired, size: tuple[int, int]) -> None:
        """Raise `RequestError` for what `control` asks and cannot do. size: width and height in pixels."""
        name = control.name
        if control.guess_mode and not (wired.guess and wired.kind != "adapter"):
            kind = "a T2I-Adapter" if wired.kind == "adapter" else "a ControlNet of a transformer"
            raise RequestError(f"guess_mode has no effect on {name}, {kind}: leave it out")
        if control.mask is not None and not wired.masked:
            raise RequestError(f"a mask has no effect on the control {name}, which does not inpaint: leave it out")
        if control.mask is None and wired.masked:
            raise RequestError(
                f"the control {name} inpaints: give it a mask, white where the picture is drawn anew, as in "
                f"--control-mask {name}=PICTURE or mask=PICTURE"
            )
        unit, most = self._downscale * wired.multiple, self._downscale * wired.most
        if any(each % unit for each in size):
            raise RequestError(
                f"the control {name} takes sizes that are multiples of {unit}, found {size[0]}x{size[1]}: "
                f"try {max(size[0] // unit, 1) * unit}x{max(size[1] // unit, 1) * unit}"
            )
        if most and max(size) > most:
            raise RequestError(
                f"the control {name} takes sizes up to {most}, found {size[0]}x{size[1]}: "
                f"try {min(size[0], most)}x{min(size[1], most)}"
            )

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

    def encodes(self, jobs: Sequence[Job]) -> bool:
        """Whether pictures of these jobs are encoded."""
        return self._encodes([job.request for job in jobs])

    def _encodes(self, requests: Sequence[Request]) -> bool:
        names = {control.name for request in requests for control in request.control}
        return any(wired.encoded for name, wired in self._controls.items() if name in names)

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
        of_prompt: dict[str, str] = {}
        for name, count in counts.items():
            wired = self._controls[name]
            own = [control for control in job.request.control if control.name == name]
            many = wired.kind == "union"
            if not (own and wired.reads == "drawn"):
                pictures = self._given(job, name, count)
                inputs[input_name(wired.component, PICTURE)] = pictures if many else pictures[0]
            of_prompt |= {input_name(wired.component, each): source for each, source in wired.of_prompt.items()}
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
            of_prompt=of_prompt,
            drawn=self._drawing(job),
        )

    def _given(self, job: Job, name: str, count: int) -> Array:
        """What a control is given of its pictures, float32 (images, C, H, W); zeros where the job has none for it."""
        wired, (width, height) = self._controls[name], job.size
        if name not in job.controls:
            _, *sides = self._autoencoder.shape(job.size)
            return np.zeros((count, wired.channels, *(sides if wired.encoded else (height, width))), np.float32)
        pictures = job.controls[name]
        if not wired.encoded:
            return pictures if wired.reads == "pixels" else 2 * pictures - 1
        found = [self._autoencoder.mean(each, shifted=wired.shifted) for each in self._encoded(job, name)]
        if wired.masked:
            kept = [1 - latent_mask(each[3:], *found[0].shape[1:]) for each in pictures]
            found = [np.concatenate(pair) for pair in zip(found, kept, strict=True)]
        return np.stack(found)

    def _encoded(self, job: Job, name: str) -> list[Array]:
        """What the encoder makes of each picture of a control; what a mask leaves out is black."""
        pictures = [np.float32(2) * each[:3] - np.float32(1) for each in job.controls[name]]
        if self._controls[name].masked:
            pictures = [
                np.where(whole[3:] > 0.5, np.float32(-1), each)
                for each, whole in zip(pictures, job.controls[name], strict=True)
            ]
        return [self._autoencoder.encode(each, tiled=job.request.tiled) for each in pictures]

    def _drawing(self, job: Job) -> Callable[[Generator], Mapping[str, Array]] | None:
        """Draws the latents of the pictures, in the order of the request, as diffusers' pipelines do."""
        names = [each.name for each in job.request.control if self._controls[each.name].reads == "drawn"]
        encoded = {name: self._encoded(job, name) for name in dict.fromkeys(names)}
        if not names:
            return None

        def drawn(generator: Generator) -> Mapping[str, Array]:
            waiting = {name: list(each) for name, each in encoded.items()}
            made: dict[str, list[Array]] = {name: [] for name in encoded}
            for name in names:
                made[name].append(self._autoencoder.sample(waiting[name].pop(0), generator))
            return {
                input_name(self._controls[name].component, PICTURE): (
                    np.stack(each) if self._controls[name].kind == "union" else each[0]
                )
                for name, each in made.items()
            }

        return drawn

    def _mode(self, control: Control) -> int | None:
        """The number of its mode, None for a control that knows none."""
        wired, mode = self._wired(control.name), control.mode
        known = mode_names(wired)
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
        if self._wiring.edits or self._wiring.inputs_from("latents.filled"):
            raise RequestError(
                f"{self._root} has no control {name!r:.60}: its model sees a picture by itself and takes no control "
                "beside it, leave it out"
            )
        if self._wiring.inputs_from("text.mask"):  # no transformer with ControlNets has it
            raise RequestError(
                f"{self._root} has no control {name!r:.60}: ControlNets of its model are not supported, leave it out"
            )
        if name not in self._controls:
            has = f"it has {', '.join(self._controls)}" if self._controls else "it has none"
            more = parts_again(self._wiring, "--controlnet", name)
            if self._wiring.flow is not None and not self._controls:
                more += ", which FLUX.1 and Stable Diffusion 3 take among transformers"
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
