"""Every family and task of Stable Diffusion against diffusers: same weights, same seeds, final latents and pixels.

python -m diffoundry.parity
python -m diffoundry.parity --engine onnxruntime:cuda --precision fp16      on a GPU, where diffusers runs in fp16, too
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image

from ..bundle import FULL
from ..calibration import PRECISIONS
from ..common.arrays import Array
from ..engines.names import ENGINES, EngineName
from .lora import KINDS, write_lora

ATOL, RTOL = 1e-4, 1e-2
"""What the project promises of latents and pixels."""
LEAST_PSNR, LEAST_SSIM = 30.0, 0.97
"""What is asked of pictures where both compute in half precision, in dB, and of 1."""
SEED = 11
PROMPT, NEGATIVE = "a large red star at the left on a navy background", "a small ring"
OTHER, OTHER_NEGATIVE = "a watercolour of a harbour, soft light", "text, frame"
WIDE = (104, 72)
"""Width and height of which the latents are odd, so that halving and doubling them meet no whole size."""
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "plms": "PNDMScheduler",
    "pndm": "PNDMScheduler",
}
_OF_FLOW = {"flow-heun": "FlowMatchHeunDiscreteScheduler", "flow-lcm": "FlowMatchLCMScheduler"}
_HALF_SCHEDULERS = tuple(name for name in SCHEDULERS if name != "lcm")  # pico is no consistency model
CONTROLLED = "+control"
CONTROLS = {"edge": 0, "depth": 1}
"""The ControlNets of a bundle with controls, and the seeds of their weights."""
SKETCHED, SKETCH = "+t2i", "sketch"
"""Behind the name of a checkpoint whose bundle has a T2I-Adapter, and the name of that."""
UNITED, UNION = "+union", "union"
"""Behind the name of a checkpoint whose bundle has a ControlNet-Union, and the name of that."""
PICO = "pico+control+union+image-plus"
"""The bundle of pico with all that steers it."""
_PARTS = {SKETCH: SKETCHED, UNION: UNITED}
STEERED = "+dit-"
"""Before the kinds of ControlNets that the bundle of a transformer has, of `examples.random_transformer`."""
PROMPTED = "+image-"
ADAPTERS, FACE = ("plain", "plus", "full"), "face"
"""The kinds of IP-Adapters, by which they are called, and one that is given embeddings."""
READ = {
    "flux-dev-small": ("look", "mood"),
    "flux-schnell-small": ("look",),
    "flux-kontext-small": ("look",),
    "sd3-small": ("look",),
    "sd35-small": ("look",),
}
"""The IP-Adapters that the bundle of a transformer is compared with, of `examples.random_transformer`."""
ADAPTED, LORA = "+lora", "+lora-"
"""Behind the name of a checkpoint whose bundle takes LoRAs as inputs, and before the kind of one made for it."""
_PNDM = {"plms": {"skip_prk_steps": True}, "pndm": {"skip_prk_steps": False}}


@dataclass(frozen=True, slots=True)
class Steer:
    """One control of a case. name: of a ControlNet that `examples.random_checkpoint` makes, in `CONTROLS`."""

    name: str
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class Prompted:
    """An image prompt of a case. name: of an IP-Adapter that `examples.random_checkpoint` makes, in `ADAPTERS`.

    masked: whether each image acts in a part of the drawing. negative: whether the negative prompt has an image, too.
    """

    name: str
    scale: float = 1.0
    images: int = 1
    masked: bool = False
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Adapted:
    """A LoRA of a case. kind: of `lora.KINDS`. text: its strength in the text encoders, None for the same."""

    kind: str
    strength: float = 1.0
    text: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One request, as both are given it.

    checkpoint: a name of `examples.random_checkpoint`. task: txt2img, img2img or inpaint. kind: the diffusers class.
    options: by our names, see `_THEIR_NAMES`. scheduler: a name of `SCHEDULERS`, a diffusers class, or None for the
    checkpoint's own.
    size: width and height, None for the checkpoint's own. picture: size of the image and the mask where it differs.
    then: the second stage, which takes the latents of this one as its image.
    controls: what steers it, and guess_mode whether by the prompt alone. prompts: pictures beside the text.
    loras: that it is drawn with, and as_inputs whether the denoiser takes them as inputs; in_memory: one made for it.
    """

    checkpoint: str
    task: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    count: int = 1
    scheduler: str | None = None
    size: tuple[int, int] | None = None
    picture: tuple[int, int] | None = None
    then: Case | None = None
    controls: tuple[Steer, ...] = ()
    guess_mode: bool = False
    prompts: tuple[Prompted, ...] = ()
    loras: tuple[Adapted, ...] = ()
    as_inputs: bool = False
    in_memory: bool = False

    @property
    def flows(self) -> bool:
        """Whether its model is one of flow matching."""
        return self.checkpoint in TRANSFORMERS

    @property
    def source(self) -> str:
        """The name of the checkpoint, with what its bundle has beside it; pico's has all that its cases need."""
        if self.checkpoint == "pico" and (self.controls or self.prompts):
            return PICO
        if self.flows and self.prompts:
            steered = f"{STEERED}edge" if self.checkpoint in ("flux-dev-small", "sd3-small") else ""
            return self.checkpoint + steered + "".join(PROMPTED + each for each in READ[self.checkpoint])
        if self.flows and self.controls:
            return self.checkpoint + STEERED + "-".join(BESIDE[self.checkpoint])
        if self.loras:
            return self.checkpoint if self.in_memory else self.checkpoint + ADAPTED
        more = "".join(f"{PROMPTED}{each.name}" for each in self.prompts)
        kind = CONTROLLED if self.controls else ""
        for each in self.controls:
            kind = _PARTS.get(each.name, kind)
        return self.checkpoint + kind + more

    def __str__(self) -> str:
        size = "x".join(map(str, self.size)) if self.size else "default"
        then = f"-> {self.then.checkpoint} {self.then.task}" if self.then else ""
        steers = [
            f"{each.name}{'' if each.mode is None else each.mode} {each.scale:g} "
            f"{each.interval[0]:g}:{each.interval[1]:g}"
            for each in self.controls
        ]
        steers = [f"control {', '.join(steers)}" + (" guess" if self.guess_mode else "")] if steers else []
        steers += [
            f"control by image {each.name} {each.scale:g} x{each.images}"
            + (" masked" if each.masked else "")
            + (" and a negative" if each.negative else "")
            for each in self.prompts
        ]
        steers += [
            f"lora {each.kind} {each.strength:g}" + ("" if each.text is None else f":{each.text:g}")
            for each in self.loras
        ]
        steers += ["as inputs" + (" in memory" if self.in_memory else "")] if self.as_inputs else []
        about = (self.checkpoint, self.task, self.kind, self.label, *steers, self.scheduler)
        parts = (*about, size, f"batch {self.count}", then)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Setting:
    """What runs the bundle, and in which precision; diffusers runs in the same, on the same device."""

    engine: str = "onnxruntime"
    precision: str = "fp32"

    @property
    def device(self) -> str:
        """Where diffusers runs."""
        return "cpu" if EngineName.parse(self.engine).on_cpu else "cuda"


ON_THE_CPU = Setting()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave.

    latents: float (N, C, h, w). pixels: float (N, H, W, 3) from 0 to 1, None where the image is laid over another.
    images: uint8 (N, H, W, 3). Of a run that ends at the latents, pixels and images are None.
    """

    latents: Array
    pixels: Array | None
    images: Array | None


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest absolute differences of latents, of pixels, and of images, in levels of 1/255.

    share: the largest difference of latents or pixels as a share of what is allowed.
    """

    latents: float = math.inf
    pixels: float = math.inf
    levels: float = math.inf
    share: float = math.inf

    @property
    def passed(self) -> bool:
        """Whether all is within the promise; a pixel at the edge between two levels may be rounded to either."""
        return self.share <= 1 and self.levels <= 1


# ---------------------------------------------------------------------------------------------------------- the cases

_TXT2IMG = {"SD": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline"}
_IMG2IMG = {"SD": "StableDiffusionImg2ImgPipeline", "SDXL": "StableDiffusionXLImg2ImgPipeline"}
_INPAINT = {"SD": "StableDiffusionInpaintPipeline", "SDXL": "StableDiffusionXLInpaintPipeline"}
_KINDS = {"txt2img": _TXT2IMG, "img2img": _IMG2IMG, "inpaint": _INPAINT}
_GUIDED = {"steps": 4, "guidance": 7.5, "negative_prompt": NEGATIVE}
_DISTILLED = {"steps": 4, "guidance": 0.0}
_TOLD = {"steps": 4, "guidance": 8.5}
_ALL = ("txt2img", "img2img", "inpaint")
_OWN_LCM = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")

FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sd15-small": ("SD", _ALL, _GUIDED),
    "sd2-small": ("SD", _ALL, _GUIDED),
    "turbo-small": ("SD", _ALL, _DISTILLED),
    "lcm-small": ("SD", ("txt2img", "inpaint"), _TOLD),
    "sd15-inpaint-small": ("SD", ("inpaint",), _GUIDED),
    "sd2-inpaint-small": ("SD", ("inpaint",), _GUIDED),
    "sdxl-small": ("SDXL", _ALL, _GUIDED),
    "sdxl-turbo-small": ("SDXL", _ALL, _DISTILLED),
    "lcm-sdxl-small": ("SDXL", _ALL, _TOLD),
    "sdxl-inpaint-small": ("SDXL", ("inpaint",), _GUIDED),
    "sdxl-refiner-small": ("SDXL", ("img2img", "inpaint"), _GUIDED),
}
"""Checkpoint: the pipelines it runs in, its tasks, and the options it is used with."""
STRENGTHS = {"img2img": (0.5, 1.0), "inpaint": (0.6, 1.0)}


