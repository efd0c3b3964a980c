"""The files of an IP-Adapter, read and checked: its projection of a picture, and keys and values for the denoiser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.checks import LARGEST_SIDE, is_whole
from ..common.errors import CheckpointError, DiffoundryError, reason
from ..common.files import read_json, write_json
from ..families.image_prompt import EMBEDS, FLUX, HIDDEN, SD3, UNET, Adapter
from .loading import quiet
from .weight_files import open_safetensors, other_kind, read_pickle

ENCODER = "image_encoder"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PROJECTION = "image_proj."
_KEY = re.compile(r"ip_adapter\.(\d{1,4})\.to_([kv])_ip\.weight")
_OF_LAYER = re.compile(r"ip_adapter\.(\d{1,4})\.(.+)")
_OF_XLABS = (
    (re.compile(r"ip_adapter_proj_model\."), _PROJECTION),
    (
        re.compile(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\."),
        r"ip_adapter.\1.to_\2_ip.",
    ),
)
"""The names of XLabs' files of FLUX.1, and those of the others."""
_PARTS = {
    "flux": ("to_k_ip.weight", "to_k_ip.bias", "to_v_ip.weight", "to_v_ip.bias"),
    "sd3": (
        *("norm_ip.linear.weight", "norm_ip.linear.bias", "to_k_ip.weight", "to_v_ip.weight"),
        *("norm_q.weight", "norm_k.weight", "norm_ip_k.weight"),
    ),
}
"""What each layer of a transformer has in the files."""
_OF = {"flux": FLUX, "sd3": SD3}
_FIRST = {"plain": "proj.weight", "flux": "proj.weight", "plus": "proj_in.weight", "sd3": "proj_in.weight"}
_FIRST |= {"full": "proj.0.weight"}
"""The weight of each kind that reads what the image encoder gives."""
_FACE = "give one of the kinds plain, Plus and Full, or a FaceID without a LoRA, such as FaceID-Portrait"


