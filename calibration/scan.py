"""The real loop, as the bundle runs it: prompts through text encoders, U-Net and autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from ..bundle import EIGHT_BIT, Bundle
from ..common.arrays import Array
from ..common.checks import LARGEST_SIDE, is_number, whole_number
from ..common.errors import RequestError
from ..common.progress import Progress
from ..engines import Engine
from ..runtime.control import Control
from ..runtime.image_prompt import ImagePrompt
from ..runtime.pipeline import Pipeline
from ..runtime.request import Request
from .budget import PSNR, Budget
from .quality import psnr

_BUDGET_DB, _EIGHT_BIT_DB = 35.0, 25.0
"""The least PSNR of the images against float32 where none is asked for: in 16 bits, and in 8."""
DEFAULT_PROMPTS = (
    "a photograph of a red fox sitting in tall grass at sunset, mountains in the background",
    "an oil painting of a crowded harbor town with white houses and blue boats",
    "a portrait of an old woman in a yellow raincoat, soft light",
)
_MOST_STEPS = 1000
_MOST_PROMPTS = 1024
_SIDE_UNIT = 8
_LARGEST_SEED = 2**62
_LARGEST_BUDGET = 120


@dataclass(frozen=True, slots=True)
class Scan:
    """What the loop is run with; prompt i is drawn from `seed + i`.

    steps: None for the bundle's own. size: width and height in pixels, None for the bundle's own.
    budget_db: the least PSNR of the images against float32, the median of the prompts; None for the usual, `least_db`.
    budget: a budget by another measure, in place of `budget_db`.
    Raises `RequestError` for what no bundle can run.
    """

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    steps: int | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    budget_db: float | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        prompts = self.prompts
        count = len(prompts) if isinstance(prompts, (tuple, list)) else -1
        if not 1 <= count <= _MOST_PROMPTS:
            found = f"{prompts!r:.80}" if count < 0 else str(count)
            raise RequestError(f"a scan needs from 1 to {_MOST_PROMPTS} prompts in a list, found {found}")
        empty = [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()]
        if empty:
            raise RequestError(f"each prompt of a scan must be a text that is not empty, found {empty[0]!r:.80}")
        object.__setattr__(self, "prompts", tuple(prompts))
        if self.steps is not None:
            object.__setattr__(self, "steps", whole_number("steps", self.steps, 1, _MOST_STEPS))
        budget = self.budget_db
        if budget is not None and (not is_number(budget) or not 0 <= budget <= _LARGEST_BUDGET):
            raise RequestError(f"the least PSNR must be from 0 to {_LARGEST_BUDGET} dB, found {budget!r}")
        object.__setattr__(self, "budget_db", None if budget is None else float(budget))
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise RequestError(f"the budget must be a Budget, found {type(self.budget).__name__}")
        if self.budget is not None and budget is not None:
            raise RequestError("a budget and a least PSNR say the same: give one of them")
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, _LARGEST_SEED))
        if self.size is not None:
            if not isinstance(self.size, (tuple, list)) or len(self.size) != 2:
                raise RequestError(f"the size of a scan must be a width and a height, found {self.size!r:.80}")
            sides = tuple(whole_number("a side", side, 1, LARGEST_SIDE) for side in self.size)
            if any(side % _SIDE_UNIT for side in sides):
                raise RequestError(
                    f"the size of a scan must be a multiple of {_SIDE_UNIT}, found {sides[0]}x{sides[1]}"
                )
            object.__setattr__(self, "size", sides)

    def budget_of(self, precision: str) -> Budget:
        """What images in `precision` must reach: what was asked, else a PSNR of 35 dB, and of 25 in eight bits."""
        if self.budget is not None:
            return self.budget
        usual = _EIGHT_BIT_DB if precision in EIGHT_BIT else _BUDGET_DB
        return Budget(PSNR, usual if self.budget_db is None else self.budget_db)

    def figures(self, images: Sequence[Array], exact: Sequence[Array], precision: str) -> dict[str, Any]:
        """How far images in `precision` are from those in float32, as a report has it.

        The PSNR is the median: a loop may magnify any difference, however small, on some of its ways. `measured` is
        by the measure of the budget. Raises `DiffoundryError` when a user's function fails.
        """
        found = [psnr(image, reference) for image, reference in zip(images, exact, strict=True)]
        texts = (*self.prompts, *self.prompts[: len(found) - len(self.prompts)])  # the rest were drawn with controls
        prompts = [
            {"prompt": text, "seed": self.seed + i % len(self.prompts), "psnr_db": round(ratio, 2)}
            | ({"controlled": True} if i >= len(self.prompts) else {})
            for i, (text, ratio) in enumerate(zip(texts, found, strict=True))
        ]
        near = {"psnr_db": round(median(found), 2), "worst_db": round(min(found), 2), "prompts": prompts}
        budget = self.budget_of(precision)
        return {
            **near,
            "measured": near["psnr_db"] if budget.measure == PSNR else budget.of(images, exact, texts),
        }

    def is_within(self, figures: Mapping[str, Any], precision: str) -> bool:
        """Whether images of these `figures` are within the budget; those that are not finite have a PSNR of None."""
        return figures["psnr_db"] is not None and bool(figures["measured"] >= self.budget_of(precision).least)

    def asked(self, precision: str) -> dict[str, Any]:
        """The budget as a report has it."""
        budget = self.budget_of(precision)
        return (
            {"budget_db": budget.least} if budget.measure == PSNR else {"budget": f"{budget.measure}={budget.least:g}"}
        )

    def missed(self, found: Sequence[Mapping[str, Any]], precision: str) -> tuple[str, str]:
        """What images of these figures reach at most beside what is asked, in words, and the option that asks less."""
        budget = self.budget_of(precision)
        best = max((each["measured"] for each in found if each["psnr_db"] is not None), default=0.0)
        if budget.measure == PSNR:
            return f"differ from fp32 by {best:.1f} dB PSNR", "--min-psnr or --budget"
        return f"have a {budget.measure} of {best:.4g}", "--budget"

    def record(self, bundle: Bundle) -> dict[str, Any]:
        """The settings as JSON, with the bundle's own where none were given."""
        manifest = bundle.manifest
        return {
            "prompts": list(self.prompts),
            "steps": self.steps or manifest.default_steps,
            "size": list(self.size or (manifest.default_width, manifest.default_height)),
            "seed": self.seed,
            "guidance": manifest.default_guidance,
        }