def cases() -> Iterator[Case]:
    """All of them: batch and size of each family and task, then what each option changes."""
    for checkpoint, (pipelines, tasks, options) in FAMILIES.items():
        for task in tasks:
            yield from _grid(Case(checkpoint, task, _KINDS[task][pipelines], options))
    txt2img, img2img = (Case("lcm-small", task, kind, _TOLD) for task, kind in zip(_ALL, _OWN_LCM, strict=False))
    yield from (*_grid(txt2img), *_grid(img2img))
    # of a smaller strength, the classes make different steps
    yield replace(img2img, kind=_IMG2IMG["SD"], options={**_TOLD, "strength": 1.0}, label="strength 1.0")
    yield from _of_prompts()
    yield from _of_schedulers()
    yield from _of_pictures()
    yield from _of_conditions()
    yield from _of_stages()
    yield from _of_controls()
    yield from _of_unions()
    yield from _of_crops()
    yield from _of_t2i_adapters()
    yield from _of_image_prompts()
    yield from _of_loras()
    yield from _of_transformers()
    yield from _of_loras_of_transformers()
    yield from _of_controls_of_transformers()
    yield from _of_image_prompts_of_transformers()


def half_cases() -> Iterator[Case]:
    """What both draw in half precision: pico, which is trained. Random weights blow up any rounding."""
    for task in _ALL:
        for scheduler in _HALF_SCHEDULERS if task == "txt2img" else ("ddim", "euler_a"):
            strength = {"strength": STRENGTHS[task][0]} if task in STRENGTHS else {}
            options = {"steps": 20, "guidance": 7.5, "negative_prompt": NEGATIVE, **strength}
            yield Case("pico", task, _KINDS[task]["SD"], options, count=5, scheduler=scheduler, size=(64, 64))


def _grid(case: Case) -> Iterator[Case]:
    """Batch 1 and 2, square and not; where there is a strength, one value of it goes with each size and batch."""
    for count, size in ((1, None), (2, None), (1, WIDE), (2, WIDE)):
        strengths = STRENGTHS.get(case.task, ())
        strength = {"strength": strengths[(count + (size is None)) % 2]} if strengths else {}
        label = "".join(f"strength {value}" for value in strength.values())
        yield replace(case, options={**case.options, **strength}, label=label, count=count, size=size)


def _of(checkpoint: str, task: str, label: str, scheduler: str | None = None, **options: Any) -> Case:
    """A case of a checkpoint with `options` laid over those it is used with."""
    pipelines, _, usual = FAMILIES[checkpoint]
    strength = {"strength": STRENGTHS[task][0]} if task in STRENGTHS and "denoising_start" not in options else {}
    return Case(checkpoint, task, _KINDS[task][pipelines], {**usual, **strength, **options}, label, scheduler=scheduler)


def _of_prompts() -> Iterator[Case]:
    """Prompts of the second encoder, no negative prompt and an empty one, skipped layers, guidance."""
    second: dict[str, Any] = {"prompt_2": OTHER, "negative_prompt_2": OTHER_NEGATIVE}
    for checkpoint, (pipelines, tasks, _) in FAMILIES.items():
        guided = FAMILIES[checkpoint][2] is _GUIDED
        if guided:
            yield _of(checkpoint, tasks[0], "no negative prompt", negative_prompt=None)
            yield _of(checkpoint, tasks[0], "empty negative prompt", negative_prompt="")
            yield _of(checkpoint, tasks[0], "no guidance", guidance=1.0, negative_prompt=None)
        if "txt2img" in tasks or guided:
            yield _of(checkpoint, tasks[0], "clip_skip", clip_skip=1)
        if guided and (tasks[0] == "txt2img" or pipelines == "SDXL"):
            yield _of(checkpoint, tasks[0], "guidance_rescale", guidance_rescale=0.7)
    for task in _ALL:
        yield _of("sdxl-small", task, "prompt_2", **second)
    yield _of("sdxl-small", "txt2img", "prompt_2 alone", prompt_2=OTHER, negative_prompt=None)
    yield _of("sd2-small", "txt2img", "clip_skip 2", clip_skip=2)
    yield _of("sdxl-small", "txt2img", "long prompt", prompt=" ".join([PROMPT] * 12))
    yield _of("turbo-small", "txt2img", "one step", steps=1)
    yield _of("turbo-small", "txt2img", "guidance", guidance=2.0, negative_prompt=NEGATIVE)
    yield _of("sdxl-turbo-small", "txt2img", "one step", steps=1)
    yield _of("lcm-small", "txt2img", "little guidance", guidance=1.5, steps=2)
    yield _of("lcm-sdxl-small", "txt2img", "little guidance", guidance=1.5, steps=2)


def _of_schedulers() -> Iterator[Case]:
    """Samplers that start in the middle, and those that inpainting blends at each of their steps."""
    for scheduler in ("ddim", "euler", "dpm++2m", "heun", "lcm", "unipc", "pndm", "plms", "euler_a"):
        for strength in STRENGTHS["inpaint"]:
            yield _of("sd15-small", "inpaint", f"strength {strength}", scheduler, strength=strength, steps=5)
        yield _of("sd15-small", "img2img", "", scheduler, strength=0.5, steps=6)
    for scheduler in ("ddim", "dpm++2m", "heun", "euler_a"):
        yield _of("sdxl-small", "inpaint", "", scheduler, steps=5)
        yield _of("sdxl-small", "img2img", "", scheduler, steps=6)
        yield _of("sd15-inpaint-small", "inpaint", "", scheduler, steps=5)
        yield _of("sdxl-inpaint-small", "inpaint", "", scheduler, steps=5)


def _of_pictures() -> Iterator[Case]:
    """Pictures of other sizes than the request, and crops around the mask."""
    for checkpoint in ("sd15-small", "sdxl-small", "sdxl-refiner-small"):
        yield replace(_of(checkpoint, "img2img", "picture 77x93"), picture=(77, 93))
    for checkpoint in ("sd15-small", "sd15-inpaint-small", "sdxl-small", "sdxl-inpaint-small"):
        yield replace(_of(checkpoint, "inpaint", "picture 77x93"), picture=(77, 93))
        yield replace(_of(checkpoint, "inpaint", "crop", padding_mask_crop=8), picture=(120, 96))
        yield replace(_of(checkpoint, "inpaint", "crop, strength 1.0", padding_mask_crop=8, strength=1.0), size=WIDE)