@dataclass(frozen=True, slots=True)
class IPAdapterFile:
    """kind: `plain`, `plus`, `full` or `face`, of U-Nets, `flux` or `sd3`. tensors: by their published names, XLabs' as
    the others. encoder: the folder of its image encoder, None for a `face`, which is given embeddings that a face model
    made."""

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
        _check_shapes(path, kind, tensors)
        _check_values(path, tensors)
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
        config = encoder_config(self.encoder, "siglip" if self.kind == "sd3" else "clip")
        more = self.encoder / "preprocessor_config.json"
        prepared = read_json(more, "the configuration of the preprocessor") if more.is_file() else {}
        reads = EMBEDS if self.kind in ("plain", "flux") else HIDDEN
        first, key = self.tensors[_PROJECTION + _FIRST[self.kind]], self.layers()[0][0]
        patches = (int(config["image_size"]) // int(config["patch_size"])) ** 2
        if reads == EMBEDS:
            tokens = int(first.shape[0]) // int(key.shape[1])
        elif self.kind == "plus":
            tokens = int(self.tensors[f"{_PROJECTION}latents"].shape[1])
        else:
            tokens = patches if self.kind == "sd3" else patches + 1
        return Adapter(
            _OF.get(self.kind, UNET),
            encoder,
            config,
            prepared,
            reads,
            int(first.shape[1]),
            tokens,
            int(key.shape[1]),
            len(self.layers()),
            # that of Stable Diffusion 3 makes its tokens at each step anew, of the picture and the timestep
            int(first.shape[0]) if self.kind == "sd3" else 0,
        )

    def _face(self) -> Adapter:
        key, width = self.layers()[0][0], int(self.tensors[f"{_PROJECTION}proj.0.weight"].shape[1])
        tokens = int(self.tensors[f"{_PROJECTION}proj.2.weight"].shape[0]) // int(key.shape[1])
        return Adapter(UNET, "", {}, {}, EMBEDS, width, tokens, int(key.shape[1]), len(self.layers()))

    def layers(self) -> list[tuple[Any, Any]]:
        """The weights of keys and values for each cross-attention, (C, width) each, in diffusers' order."""
        found: dict[int, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            match = _KEY.fullmatch(name)
            if match:
                found.setdefault(int(match[1]), {})[match[2]] = tensor
        return [(each["k"], each["v"]) for _, each in sorted(found.items())]

    def parts(self) -> list[dict[str, Any]]:
        """All weights of each layer by their names, in diffusers' order."""
        found: dict[int, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            match = _OF_LAYER.fullmatch(name)
            if match:
                found.setdefault(int(match[1]), {})[match[2]] = tensor
        return [each for _, each in sorted(found.items())]

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


def encoder_config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration of an image encoder, with the defaults of its class. kind: `clip` or `siglip`, also where the
    folder holds a whole one.

    Raises `CheckpointError` for that of another kind of model.
    """
    import transformers

    found = read_json(folder / "config.json", "the configuration of the image encoder").get("model_type")
    if found not in (kind, f"{kind}_vision_model"):
        raise CheckpointError(
            f"{folder} holds a model of the type {found!r}, which is not supported as an image encoder of this "
            f"IP-Adapter; {kind}_vision_model is"
        )
    own = transformers.SiglipVisionConfig if kind == "siglip" else transformers.CLIPVisionConfig
    try:
        with quiet():
            config: dict[str, Any] = own.from_pretrained(folder).to_dict()
    except Exception as error:  # each version has its own ways of refusing a configuration
        raise CheckpointError(f"{folder}/config.json is no image encoder's ({reason(error)})") from None
    side, patch = config["image_size"], config["patch_size"]
    if not (is_whole(side) and is_whole(patch) and 1 <= patch <= side <= LARGEST_SIDE):
        raise CheckpointError(
            f"{folder}/config.json says pictures of {side!r:.40} pixels in patches of {patch!r:.40}: give the image "
            "encoder that the IP-Adapter was trained with"
        )
    return config


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
            return {_renamed(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found: dict[str, Any] = {}
    for part, content in read_pickle(path).items():
        inner = content.items() if isinstance(content, Mapping) else [("", content)]
        for name, value in inner:
            if isinstance(value, torch.Tensor):
                found[_renamed(f"{part}.{name}" if name else str(part))] = value.detach()
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _OF_XLABS:
        name = theirs.sub(ours, name)
    return name


def _kind(path: Path, tensors: Mapping[str, Any]) -> str:
    names = {name.removeprefix(_PROJECTION) for name in tensors if name.startswith(_PROJECTION)}
    if not names or not any(_KEY.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{path} holds no IP-Adapter (no image_proj.* and ip_adapter.*): give the file of one")
    if any(name.startswith("perceiver_resampler.") for name in names):
        raise CheckpointError(f"{path} is an IP-Adapter FaceID-Plus, which is not supported: {_FACE}")
    if any("_lora." in name for name in tensors):
        raise CheckpointError(f"{path} is an IP-Adapter FaceID with a LoRA, which is not supported: {_FACE}")
    if any(".norm_added_" in name for name in tensors):
        raise CheckpointError(
            f"{path} is an IP-Adapter of InstantX for FLUX.1, which is not supported: give one in the form of XLabs'"
        )
    parted = next((kind for kind, sign in _SIGNS.items() if any(sign in name for name in tensors)), None)
    if parted is not None:
        return _of_transformer(path, tensors, names, parted)
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


def _check_shapes(path: Path, kind: str, tensors: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a shape that is read is not there, or tokens have several widths."""
    first = _PROJECTION + ("proj.0.weight" if kind == "face" else _FIRST[kind])
    due = {first: 2} | ({_PROJECTION + "proj.2.weight": 2} if kind == "face" else {})
    due |= {f"{_PROJECTION}latents": 3} if kind in ("plus", "sd3") else {}
    due |= dict.fromkeys((name for name in tensors if _KEY.fullmatch(name)), 2)
    shapes = {name: tuple(tensors[name].shape) if name in tensors else () for name in due}
    wrong = [name for name, shape in shapes.items() if len(shape) != due[name] or not all(shape)]
    widths = [] if wrong else [shape[1] for name, shape in shapes.items() if _KEY.fullmatch(name)]
    wrong += [name for name in shapes if widths and _KEY.fullmatch(name) and shapes[name][1] != widths[0]]
    if wrong:
        raise CheckpointError(f"{path} is damaged: {wrong[0]:.100} has another shape than is due; download it again")


def _check_values(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for weights that are no finite floats."""
    import torch

    for name, tensor in tensors.items():
        if not name.startswith((_PROJECTION, "ip_adapter.")):
            continue
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{path} is damaged: {name:.100} ({tensor.dtype}) holds what is no finite float; download it again"
            )


_SIGNS = {"sd3": ".norm_ip.linear.", "flux": "to_k_ip.bias"}
"""What the names of those of transformers have in them."""


def _of_transformer(path: Path, tensors: Mapping[str, Any], names: set[str], kind: str) -> str:
    """`kind`, where the file is whole. names: of the weights of its projection."""
    due = {"flux": {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}, "sd3": {"proj_in.weight", "latents"}}[kind]
    if not due <= names:
        raise CheckpointError(
            f"{path} is an IP-Adapter of {_OF[kind]} without {', '.join(sorted(due - names))}, which is of an unknown "
            "kind or damaged: give one that diffusers loads"
        )
    layers: dict[int, set[str]] = {}
    for name in tensors:
        match = _OF_LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), set()).add(match[2])
    for number in range(max(layers) + 1):
        lacking = [part for part in _PARTS[kind] if part not in layers.get(number, set())]
        if lacking:
            raise CheckpointError(f"{path} lacks {lacking[0]} of layer {number}: download it again")
    return kind
