"""Latent consistency models (Luo et al. 2023): Stable Diffusion 1.x whose U-Net is told the guidance.

They differ from Stable Diffusion in how an image's strength becomes steps, in what is asked of them by default, and in
that their pipeline classes take configurations as they are.
"""

from __future__ import annotations

from ..checkpoint import Checkpoint
from . import unet
from .stable_diffusion import components, latents, options, prompts, tasks

__all__ = ["components", "latents", "options", "prompts", "tasks"]

NAME = "latent-consistency"
PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
DEFAULT_STEPS = 4
DEFAULT_GUIDANCE = 8.5


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height that the checkpoint was trained for, in pixels."""
    return unet.default_size(checkpoint, latents(checkpoint).downscale, NAME)