def _of_conditions() -> Iterator[Case]:
    """What SDXL is told beside the prompt."""
    sizes: dict[str, Any] = {"original_size": (40, 90), "crops_coords_top_left": (8, 24), "target_size": (96, 48)}
    negative: dict[str, Any] = {
        "negative_original_size": (16, 32),
        "negative_crops_coords_top_left": (5, 3),
        "negative_target_size": (50, 60),
    }
    scores: dict[str, Any] = {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
    for task in _ALL:
        yield replace(_of("sdxl-small", task, "sizes", **sizes), count=2)
        # from an image, the pipelines heed no negative crop
        heeded = {name: value for name, value in negative.items() if task == "txt2img" or "crops" not in name}
        yield _of("sdxl-small", task, "negative sizes", **sizes, **heeded)
    yield _of("sdxl-small", "txt2img", "original size alone", original_size=(40, 90))
    # a score is told in the place of the target size
    without = [{name: value for name, value in told.items() if "target" not in name} for told in (sizes, negative)]
    for task in ("img2img", "inpaint"):
        yield _of("sdxl-refiner-small", task, "sizes", **without[0])
        yield _of("sdxl-refiner-small", task, "scores", **scores)
        yield _of("sdxl-refiner-small", task, "sizes and scores", **without[0], **without[1], **scores)


def _of_stages() -> Iterator[Case]:
    """The denoising split between base and refiner (or the base twice), and its halves alone."""
    first: dict[str, Any] = {"steps": 8, "denoising_end": 0.7}
    second: dict[str, Any] = {"steps": 8, "denoising_start": 0.7}
    refiner = _of("sdxl-refiner-small", "img2img", "", **second)
    for scheduler in (None, "ddim", "heun", "dpm++2m"):
        base = _of("sdxl-small", "txt2img", "denoising_end", scheduler, **first)
        yield base
        again = _of("sdxl-small", "img2img", "", scheduler, **second)
        yield replace(base, label="denoising split", then=replace(refiner, scheduler=scheduler))
        yield replace(base, label="denoising split", then=again)
    base = _of("sdxl-small", "txt2img", "denoising split", **first)
    yield replace(base, count=2, size=WIDE, then=refiner)
    for checkpoint in ("sdxl-refiner-small", "sdxl-small"):
        yield replace(base, label="split, inpaint", then=_of(checkpoint, "inpaint", "", **second))
    yield _of("sdxl-small", "img2img", "start and end", steps=8, denoising_start=0.3, denoising_end=0.8)
    yield _of("sdxl-refiner-small", "img2img", "denoising_start of a picture", steps=8, denoising_start=0.5)


_CONTROLNET = {
    ("SD", "txt2img"): "StableDiffusionControlNetPipeline",
    ("SD", "img2img"): "StableDiffusionControlNetImg2ImgPipeline",
    ("SD", "inpaint"): "StableDiffusionControlNetInpaintPipeline",
    ("SDXL", "txt2img"): "StableDiffusionXLControlNetPipeline",
    ("SDXL", "img2img"): "StableDiffusionXLControlNetImg2ImgPipeline",
    ("SDXL", "inpaint"): "StableDiffusionXLControlNetInpaintPipeline",
}
_STEERED = ("sd15-small", "sd15-inpaint-small", "sdxl-small", "sdxl-inpaint-small")


def _of_controls() -> Iterator[Case]:
    """One ControlNet and two, in every task; scales, intervals, guess mode, samplers."""
    edge, both = (Steer("edge"),), (Steer("edge", 0.7), Steer("depth", 1.2, (0.0, 0.6)))
    for task in _ALL:
        strength = {"strength": 0.6} if task in STRENGTHS else {}
        case = Case("pico", task, _CONTROLNET["SD", task], {**_GUIDED, **strength}, size=(72, 56), count=2)
        yield replace(case, controls=both)
        yield replace(case, count=1, controls=edge, guess_mode=True, scheduler="heun")
    for checkpoint in _STEERED:
        pipelines, tasks, _ = FAMILIES[checkpoint]
        for task in tasks:
            case = replace(_of(checkpoint, task, ""), kind=_CONTROLNET[pipelines, task])
            for count, size, controls in ((1, None, edge), (2, WIDE, edge), (2, None, both), (1, WIDE, both)):
                yield replace(case, count=count, size=size, controls=controls)
            yield replace(case, controls=edge, guess_mode=True)
            late = (Steer("edge", 0.5, (0.3, 1.0)),)
            options = {**case.options, "steps": 6}
            for scheduler in ("ddim", "heun", "dpm++2m", "euler_a"):
                yield replace(case, options=options, controls=late, scheduler=scheduler)
        if "txt2img" in tasks:
            plain = replace(_of(checkpoint, "txt2img", ""), kind=_CONTROLNET[pipelines, "txt2img"])
            unguided = {**plain.options, "guidance": 1.0, "negative_prompt": None}
            yield replace(plain, options=unguided, controls=edge, label="no guidance")
            yield replace(plain, options=unguided, controls=both, guess_mode=True, label="no guidance")
            yield replace(plain, controls=both, guess_mode=True)
            yield replace(plain, controls=edge, picture=(77, 93), size=WIDE, label="picture 77x93")


_CONTROLNET_UNION = {
    "txt2img": "StableDiffusionXLControlNetUnionPipeline",
    "img2img": "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "inpaint": "StableDiffusionXLControlNetUnionInpaintPipeline",
}


def _of_unions() -> Iterator[Case]:
    """A ControlNet-Union, which diffusers has for XL, with one picture and with two, in every task."""
    edge, both = (Steer(UNION, 0.8, mode=3),), (Steer(UNION, 0.7, mode=1), Steer(UNION, 1.2, (0.0, 0.6), mode=3))
    for task in _ALL:
        case = replace(_of("sdxl-small", task, ""), kind=_CONTROLNET_UNION[task])
        for count, size, controls in ((1, None, edge), (2, WIDE, edge), (2, None, both), (1, WIDE, both)):
            yield replace(case, count=count, size=size, controls=controls)
        # in guess mode, diffusers' classes fail where there is guidance
        unguided = {**case.options, "guidance": 1.0, "negative_prompt": None}
        for controls in (edge, both):
            yield replace(case, options=unguided, controls=controls, guess_mode=True, label="no guidance")
        late = (Steer(UNION, 0.5, (0.3, 1.0), mode=5),)
        options = {**case.options, "steps": 6}
        for scheduler in ("ddim", "heun", "dpm++2m", "euler_a"):
            yield replace(case, options=options, controls=late, scheduler=scheduler)
    case = replace(_of("sdxl-small", "txt2img", ""), kind=_CONTROLNET_UNION["txt2img"])
    yield replace(case, controls=edge, picture=(77, 93), size=WIDE, label="picture 77x93")


def _of_t2i_adapters() -> Iterator[Case]:
    """T2I-Adapters, which diffusers draws from noise with alone."""
    for checkpoint, kind in (
        ("sd15-small", "StableDiffusionAdapterPipeline"),
        ("sdxl-small", "StableDiffusionXLAdapterPipeline"),
    ):
        case = replace(_of(checkpoint, "txt2img", ""), kind=kind)
        wide = WIDE if checkpoint == "sd15-small" else (112, 80)  # that of XL halves the latents once more
        for count, size, scale in ((1, None, 1.0), (2, None, 0.6), (1, wide, 1.0), (2, wide, 0.4)):
            yield replace(case, count=count, size=size, controls=(Steer(SKETCH, scale),))
        # of two calls a step, the class of XL lets the adapter act in as many calls as there are steps
        for scheduler in ("ddim", "euler" if "XL" in kind else "heun", "dpm++2m", "euler_a"):
            late = Steer(SKETCH, 0.8, (0.0, 0.5 if "XL" in kind else 1.0))
            yield replace(case, controls=(late,), scheduler=scheduler)
        unguided = {**case.options, "guidance": 1.0, "negative_prompt": None}
        yield replace(case, options=unguided, controls=(Steer(SKETCH),), label="no guidance")


def _of_crops() -> Iterator[Case]:
    """Controls where the part around a mask alone is drawn."""
    for checkpoint in ("sd15-small", "sdxl-small"):
        pipelines = FAMILIES[checkpoint][0]
        case = replace(_of(checkpoint, "inpaint", "crop", padding_mask_crop=8), kind=_CONTROLNET[pipelines, "inpaint"])
        yield replace(case, controls=(Steer("edge"),), picture=(120, 96), size=(64, 72))


def _of_image_prompts() -> Iterator[Case]:
    """Each kind of IP-Adapter in every task, several images, two adapters, and one with ControlNets."""
    for task in _ALL:
        strength = {"strength": 0.6} if task in STRENGTHS else {}
        case = Case("pico", task, _KINDS[task]["SD"], {**_GUIDED, **strength}, size=(72, 56), count=2)
        yield replace(case, prompts=(Prompted("plus", 0.7),))
    for checkpoint in ("sd15-small", "sdxl-small"):
        pipelines, tasks, _ = FAMILIES[checkpoint]
        for kind in ADAPTERS:
            for task in tasks:
                case = _of(checkpoint, task, "")
                yield replace(case, prompts=(Prompted(kind),))
                yield replace(case, prompts=(Prompted(kind, 0.4, 2),), count=2, size=WIDE)
            plain = _of(checkpoint, "txt2img", "")
            for scheduler in ("ddim", "heun", "dpm++2m", "euler_a"):
                yield replace(plain, prompts=(Prompted(kind, 0.8),), scheduler=scheduler)
            unguided = {**plain.options, "guidance": 1.0, "negative_prompt": None}
            yield replace(plain, options=unguided, prompts=(Prompted(kind),), label="no guidance")
        faces = replace(_of(checkpoint, "txt2img", ""), prompts=(Prompted(FACE, 0.8),))
        yield faces
        yield replace(faces, prompts=(Prompted(FACE, 0.6, 2, masked=True),), count=2, size=WIDE)
        for task in tasks:
            masked = (Prompted("plus", 0.8, 2, masked=True),)
            yield replace(_of(checkpoint, task, ""), prompts=masked)
            yield replace(_of(checkpoint, task, ""), prompts=masked, count=2, size=WIDE)
            apart = (Prompted("plain", 0.7, masked=True), Prompted("full", 0.9, 2, masked=True))
            yield replace(_of(checkpoint, task, ""), prompts=apart, size=(64, 96))
            yield replace(_of(checkpoint, task, ""), prompts=(Prompted("full", masked=True),), size=(96, 64))
            both = (Prompted("plain", 0.5), Prompted("plus", 0.9, 2))
            yield replace(_of(checkpoint, task, ""), prompts=both)
            steered = replace(
                _of(checkpoint, task, ""), kind=_CONTROLNET[pipelines, task], controls=(Steer("edge", 0.8),)
            )
            yield replace(steered, prompts=(Prompted("plain", 0.6),))


# ---------------------------------------------------------------------------------------------------------- the inputs


def _of_loras() -> Iterator[Case]:
    """Each form; two at once, negative and zero strengths, other ones for the text; every task; as inputs."""
    for checkpoint in ("sd15-small", "sdxl-small"):
        case = _of(checkpoint, "txt2img", "")
        for kind in KINDS:
            if kind == "original" and checkpoint != "sdxl-small":
                continue
            yield replace(case, loras=(Adapted(kind, 0.8),))
            if kind != "dora":
                yield replace(case, loras=(Adapted(kind, 0.8),), as_inputs=True)
        yield replace(case, loras=(Adapted("peft", -0.5),), count=2, size=WIDE)
        yield replace(case, loras=(Adapted("dora", -0.5),))
        yield replace(case, loras=(Adapted("peft", 0.0),))
        yield replace(case, loras=(Adapted("dora", 0.0),))
        yield replace(case, loras=(Adapted("kohya", 0.9, 0.2),))
        two = (Adapted("peft", 0.7), Adapted("kohya", -0.4))
        yield replace(case, loras=two, count=2)
        yield replace(case, loras=two, count=2, size=WIDE, as_inputs=True)
        yield replace(case, loras=two, count=2, size=WIDE, as_inputs=True, in_memory=True)
        for scheduler in ("ddim", "heun", "dpm++2m", "euler_a"):
            yield replace(case, loras=two, scheduler=scheduler, as_inputs=scheduler in ("ddim", "heun"))
        for task in ("img2img", "inpaint"):
            yield replace(_of(checkpoint, task, ""), loras=two, as_inputs=task == "inpaint")


def _of_loras_of_transformers() -> Iterator[Case]:
    for checkpoint in ("sd35-small", "flux-dev-small", "z-image-small"):
        kind, options = TRANSFORMERS[checkpoint]
        case = Case(checkpoint, "txt2img", f"{kind}Pipeline", options, _DIT, size=(64, 64))
        for form in ("peft", "mixed", "dora"):
            yield replace(case, loras=(Adapted(form, 0.8),))
        yield replace(case, loras=(Adapted("peft", -0.5),), count=2, size=_WIDE_TOKENS, as_inputs=True)
        two = (Adapted("peft", 0.7), Adapted("mixed", -0.4))
        yield replace(case, loras=two)
        yield replace(case, loras=two, count=2, as_inputs=True)
        yield replace(case, loras=two, count=2, as_inputs=True, in_memory=True)


def _of_transformers() -> Iterator[Case]:
    """Stable Diffusion 3 and FLUX.1: every task, batch and size; then samplers, prompts, guidance, steps."""
    for checkpoint, (kind, options) in TRANSFORMERS.items():
        if checkpoint in EDITING:
            yield from _of_editing(checkpoint, kind, options)
            continue
        for task, middle in (("txt2img", ""), ("img2img", "Img2Img"), ("inpaint", "Inpaint")):
            plain = Case(checkpoint, task, f"{kind}{middle}Pipeline", options, size=(64, 64))
            for count, size in ((1, (64, 64)), (2, (64, 64)), (1, _WIDE_TOKENS), (2, _WIDE_TOKENS)):
                strengths = _STRENGTHS_OF_FLOW[(count + size[0]) % 3 :] if task != "txt2img" else ()
                strength = {"strength": strengths[0]} if strengths and strengths[0] else {}
                yield replace(
                    plain, options={**options, **strength}, label=_DIT + _named(strength), count=count, size=size
                )
        plain = Case(checkpoint, "txt2img", f"{kind}Pipeline", options, size=(64, 64))
        more: list[dict[str, Any]] = [{"max_sequence_length": 40}, {"steps": 7}]
        if kind == "ZImage":
            more += [{"negative_prompt": ""}, {"guidance": 0.5}, {"guidance": 0.0, "negative_prompt": None}]
        else:
            more.append({"prompt_2": OTHER})
        if "negative_prompt" in options and kind != "ZImage":
            more += [{"negative_prompt": ""}, {"negative_prompt": OTHER_NEGATIVE, "negative_prompt_2": NEGATIVE}]
        if checkpoint == "sd3-small":
            more += [{"prompt_3": OTHER, "negative_prompt_3": OTHER_NEGATIVE}]
        if kind == "StableDiffusion3":
            more += [{"clip_skip": 1}, {"guidance": 1.0, "negative_prompt": None}]
            for skipped, (count, size, scheduler) in itertools.product(_SKIPPED, _SKIPPING_CASES):
                yield replace(
                    plain,
                    options={**options, **skipped},
                    label=f"{_DIT} skipped layers {skipped['skip_guidance_layers']}",
                    count=count,
                    size=size,
                    scheduler=scheduler,
                )
        if checkpoint == "flux-dev-small":
            more += [{"true_cfg_scale": 1.0, "negative_prompt": None}, {"guidance": 0.0}, {"guidance": 30.0}]
        for each in more:
            yield replace(plain, options={**options, **each}, label=_DIT + _named(each))
        for scheduler in _FLOW_SAMPLERS:
            if scheduler not in _REFUSED.get(checkpoint, ()):
                yield replace(plain, scheduler=scheduler, label=_DIT)


def _of_controls_of_transformers() -> Iterator[Case]:
    """ControlNets of each kind, one and two at once, with scales and intervals; several pictures of a union."""
    part, late = (0.0, 0.5), (0.5, 1.0)
    for checkpoint in ("sd3-small", "sd35-small"):
        kind, options = TRANSFORMERS[checkpoint]
        case = Case(checkpoint, "txt2img", f"{kind}ControlNetPipeline", options, _STEERED_DIT, size=(64, 64))
        for name in BESIDE[checkpoint]:
            if name == "inpaint":
                masked = replace(case, kind=f"{kind}ControlNetInpaintingPipeline", controls=(Steer(name, 0.8),))
                yield masked
                yield replace(masked, count=2, size=_WIDE_TOKENS)
                continue
            yield replace(case, controls=(Steer(name),))
            yield replace(case, controls=(Steer(name, 0.6),), count=2, size=_WIDE_TOKENS)
            yield replace(case, controls=(Steer(name, 0.8, late),), scheduler="flow-heun")
        unguided = {**options, "guidance": 1.0, "negative_prompt": None}
        yield replace(case, options=unguided, controls=(Steer("edge"),), label=f"{_STEERED_DIT} no guidance")
        yield replace(case, controls=(Steer("edge"),), loras=(Adapted("peft", 0.8),))
    case = replace(case, checkpoint="sd3-small", options=TRANSFORMERS["sd3-small"][1])
    twice = (Steer("edge", 0.7), Steer("edge2", 1.2, part))
    yield replace(case, controls=twice)
    yield replace(case, controls=twice, count=2, size=_WIDE_TOKENS)
    for checkpoint in ("flux-dev-small", "flux-schnell-small"):
        kind, options = TRANSFORMERS[checkpoint]
        # a ControlNet that is given the guidance is given diffusers' own beside a model that is given none
        case = Case(checkpoint, "txt2img", f"{kind}ControlNetPipeline", options, _STEERED_DIT, size=(64, 64))
        for name in BESIDE[checkpoint]:
            mode = 3 if name == "union" else None
            yield replace(case, controls=(Steer(name, mode=mode),))
            yield replace(case, controls=(Steer(name, 0.6, part, mode),), count=2, size=_WIDE_TOKENS)
        if checkpoint == "flux-schnell-small":
            continue
        both = (Steer("edge", 0.7), Steer("depth", 1.2, part))
        yield replace(case, controls=both)
        yield replace(case, controls=both, count=2, size=_WIDE_TOKENS)
        yield replace(case, controls=(Steer("union", 0.7, part, 0), Steer("union", 0.9, late, 4)), count=2)
        plain = {**options, "true_cfg_scale": 1.0, "negative_prompt": None}
        yield replace(case, options=plain, controls=both, label=f"{_STEERED_DIT} no guidance")
        yield replace(case, controls=both, picture=(77, 93), label=f"{_STEERED_DIT} picture 77x93")
        yield replace(case, controls=both, loras=(Adapted("peft", 0.8),))
        for task, middle in (("img2img", "Img2Img"), ("inpaint", "Inpaint")):
            drawn = {"steps": 4, "guidance": 3.5, "strength": 0.85}
            changed = replace(case, task=task, kind=f"{kind}ControlNet{middle}Pipeline", options=drawn)
            yield replace(changed, controls=(Steer("edge", 0.8),))
            yield replace(changed, controls=both, count=2, size=_WIDE_TOKENS)


def _of_image_prompts_of_transformers() -> Iterator[Case]:
    """Scales, several images, two adapters, a negative image, ControlNets, every task that diffusers has."""
    look = Prompted("look")
    for checkpoint in READ:
        kind, options = TRANSFORMERS[checkpoint]
        label = "dit-ip"
        if checkpoint in EDITING:
            plain = Case(checkpoint, EDITING[checkpoint], f"{kind}Pipeline", options, label, prompts=(look,))
            guided = {**options, "true_cfg_scale": 2.0, "negative_prompt": NEGATIVE}
            yield replace(plain, size=(64, 64))
            yield replace(plain, options=guided, count=2, size=_WIDE_TOKENS)
            yield replace(plain, task="txt2img", size=_WIDE_TOKENS)
            continue
        plain = Case(checkpoint, "txt2img", f"{kind}Pipeline", options, label, size=(64, 64))
        for scale, (count, size) in itertools.product((0.0, 0.5, 1.0), ((1, (64, 64)), (2, _WIDE_TOKENS))):
            yield replace(plain, prompts=(replace(look, scale=scale),), count=count, size=size)
        yield replace(plain, prompts=(look,), scheduler="flow-lcm")
        for task, middle in (("img2img", "Img2Img"), ("inpaint", "Inpaint")):
            changed = replace(plain, task=task, kind=f"{kind}{middle}Pipeline", options={**options, "strength": 0.85})
            yield replace(changed, prompts=(look,))
            yield replace(changed, prompts=(replace(look, scale=0.7),), count=2, size=_WIDE_TOKENS)
        yield replace(plain, prompts=(look,), loras=(Adapted("peft", 0.8),))
        if checkpoint.startswith("sd3"):
            unguided = {**options, "guidance": 1.0, "negative_prompt": None}
            yield replace(plain, options=unguided, prompts=(look,), label=f"{label} no guidance")
        if checkpoint in ("flux-dev-small", "sd3-small"):
            steered = replace(plain, kind=f"{kind}ControlNetPipeline", controls=(Steer("edge", 0.8),))
            yield replace(steered, prompts=(replace(look, scale=0.6),))
            yield replace(steered, prompts=(replace(look, scale=0.6),), count=2, size=_WIDE_TOKENS)
        if checkpoint.startswith("flux"):
            yield replace(plain, prompts=(Prompted("look", 0.8, 2),))
            yield replace(plain, prompts=(Prompted("look", 0.8, 3),), count=2, size=_WIDE_TOKENS)
        if checkpoint == "flux-dev-small":
            unguided = {**options, "true_cfg_scale": 1.0, "negative_prompt": None}
            yield replace(plain, options=unguided, prompts=(look,), label=f"{label} no guidance")
            both = (Prompted("look", 0.5), Prompted("mood", 0.9, 2))
            for count, size in ((1, (64, 64)), (2, _WIDE_TOKENS)):
                yield replace(plain, prompts=both, count=count, size=size)
                yield replace(plain, prompts=(replace(look, negative=True),), count=count, size=size)
                yield replace(plain, prompts=tuple(replace(p, negative=True) for p in both), count=count, size=size)


BESIDE = {
    "sd3-small": ("edge", "edge2", "depth", "inpaint"),
    "sd35-small": ("edge", "borrowing"),
    "flux-dev-small": ("edge", "depth", "union", "pixels"),
    "flux-schnell-small": ("edge",),
}
"""The ControlNets that the bundle of a transformer is compared with."""


def _of_editing(checkpoint: str, kind: str, options: Mapping[str, Any]) -> Iterator[Case]:
    """Models that see a picture: batch and size; for Fill strengths too."""
    plain = Case(checkpoint, EDITING[checkpoint], f"{kind}Pipeline", options)
    for count, size in ((1, (64, 64)), (2, (64, 64)), (1, _WIDE_TOKENS), (2, _WIDE_TOKENS)):
        yield replace(plain, label=_DIT, count=count, size=size)
    yield replace(plain, label=f"{_DIT} picture 96x48", size=(64, 64), picture=(96, 48))
    yield replace(plain, label=_DIT, size=(64, 64), scheduler="flow-lcm")
    if checkpoint == "flux-fill-small":
        for strength in (0.5, 0.85):
            changed = {"strength": strength}
            yield replace(plain, options={**options, **changed}, label=_DIT + _named(changed), size=(64, 64))
    if checkpoint == "flux-kontext-small":
        guided = {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE}
        yield replace(plain, options={**options, **guided}, label=_DIT + _named(guided), size=(64, 64))
        for count in (1, 2):  # from the text alone
            yield replace(plain, task="txt2img", label=_DIT, count=count, size=_WIDE_TOKENS)


EDITING = {"flux-kontext-small": "img2img", "flux-fill-small": "inpaint", "flux-control-small": "img2img"}
"""Checkpoints whose model sees a picture, and what they do with it."""


def tasks_of(checkpoint: str) -> tuple[str, ...]:
    """The tasks of one of `TRANSFORMERS`."""
    if checkpoint == "flux-kontext-small":  # which does without a picture, too
        return ("txt2img", "img2img")
    return (EDITING[checkpoint],) if checkpoint in EDITING else _ALL


def _named(options: Mapping[str, Any]) -> str:
    return "".join(f" {name} {value}" for name, value in options.items())


_DIT, _STEERED_DIT = "dit", "dit-control"
_WIDE_TOKENS = (112, 80)
_STRENGTHS_OF_FLOW = (0.5, 0.85, None, 1.0)
_REFUSED = {"flux-dev-small": ("flow-heun",), "flux-schnell-small": ("flow-heun", "dpm++2m")}
_REFUSED["z-image-small"] = _REFUSED["flux-schnell-small"]
"""Samplers that take none of what the pipelines of FLUX.1 and Z-Image ask for, in diffusers."""
_FLOW_SAMPLERS = ("flow-heun", "flow-lcm", "dpm++2m")
_SKIPPED: tuple[dict[str, Any], ...] = (
    {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7},
    {
        "skip_guidance_layers": [0, 2],
        "skip_layer_guidance_scale": 1.5,
        "skip_layer_guidance_start": 0.2,
        "skip_layer_guidance_stop": 1.0,
    },
)
_SKIPPING_CASES = ((1, (64, 64), None), (2, _WIDE_TOKENS, None), (2, (64, 64), "flow-heun"), (1, (64, 64), "dpm++2m"))
"""Batch, size and sampler."""
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3-small": ("StableDiffusion3", {**_GUIDED, "guidance": 7.0}),
    "sd35-small": ("StableDiffusion3", {**_GUIDED, "guidance": 4.5}),
    "flux-dev-small": (
        "Flux",
        {"steps": 4, "guidance": 3.5, "true_cfg_scale": 2.0, "negative_prompt": NEGATIVE},
    ),
    "flux-schnell-small": ("Flux", {"steps": 4}),
    "z-image-small": ("ZImage", {"steps": 4, "guidance": 4.0, "negative_prompt": NEGATIVE}),
    "flux-kontext-small": ("FluxKontext", {"steps": 3, "guidance": 2.5}),
    "flux-fill-small": ("FluxFill", {"steps": 4, "guidance": 30.0}),
    "flux-control-small": ("FluxControl", {"steps": 4, "guidance": 10.0}),
}
"""Checkpoint: its pipelines, and the options it is used with."""


