"""The torch modules that are traced: one file for each kind of model, and what makes a component of it."""

from __future__ import annotations

from ...families import Pipeline
from ...families.parts import TRANSFORMER
from ..checkpoint import Checkpoint
from ..graphs.spec import ComponentSpec
from . import autoencoder, control, image_prompt, text, transformer, unet

_MAKERS = {
    "text": text.text_encoder,
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
    denoisers = {TRANSFORMER: transformer.transformer}
    return [
        _MAKERS.get(part.role, denoisers.get(part.source, unet.unet))(checkpoint, name, pipeline)
        for name, part in pipeline.parts.items()
    ]
