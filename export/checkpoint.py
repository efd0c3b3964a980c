"""A diffusers checkpoint on disk (or fetched from the hub), checked before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST_NAME
from ..bundle.wiring import NAME
from ..common.errors import CheckpointError, reason
from ..families.control import PREFIX
from .weight_files import WeightFiles, find, other_kind, read_stated

_ADDED = ("vae_tiny",)
"""Components that no checkpoint holds, and that may be given one."""
_MOST_LAYERS = 10_000
"""Of a model. Its class makes them one by one, without weights, and would not end."""
_TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Qwen3Model", "Qwen3ForCausalLM")
_CLIP = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
"""What a replaced text encoder is read as: its own configuration shows whether it is one."""


def is_part(component: str) -> bool:
    """Whether a component of this name has weights, which may lie in a single file."""
    return component in ("transformer", "unet", "vae") or component.startswith("text_encoder")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with `model_index.json`; `index` is its contents.

    replaced: folders that stand for components of it, or for ones that it lacks.
    """

    root: Path
    index: dict[str, Any]
    replaced: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local folder, or fetch the hub id `owner/name`. Raises `CheckpointError`."""
        if not isinstance(source, (str, Path)) or not str(source):
            raise CheckpointError(f"the checkpoint must be a folder or a hub id, found {source!r}")
        root = Path(source)
        if not root.exists():
            root = _fetch(str(source))
        if root.is_file():
            raise other_kind(root) or CheckpointError(
                f"{root} is a file of an unknown kind: give a folder in the diffusers layout (with model_index.json), "
                "or a .safetensors or .ckpt file"
            )
        if not (root / "model_index.json").is_file():
            raise CheckpointError(f"{root} holds no model_index.json: {_in_place_of_it(root)}")
        exported = (root / "unet" / "model.onnx").is_file() and not (root / "vae").is_dir()
        if exported or (root / MANIFEST_NAME).is_file():
            raise CheckpointError(
                f"{root} holds ONNX models that were made of a checkpoint: give the checkpoint itself; "
                f"`diffoundry run {root}` draws with what is there"
            )
        return cls(root, read_stated(root / "model_index.json", "the pipeline index"))

    @property
    def class_name(self) -> str:
        """The diffusers pipeline class that the checkpoint was saved from."""
        name = self.index.get("_class_name", "")
        return ".".join(map(str, name)) if isinstance(name, list) else str(name)

    def kind(self, name: str) -> tuple[str, str]:
        """Library and class of component `name`, as the index names them; of one that it lacks, its own folder."""
        value = self.index.get(name)
        if isinstance(value, list) and len(value) == 2:
            return str(value[0]), str(value[1])
        return "diffusers", str(self.config(name).get("_class_name", ""))

    def has(self, name: str) -> bool:
        """Whether the pipeline has a component `name`; the refiner of SDXL has no first text encoder."""
        value = self.index.get(name)
        return name in self.replaced or (isinstance(value, list) and value != [None, None])

    def replace(self, folders: Mapping[str, str | Path]) -> Checkpoint:
        """The checkpoint with other folders for some components. Raises `CheckpointError` for what is none."""
        for name, folder in folders.items():
            known = [*(key for key in self.index if self.has(key)), *_ADDED]
            if name not in known:
                raise CheckpointError(f"{self.root} has no component {name!r} to replace: it has {', '.join(known)}")
            if not Path(folder).is_dir():
                found = other_kind(Path(folder)) if is_part(name) and Path(folder).is_file() else None
                file = ", or a file that ends in .safetensors" if is_part(name) else ""
                raise found or CheckpointError(
                    f"{folder} is no folder: give the diffusers folder of the component {name!r}{file}"
                )
        index = {key: value for key, value in self.index.items() if key not in folders}
        replaced = {**self.replaced, **{name: Path(folder) for name, folder in folders.items()}}
        changed = Checkpoint(self.root, index, replaced)
        for name in folders:
            if name in self.index:
                index[name] = changed._kind_of_folder(name, self.index[name])
        return changed

    def with_controls(self, folders: Mapping[str, str | Path], prefix: str = PREFIX) -> Checkpoint:
        """The checkpoint with ControlNets beside it, or T2I-Adapters. prefix: of the names of their components.

        Raises `CheckpointError` for a name or a folder that is none.
        """
        for name, folder in folders.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise CheckpointError(f"the name of a control has letters, digits and _, found {name!r:.80}")
            if not (Path(folder) / "config.json").is_file():
                kind, more = ("ControlNet", ", or a file of it") if prefix == PREFIX else ("T2I-Adapter", "")
                raise CheckpointError(
                    f"{folder} is no {kind}: give a diffusers folder with config.json and weights{more}"
                )
        return self.beside({prefix + name: Path(folder) for name, folder in folders.items()})

    def beside(self, folders: Mapping[str, Path]) -> Checkpoint:
        """The checkpoint with models in other folders beside its own, by the names that components get."""
        return Checkpoint(self.root, self.index, {**self.replaced, **folders})

    def _kind_of_folder(self, name: str, own: list[Any]) -> list[Any]:
        """The index entry of a replaced component: of a diffusers model its own class, of others the pipeline's."""
        if name.startswith(("text_encoder", "tokenizer")):
            return own if own[1] in _TEXT else [own[0], _CLIP.get(name, own[1])]
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        return [own[0], self.config(name, file).get("_class_name", own[1])]

    def folder(self, name: str) -> Path:
        """The folder of component `name`. Raises `CheckpointError`."""
        folder = self.replaced.get(name, self.root / name)
        if not folder.is_dir():
            raise CheckpointError(
                f"{self.root} has no folder {name!r}: the checkpoint is incomplete, download it again"
            )
        return folder

    def weights(self, name: str, *, adapted: bool = False) -> WeightFiles:
        """The weights of component `name`, whose files were checked to be whole. Raises `CheckpointError`.

        adapted: whether they may have an adapter beside them, see `lora.merged`.
        """
        library = (self.index.get(name) or [None])[0]
        if library is None and name in self.replaced:
            library = "transformers" if "model_type" in self.config(name) else "diffusers"
        return find(self.folder(name), "transformers" if library == "transformers" else "diffusers", adapted=adapted)

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """The JSON configuration of component `name`. Raises `CheckpointError`."""
        path = self.folder(name) / file
        found = read_stated(path, f"the {name} configuration")
        for key, value in found.items():
            if "layers" in key and isinstance(value, (int, float)) and value > _MOST_LAYERS:
                raise CheckpointError(
                    f"{path} asks for {value:g} layers ({key}), more than any model has: give the config.json that "
                    "belongs to the weights"
                )
        return found


def _in_place_of_it(root: Path) -> str:
    """What the folder `root` may be, which is no checkpoint."""
    files = sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))
    if (root / "config.json").is_file():
        return "it is the folder of one model, give the one that it lies in, or this one with --component NAME=FOLDER"
    whole = [path for path in files if path.suffix in (".safetensors", ".ckpt")]
    if whole:
        return f"it is not a diffusers checkpoint, give the file {whole[0]} where that is one"
    inner = sorted(path.parent for path in root.glob("*/model_index.json"))
    return f"give the folder {inner[0]} in it" if inner else "it is not a diffusers checkpoint"


def _fetch(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(f"{name} does not exist: give a folder in the diffusers layout, or a hub id owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*/*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        raise CheckpointError(f"{name} is no local folder, and the hub did not give it: {reason(error)}") from None