def run_loop(
    bundle: Bundle,
    engines: Mapping[str, Callable[[], Engine]],
    scan: Scan,
    text: str,
    progress: Progress,
    threads: int | None = 1,
    controlled: bool = False,
) -> list[Array]:
    """Run the loop on every prompt and return the images, uint8 (H, W, 3); each component runs at least once.

    controlled: where the bundle has controls or IP-Adapters, draw the first prompt once more, with all of them; else
    they do not run.
    engines: what loads each component. One is in memory at a time. threads: of the pipeline, which shares the rows of
    a small model among them; None for all.
    Raises `EngineError` when latents or an image are not finite, `RequestError` for a size the bundle cannot do.
    """
    pipeline = Pipeline(bundle, threads=threads, loop="host", engines=engines)

    def report(done: int, total: int, _: Array) -> None:
        progress(text, done, total)

    asked = requests(bundle, scan)
    results = pipeline.generate_many(asked, batch=1, low_memory=True, callback=report)
    if controlled and bundle.manifest.with_role("controlled"):
        results += pipeline.generate_many([_steered(bundle, scan)], batch=1, low_memory=True, callback=report)
    pipeline.release_all()
    images = [np.asarray(image) for result in results for image in result.images]
    if bundle.manifest.with_role("preview"):
        for result in results:
            pipeline.decode(result.latents, "tiny")
        pipeline.release_all()
    for name in bundle.manifest.with_role("encoder"):
        encoder = pipeline.engine(name)
        for image in images:
            pixels = image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(127.5) - 1
            encoder({encoder.inputs[0].name: np.asarray(pixels, encoder.inputs[0].dtype, order="C")})
    return images


