"""The torch modules that are traced: one file for each kind of model, and what makes a component of it."""

from __future__ import annotations

from ...families import Pipeline
from ...families.parts import TRANSFORMER
from ..checkpoint import Checkpoint
from ..graphs.spec import ComponentSpec
from . import autoencoder, control, image_prompt, text, transformer, transformer_control, unet

_MAKERS = {
    "text": text.text_encoder,
    "encoder": autoencoder.encoder,
    "decoder": autoencoder.decoder,
    "preview": autoencoder.preview,
    "image": image_prompt.image_encoder,
    "image_prompt": image_prompt.projection,
}
_OF_UNETS = {"denoiser": unet.unet, "control": control.control, "controlled": control.controlled_unet}
_OF_TRANSFORMERS = {
    "denoiser": transformer.transformer,
    "control": transformer_control.controlnet,
    "controlled": transformer_control.controlled_transformer,
}


def component_specs(checkpoint: Checkpoint, pipeline: Pipeline) -> list[ComponentSpec]:
    """How each component of a pipeline is traced, smallest first.

    Raises `CheckpointError` for a model that is not supported.
    """
    [denoiser] = [part.source for part in pipeline.parts.values() if part.role == "denoiser"]
    makers = _MAKERS | (_OF_TRANSFORMERS if denoiser == TRANSFORMER else _OF_UNETS)
    return [makers[part.role](checkpoint, name, pipeline) for name, part in pipeline.parts.items()]
