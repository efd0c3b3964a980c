"""The configurations of a checkpoint's models, read as their classes read them: what is left out has its default."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..common.errors import CheckpointError, reason
from ..families import Family, Pipeline
from ..families.control import CONTROLNET, PREFIX, T2I_ADAPTER, T2I_PREFIX, UNION
from ..families.parts import KL, TINY, TRANSFORMER, UNET, VAE, VAE_TINY
from ..families.transformer_control import CONTROLNETS
from .checkpoint import Checkpoint
from .loading import quiet

_TEXT_TYPES = ("clip", "clip_text_model")
T5 = "T5EncoderModel"
QWEN3 = ("Qwen3Model", "Qwen3ForCausalLM")
_TEXT_KINDS = {
    "clip": ("CLIP", _TEXT_TYPES, "CLIPTextConfig"),
    "t5": ("T5", ("t5",), "T5Config"),
    "qwen3": ("Qwen3", ("qwen3",), "Qwen3Config"),
}
"""By kind of text encoder: what people call it, the types that its configuration may state, and their class."""
_LIBRARIES = ("diffusers", "transformers")


class Complete:
    """The configurations of a checkpoint with the defaults of their classes; see `families.Configs`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.index = checkpoint, checkpoint.index
        self.has = checkpoint.has

    def config(self, name: str) -> Mapping[str, Any]:
        """Raises `CheckpointError` for the configuration of another kind of model."""
        if name in (VAE, VAE_TINY):
            return vae_config(self._checkpoint, name)
        if name == "unet":
            return unet_config(self._checkpoint)
        if name == TRANSFORMER:
            return transformer_config(self._checkpoint)
        found: Mapping[str, Any] = text_config(self._checkpoint, name).to_dict()
        return found


def check_classes(checkpoint: Checkpoint, family: Family) -> None:
    """Raise `CheckpointError` for a model whose class, as the pipeline index names it, the family does not take."""
    for name, classes in family.models.items():
        if name in family.optional and not checkpoint.has(family.optional[0]):
            continue
        if not checkpoint.has(name):
            home = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
            raise CheckpointError(
                f"the model_index.json of {checkpoint.root} has no {name}, which a {checkpoint.class_name} needs: "
                f'add "{name}": ["{home}", "{classes[0]}"] to it, and the folder'
            )
        library, kind = checkpoint.kind(name)
        if kind in classes and library in _LIBRARIES:
            continue
        found = kind if library in _LIBRARIES else f"{library}.{kind}"
        raise CheckpointError(
            f"the {name} of {checkpoint.root} is a {found}, which is not supported; {' or '.join(classes)} is: "
            f"give one of these with --component {name}=FOLDER"
        )


def unet_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the U-Net. Raises `CheckpointError`."""
    return _model_config(checkpoint, "unet", UNET)


def transformer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the transformer, its class as `_class_name`. Raises `CheckpointError`."""
    kind = checkpoint.kind(TRANSFORMER)[1]
    return {**_model_config(checkpoint, TRANSFORMER, kind), "_class_name": kind}


def denoiser_config(checkpoint: Checkpoint, pipeline: Pipeline) -> dict[str, Any]:
    """The configuration of the denoiser, whichever it is. Raises `CheckpointError`."""
    [source] = [part.source for part in pipeline.parts.values() if part.role == "denoiser"]
    return transformer_config(checkpoint) if source == TRANSFORMER else unet_config(checkpoint)


def vae_config(checkpoint: Checkpoint, name: str = "vae") -> dict[str, Any]:
    """The configuration of the autoencoder `name`, its class as `_class_name`. Raises `CheckpointError`."""
    kind = checkpoint.kind(name)[1]
    if kind not in (KL, TINY):
        raise CheckpointError(
            f"{checkpoint.folder(name)} holds a {kind or 'model without a class name'}, which is not supported; "
            f"{KL} or {TINY} is"
        )
    return {**_model_config(checkpoint, name, kind), "_class_name": kind}


def control_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The configuration of the ControlNet called `name`. Raises `CheckpointError` for a model of another kind.

    That of a ControlNet-Union of XL alone has `num_control_type`.
    """
    if checkpoint.has(TRANSFORMER):
        kind = checkpoint.kind(TRANSFORMER)[1]
        if kind not in CONTROLNETS:
            raise CheckpointError(
                f"ControlNets of a {kind} are not supported, those of {' and '.join(CONTROLNETS)} are: leave {name} out"
            )
        return _control(checkpoint, PREFIX + name, CONTROLNETS[kind])
    return _control(checkpoint, PREFIX + name, CONTROLNET, UNION)


def t2i_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The configuration of the T2I-Adapter called `name`. Raises `CheckpointError` for a model of another kind."""
    return _control(checkpoint, T2I_PREFIX + name, T2I_ADAPTER)


def _control(checkpoint: Checkpoint, component: str, *due: str) -> dict[str, Any]:
    kind = checkpoint.config(component).get("_class_name", due[0])
    if kind in (CONTROLNET, UNION, *CONTROLNETS.values()) and due[0] != T2I_ADAPTER and kind not in due:
        raise CheckpointError(
            f"{checkpoint.folder(component)} holds a {kind}, which was made for another kind of model; this checkpoint "
            f"takes a {' or a '.join(due)}: give one that was trained with it"
        )
    if kind not in due:
        raise CheckpointError(
            f"{checkpoint.folder(component)} holds a {kind}, which is not supported as a control; {due[0]} is: "
            f"--{'t2i-adapter' if due[0] == T2I_ADAPTER else 'controlnet'} takes it"
        )
    return _model_config(checkpoint, component, kind)


def _model_config(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Any]:
    import diffusers

    model: Any = getattr(diffusers, kind)
    raw = checkpoint.config(name)
    parameters = inspect.signature(model.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    try:
        with quiet():
            stated, _, _ = model.extract_init_dict(dict(raw))
    except Exception as error:  # each version has its own ways of refusing a configuration
        raise CheckpointError(f"{checkpoint.folder(name)}/config.json is no {kind}'s ({reason(error)})") from None
    return {**defaults, **stated, "_diffusers_version": raw.get("_diffusers_version")}


def text_config(checkpoint: Checkpoint, name: str) -> Any:
    """The configuration of the text encoder `name`: a `CLIPTextConfig`, also of a whole CLIP's, or that of its kind.

    Raises `CheckpointError` for that of another kind of model.
    """
    import transformers

    title, types, config = _TEXT_KINDS[text_kind(checkpoint, name)]
    found = checkpoint.config(name).get("model_type", types[0])
    if found not in types:
        raise CheckpointError(
            f"{checkpoint.folder(name)} holds a text encoder of the type {found!r}, which is not supported; "
            f"{title} is: give one with --component {name}=FOLDER"
        )
    try:
        with quiet():
            return getattr(transformers, config).from_pretrained(checkpoint.folder(name))
    except Exception as error:  # each version has its own ways of refusing a configuration
        raise CheckpointError(
            f"{checkpoint.folder(name)}/config.json is no {title} text encoder's ({reason(error)})"
        ) from None


def text_kind(checkpoint: Checkpoint, name: str) -> str:
    """The kind of the text encoder `name`, by the class that the pipeline index names: `clip`, `t5` or `qwen3`."""
    kind = checkpoint.kind(name)[1]
    return "t5" if kind == T5 else "qwen3" if kind in QWEN3 else "clip"