def picture(width: int, height: int) -> Image.Image:
    """An RGB picture with smooth and rough parts."""
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = np.stack([np.sin(x + y), np.cos(1.7 * x - 0.4 * y), np.sin(0.6 * x) * np.cos(y)], axis=-1)
    rough = np.random.default_rng(5).normal(0, 0.15, waves.shape) * (x > 2)[..., None]
    return Image.fromarray(np.clip(127.5 + 110 * (waves + rough), 0, 255).astype(np.uint8))


def mask(width: int, height: int) -> Image.Image:
    """A grey mask with a soft edge: an ellipse off the middle, so that crops around it reach no border."""
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((x - 0.45 * width) / (0.28 * width), (y - 0.55 * height) / (0.22 * height))
    return Image.fromarray(np.clip(255 * (1.5 - distance), 0, 255).astype(np.uint8))


def _size(case: Case) -> tuple[int, int]:
    from ..examples.random_checkpoint import SIZES

    if case.size is not None:
        return case.size
    side = 8 * int(SIZES[case.checkpoint].unet["sample_size"])
    return side, side


def _pictures(case: Case) -> dict[str, Image.Image]:
    """The image and the mask of a case, by our names."""
    if case.task == "txt2img":
        return {}
    size = case.picture or _size(case)
    return {"image": picture(*size)} | ({"mask": mask(*size)} if case.task == "inpaint" else {})


