"""Same seed, same image: the runtime against diffusers, with the same weights, prompt, sampler and seed."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from diffoundry.parity import digits
from diffoundry.runtime.pipeline import load
from diffoundry.runtime.schedulers import SAMPLERS as ALL

ATOL, RTOL = 1e-4, 1e-2
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
STEPS = 5
PROMPT, NEGATIVE = "a large red star at the left on a navy background", "a small ring"


@functools.cache
def oracle(checkpoint, dtype="float32"):
    import torch
    from diffusers import StableDiffusionPipeline

    kind = getattr(torch, dtype)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, torch_dtype=kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


@functools.cache
def runtime(bundle):
    return load(bundle)


def diffusers_run(checkpoint, sampler, *, count, guidance, size, seed, steps=STEPS, dtype="float32"):
    """Latents and pixels in [-1, 1] of diffusers; image i is drawn from its own generator, seed + i."""
    import diffusers
    import torch

    pipeline, config = oracle(checkpoint, dtype)
    pipeline.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(config)
    with torch.no_grad():
        latents = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE if guidance > 1 else None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=count,
            width=size[0],
            height=size[1],
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            output_type="latent",
        ).images
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents.numpy(), pixels.numpy()


def diffusers_run_in_float64(monkeypatch, checkpoint, sampler, **options):
    """The same in float64, with the noise that is drawn in float32."""
    import torch
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_euler_discrete, scheduling_lcm
    from diffusers.utils.torch_utils import randn_tensor

    def drawn(shape, generator=None, device=None, dtype=None, layout=None):
        return randn_tensor(shape, generator=generator, dtype=torch.float32).to(dtype)

    for module in (
        pipeline_stable_diffusion,
        scheduling_ddim,
        scheduling_ddpm,
        scheduling_euler_discrete,
        scheduling_lcm,
    ):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    return diffusers_run(checkpoint, sampler, dtype="float64", **options)


def is_close(found, expected):
    return all(np.allclose(a, b, atol=ATOL, rtol=RTOL) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("count", "size"),
    [
        pytest.param(1, (64, 64), id="1-square"),
        pytest.param(3, (96, 64), id="3-wide"),
        pytest.param(1, (96, 64), id="1-wide", marks=pytest.mark.slow),
        pytest.param(3, (64, 64), id="3-square", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("name", ["pico", "sd15-small", pytest.param("sd2-small", marks=pytest.mark.slow)])
def test_the_image_is_that_of_diffusers(name, sampler, count, guidance, size, checkpoint_of, bundle_of, monkeypatch):
    """Where torch's float32 is itself too far from float64, as on some processors, ours is held against float64."""
    asked = {"count": count, "guidance": guidance, "size": size, "seed": 11}
    expected, expected_pixels = diffusers_run(checkpoint_of(name), sampler, **asked)
    pipeline = runtime(bundle_of(name))
    result = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE if guidance > 1 else "",
        steps=STEPS,
        guidance=guidance,
        scheduler=sampler,
        count=count,
        width=size[0],
        height=size[1],
        seed=11,
    )
    pixels = pipeline.decode(result.latents)
    if not is_close((result.latents, pixels), (expected, expected_pixels)):
        exact = diffusers_run_in_float64(monkeypatch, checkpoint_of(name), sampler, **asked)
        assert not is_close((expected, expected_pixels), exact)
        expected, expected_pixels = exact
    np.testing.assert_allclose(result.latents, expected, atol=ATOL, rtol=RTOL)
    np.testing.assert_allclose(pixels, expected_pixels, atol=ATOL, rtol=RTOL)
    images = np.stack([np.asarray(image) for image in result.images]).astype(int)
    rounded = np.round(np.clip(expected_pixels / 2 + 0.5, 0, 1) * 255).transpose(0, 2, 3, 1).astype(int)
    assert images.shape == (count, size[1], size[0], 3)
    assert np.abs(images - rounded).max() <= 1


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_arguments_of_step_left_out_are_those_that_the_pipeline_passes(name, checkpoint_of, bundle_of):
    same_picture(checkpoint_of, bundle_of, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({sampler.class_name for sampler in ALL.values()}))
def test_every_class_draws_the_picture_of_the_pipeline(name, checkpoint_of, bundle_of):
    same_picture(checkpoint_of, bundle_of, name)


def same_picture(checkpoint_of, bundle_of, name):
    """The picture of the pipeline with the scheduler class `name`, nothing said beside it; or both fail."""
    import diffusers
    import torch

    pipeline, config = oracle(checkpoint_of("pico"))
    own = {"algorithm_type": "data_prediction"} if name == "SASolverScheduler" else {}  # it knows no dpmsolver++
    pipeline.scheduler = getattr(diffusers, name).from_config(config, **own)
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            expected = pipeline(
                PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                width=32,
                height=32,
                generator=generator,
                output_type="latent",
            ).images.numpy()
    except (AttributeError, TypeError, ValueError):
        assert name.startswith(("DDIMInverse", "FlowMatch", "IPNDM"))  # which this pipeline cannot run
        return
    options = {"steps": STEPS, "guidance": 1.0, "width": 32, "height": 32, "seed": 7, "output": "latent"}
    found = runtime(bundle_of("pico"))(PROMPT, scheduler=name, scheduler_options=own, **options).latents
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("deis, order 3", 60), ("sa, orders 3 and 4", 60), ("unipc, order 3", 20)])
def test_where_digits_are_lost_ours_are_nearer_to_float64(name, steps, bundle_of, checkpoint_of):
    import torch

    kind, options = digits.CASES[name]
    single, double = (digits.theirs(checkpoint_of("pico"), dtype) for dtype in (torch.float32, torch.float64))
    config = dict(single.scheduler.config)
    ours = digits.our_latents(runtime(bundle_of("pico")), kind, options, steps)
    plain, exact = (digits.their_latents(each, config, kind, options, steps) for each in (single, double))
    assert digits.share(ours, exact) < min(1, digits.share(plain, exact))
    assert digits.share(ours, plain) > 0
