"""A ControlNet in one file, in the layout of its authors or under diffusers' names, to a diffusers folder.

Such a file has no configuration: it is that of the checkpoint's U-Net, which the ControlNet is a copy of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError, reason
from ...common.files import write_json
from ...families.control import CONTROLNET, UNION
from ..fit import hollow
from ..weight_files import other_kind
from .names import unet_names
from .unpack import Model, misfits, refuse, write_weights
from .weights import SUFFIXES, Weights, open_weights

_PREFIX = "control_model."
_HINT = "input_hint_block."
_EMBEDDING = "controlnet_cond_embedding."
_TASKS = "task_embedding"
_MODES = "control_add_embedding.linear_1.weight"
_LAYERS = "transformer_layes."
_OF_A_UNION = (_TASKS, _LAYERS, "spatial_ch_projs.", "control_add_embedding.")
_HEADS = 8
"""Of its layers, which a file does not tell; each token reads itself alone, so that they change nothing."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_ANOTHER = "it was made for another model; give one that was trained with this kind of checkpoint"
_OTHERS = {
    "lllite_": "a ControlNet-LLLite",
    "body.": "a T2I-Adapter",
    "adapter.": "a T2I-Adapter",
    "lora_controlnet": "a Control-LoRA",
    "model.diffusion_model.": "a whole checkpoint",
    "double_blocks.": "a ControlNet of FLUX",
    "controlnet_x_embedder.": "a ControlNet of FLUX or SD3",
}
"""What other files hold, by how one of their names begins."""


class ControlNetFile:
    """A file whose names and shapes were found to be a ControlNet for a U-Net of the configuration `unet`."""

    def __init__(self, path: Path, unet: Mapping[str, Any]) -> None:
        """Raises `CheckpointError` for a file of another kind, a damaged one, and one for another model."""
        from diffusers import ControlNetModel, ControlNetUnionModel

        if path.suffix.lower() not in SUFFIXES:
            raise other_kind(path) or CheckpointError(
                f"{path} is no ControlNet: give a diffusers folder, or a file that ends in {', '.join(SUFFIXES)}"
            )
        self._weights = open_weights(path)
        prefix, original = _layout(self._weights)
        embedding = f"{prefix}{_HINT}0.weight" if original else f"{_EMBEDDING}conv_in.weight"
        self.config = _config(unet, self._weights, embedding, original, prefix)
        kind = ControlNetUnionModel if self.config["_class_name"] == UNION else ControlNetModel
        try:
            module = hollow(kind, self.config)
        except Exception as error:  # whatever the class raises for sizes that do not go together
            raise CheckpointError(
                f"the sizes of the ControlNet {path} do not go together ({reason(error):.120}): download it again"
            ) from None
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        names = _original_names(shapes, self.config) if original else {name: name for name in shapes}
        self._model = Model("", None, shapes, {name: prefix + old for name, old in names.items()})
        due = self._model.originals.values()
        found = self._weights.dtypes
        refuse(
            (name for name in due if name not in found),
            f"{path}, a ControlNet, lacks",
            f"where it is whole, {_ANOTHER}",
        )
        refuse(
            (f"{name} ({found[name]})" for name in due if found[name] not in _FLOATS),
            f"{path} is quantized:",
            "give the original",
        )
        refuse(misfits(self._weights, self._model), f"the ControlNet {path} does not fit the checkpoint:", _ANOTHER)

    def write(self, folder: Path) -> None:
        """Write the diffusers folder, which is not there, whole or not at all, in the stored types."""
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "config.json", self.config)
        write_weights(part, self._weights, self._model)
        part.replace(folder)


def _layout(weights: Weights) -> tuple[str, bool]:
    """What names begin with, and whether they are those of the original layout."""
    for prefix in (_PREFIX, ""):
        if f"{prefix}{_HINT}0.weight" in weights.shapes:
            return prefix, True
    if f"{_EMBEDDING}conv_in.weight" in weights.shapes:
        return "", False
    kind = next((kind for start, kind in _OTHERS.items() if weights.has(start)), "no ControlNet that is known")
    raise CheckpointError(f"{weights.path} holds {kind}, which is not supported as a control: give a ControlNet")


def _config(unet: Mapping[str, Any], weights: Weights, first: str, original: bool, prefix: str) -> dict[str, Any]:
    """The configuration of a ControlNet: what the U-Net's says, and the layers that read the picture."""
    import inspect

    from diffusers import ControlNetModel

    known = inspect.signature(ControlNetModel.__init__).parameters
    shapes = weights.shapes
    pattern = rf"{prefix}{_HINT}(\d+)\.weight" if original else rf"{_EMBEDDING}blocks\.(\d+)\.weight"
    found = sorted((int(match[1]), name) for name in shapes if (match := re.fullmatch(pattern, name)))
    read = {first: 4, **{name: 4 for _, name in found}, **{name: 2 for name in (_TASKS, _MODES) if name in shapes}}
    for name, axes in read.items():
        if len(shapes[name]) != axes or not all(shapes[name]):
            raise CheckpointError(
                f"{weights.path} is damaged: {name} has the shape {list(shapes[name])}, and {axes} axes are due; "
                "download it again"
            )
    layers = [shapes[name][0] for _, name in found][1 if original else 0 :]
    last = layers[:-1] if original else layers  # the last one makes what the U-Net reads
    own = {
        "_class_name": CONTROLNET,
        "in_channels": 4,
        "conditioning_channels": shapes[first][1],
        "conditioning_embedding_out_channels": [shapes[first][0], *last[1::2]],
    }
    if any(name.startswith(_OF_A_UNION) for name in shapes):
        tasks, width = (*shapes.get(_TASKS, ()), 1, 1)[:2]
        blocks = {name.split(".")[1] for name in shapes if name.startswith(_LAYERS)}
        own |= {
            "_class_name": UNION,
            "num_control_type": tasks,
            "num_trans_channel": width,
            "num_proj_channel": unet["block_out_channels"][0],
            "num_trans_head": math.gcd(width, _HEADS),
            "num_trans_layer": max(len(blocks), 1),
            "addition_time_embed_dim": max(shapes.get(_MODES, (1, 1))[-1] // max(tasks, 1), 1),
        }
    return {**{name: value for name, value in unet.items() if name in known}, **own}


def _original_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Original name by diffusers name."""
    names = tuple(names)
    last = 4 * len(config["conditioning_embedding_out_channels"]) - 2
    rules = {
        rf"{_EMBEDDING}conv_in\.": f"{_HINT}0.",
        rf"{_EMBEDDING}conv_out\.": f"{_HINT}{last}.",
        r"controlnet_down_blocks\.(\d+)\.": r"zero_convs.\1.0.",
        r"controlnet_mid_block\.": "middle_block_out.0.",
    }
    own = {}
    for name in names:
        block = re.fullmatch(rf"{_EMBEDDING}blocks\.(\d+)\.(\w+)", name)
        if block:
            own[name] = f"{_HINT}{2 * int(block[1]) + 2}.{block[2]}"
        for pattern, replacement in rules.items():
            if re.match(pattern, name):
                own[name] = re.sub(f"^{pattern}", replacement, name)
    rest = [name for name in names if name not in own]
    return own | unet_names(rest, int(config.get("layers_per_block", 2)))
