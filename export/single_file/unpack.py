"""Single-file checkpoints (Stable Diffusion 1, 2, XL and its refiner in the original layout) to diffusers folders.

The tensors are renamed by diffusers' own conversions, as its `from_single_file` does; the configurations and CLIP's
tokenizer are built in, so nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError, DiffoundryError, reason
from ...common.files import disk_error, remove, write_json
from ..loading import quiet
from .configs import COND_PROJ, Config, Setup, built_in, setup_of
from .kinds import UNET, VAE, Family, TextEncoder, recognise
from .names import clip_names, unet_names, vae_names
from .tokenizer import write_clip_tokenizer
from .weights import SUFFIXES, Weights, open_weights

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CLIP_PREFIX = "text_model."


def is_single_file(path: Path) -> bool:
    """Whether `path` is a file that may hold a whole checkpoint, by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the target: module is on the meta device, originals the original name of each of its weights."""

    folder: str
    prefix: str
    config: Config
    text: TextEncoder | None
    module: Any
    shapes: dict[str, tuple[int, ...]]
    originals: dict[str, str]

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of its weights in the file, each once."""
        return tuple(dict.fromkeys(self.originals.values()))


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A single-file checkpoint whose header, names and shapes were found to be a whole model of its family."""

    weights: Weights
    family: Family
    setup: Setup
    models: tuple[_Model, ...]
    config: Path | None

    @classmethod
    def open(cls, source: Path, *, config: Path | None = None, prediction_type: str | None = None) -> SingleFile:
        """Check `source`, of which no weight is read. The arguments and errors are those of `unpack`."""
        if prediction_type not in (None, *PREDICTION_TYPES):
            known = ", ".join(PREDICTION_TYPES)
            raise DiffoundryError(f"unknown prediction type {prediction_type!r}: choose one of {known}")
        if not is_single_file(source):
            raise CheckpointError(f"{source} is no single-file checkpoint ({', '.join(SUFFIXES)}): check the path")
        weights = open_weights(source)
        family = recognise(weights)
        setup = setup_of(config, family, prediction_type) if config else built_in(weights, family, prediction_type)
        models = tuple(_model(name, setup, family) for name in setup.models)
        _check(weights, f"{source}, a {family.title} checkpoint,", models, config)
        return cls(weights, family, setup, models, config)

    def write_outline(self, root: Path) -> None:
        """Write all but the weights to the folder `root`: configurations, scheduler and tokenizers."""
        _write_tokenizers(root, self.family, self.setup, self.config)
        _write_rest(root, self.family, self.setup)
        for model in self.models:
            _write_config(root, self.weights, model)

    def write(self, target: Path) -> None:
        """Write the folder `target`, which is not there or empty. Raises `DiffoundryError`, then nothing is left."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DiffoundryError(f"{target} exists: choose another folder, or remove it first")
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            beside.mkdir(parents=True)
            self.write_outline(beside)
            for model in self.models:
                _write_model(beside, self.weights, model)
            beside.replace(target)
        except OSError as error:
            raise disk_error(error) from error
        finally:
            remove(beside)


def unpack(source: Path, target: Path, *, config: Path | None = None, prediction_type: str | None = None) -> None:
    """Write the single-file checkpoint `source` as the diffusers folder `target`, in the types that it is stored in.

    config: a diffusers folder whose configurations, scheduler and tokenizer are taken instead of the built-in ones.
    prediction_type: `epsilon`, `v_prediction` or `sample`, instead of what the file says or is taken for.
    Raises `CheckpointError` when the file is damaged, incomplete, of no known family or has shapes that do not fit, and
    `DiffoundryError` when `target` cannot be written; then nothing is left there.
    """
    SingleFile.open(source, config=config, prediction_type=prediction_type).write(target)


