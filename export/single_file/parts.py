"""A part of a checkpoint in one file as a folder of diffusers.

The file has the part alone, or beside others, which are left to the checkpoint that the part is for. Tensors are read
and written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...common.errors import CheckpointError
from ...common.files import remove, write_json
from ..configs import QWEN3 as OF_QWEN3
from ..shards import write_shards
from ..weight_files import check_names
from .layouts import looks_like
from .part_names import HALVES, IDENTITY, QWEN3, T5, TRANSPOSED, Origin, is_beside, is_scale, namings, prefixes
from .unpack import module_of, published_name, refuse
from .weights import Weights

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


class Place(NamedTuple):
    """Where a weight lies: its tensor, the first of its rows there, and what is done with it; see `Origin`."""

    stored: str
    start: int
    turn: str


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file whose names and shapes were found to hold a whole model; no weight of it was read.

    config: of the model. shapes: of its weights, and places: where each lies. eight_bit: whether some have eight bits.
    """

    weights: Weights
    library: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    eight_bit: bool

    @classmethod
    def of(cls, weights: Weights, component: str, library: str, kind: str, config: Mapping[str, Any]) -> PartFile:
        """The component in `weights` that stands for one of a checkpoint.

        library, kind: of its class. config: of the one that it stands for, whose sizes it must have.
        Raises `CheckpointError` for a file that is damaged, incomplete or of another kind or size.
        """
        check_names(weights.path, (name for name in weights.shapes if not is_scale(name)))
        kind = QWEN3 if kind in OF_QWEN3 else kind  # its layers, without the head
        module = module_of(component, config, library, kind)
        named = {published_name(name, kind): tuple(each.shape) for name, each in module.state_dict().items()}
        shapes = {name: each for name, each in named.items() if kind != T5 or name != "encoder.embed_tokens.weight"}
        prefix, naming = _chosen(weights, component, kind, config, shapes)
        due = _due(naming, shapes)
        _check(weights, component, due)
        layers = config.get("num_hidden_layers")
        refuse(
            (name for name in sorted(weights.shapes) if name not in due and not is_beside(name, prefix, kind, layers)),
            f"{weights.path} holds what the checkpoint's {component} ({kind}) has no place for:",
            "give the folder of a checkpoint of the same kind",
        )
        for stored in due:
            _check_scale(weights, stored, prefix)
        narrow = any(weights.dtypes[stored] in _FP8 for stored in due)
        if library == "diffusers":
            config = {**config, "_class_name": kind}
        else:  # of what was stored there
            config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
        return cls(weights, library, config, shapes, _places(naming, shapes), narrow)

    @property
    def size(self) -> int:
        """Bytes that `write` takes."""
        numbers = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return sum(count * self._bits(self.places[name].stored) // 8 for name, count in numbers.items())

    def _bits(self, stored: str) -> int:
        return 16 if self.eight_bit else _BITS.get(self.weights.dtypes.get(stored, ""), 16)

    def write(self, target: Path) -> None:
        """Write the folder `target`, whole or not at all, in the stored types.

        Where a weight has eight bits, all become bfloat16. Raises `DiffoundryError` on a full disk.
        """
        beside = target.with_name(f"{target.name}.part")
        remove(beside)
        beside.mkdir(parents=True)
        write_shards(beside, _STEMS[self.library], ((name, self._read(name)) for name in self.shapes))
        write_json(beside / "config.json", dict(self.config))
        remove(target)
        beside.replace(target)

    def _read(self, name: str) -> Any:
        """The weight `name`, in memory of its own."""
        import torch

        stored, start, turn = self.places[name]
        shape = self.shapes[name]
        if turn == IDENTITY:
            other = next(each.stored for each in self.places.values() if each.stored)
            made = torch.eye(shape[0], dtype=self.weights.read([other])[other].dtype)
            return made.to(torch.bfloat16) if self.eight_bit else made
        whole = self.weights.read([stored])[stored]
        rows = slice(start, start + shape[0]) if turn != TRANSPOSED and shape else slice(None)
        tensor = whole[rows] if whole.ndim else whole
        scale = _scale(self.weights, stored)
        if scale:
            factor = self.weights.read([scale])[scale].float().reshape(-1)
            factor = factor[rows] if factor.numel() > 1 else factor
            tensor = tensor.float() * factor.reshape(-1, *[1] * (tensor.ndim - 1))
        if turn == HALVES:
            tensor = torch.cat(list(reversed(tensor.chunk(2))))
        elif turn == TRANSPOSED:
            tensor = tensor.t()
        return tensor.reshape(shape).to(torch.bfloat16 if self.eight_bit else whole.dtype).clone().contiguous()


def _chosen(
    weights: Weights, component: str, kind: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Origin]]:
    """The prefix and the names, with it, that most of a file's tensors have, and of the right shapes."""
    best: tuple[tuple[int, int, int], str, dict[str, Origin]] | None = None
    for naming in namings(component, kind, config, shapes):
        for prefix in (*prefixes(component, kind), ""):
            named = {
                name: origin._replace(name=prefix + origin.name) if origin.name else origin
                for name, origin in naming.items()
            }
            due = _due(named, shapes)
            found = [stored for stored in due if stored in weights.shapes]
            fitting = sum(_fits(weights.shapes[stored], due[stored]) for stored in found)
            score = (fitting, len(found), len(found) - len(due))
            if found and (best is None or score > best[0]):
                best = score, prefix, named
    if best is None:
        looks = looks_like(weights)
        shown = (
            f"it looks like {looks}" if looks else f"its tensors are {', '.join(sorted(weights.shapes)[:3]) or 'none'}"
        )
        raise CheckpointError(
            f"{weights.path} holds no weights of {kind}, the class of the checkpoint's {component} ({shown}): give a "
            f"file with the {component} of this kind of checkpoint"
        )
    return best[1], best[2]


