"""The names that diffusers' pipelines have for options: those that are taken too, and what to give for the others."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..common.errors import RequestError
from .loop.guidance import SKIPPING

SAME = {"guidance_scale": "guidance", "num_inference_steps": "steps", "mask_image": "mask"}
"""diffusers' names that are taken beside ours."""
_CONDITIONING = "{}conditioning=diffoundry.Conditioning({}=…)"
_CALLBACK = "give callback=, a function of step, total and latents that returns False to stop"
_INSTEAD = {
    "generator": "give seed=, a whole number (of a torch.Generator its initial_seed()), and rng='cuda' for a GPU's",
    "num_images_per_prompt": "give count=; image i is drawn with seed + i",
    "batch_size": "give count=, the number of images, or batch=, the most of them in one call of the U-Net",
    "output_type": "give output='image' or output='latent'; numpy.asarray(image) makes an array of a picture",
    "eta": "give scheduler_options={'eta': …}",
    "original_inference_steps": "give scheduler_options={'original_inference_steps': …}",
    "callback_on_step_end": _CALLBACK,
    "callback_on_step_end_tensor_inputs": _CALLBACK,
    "callback_steps": _CALLBACK,
    "latents": "give seed= for the noise; image= takes latents of a picture to start from",
    "masked_image_latents": "give image= and mask=",
    "return_dict": "leave it out: the images are result.images",
    "cross_attention_kwargs": "leave it out: fuse a LoRA into the checkpoint before it is compiled",
    "ip_adapter_image": "give image_prompt=diffoundry.ImagePrompt(name, image)",
    "ip_adapter_image_embeds": "give image_prompt=diffoundry.ImagePrompt(name, embeds=…)",
    "negative_ip_adapter_image": "give image_prompt=diffoundry.ImagePrompt(name, image, negative=…)",
    "control_image": "give control=diffoundry.Control(name, image)",
    "controlnet_conditioning_scale": "give control=diffoundry.Control(name, image, scale=…)",
    "control_guidance_start": "give control=diffoundry.Control(name, image, interval=(start, end))",
    "control_guidance_end": "give control=diffoundry.Control(name, image, interval=(start, end))",
    "guess_mode": "give control=diffoundry.Control(name, image, guess_mode=True)",
    "guidance_rescale": "give guidance=diffoundry.Guidance(…, rescale=…)",
    "guidance_mode": "give guidance=diffoundry.Guidance(…, mode=…)",
    "guidance_interval": "give guidance=diffoundry.Guidance(…, interval=…)",
    **{name: f"give guidance=diffoundry.Guidance(…, {name}=…)" for name in ("true_cfg_scale", *SKIPPING)},
    "cfg_scale": "give guidance=",
    "sampler": "give scheduler=",
    "crops_coords_top_left": "give " + _CONDITIONING.format("", "crop"),
    "negative_crops_coords_top_left": "give " + _CONDITIONING.format("negative_", "crop"),
    **{
        prefix + name: "give " + _CONDITIONING.format(prefix, name)
        for prefix in ("", "negative_")
        for name in ("original_size", "target_size", "aesthetic_score")
    },
}
"""What to do in place of an option that is not taken."""


def ours(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """`options` by our names. Raises `RequestError` for one that is not `known`, or that is given by both names."""
    for theirs, name in SAME.items():
        if theirs in options and name in options:
            raise RequestError(f"{theirs} and {name} are two names of one option: give one of them")
    named = {SAME.get(name, name): value for name, value in options.items()}
    for name in sorted(set(named) - set(known)):
        instead = _INSTEAD.get(name)
        if instead is None:
            near = difflib.get_close_matches(name, [*known, *SAME, *_INSTEAD], n=1)
            instead = f"did you mean {near[0]!r}?" if near else "help(diffoundry.Request) lists all"
        raise RequestError(f"unknown option {name!r}: {instead}")
    return named