def _steering(case: Case) -> list[Image.Image]:
    """The pictures of its controls."""
    return [picture(*(case.picture or _size(case))).rotate(180 * i) for i, _ in enumerate(case.controls, 1)]


def _prompting(case: Case) -> list[list[Image.Image]]:
    """The pictures of its image prompts."""
    return [[picture(50 + 13 * i, 40 + 9 * k) for k in range(each.images)] for i, each in enumerate(case.prompts)]


def _negatives(case: Case) -> list[Image.Image | None]:
    """The picture that the negative prompt reads of each image prompt, or None."""
    return [picture(44 + 6 * i, 61) if each.negative else None for i, each in enumerate(case.prompts)]


def _face(prompt: Prompted) -> Array:
    """The embeddings of a prompt, float32 (images, 20)."""
    return np.random.default_rng(7).standard_normal((prompt.images, 20)).astype(np.float32)


def kind_of(adapter: Path) -> str:
    """The kind of an IP-Adapter that `make_part` wrote."""
    return adapter.name.rpartition("-")[2]


def _regions(prompt: Prompted, case: Case) -> list[Image.Image] | None:
    """A mask for each image of a prompt, of another size than the drawing."""
    if not prompt.masked:
        return None
    width, height = _size(case)
    return [mask(2 * width, 2 * height).rotate(180 * i) for i in range(prompt.images)]


