"""The files of an IP-Adapter, read and checked: its projection of a picture, and its keys and values for the U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError, DiffoundryError
from ..common.files import read_json, write_json
from ..families.image_prompt import EMBEDS, HIDDEN, Adapter
from .weight_files import open_safetensors, other_kind, read_pickle

ENCODER = "image_encoder"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PROJECTION = "image_proj."
_KEY = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
_FACE = "give one of the kinds plain, Plus and Full, or a FaceID without a LoRA, such as FaceID-Portrait"


@dataclass(frozen=True, slots=True)
class IPAdapterFile:
    """kind: `plain`, `plus`, `full` or `face`. tensors: by their published names. encoder: the folder of its image
    encoder, None for a `face`, which is given embeddings that a face model made."""

    path: Path
    kind: str
    tensors: dict[str, Any]
    encoder: Path | None

    @classmethod
    def open(cls, source: Path, encoder: Path | None) -> IPAdapterFile:
        """source: a file, or a folder with one. encoder: its image encoder, None for the folder beside the file.

        Raises `CheckpointError` for what is no IP-Adapter, one of a kind that is not supported, and a damaged file.
        """
        path = _file(source)
        tensors = _read(path)
        kind = _kind(path, tensors)
        if kind == "face":
            return cls(path, kind, tensors, None)
        if encoder is None:
            homes = (path.parent / ENCODER, path.parent.parent / "models" / ENCODER)
            encoder = next((home for home in homes if (home / "config.json").is_file()), None)
        if encoder is None:
            raise CheckpointError(
                f"{path} needs the image encoder that it was trained with, and there is none beside it: give "
                "--image-encoder FOLDER"
            )
        if not (encoder / "config.json").is_file():
            raise CheckpointError(f"{encoder} is no folder of an image encoder: give one with config.json and weights")
        return cls(path, kind, tensors, encoder)

    def describe(self, encoder: str) -> Adapter:
        """What it is. encoder: the name of the component that its image encoder becomes."""
        if self.encoder is None:
            return self._face()
        config = read_json(self.encoder / "config.json", "the configuration of the image encoder")
        if config.get("model_type") != "clip_vision_model":
            raise CheckpointError(
                f"{self.encoder} holds a model of the type {config.get('model_type')!r}, which is not supported as an "
                "image encoder; clip_vision_model is"
            )
        more = self.encoder / "preprocessor_config.json"
        prepared = read_json(more, "the configuration of the preprocessor") if more.is_file() else {}
        reads = EMBEDS if self.kind == "plain" else HIDDEN
        first = {"plain": "proj.weight", "plus": "proj_in.weight", "full": "proj.0.weight"}[self.kind]
        key = self.layers()[0][0]
        width = int(self.tensors[_PROJECTION + first].shape[1])
        if self.kind == "plain":
            tokens = int(self.tensors[_PROJECTION + first].shape[0]) // int(key.shape[1])
        elif self.kind == "plus":
            tokens = int(self.tensors[f"{_PROJECTION}latents"].shape[1])
        else:
            tokens = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
        return Adapter(encoder, config, prepared, reads, width, tokens, int(key.shape[1]), len(self.layers()))

    def _face(self) -> Adapter:
        key, width = self.layers()[0][0], int(self.tensors[f"{_PROJECTION}proj.0.weight"].shape[1])
        tokens = int(self.tensors[f"{_PROJECTION}proj.2.weight"].shape[0]) // int(key.shape[1])
        return Adapter("", {}, {}, EMBEDS, width, tokens, int(key.shape[1]), len(self.layers()))

    def layers(self) -> list[tuple[Any, Any]]:
        """The weights of keys and values for each cross-attention, (C, width) each, in diffusers' order."""
        found: dict[int, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            match = _KEY.fullmatch(name)
            if match:
                found.setdefault(int(match[1]), {})[match[2]] = tensor
        return [(each["k"], each["v"]) for _, each in sorted(found.items())]

    def state(self) -> dict[str, dict[str, Any]]:
        """As diffusers' loaders take it, in float32."""
        found: dict[str, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            part, _, rest = name.partition(".")
            found.setdefault(part, {})[rest] = tensor.float()
        return found

    def write(self, folder: Path) -> None:
        """Write it into `folder`, which is not there, in the layout of a diffusers component, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "config.json", {"_class_name": "IPAdapter", "kind": self.kind})
        own = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        try:
            save_file(own, part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise DiffoundryError(f"{part} cannot be written ({error}): free some disk space and try again") from None
        part.replace(folder)


def _file(source: Path) -> Path:
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
        if len(files) != 1:
            raise CheckpointError(
                f"{source} holds {len(files)} files that may be an IP-Adapter: give the one ({', '.join(_SUFFIXES)})"
            )
        return files[0]
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist: give the file of an IP-Adapter")
    if source.suffix.lower() not in _SUFFIXES:
        raise other_kind(source) or CheckpointError(f"{source} is no IP-Adapter: give a file of {', '.join(_SUFFIXES)}")
    return source


def _read(path: Path) -> dict[str, Any]:
    import torch

    if path.suffix.lower() == ".safetensors":
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found: dict[str, Any] = {}
    for part, content in read_pickle(path).items():
        inner = content.items() if isinstance(content, Mapping) else [("", content)]
        for name, value in inner:
            if isinstance(value, torch.Tensor):
                found[f"{part}.{name}" if name else str(part)] = value.detach()
    return found


def _kind(path: Path, tensors: Mapping[str, Any]) -> str:
    names = {name.removeprefix(_PROJECTION) for name in tensors if name.startswith(_PROJECTION)}
    if not names or not any(_KEY.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{path} holds no IP-Adapter (no image_proj.* and ip_adapter.*): give the file of one")
    if any(name.startswith("perceiver_resampler.") for name in names):
        raise CheckpointError(f"{path} is an IP-Adapter FaceID-Plus, which is not supported: {_FACE}")
    if any("_lora." in name for name in tensors):
        raise CheckpointError(f"{path} is an IP-Adapter FaceID with a LoRA, which is not supported: {_FACE}")
    signs = {"plain": "proj.weight", "full": "proj.3.weight", "plus": "latents", "face": "proj.2.weight"}
    kind = next((kind for kind, sign in signs.items() if sign in names), None)
    if kind is None or (kind == "face" and not {"proj.0.weight", "norm.weight"} <= names):
        raise CheckpointError(f"{path} is an IP-Adapter of an unknown kind: {_FACE}")
    pairs: dict[str, set[str]] = {}
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match:
            pairs.setdefault(match[1], set()).add(match[2])
    lacking = [number for number, both in pairs.items() if both != {"k", "v"}]
    if lacking:
        raise CheckpointError(f"{path} lacks a key or a value of layer {lacking[0]}: download it again")
    return kind
