"""Latent consistency models (Luo et al. 2023): Stable Diffusion 1.x whose U-Net is told the guidance.

They differ from Stable Diffusion in how an image's strength becomes steps, and in what is asked of them by default.
"""

from __future__ import annotations

from typing import Any

from .stable_diffusion import components, default_size, latents, options, prompts, tasks

__all__ = ["components", "default_size", "latents", "options", "prompts", "tasks"]

PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
DEFAULT_STEPS = 4
DEFAULT_GUIDANCE = 8.5


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler configuration, which this pipeline class leaves as it is."""
    return dict(config)