# ---------------------------------------------------------------------------------------------------------- diffusers

_THEIR_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "mask": "mask_image"}


_TEXTS = (*("prompt", "prompt_2", "prompt_3"), *("negative_prompt", "negative_prompt_2", "negative_prompt_3"))
_FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Options of a scheduler for noise under which it is one of flow matching."""
FolderOf = Callable[[str], Path]
"""The folder of a checkpoint, or of its bundle, by the name of the checkpoint."""


@functools.lru_cache(maxsize=8)
def _oracle(
    checkpoint: Path,
    kind: str,
    setting: Setting,
    controls: tuple[Path, ...] = (),
    adapters: tuple[Path, ...] = (),
    loras: tuple[Path, ...] = (),
    several: bool = False,
) -> tuple[Any, Any]:
    """several: whether the pipeline is given a list of ControlNets, where of one it reads several pictures, too."""
    import diffusers
    import torch

    # Where its package is installed, the pipelines of XL put a watermark into the pixels.
    extra: dict[str, Any] = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    if kind.startswith("StableDiffusion3") and not (checkpoint / "text_encoder_3").is_dir():
        extra = {"text_encoder_3": None, "tokenizer_3": None}
    elif kind.startswith(("Flux", "StableDiffusion3", "ZImage")):
        extra = {}
    if controls and "Adapter" in kind:
        extra["adapter"] = diffusers.T2IAdapter.from_pretrained(controls[0])
    elif controls:
        net = diffusers.ControlNetUnionModel if "Union" in kind else diffusers.ControlNetModel
        net = next((each for prefix, each in _nets().items() if kind.startswith(prefix)), net)
        nets = [net.from_pretrained(folder) for folder in controls]
        extra["controlnet"] = nets if several else nets[0]
    pipeline = getattr(diffusers, kind).from_pretrained(checkpoint, **extra)
    pipeline.set_progress_bar_config(disable=True)
    if adapters and "transformer" in pipeline.components:
        _load_tokens(pipeline, kind, adapters)
    elif adapters:
        pipeline.unet.float()  # which they take over
        pipeline.load_ip_adapter(
            [str(folder) for folder in adapters],
            subfolder=[""] * len(adapters),
            weight_name=["ip_adapter.safetensors"] * len(adapters),
            image_encoder_folder=None if kind_of(adapters[0]) == FACE else str(adapters[0] / "image_encoder"),
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline.to(
        setting.device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[setting.precision]
    )
    for file in loras:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
    encoder = pipeline.components.get("text_encoder")
    if encoder is not None and not hasattr(encoder, "text_model"):
        # transformers 5 has dropped a level of modules that diffusers still reads its last norm from for clip_skip
        object.__setattr__(encoder, "text_model", encoder)
    return pipeline, pipeline.scheduler.config


def _load_tokens(pipeline: Any, kind: str, adapters: tuple[Path, ...]) -> None:
    """Let the pipeline of a transformer have these IP-Adapters, and their image encoder."""
    import torch

    encoder, weights = str(adapters[0] / "image_encoder"), "ip_adapter.safetensors"
    if kind.startswith("StableDiffusion3"):
        pipeline.load_ip_adapter(
            str(adapters[0]), weight_name=weights, subfolder="", image_encoder_folder=encoder, low_cpu_mem_usage=False
        )
        return
    pipeline.load_ip_adapter(
        [str(folder) for folder in adapters],
        weight_name=[weights] * len(adapters),
        image_encoder_pretrained_model_name_or_path=encoder,
        image_encoder_dtype=torch.float32,
    )


def diffusers_run(
    case: Case, checkpoint_of: FolderOf, latents: Array | None = None, setting: Setting = ON_THE_CPU
) -> Outcome:
    """What diffusers gives; image i is drawn from a generator of its own, seeded `SEED` + i.

    latents: of the stage before, which become the image.
    """
    import diffusers
    import torch

    with _quiet():
        names = dict.fromkeys(each.name for each in case.controls)
        before = {name: STEERED if case.flows else f"{_PARTS.get(name, CONTROLLED)}-" for name in names}
        folders = tuple(checkpoint_of(f"{case.checkpoint}{before[name]}{name}") for name in names)
        several = len(case.controls if case.flows else folders) > 1
        adapters = tuple(checkpoint_of(f"{case.checkpoint}{PROMPTED}{each.name}") for each in case.prompts)
        files = tuple(checkpoint_of(f"{case.checkpoint}{LORA}{each.kind}") for each in case.loras)
        pipeline, config = _oracle(
            checkpoint_of(case.checkpoint), case.kind, setting, folders, adapters, files, several
        )
        if files:
            pipeline.set_adapters(
                [file.stem for file in files], [_their_strength(each, pipeline) for each in case.loras]
            )
        if adapters:
            scales = [each.scale for each in case.prompts]
            # of one adapter of a transformer a list is of its layers
            pipeline.set_ip_adapter_scale(scales[0] if case.flows and len(scales) == 1 else scales)
    kind = {**SCHEDULERS, **_OF_FLOW}.get(case.scheduler, case.scheduler) if case.scheduler else config["_class_name"]
    changes: dict[str, Any] = _PNDM.get(case.scheduler or "", {})
    if case.flows and not kind.startswith("FlowMatch"):
        changes = {**_FLOWS, "flow_shift": config["shift"]}
    pipeline.scheduler = getattr(diffusers, kind).from_config(config, **changes)
    inputs: dict[str, Any] = dict(_pictures(case))
    if case.count > 1:  # of a single image, inpainting draws one sample for all
        inputs = {name: [value] * case.count for name, value in inputs.items()}
    if latents is not None:
        inputs["image"] = torch.from_numpy(latents)
    if case.controls:
        inputs |= _their_controls(case)
    if case.prompts and case.prompts[0].name == FACE:
        found = torch.from_numpy(_face(case.prompts[0]))[None]  # the negative first, where there is guidance
        guided = case.options.get("guidance", 1.0) > 1
        inputs["ip_adapter_image_embeds"] = [torch.cat([0 * found, found]) if guided else found]
    elif case.prompts:
        inputs["ip_adapter_image"] = _prompting(case)
        if case.kind.startswith("StableDiffusion3"):
            inputs["ip_adapter_image"] = inputs["ip_adapter_image"][0][0]
        if case.prompts[0].negative:
            inputs["negative_ip_adapter_image"] = _negatives(case)
    if case.prompts:
        masks = [_their_masks(each, case) for each in case.prompts]
        if any(each is not None for each in masks):
            inputs["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    options = {"prompt": PROMPT, **inputs, **case.options}
    options = {_THEIR_NAMES.get(name, name): value for name, value in options.items()}
    for name in _TEXTS:
        if case.count > 1 and options.get(name) is not None:
            options[name] = [options[name]] * case.count
    if case.size and (case.task != "img2img" or case.flows):
        options["width"], options["height"] = case.size
    if case.kind == "FluxControlPipeline":
        options["control_image"] = options.pop("image")
    if "Kontext" in case.kind:
        options["max_area"] = case.size[0] * case.size[1] if case.size else 1024**2
    ends = "latent" if "denoising_end" in case.options else "pil" if "padding_mask_crop" in case.options else "np"
    states: list[Any] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        made = values["latents"]
        if case.kind.startswith("Flux"):
            made = pipe._unpack_latents(made, *_size(case)[::-1], pipe.vae_scale_factor)
        states.append(made.float().cpu().numpy().copy())
        return values

    generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.count)]
    if case.flows and case.scheduler == "flow-lcm":
        pipeline.scheduler.step = _drawing(pipeline, case, generators)
    with torch.no_grad(), _quiet():
        watched: dict[str, Any] = {"callback_on_step_end": keep}
        if "Adapter" in case.kind:
            watched = {"callback": lambda step, timestep, latents: keep(None, step, timestep, {"latents": latents})}
        with _likeliest() if case.kind.startswith("StableDiffusion3ControlNet") else nullcontext():
            found = pipeline(**options, generator=generators, output_type=ends, **watched).images
        if case.kind == "StableDiffusion3InpaintPipeline":  # which forgets the shift of its autoencoder
            latents_of, own = torch.from_numpy(states[-1]), pipeline.vae.config
            made = pipeline.vae.decode(latents_of / own.scaling_factor + own.shift_factor, return_dict=False)[0]
            found = pipeline.image_processor.postprocess(made, output_type=ends)
    if case.then is not None:
        return diffusers_run(replace(case.then, count=case.count), checkpoint_of, states[-1], setting)
    if ends == "latent":
        return Outcome(states[-1], None, None)
    if ends == "pil":
        return Outcome(states[-1], None, np.stack([np.asarray(image) for image in found]))
    return Outcome(states[-1], found, np.round(found * 255).astype(np.uint8))


def _drawing(pipeline: Any, case: Case, generators: list[Any]) -> Any:
    """The step of its scheduler with our generators, which the pipelines of flow matching do not hand on.

    Noise is drawn for latents, not for the tokens that FLUX's pipelines step.
    """
    step, packs = pipeline.scheduler.step, case.kind.startswith("Flux")
    width, height = _size(case)

    def unpacked(tokens: Any) -> Any:
        return pipeline._unpack_latents(tokens, height, width, pipeline.vae_scale_factor) if packs else tokens

    def stepped(output: Any, timestep: Any, sample: Any, return_dict: bool) -> Any:
        made = step(unpacked(output), timestep, unpacked(sample), generator=generators, return_dict=return_dict)[0]
        return (pipeline._pack_latents(made, *made.shape) if packs else made,)

    return stepped


def _nets() -> dict[str, Any]:
    """The classes of ControlNets of transformers, by how the names of their pipelines begin."""
    import diffusers

    return {"Flux": diffusers.FluxControlNetModel, "StableDiffusion3": diffusers.SD3ControlNetModel}


@contextmanager
def _likeliest() -> Iterator[None]:
    """Let an autoencoder give the likeliest latents where it would draw some without a generator.

    So the pipelines of Stable Diffusion 3 draw those of pictures that steer; no seed gives the same twice.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    usual = DiagonalGaussianDistribution.sample

    def sample(self: Any, generator: Any = None) -> Any:
        return self.mode() if generator is None else usual(self, generator)

    DiagonalGaussianDistribution.sample = sample
    try:
        yield
    finally:
        DiagonalGaussianDistribution.sample = usual


