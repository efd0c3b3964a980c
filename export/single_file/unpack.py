"""Single-file checkpoints (Stable Diffusion 1, 2, XL and its refiner in the original layout) to diffusers folders.

The configurations and CLIP's tokenizer are built in, so nothing is fetched.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError, DiffoundryError, reason
from ...common.files import write_json
from ..fit import hollow
from ..loading import quiet
from .configs import Config, built_in, setup_of
from .layouts import UNET, VAE, Layout, TextEncoder, recognise
from .names import clip_names, convert, unet_names, vae_names
from .tokenizer import write_clip_tokenizer
from .weights import SUFFIXES, Weights, open_weights

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CLIP_PREFIX = "text_model."
_ANOTHER = "give the diffusers folder of a checkpoint of the same make as the configuration"


def is_single_file(path: Path) -> bool:
    """Whether `path` is a file that may hold a whole checkpoint, by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the target. shapes: of its weights. originals: what the file calls each of them.

    text: None for the U-Net and the autoencoder.
    """

    folder: str
    text: TextEncoder | None
    shapes: dict[str, tuple[int, ...]]
    originals: dict[str, str]

    def convert(self, name: str, tensor: Any) -> Any:
        """The weight `name` out of the tensor that the file has for it."""
        return convert(name, tensor, self.text is not None and self.text.open_clip)


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A single-file checkpoint whose header, names and shapes were found to be a whole model of its layout.

    setup: see `configs.built_in`. config: the folder that the setup was read from, None for the built-in one.
    """

    weights: Weights
    layout: Layout
    setup: dict[str, Config]
    models: tuple[Model, ...]
    config: Path | None

    @classmethod
    def open(
        cls, source: Path, *, config: Path | None = None, prediction_type: str | None = None, vae: Path | None = None
    ) -> SingleFile:
        """Check `source`, of which no weight is read.

        config: a diffusers folder whose configurations, scheduler and tokenizer are taken instead of the built-in ones.
        prediction_type: `epsilon`, `v_prediction` or `sample`, instead of what the file says or is taken for.
        vae: the file or folder of the autoencoder that it is used with; it may then have none of its own.
        Raises `CheckpointError` when it is damaged, incomplete, of no known layout or has shapes that do not fit.
        """
        return cls.of(open_weights(source), config=config, prediction_type=prediction_type, vae=vae)

    @classmethod
    def of(
        cls,
        weights: Weights,
        *,
        config: Path | None = None,
        prediction_type: str | None = None,
        vae: Path | None = None,
    ) -> SingleFile:
        """The same of weights that were opened."""
        if prediction_type not in (None, *PREDICTION_TYPES):
            known = ", ".join(PREDICTION_TYPES)
            raise DiffoundryError(f"unknown prediction type {prediction_type!r}: choose one of {known}")
        other = None if weights.has(VAE) else vae
        layout = recognise(weights, needs_vae=other is None)
        if config:
            setup = setup_of(config, layout, prediction_type)
        else:
            setup = built_in(weights, layout, prediction_type, other)
        held = (name for name in layout.models if name != "vae" or other is None)
        models = tuple(_model(name, setup, layout) for name in held)
        _check(weights, f"{weights.path}, a {layout.title} checkpoint,", models, config)
        return cls(weights, layout, setup, models, config)

    def write_outline(self, root: Path) -> None:
        """Write all but the weights to the folder `root`: configurations, scheduler and tokenizers."""
        import diffusers

        for text in self.layout.text_encoders:
            self._write_tokenizer(root, text)
        write_json(
            root / "model_index.json", {**self.setup["model_index"], "_diffusers_version": diffusers.__version__}
        )
        (root / "scheduler").mkdir()
        write_json(root / "scheduler" / "scheduler_config.json", self.setup["scheduler"])
        first = {model.folder: next(iter(model.originals.values())) for model in self.models if model.text}
        for name in self.layout.models:
            stated = self.setup[name]
            config = {key: value for key, value in stated.items() if key not in ("torch_dtype", "_name_or_path")}
            if name in first:  # transformers 5 loads in the type that is stated here
                config["dtype"] = _FLOATS[self.weights.dtypes[first[name]]]
            (root / name).mkdir()
            write_json(root / name / "config.json", config)

    def _write_tokenizer(self, root: Path, text: TextEncoder) -> None:
        if self.config is None:
            window = self.setup[text.name]["max_position_embeddings"]
            write_clip_tokenizer(root / text.tokenizer, text.pad_token, window)
        elif not (self.config / text.tokenizer).is_dir():
            raise CheckpointError(f"{self.config} has no folder {text.tokenizer!r}: give a complete diffusers folder")
        else:
            shutil.copytree(self.config / text.tokenizer, root / text.tokenizer)

    def write(self, target: Path) -> None:
        """Write the diffusers folder `target`, which is not there, whole or not at all, in the stored types."""
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as beside:
            folder = Path(beside, target.name)
            folder.mkdir()
            self.write_outline(folder)
            for model in self.models:
                write_weights(folder, self.weights, model)
            folder.replace(target)


