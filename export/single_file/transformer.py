"""A transformer in one file, in the layout of the original authors or of diffusers, as a folder of diffusers.

The file has the transformer alone, or beside the other parts of a checkpoint, which are then left to the checkpoint
whose transformer it stands for. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError
from ...common.files import remove, write_json
from ...families.original_transformer import originals
from ..fit import hollow
from .weights import Weights, open_weights

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
_OTHERS = re.compile(
    r"(vae|first_stage_model|text_encoders?(_\d)?|conditioner|cond_stage_model|model_ema|clip_[lg]|t5xxl)\."
)
"""Other parts of a whole checkpoint."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALED = "scaled_fp8"
_SHARD_BYTES = 1 << 30
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_transformer(path: Path, config: Mapping[str, Any], target: Path) -> None:
    """Write the transformer in the file `path` as the diffusers folder `target`, whole or not at all.

    config: of the transformer that it stands for, whose class and sizes it must have. What is stored in eight bits
    becomes bfloat16. Raises `CheckpointError` for a file that is damaged or of another kind or size.
    """
    import diffusers
    import torch
    from safetensors.torch import save_file

    weights = open_weights(path)
    kind = str(config["_class_name"])
    shapes = {name: tuple(each.shape) for name, each in hollow(getattr(diffusers, kind), config).state_dict().items()}
    places = _places(weights, kind, shapes)
    scaled = any(name.endswith(_SCALED) for name in weights.shapes)
    for stored, _, _ in places.values():
        if scaled and weights.dtypes[stored] in _FP8 and _scale(stored) not in weights.shapes:
            raise CheckpointError(
                f"{path} holds {stored} in fp8 without its scale ({_scale(stored)}): download it again"
            )
    beside = target.with_name(f"{target.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def write() -> None:
        name = f"diffusion_pytorch_model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, beside / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, (stored, start, swapped) in places.items():
        tensor = weights.read([stored])[stored]
        if weights.dtypes[stored] in _FP8:
            scale = _scale(stored)
            factor = weights.read([scale])[scale].float() if scale in weights.shapes else 1.0
            tensor = (tensor.float() * factor).to(torch.bfloat16)
        if len(shapes[name]) and tensor.shape[0] != shapes[name][0]:
            tensor = tensor[start : start + shapes[name][0]]
        if swapped:
            tensor = torch.cat(list(reversed(tensor.chunk(2))))
        shard[name] = tensor.reshape(shapes[name]).clone()
        if sum(each.nbytes for each in shard.values()) > _SHARD_BYTES:
            write()
    write()
    (beside / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_json(beside / "config.json", dict(config))
    remove(target)
    beside.replace(target)


def _scale(name: str) -> str:
    """The name of what a weight in eight bits is multiplied with."""
    return f"{name.removesuffix('.weight')}.scale_weight"


def _places(weights: Weights, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, int, bool]]:
    """For each weight of the model its tensor in the file, the first of its rows there, and whether its halves swap."""
    path = weights.path
    own = originals(kind, shapes)
    layouts = [
        {name: (f"{prefix}{each.name}", each.order, each.swapped) for name, each in own.items()} for prefix in _PREFIXES
    ]
    layouts += [{name: (f"{prefix}{name}", 0, False) for name in shapes} for prefix in _PREFIXES]
    found = max(layouts, key=lambda layout: sum(stored in weights.shapes for stored, _, _ in layout.values()))
    if not any(stored in weights.shapes for stored, _, _ in found.values()):
        raise CheckpointError(
            f"{path} holds no weights of a {kind} (its tensors are {', '.join(sorted(weights.shapes)[:3]) or 'none'}): "
            "give a file with the transformer of this kind of checkpoint"
        )
    missing = sorted({stored for stored, _, _ in found.values()} - weights.shapes.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks the weights {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} ({len(missing)} in "
            "all): it is of another size than the checkpoint's transformer, or incomplete"
        )
    places, rows = {}, dict.fromkeys((stored for stored, _, _ in found.values()), 0)
    for name, (stored, _, swapped) in sorted(found.items(), key=lambda item: item[1][:2]):
        places[name] = stored, rows[stored], swapped
        rows[stored] += shapes[name][0] if shapes[name] else 1
    for stored, count in rows.items():
        held = weights.shapes[stored]
        if (held[0] if held else 1) != count:
            raise CheckpointError(
                f"{path}: {stored} has the shape {held}, the checkpoint's transformer asks for {count} rows: give a "
                "file for a transformer of this size"
            )
    for stored in _unused(weights, {stored for stored, _, _ in found.values()}):
        raise CheckpointError(
            f"{path} holds {stored}, which the checkpoint's {kind} has no place for: give the folder of a checkpoint "
            "of the same kind"
        )
    return {name: places[name] for name in shapes}


def _unused(weights: Weights, used: set[str]) -> Iterator[str]:
    """The tensors that are neither of the transformer nor of other parts of a checkpoint."""
    scales = {f"{name.removesuffix('.weight')}.{end}" for name in used for end in ("scale_weight", "scale_input")}
    for name in sorted(weights.shapes):
        if name not in used | scales and not _OTHERS.match(name) and not name.endswith(_SCALED):
            yield name