def _their_controls(case: Case) -> dict[str, Any]:
    """The options of diffusers' ControlNet pipelines; of one control they are no lists."""
    if "Adapter" in case.kind:
        given: dict[str, Any] = {
            "image": _steering(case) * case.count if case.count > 1 else _steering(case)[0],
            "adapter_conditioning_scale": case.controls[0].scale,
        }
        return given | ({"adapter_conditioning_factor": case.controls[0].interval[1]} if "XL" in case.kind else {})
    named: dict[str, list[Any]] = {
        "image" if case.task == "txt2img" and not case.flows else "control_image": _steering(case),
        "controlnet_conditioning_scale": [each.scale for each in case.controls],
        "control_guidance_start": [each.interval[0] for each in case.controls],
        "control_guidance_end": [each.interval[1] for each in case.controls],
    }
    found = {name: values if len(values) > 1 else values[0] for name, values in named.items()}
    if "Union" in case.kind:
        pictures = named.get("image", named.get("control_image"))
        found = {name: value for name, value in found.items() if name != "image"}
        found |= {"control_image": pictures, "control_mode": [each.mode for each in case.controls]}
    if not case.flows:
        return {**found, "guess_mode": case.guess_mode}
    if "Inpainting" in case.kind:
        found["control_mask"] = mask(*(case.picture or _size(case)))
    modes = [each.mode for each in case.controls]
    if case.kind.startswith("Flux") and (len(modes) > 1 or modes[0] is not None):
        found["control_mode"] = modes if len(modes) > 1 else modes[0]
    return found


def _their_strength(lora: Adapted, pipeline: Any) -> Any:
    if lora.text is None:
        return lora.strength
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    return {denoiser: lora.strength, **dict.fromkeys(texts, lora.text)}


