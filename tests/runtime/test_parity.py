"""Same seed, same image: the runtime against diffusers, with the same weights, prompt, sampler and seed."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from diffoundry.runtime.pipeline import load

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
def oracle(checkpoint):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


@functools.cache
def runtime(bundle):
    return load(bundle)


def diffusers_run(checkpoint, sampler, *, count, guidance, size, seed, steps=STEPS):
    """Latents and pixels in [-1, 1] of diffusers; image i is drawn from its own generator, seed + i."""
    import diffusers
    import torch

    pipeline, config = oracle(checkpoint)
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


@pytest.mark.parametrize("size", [(64, 64), (96, 64)], ids=["square", "wide"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("name", ["pico", "sd15-small", "sd2-small"])
def test_the_image_is_that_of_diffusers(name, sampler, count, guidance, size, checkpoint_of, bundle_of):
    expected, expected_pixels = diffusers_run(
        checkpoint_of(name), sampler, count=count, guidance=guidance, size=size, seed=11
    )
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
    np.testing.assert_allclose(result.latents, expected, atol=ATOL, rtol=RTOL)
    np.testing.assert_allclose(pipeline.decode(result.latents), expected_pixels, atol=ATOL, rtol=RTOL)
    images = np.stack([np.asarray(image) for image in result.images]).astype(int)
    rounded = np.round(np.clip(expected_pixels / 2 + 0.5, 0, 1) * 255).transpose(0, 2, 3, 1).astype(int)
    assert images.shape == (count, size[1], size[0], 3)
    assert np.abs(images - rounded).max() <= 1
