"""Two models in turn: the first runs the noisy part of a schedule, the second (SDXL's refiner) the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..common.errors import RequestError
from .pipeline import Pipeline
from .request import Request
from .run import Callback, Result


def generate_refined(
    base: Pipeline,
    refiner: Pipeline,
    request: Request,
    part: float = 0.8,
    *,
    batch: int | None = None,
    low_memory: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Run `request` on `base` up to `part` of the schedule and on `refiner` from there.

    Podell et al. 2023, section 2.5, as diffusers' `denoising_end` and `denoising_start`. The refiner gets the prompts,
    steps, guidance and scheduler of the request; skipped layers, controls, pictures and LoRAs are for the first alone.
    Options and errors are those of `Pipeline.generate`.
    """
    if request.denoising_start is not None or request.denoising_end is not None:
        raise RequestError("the refiner shares the schedule by itself: leave denoising_start and denoising_end out")
    if request.mask is not None or request.prompt_embeds is not None or request.negative_prompt_embeds is not None:
        raise RequestError("the refiner takes a text, and no mask: run the two models one after the other")
    if not isinstance(part, (int, float)) or not 0 < part < 1:
        raise RequestError(f"the part of the schedule before the refiner must be between 0 and 1, found {part!r}")
    for name in ("channels", "downscale", "scaling_factor", "shift_factor", "mean", "std"):
        ours, theirs = (getattr(pipe.bundle.manifest.latents, name) for pipe in (base, refiner))
        if ours != theirs:
            raise RequestError(
                f"{refiner.bundle.root} does not refine {base.bundle.root}: the {name} of its latents is {theirs}, not "
                f"{ours}; give the refiner that was made for this model"
            )
    first = replace(request, denoising_end=part, output="latent", decoder="full", tiled=False)
    width, height = base.check(first)
    channels, unit = base.bundle.manifest.latents.channels, base.bundle.manifest.latents.downscale
    second = replace(
        request,
        image=np.zeros((request.count, channels, height // unit, width // unit), np.float32),
        denoising_start=part,
        strength=None,
        resize="default",
        width=None,
        height=None,
        clip_skip=None,
        control=(),
        image_prompt=(),
        loras=(),
    )
    refiner.check(second)
    begun = base.generate(first, batch=batch, low_memory=low_memory, callback=callback)
    if low_memory:
        base.release_all()
    second = replace(second, image=begun.latents, seed=begun.seeds[0])
    refined = refiner.generate(second, batch=batch, low_memory=low_memory, callback=callback)
    seconds = {
        name: begun.seconds.get(name, 0.0) + refined.seconds.get(name, 0.0)
        for name in {**begun.seconds, **refined.seconds}
    }
    source = dict(refiner.bundle.manifest.source)
    record = {**begun.request, "output": request.output, "refined_from": part, "refiner": source}
    del record["denoising_end"]
    return replace(refined, request=record, truncated=begun.truncated | refined.truncated, seconds=seconds)