def _their_masks(prompt: Prompted, case: Case) -> Any:
    """The masks of a prompt as diffusers takes them, (1, images, H, W), or None."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    masks = _regions(prompt, case)
    if masks is None:
        return None
    width, height = _size(case)
    return IPAdapterMaskProcessor().preprocess(masks, height=height, width=width).reshape(1, -1, height, width)


class _quiet:
    """No loading bars, and no warnings of what is meant here, such as a prompt that is cut."""

    def __enter__(self) -> None:
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        self._levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
        for library, _ in self._levels:
            library.set_verbosity_error()
            library.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        for library, level in self._levels:
            library.set_verbosity(level)
            library.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------- diffoundry

_SIZES = {
    "original_size": "original_size",
    "crops_coords_top_left": "crop",
    "target_size": "target_size",
    "aesthetic_score": "aesthetic_score",
}
"""What SDXL is told: the name of diffusers to the field of `Conditioning`."""


@functools.lru_cache(maxsize=4)
def _pipeline(bundle: Path, setting: Setting) -> Any:
    from ..runtime.pipeline import load

    return load(bundle, engine=setting.engine, precision=setting.precision)


def diffoundry_run(
    case: Case, bundle_of: FolderOf, latents: Array | None = None, setting: Setting = ON_THE_CPU
) -> Outcome:
    """What the bundle gives. Raises `DiffoundryError` for what it refuses."""
    from ..runtime.conditioning import Conditioning
    from ..runtime.control import Control
    from ..runtime.image_prompt import ImagePrompt
    from ..runtime.lora import Lora

    pipeline = _pipeline(bundle_of(case.source), setting)
    files = [bundle_of(f"{case.checkpoint}{LORA}{each.kind}") for each in case.loras]
    loras = [Lora(file, each.strength, each.text) for file, each in zip(files, case.loras, strict=True)]
    if loras or pipeline.loras:  # of the case before
        pipeline.set_loras(loras, as_inputs=case.as_inputs if loras else None)
    options = {"prompt": PROMPT, **_pictures(case), **case.options, "scheduler": case.scheduler, "seed": SEED}
    for prefix, name in (("", "conditioning"), ("negative_", "negative_conditioning")):
        told = {ours: options.pop(prefix + theirs) for theirs, ours in _SIZES.items() if prefix + theirs in options}
        options |= {name: Conditioning(**told)} if told else {}
    if latents is not None:
        options["image"] = latents
    options["image_prompt"] = [
        ImagePrompt(each.name, embeds=_face(each), scale=each.scale, mask=_regions(each, case))
        if each.name == FACE
        else ImagePrompt(each.name, images, each.scale, mask=_regions(each, case), negative=negative)
        for each, images, negative in zip(case.prompts, _prompting(case), _negatives(case), strict=True)
    ]
    options["control"] = [
        Control(
            *(each.name, image, each.scale, each.interval, case.guess_mode, each.mode),
            mask=mask(*image.size) if each.name == "inpaint" else None,
        )
        for each, image in zip(case.controls, _steering(case), strict=True)
    ]
    if (case.task != "img2img" or case.flows) and latents is None:  # diffusers inpaints at the checkpoint's size
        manifest = pipeline.bundle.manifest
        options["width"], options["height"] = case.size or (manifest.default_width, manifest.default_height)
    ends_early = "denoising_end" in case.options
    result = pipeline(**options, count=case.count, output="latent" if ends_early else "image")
    if case.then is not None:
        return diffoundry_run(replace(case.then, count=case.count), bundle_of, result.latents, setting)
    if ends_early:
        return Outcome(result.latents, None, None)
    images = np.stack([np.asarray(image) for image in result.images])
    if "padding_mask_crop" in case.options:
        return Outcome(result.latents, None, images)
    pixels = np.clip(pipeline.decode(result.latents) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return Outcome(result.latents, pixels, images)


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(found: Outcome, expected: Outcome) -> Errors:
    """How far `found` is from `expected`; of latents and pixels `ATOL` + `RTOL` · |expected| is allowed."""
    latents, latents_share = _difference(found.latents, expected.latents)
    pixels, pixels_share = _difference(found.pixels, expected.pixels)
    levels, _ = _difference(found.images, expected.images)
    return Errors(latents, pixels, levels, max(latents_share, pixels_share))


def likeness(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """PSNR in dB and SSIM of the images, each the median: some ways of a loop magnify any rounding."""
    if found.images is None or expected.images is None or found.images.shape != expected.images.shape:
        return -math.inf, -math.inf
    pairs = list(zip(found.images, expected.images, strict=True))
    return median(_psnr(a, b) for a, b in pairs), median(_ssim(a, b) for a, b in pairs)


def _psnr(found: Array, expected: Array) -> float:
    squared = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 10 * math.log10(255**2 / squared) if squared else math.inf


def _ssim(found: Array, expected: Array) -> float:
    """The structural similarity of two pictures (H, W, 3) of 8 bits, over windows of 8x8 (Wang et al. 2004)."""
    a, b = (
        np.lib.stride_tricks.sliding_window_view(picture.astype(np.float64), (8, 8), axis=(0, 1))
        for picture in (found, expected)
    )
    windows = (-2, -1)
    mean_a, mean_b = a.mean(windows), b.mean(windows)
    both = (a * b).mean(windows) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (a.var(windows) + b.var(windows) + c2))).mean())


def _difference(found: Array | None, expected: Array | None) -> tuple[float, float]:
    """The largest difference, absolute and as a share of what is allowed; infinite where there is nothing to compare
    with what is expected."""
    if expected is None:
        return 0.0, 0.0
    if found is None or found.shape != expected.shape:
        return math.inf, math.inf
    reference = expected.astype(np.float64)
    gap = np.abs(found.astype(np.float64) - reference)
    gap = np.where(np.isnan(gap), np.inf, gap)
    return float(gap.max()), float((gap / (ATOL + RTOL * np.abs(reference))).max())


@click.command()
@click.option("--only", default="", help="Only the cases whose description has this in it, such as a checkpoint.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every case to this file.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep checkpoints and bundles here [default: nowhere].")
@click.option("--engine", default="onnxruntime", show_default=True, type=click.Choice(ENGINES))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice([FULL, *PRECISIONS]))
def main(only: str, json_path: Path | None, work: Path | None, engine: str, precision: str) -> None:
    """Compile the checkpoints and print, for each task, the largest differences to diffusers.

    Exits with 1 when one is above what is promised, and says of which case. In half precision both compute in it: their
    pictures must be alike (PSNR of 30 dB, SSIM of 0.97), or ours nearer to those of float32 than theirs.
    """
    every = cases() if precision == "fp32" else half_cases()
    chosen = [case for case in every if only in str(case)]
    if not chosen:
        raise click.UsageError(f"no case has {only!r} in its description")
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(chosen, work or Path(folder), Setting(engine, precision))
    _print(rows, half=precision != "fp32")
    if json_path:
        infinite = (math.inf, -math.inf)
        finite = [{name: None if value in infinite else value for name, value in row.items()} for row in rows]
        json_path.write_text(json.dumps(finite, indent=1))
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(f"FAILED {row['case']}: {row['error'] or (_figures if precision == 'fp32' else _half_figures)([row])}")
    if failed:
        raise SystemExit(1)


def _measure(chosen: list[Case], root: Path, setting: Setting) -> list[dict[str, Any]]:
    """One row a case; a request that is refused has the message as its `error`."""
    from ..common.errors import DiffoundryError

    checkpoint_of = functools.partial(_checkpoint, root)
    bundle_of = functools.cache(functools.partial(_bundle, root, setting))
    rows: list[dict[str, Any]] = []
    half = setting.precision != "fp32"
    for number, case in enumerate(chosen, 1):
        click.echo(f"{number}/{len(chosen)} {case}", err=True)
        error, errors, exact = "", Errors(), {}
        try:
            expected = diffusers_run(case, checkpoint_of, setting=setting)
            found = diffoundry_run(case, bundle_of, setting=setting)
            errors = compare(found, expected)
            if half:
                full = diffusers_run(case, checkpoint_of, setting=replace(setting, precision="fp32"))
                psnr, ssim = likeness(found, expected)
                exact = {"psnr": psnr, "ssim": ssim}
                exact |= {"ours": likeness(found, full)[0], "theirs": likeness(expected, full)[0]}
        except DiffoundryError as refused:
            error = str(refused)
        stages = [case] if case.then is None else [case, case.then]
        about = {name: ", ".join(getattr(stage, name) for stage in stages) for name in ("checkpoint", "task", "kind")}
        passed = errors.passed if not half else not error and _is_alike(**exact)
        rows.append({**about, "case": str(case), **asdict(errors), **exact, "passed": passed, "error": error})
    return rows


def _is_alike(psnr: float, ssim: float, ours: float, theirs: float) -> bool:
    """Whether pictures are as near as half precision has them."""
    return (psnr >= LEAST_PSNR and ssim >= LEAST_SSIM) or ours >= theirs


def _checkpoint(root: Path, name: str) -> Path:
    from ..examples import random_transformer
    from ..examples.random_checkpoint import make

    if name == "pico":
        return Path(__file__).parents[1] / "examples" / name
    folder = root / name
    plain = name.partition("+")[0]
    if plain != name:
        folder = lora_file(folder) if LORA in name else folder
        if not folder.exists():
            make_beside(_checkpoint(root, plain), name, folder)
        return folder
    if not (folder / "model_index.json").exists():
        (random_transformer.make if name in TRANSFORMERS else make)(name, folder)
    return folder


def lora_file(folder: Path) -> Path:
    """The file of a LoRA of this name."""
    return folder.with_name(f"{folder.name.replace('+', '-')}.safetensors")


def make_beside(checkpoint: Path, name: str, folder: Path) -> None:
    """Write what stands beside `checkpoint` under this name; see `make_part`."""
    if LORA in name:
        write_lora(checkpoint, name.partition(LORA)[2], folder)
        return
    if STEERED in name:
        from ..examples.random_transformer import make_controlnet

        config = json.loads((checkpoint / "transformer" / "config.json").read_text())
        make_controlnet(config, folder, name.partition(STEERED)[2])
        return
    if PROMPTED in name and (checkpoint / "transformer").is_dir():
        from ..examples.random_transformer import make_ip_adapter

        config = json.loads((checkpoint / "transformer" / "config.json").read_text())
        make_ip_adapter(config, folder, ("look", "mood").index(name.partition(PROMPTED)[2]))
        return
    make_part(json.loads((checkpoint / "unet" / "config.json").read_text()), name, folder)


def make_part(unet: Mapping[str, Any], name: str, folder: Path) -> None:
    """Write what stands beside a checkpoint with this U-Net: `CHECKPOINT+control-NAME` or `CHECKPOINT+image-KIND`."""
    from ..examples.random_checkpoint import make_controlnet, make_ip_adapter, make_t2i_adapter, make_union

    if SKETCHED in name or UNITED in name:
        (make_t2i_adapter if SKETCHED in name else make_union)(unet, folder)
        return
    _, is_control, control = name.partition(f"{CONTROLLED}-")
    if is_control:
        make_controlnet(unet, folder, CONTROLS[control])
    else:
        make_ip_adapter(unet, folder, name.partition(PROMPTED)[2])


def beside(checkpoint_of: FolderOf, name: str) -> dict[str, Any]:
    """What `compile` is given beside the checkpoint for a bundle of this name; see `Case.source`."""
    plain, *parts = name.split("+")
    adapters = [part.removeprefix(PROMPTED[1:]) for part in parts if part.startswith(PROMPTED[1:])]
    nets: dict[str, str] = dict.fromkeys(CONTROLS if CONTROLLED[1:] in parts else (), CONTROLLED)
    nets |= {UNION: UNITED} if UNITED[1:] in parts else {}
    steered = [part.removeprefix(STEERED[1:]).split("-") for part in parts if part.startswith(STEERED[1:])]
    folders = {each: checkpoint_of(f"{plain}{kind}-{each}") for each, kind in nets.items()}
    folders |= {each: checkpoint_of(f"{plain}{STEERED}{each}") for each in (steered[0] if steered else ())}
    return {
        "controlnets": folders,
        "t2i_adapters": {SKETCH: checkpoint_of(f"{plain}{SKETCHED}-{SKETCH}")} if SKETCHED[1:] in parts else {},
        "ip_adapters": {each: checkpoint_of(f"{plain}{PROMPTED}{each}") for each in adapters},
        **({"lora_rank": _MOST_RANK, "lora_layers": "all"} if ADAPTED[1:] in parts else {}),
    }


_MOST_RANK = 16


def _bundle(root: Path, setting: Setting, name: str) -> Path:
    from ..export import compile

    if LORA in name:
        return _checkpoint(root, name)

    made = compile(
        _checkpoint(root, name.partition("+")[0]),
        root / f"{name}.bundle",
        **beside(functools.partial(_checkpoint, root), name),
        engine=setting.engine,
        precision=setting.precision,
    )
    return Path(made.root)


def _print(rows: list[dict[str, Any]], half: bool) -> None:
    """A line for each checkpoint, task and class, with the largest differences of its cases."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {("checkpoint", "task", "diffusers class"): []}
    for row in rows:
        groups.setdefault((row["checkpoint"], row["task"], row["kind"]), []).append(row)
    widths = [max(map(len, column)) for column in zip(*groups, strict=True)]
    for key, group in groups.items():
        names = "  ".join(text.ljust(width) for text, width in zip(key, widths, strict=True))
        head, figures = (_HALF_HEADS, _half_figures) if half else (_HEADS, _figures)
        print(f"{names}  {len(group):5}  {figures(group)}" if group else f"{names}  cases  {head}")


_HEADS = "latents   pixels  levels  of what is allowed"
_HALF_HEADS = "to theirs: PSNR, SSIM  to fp32: ours, theirs"


def _figures(rows: list[dict[str, Any]]) -> str:
    latents, pixels, levels, share = (
        max(row[name] for row in rows) for name in ("latents", "pixels", "levels", "share")
    )
    return f"{latents:7.1e}  {pixels:7.1e}  {levels:6g}  {100 * share:.2g} %"


def _half_figures(rows: list[dict[str, Any]]) -> str:
    psnr, ssim, ours, theirs = (
        min(row.get(name, -math.inf) for row in rows) for name in ("psnr", "ssim", "ours", "theirs")
    )
    return f"{psnr:12.1f} dB, {ssim:.3f} {ours:9.1f} dB, {theirs:.1f} dB"


if __name__ == "__main__":
    main()