def _model(folder: str, setup: Setup, family: Family) -> _Model:
    text = next((text for text in family.text_encoders if text.name == folder), None)
    config = setup.models[folder]
    module = _module(folder, config, text)
    shapes = {_published(name, text): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if text:
        prefix, names = text.prefix, clip_names(shapes, text.open_clip)
    elif folder == "unet":
        if not isinstance(module.config.layers_per_block, int):
            raise CheckpointError(
                "the unet configuration has another number of layers in each block, which no "
                "single-file checkpoint has: give the configuration of a Stable Diffusion checkpoint"
            )
        prefix, names = UNET, unet_names(shapes, module.config.layers_per_block)
    else:
        prefix, names = VAE, vae_names(shapes, len(module.config.block_out_channels))
    return _Model(folder, prefix, config, text, module, shapes, {name: prefix + old for name, old in names.items()})


def _module(folder: str, config: Config, text: TextEncoder | None) -> Any:
    import diffusers
    import torch
    import transformers

    try:
        with torch.device("meta"), quiet():
            if text:
                return getattr(transformers, text.class_name)(transformers.CLIPTextConfig.from_dict(config))
            kind = diffusers.UNet2DConditionModel if folder == "unet" else diffusers.AutoencoderKL
            return kind.from_config(config)
    except Exception as error:  # each class has its own ways of refusing a configuration
        raise CheckpointError(f"the {folder} configuration describes no model: {reason(error)}") from None


def _published(name: str, text: TextEncoder | None) -> str:
    """transformers 5 leaves the prefix `text_model.` out, with which CLIP is published and which all versions read."""
    bare = text is not None and not name.startswith((_CLIP_PREFIX, "text_projection."))
    return _CLIP_PREFIX + name if bare else name


def _check(weights: Weights, where: str, models: tuple[_Model, ...], config: Path | None) -> None:
    """Raise `CheckpointError` unless the file has each weight of `models`, as floats of the right shape."""
    another = "give the diffusers folder of a checkpoint of the same make as the configuration"
    remedy = "it is incomplete, download it again"
    if config:
        another += f", not {config}"
        remedy = f"where the file is whole, {another}"
    stored = dict.fromkeys(name for model in models for name in model.stored)
    absent = [name for name in stored if name not in weights.shapes]
    _refuse(absent, f"{where} lacks", remedy)
    odd = [f"{name} ({weights.dtypes[name]})" for name in stored if weights.dtypes[name] not in _FLOATS]
    _refuse(odd, f"{where} holds types other than {', '.join(_FLOATS)}:", "use a version of it in one of these")
    extra = [name for name in weights.shapes if name.startswith(UNET) and name not in stored]
    _refuse(extra, f"{where} has parts in its U-Net that its configuration does not name:", another)
    wrong = [text for model in models for text in _misfits(weights, model)]
    _refuse(wrong, f"{where} does not fit its configuration:", another)


def _misfits(weights: Weights, model: _Model) -> list[str]:
    """What has another shape than `model`, found by converting tensors without values."""
    import torch

    hollow = {name: torch.empty(weights.shapes[name], device="meta") for name in model.stored}
    try:
        found = {name: tuple(tensor.shape) for name, tensor in _converted(model, hollow).items()}
    except Exception as error:  # whatever indexing a tensor of the wrong rank raises
        return [f"{model.prefix}* cannot be converted ({error})"]
    return [
        f"{model.originals[name]} gives {list(found.get(name, ()))} where {list(shape)} is due"
        for name, shape in model.shapes.items()
        if found.get(name) != shape
    ]


def _refuse(names: Iterable[str], what: str, remedy: str) -> None:
    names = list(dict.fromkeys(names))
    if names:
        more = f" … ({len(names)} in all)" if len(names) > 3 else ""
        raise CheckpointError(f"{what} {', '.join(names[:3])}{more}: {remedy}")


def _converted(model: _Model, tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors` of the original layout by the names of the diffusers layout."""
    from diffusers.loaders import single_file_utils as diffusers

    if model.text:
        renamed = (
            diffusers.convert_open_clip_checkpoint(model.module, tensors, prefix=model.prefix)
            if model.text.open_clip
            else diffusers.convert_ldm_clip_checkpoint(tensors)
        )
    elif model.prefix == UNET:
        renamed = diffusers.convert_ldm_unet_checkpoint(tensors, model.module.config)
        if UNET + COND_PROJ in tensors:
            renamed["time_embedding.cond_proj.weight"] = tensors[UNET + COND_PROJ]
    else:
        renamed = diffusers.convert_ldm_vae_checkpoint(tensors, model.module.config)
    return {name: renamed[name] for name in model.shapes if name in renamed}


def _write_model(root: Path, weights: Weights, model: _Model) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in _converted(model, weights.read(model.stored)).items()}
    path = root / model.folder / f"{'model' if model.text else 'diffusion_pytorch_model'}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DiffoundryError(f"{path} cannot be written ({error}): free some disk space and try again") from None


def _write_config(root: Path, weights: Weights, model: _Model) -> None:
    config = {name: value for name, value in model.config.items() if name not in ("torch_dtype", "_name_or_path")}
    if model.text:  # transformers 5 loads in the type that is stated here
        config["dtype"] = _FLOATS[weights.dtypes[model.stored[0]]]
    (root / model.folder).mkdir()
    write_json(root / model.folder / "config.json", config)


def _write_tokenizers(root: Path, family: Family, setup: Setup, config: Path | None) -> None:
    for text in family.text_encoders:
        if config is None:
            window = setup.models[text.name]["max_position_embeddings"]
            write_clip_tokenizer(root / text.tokenizer, text.pad_token, window)
        elif not (config / text.tokenizer).is_dir():
            raise CheckpointError(f"{config} has no folder {text.tokenizer!r}: give a complete diffusers folder")
        else:
            shutil.copytree(config / text.tokenizer, root / text.tokenizer)


def _write_rest(root: Path, family: Family, setup: Setup) -> None:
    import diffusers

    (root / "scheduler").mkdir()
    write_json(root / "scheduler" / "scheduler_config.json", setup.scheduler)
    texts = family.text_encoders
    index = {
        "_class_name": setup.pipeline,
        "_diffusers_version": diffusers.__version__,
        **setup.flags,
        **{name: [None, None] for name in family.absent},
        "scheduler": ["diffusers", setup.scheduler["_class_name"]],
        **{text.name: ["transformers", text.class_name] for text in texts},
        **{text.tokenizer: ["transformers", "CLIPTokenizer"] for text in texts},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(root / "model_index.json", index)