def run_steered(
    bundle: Bundle, engines: Mapping[str, Callable[[], Engine]], *, scan: Scan, text: str, progress: Progress
) -> list[Array]:
    """The image of the first prompt under all controls and image prompts of a bundle; see `run_loop`."""
    pipeline = Pipeline(bundle, threads=1, loop="host", engines=engines)
    asked = _steered(bundle, scan)
    found = pipeline.generate_many(
        [asked], batch=1, low_memory=True, callback=lambda done, total, _: progress(text, done, total)
    )
    pipeline.release_all()
    return [np.asarray(image) for result in found for image in result.images]


def _steered(bundle: Bundle, scan: Scan) -> Request:
    return replace(
        requests(bundle, scan)[0], control=_controls(bundle, scan), image_prompt=_image_prompts(bundle, scan)
    )


def requests(bundle: Bundle, scan: Scan) -> list[Request]:
    """One request a prompt, of the first task that the bundle does, with a drawn picture where one can be seen."""
    tasks, manifest = bundle.manifest.tasks, bundle.manifest
    width, height = scan.size or (manifest.default_width, manifest.default_height)
    options: dict[str, Any] = {"width": width, "height": height, "steps": scan.steps}
    if "txt2img" not in tasks or (manifest.wiring.edits and "img2img" in tasks):
        options["image"] = _picture(width, height, scan.seed)
        if "img2img" not in tasks:
            options["mask"] = _right_half(width, height)
    return [Request(prompt, seed=scan.seed + i, **options) for i, prompt in enumerate(scan.prompts)]


def _controls(bundle: Bundle, scan: Scan) -> tuple[Control, ...]:
    """Each control of the bundle, with a drawn picture."""
    width, height = scan.size or (bundle.manifest.default_width, bundle.manifest.default_height)
    controls = bundle.manifest.wiring.controls.items()
    return tuple(
        Control(
            name,
            _picture(width, height, scan.seed + i),
            mode=0 if wired.modes else None,
            mask=_right_half(width, height) if wired.masked else None,
        )
        for i, (name, wired) in enumerate(controls)
    )


def _image_prompts(bundle: Bundle, scan: Scan) -> tuple[ImagePrompt, ...]:
    """One for each IP-Adapter of the bundle, with a drawn picture."""
    prompts = bundle.manifest.wiring.image_prompts
    return tuple(
        ImagePrompt(name, _picture(each.side, each.side, scan.seed))
        if each.encoder
        else ImagePrompt(name, embeds=_embedding(int(bundle.component(each.component).inputs[0].shape[1]), scan.seed))
        for name, each in prompts.items()
    )


def _embedding(width: int, seed: int) -> Array:
    """Numbers as large as those of a face, float32 (1, width), whose squares are `width` in all."""
    found = np.random.default_rng(seed).standard_normal((1, width)).astype(np.float32)
    return np.asarray(found * np.float32(width**0.5) / np.linalg.norm(found), np.float32)


def _right_half(width: int, height: int) -> Array:
    """A mask, uint8 (H, W)."""
    return np.tile((np.arange(width) > width // 2).astype(np.uint8) * 255, (height, 1))


def _picture(width: int, height: int, seed: int) -> Array:
    """Smooth patches of colour, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.linspace(0, 1, side)[:, None] for side in (height, width))
    waves = [np.cos(2 * np.pi * (rng.uniform(0.5, 4) * axis + rng.random(3))) for axis in (rows, columns)]
    return np.round(127.5 + 127.5 * waves[0][:, None] * waves[1][None]).astype(np.uint8)
