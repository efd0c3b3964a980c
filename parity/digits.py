"""Whose float32 loses digits in long schedules of solvers of high order: ours, diffusers' or both, against float64.

python -m diffoundry.parity.digits CHECKPOINT BUNDLE
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch

from ..common.arrays import Array
from ..export.stages.trace_scheduler import float64, widen
from ..runtime.loop.guidance import Guidance
from ..runtime.pipeline import Pipeline, load

ATOL, RTOL = 1e-4, 1e-2
"""What latents may differ by."""
PROMPT, SEED, GUIDANCE, SIDE = "a large red star at the left on a navy background", 7, 4.0, 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm++3s": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "deis, order 2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis, order 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "unipc, order 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "sa, orders 2 and 2": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
    "sa, orders 3 and 4": (
        "SASolverScheduler",
        {"algorithm_type": "data_prediction", "predictor_order": 3, "corrector_order": 4},
    ),
}


def theirs(checkpoint: str, dtype: torch.dtype) -> Any:
    """A diffusers pipeline in float32 or float64."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Any:
    """Noise as float32 has it, whatever is computed in."""
    with torch._C.DisableTorchFunction():
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def _exact(scheduler: Any) -> Any:
    """A scheduler whose steps are computed in float64, of the schedule that it made in float32."""
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def widened_timesteps(*arguments: Any, **options: Any) -> None:
        set_timesteps(*arguments, **options)
        widen(scheduler)

    def exact_step(*arguments: Any, **options: Any) -> Any:
        with float64():
            return step(*arguments, **options)

    scheduler.set_timesteps, scheduler.step = widened_timesteps, functools.wraps(step)(exact_step)
    return scheduler


def their_latents(pipeline: Any, config: dict[str, Any], kind: str, options: dict[str, Any], steps: int) -> Array:
    """Final latents of a scheduler class with these options, (1, C, h, w)."""
    import diffusers

    scheduler = getattr(diffusers, kind).from_config({**config, **options})
    pipeline.scheduler = _exact(scheduler) if pipeline.dtype == torch.float64 else scheduler
    home = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in (home, type(scheduler).__module__):
            stack.enter_context(patch(f"{module}.randn_tensor", _drawn, create=True))
        made = pipeline(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            width=SIDE,
            height=SIDE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        )
    return np.asarray(made.images, np.float64)


def our_latents(pipe: Pipeline, kind: str, options: dict[str, Any], steps: int) -> Array:
    """The same of a bundle."""
    asked = {"steps": steps, "width": SIDE, "height": SIDE, "seed": SEED, "output": "latent"}
    made = pipe(PROMPT, scheduler=kind, scheduler_options=options, guidance=Guidance(GUIDANCE), **asked)
    return np.asarray(made.latents, np.float64)


def share(found: Array, expected: Array) -> float:
    """The largest difference as a multiple of what is allowed."""
    return float((np.abs(found - expected) / (ATOL + RTOL * np.abs(expected))).max())


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True))
@click.argument("bundle", type=click.Path(exists=True))
@click.option("--steps", default="20,60,99,130", show_default=True, help="Step counts.")
def main(checkpoint: str, bundle: str, steps: str) -> None:
    """Print, for CHECKPOINT and the BUNDLE made of it, differences of final latents as multiples of what is allowed."""
    pipe, single, double = load(bundle), theirs(checkpoint, torch.float32), theirs(checkpoint, torch.float64)
    config = dict(single.scheduler.config)
    print(f"{'sampler':20} {'steps':>5}  {'ours, diffusers':>16} {'diffusers, exact':>16} {'ours, exact':>12}")
    for name, (kind, options) in CASES.items():
        for count in map(int, steps.split(",")):
            ours = our_latents(pipe, kind, options, count)
            plain, exact = (their_latents(each, config, kind, options, count) for each in (single, double))
            row = share(ours, plain), share(plain, exact), share(ours, exact)
            print(f"{name:20} {count:5}  {row[0]:16.2g} {row[1]:16.2g} {row[2]:12.2g}", flush=True)


if __name__ == "__main__":
    main()