def _due(naming: Mapping[str, Origin], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the file must have."""
    due: dict[str, tuple[int, ...]] = {}
    for name, origin in naming.items():
        if not origin.name:
            continue
        shape = shapes[name][::-1] if origin.turn == TRANSPOSED else shapes[name]
        if origin.name in due:
            shape = (due[origin.name][0] + shape[0], *shape[1:])
        due[origin.name] = shape
    return due


def _fits(found: tuple[int, ...], due: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape that is due; a convolution of one pixel is as good as a matrix."""
    return found[: len(due)] == due and all(size == 1 for size in found[len(due) :])


def _check(weights: Weights, component: str, due: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless the file has each tensor that is due, as floats of the right shape."""
    path, there = weights.path, [stored for stored in due if stored in weights.shapes]
    odd = (f"{stored} ({weights.dtypes[stored]})" for stored in there if weights.dtypes[stored] not in (*_BITS, *_FP8))
    refuse(odd, f"{path} holds types other than {', '.join((*_BITS, *_FP8))}:", "use a version of it in one of these")
    wrong = (
        f"{stored} has the shape {list(weights.shapes[stored])}, the checkpoint's {component} asks for "
        f"{list(due[stored])}"
        for stored in there
        if not _fits(weights.shapes[stored], due[stored])
    )
    refuse(wrong, f"{path}:", f"give a file for a {component} of this size")
    refuse(
        (stored for stored in due if stored not in weights.shapes),
        f"{path} lacks the weights",
        f"it is of another size or kind than the checkpoint's {component}, or incomplete; give a file for this kind of "
        "checkpoint",
    )


def _scale(weights: Weights, stored: str) -> str | None:
    """The name of what a weight is multiplied with, None for one that stands for itself."""
    names = (f"{stored.removesuffix('.weight')}{end}" for end in _SCALES)
    return next((name for name in names if name in weights.shapes), None)


def _check_scale(weights: Weights, stored: str, prefix: str) -> None:
    """Raise `CheckpointError` for a weight in eight bits whose scale is not there, and for a scale that is none."""
    module, scale = stored.removesuffix(".weight"), _scale(weights, stored)
    marks = (name.removesuffix("scaled_fp8") for name in weights.shapes if name.endswith("scaled_fp8"))
    scaled = f"{module}.comfy_quant" in weights.shapes or any(prefix.startswith(mark) for mark in marks)
    if scale is None and scaled and weights.dtypes[stored] in _FP8:
        raise CheckpointError(
            f"{weights.path} holds {stored} in fp8 without its scale ({module}{_SCALES[0]}): download it again"
        )
    count = 1 if scale is None else math.prod(weights.shapes[scale])
    if count not in (1, *weights.shapes[stored][:1]):
        raise CheckpointError(
            f"{weights.path} holds {scale} of {count} numbers, where fp8 has one, or one for each row: use a version "
            "of it in fp16 or bf16"
        )


def _places(naming: Mapping[str, Origin], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where each weight lies, by the order of those that are the rows of one tensor."""
    places, rows = {}, dict.fromkeys((origin.name for origin in naming.values()), 0)
    for name, (stored, _, turn) in sorted(naming.items(), key=lambda item: item[1][:2]):
        places[name] = Place(stored, rows[stored], turn)
        rows[stored] += shapes[name][0] if shapes[name] else 1
    return places
