"""The torch modules that are traced: one file for each kind of model, and what makes a component of it."""

from __future__ import annotations

from ...families import Pipeline
from ..checkpoint import Checkpoint
from ..graphs.spec import ComponentSpec
from . import autoencoder, clip, control, image_prompt, unet

_MAKERS = {
    "text": clip.text_encoder,
    "denoiser": unet.unet,
    "encoder": autoencoder.encoder,
    "decoder": autoencoder.decoder,
    "preview": autoencoder.preview,
    "control": control.control,
    "controlled": control.controlled_unet,
    "image": image_prompt.image_encoder,
    "image_prompt": image_prompt.projection,
}


def component_specs(checkpoint: Checkpoint, pipeline: Pipeline) -> list[ComponentSpec]:
    """How each component of a pipeline is traced, smallest first.

    Raises `CheckpointError` for a model that is not supported.
    """
    return [_MAKERS[part.role](checkpoint, name, pipeline) for name, part in pipeline.parts.items()]
