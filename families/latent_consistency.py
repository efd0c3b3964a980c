"""Latent consistency models (Luo et al. 2023): Stable Diffusion 1.x whose U-Net is given the guidance.

They differ from Stable Diffusion in how an image's strength becomes steps, in what is asked of them by default, and in
that their pipeline classes take configurations as they are.
"""

from __future__ import annotations

from . import parts
from .family import Configs, Family, Pipeline
from .stable_diffusion import MODELS, describe


def _describe(configs: Configs) -> Pipeline:
    return describe(configs, parts.side_of(configs.config("unet")), strength_by_sampler=True)


FAMILY = Family(
    name="latent-consistency",
    pipelines=("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
    models=MODELS,
    describe=_describe,
    steps=4,
    guidance=8.5,
)