def _model(folder: str, setup: dict[str, Config], layout: Layout) -> Model:
    text = next((text for text in layout.text_encoders if text.name == folder), None)
    library, kind = setup["model_index"][folder]
    module = module_of(folder, setup[folder], library, kind)
    shapes = {published_name(name, kind): tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if text:
        prefix, names = text.prefix, clip_names(shapes, text.open_clip)
    elif folder == "vae":
        prefix, names = VAE, vae_names(shapes, len(module.config.block_out_channels))
    elif isinstance(module.config.layers_per_block, int):
        prefix, names = UNET, unet_names(shapes, module.config.layers_per_block)
    else:
        raise CheckpointError(
            "the unet configuration has another number of layers in each block, which no "
            "single-file checkpoint has: give the configuration of a Stable Diffusion checkpoint"
        )
    return Model(folder, text, shapes, {name: prefix + original for name, original in names.items()})


def module_of(folder: str, config: Mapping[str, Any], library: str, kind: str) -> Any:
    """A model on the meta device: shapes without values. Raises `CheckpointError` for what describes none."""
    found = getattr(importlib.import_module(library), kind)
    try:
        with quiet():  # of transformers a copy, because its version 4 adds to what it reads
            return hollow(found, found.config_class.from_dict(dict(config)) if folder.startswith("text") else config)
    except Exception as error:  # each class has its own ways of refusing a configuration
        raise CheckpointError(f"the {folder} configuration describes no model: {reason(error)}") from None


def published_name(name: str, kind: str) -> str:
    """The name of a weight of the class `kind` in files.

    transformers 5 leaves the prefix `text_model.` out, with which CLIP is published and which all versions read.
    """
    bare = kind.startswith("CLIPText") and not name.startswith((_CLIP_PREFIX, "text_projection."))
    return _CLIP_PREFIX + name if bare else name


def _check(weights: Weights, where: str, models: tuple[Model, ...], config: Path | None) -> None:
    """Raise `CheckpointError` unless the file has each weight of `models`, as floats of the right shape."""
    another = f"{_ANOTHER}, not {config}" if config else _ANOTHER
    remedy = f"where the file is whole, {another}" if config else "it is incomplete, download it again"
    due = [name for model in models for name in model.originals.values()]
    known = set(due)
    refuse((name for name in due if name not in weights.shapes), f"{where} lacks", remedy)
    odd = (f"{name} ({weights.dtypes[name]})" for name in due if weights.dtypes[name] not in _FLOATS)
    refuse(odd, f"{where} holds types other than {', '.join(_FLOATS)}:", "use a version of it in one of these")
    extra = (name for name in weights.shapes if name.startswith(UNET) and name not in known)
    refuse(extra, f"{where} has parts in its U-Net that its configuration does not name:", another)
    wrong = (text for model in models for text in misfits(weights, model))
    refuse(wrong, f"{where} does not fit its configuration:", another)


def misfits(weights: Weights, model: Model) -> Iterable[str]:
    """What has another shape than `model`, found by converting tensors without values."""
    import torch

    for name, due in model.shapes.items():
        original = model.originals[name]
        empty = torch.empty(weights.shapes[original], device="meta")
        try:
            found = list(model.convert(name, empty).shape)
        except (RuntimeError, ValueError, IndexError):  # whatever torch raises for a tensor of the wrong rank
            found = list(empty.shape)
        if found != list(due):
            yield f"{original} gives {found} where {list(due)} is due"


def refuse(found: Iterable[str], what: str, remedy: str) -> None:
    """Raise `CheckpointError` that names the first of `found`, if there are any."""
    names = list(dict.fromkeys(found))
    if names:
        more = f" … ({len(names)} in all)" if len(names) > 3 else ""
        raise CheckpointError(f"{what} {', '.join(names[:3])}{more}: {remedy}")


def write_weights(root: Path, weights: Weights, model: Model) -> None:
    """Write the weights of `model` into its folder in `root`. Raises `DiffoundryError` on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = weights.read(dict.fromkeys(model.originals.values()))
    tensors = {name: model.convert(name, stored[old]).contiguous() for name, old in model.originals.items()}
    path = root / model.folder / f"{'model' if model.text else 'diffusion_pytorch_model'}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DiffoundryError(f"{path} cannot be written ({error}): free some disk space and try again") from None
