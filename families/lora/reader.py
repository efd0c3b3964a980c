"""A file and the weights of a checkpoint put together: what it changes, and how."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.checks import is_finite
from ...common.errors import LoraError
from ...common.files import read_json, sha256_file
from . import cloneofsimo
from .forms import LAZY, Change
from .names import Modules
from .tensors import file_of, read_tensors, shown

_MOST_NAMED = 3
_OTHER = (
    (
        re.compile(
            r"lora_unet_(double|single)_blocks_|(transformer|diffusion_model)\.(double|single|single_transformer)_"
        ),
        "FLUX",
    ),
    (
        re.compile(r"lora_unet_joint_blocks_|(transformer|diffusion_model)\.joint_|transformer\.transformer_blocks\."),
        "SD 3 or FLUX",
    ),
    (re.compile(r"lora_te3_"), "a model with three text encoders"),
    (re.compile(r"blocks\.\d+\.(self|cross)_attn\."), "a video model"),
    (re.compile(r"to_[kv]_ip|image_proj\."), "an IP-Adapter: give it to `compile --ip-adapter`"),
    (re.compile(r"control_model\.|controlnet_"), "a ControlNet: give it to `compile --controlnet`"),
    (re.compile(r"string_to_param|emb_params|clip_[lg]$"), "a textual inversion: give it with --embedding"),
    (
        re.compile(r"first_stage_model\.|model\.diffusion_model\.|conditioner\."),
        "a whole checkpoint: give it to `compile`",
    ),
)
"""Keys of files that are no LoRA for a U-Net, and what they are."""


@dataclass(frozen=True)
class Weights:
    """The weights of the components that a LoRA may change.

    shapes: by component and name, as the checkpoint has them. denoiser: its component. layers: `layers_per_block` of a
    U-Net, 0 for another. title: what the checkpoint is, for errors. kind: the class of a transformer.
    """

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    denoiser: str
    layers: int
    title: str = "this model"
    kind: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The text encoders."""
        return tuple(name for name in self.shapes if name != self.denoiser)

    @cached_property
    def modules(self) -> Modules:
        """Its modules, by the names that files have for them."""
        return Modules(self.shapes, self.denoiser, self.texts, self.layers, self.kind)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file that fits a checkpoint. changes: by component and by the name of the weight. unused: keys left over.

    sha256: of the file. metadata: that its trainer wrote.
    """

    path: Path
    sha256: str
    changes: Mapping[str, Mapping[str, Change]] = field(repr=False)
    unused: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, weights: Weights, *, ignore_unused: bool = False) -> LoraFile:
        """Read a file, or the folder that holds one, and find what it changes.

        ignore_unused: leave out keys that are for nothing in the checkpoint, or for weights of another shape.
        Raises `LoraError` for a damaged file, one for another model, and keys that are not used.
        """
        file = file_of(Path(path))
        tensors, metadata = read_tensors(file)
        return cls.of(file, tensors, metadata, weights, ignore_unused=ignore_unused)

    @classmethod
    def of(
        cls,
        file: Path,
        tensors: Mapping[str, Array],
        metadata: Mapping[str, str],
        weights: Weights,
        *,
        ignore_unused: bool = False,
    ) -> LoraFile:
        """The same of tensors that were read from `file`."""
        tensors = cloneofsimo.named(tensors, metadata, weights.shapes, weights.denoiser) or tensors
        try:
            parts, unused = _sorted_out(tensors, weights)
        except LoraError as error:
            raise LoraError(f"{file}: {error}: it is damaged") from None
        if not parts:
            raise LoraError(f"{file} {_what(tensors, weights)}")
        scales = _Scales.of(file, metadata)
        changes: dict[str, dict[str, Change]] = {}
        misfits = []
        for (component, module), own in parts.items():
            try:
                made = _of_module(module, own, weights, scales, component)
            except LoraError as error:
                misfits.append(f"{component}.{module}: {error}")
                continue
            changes.setdefault(component, {}).update(made)
        if misfits and (not changes or not ignore_unused):
            another = f"it was made for a model of other widths than {weights.title}; give one for this model"
            wrong = "; ".join(misfits[:1]) + (f" ({len(misfits)} in all)" if len(misfits) > 1 else "")
            hint = another if len(misfits) > 1 else "it is damaged: download it again"
            raise LoraError(f"{file} has {wrong}: {hint}")
        if unused and not ignore_unused:
            named = ", ".join(shown(name) for name in unused[:_MOST_NAMED])
            more = f" … ({len(unused)} of {len(tensors)})" if len(unused) > _MOST_NAMED else ""
            raise LoraError(
                f"{file} has keys that change nothing in {weights.title}: {named}{more}: give a LoRA for this "
                "model, or take what is left with --lora-ignore-unused"
            )
        for component, found in changes.items():
            for name, change in found.items():
                if not math.isfinite(change.scale):
                    raise LoraError(f"{file}: the scale of {component}.{name} is not finite: it is damaged")
        return cls(file, sha256_file(file), changes, tuple(unused), metadata)


def _sorted_out(
    tensors: Mapping[str, Array], weights: Weights
) -> tuple[dict[tuple[str, str], dict[str, Array]], list[str]]:
    """The parts of each module's change by component and module, and the keys that are for none."""
    modules = weights.modules
    parts: dict[tuple[str, str], dict[str, Array]] = {}
    unused = []
    for name, tensor in tensors.items():
        key = modules.find(name)
        if key is not None and tensor.dtype.kind != "f" and key.part not in ("on_input", "alpha"):
            raise LoraError(f"{shown(name)} is of the type {tensor.dtype}, which no change is stored in")
        if key is None or key.part in parts.get((key.component, key.module), {}):
            unused.append(name)
            continue
        parts.setdefault((key.component, key.module), {})[key.part] = (
            tensor if key.part in LAZY else tensor.astype(np.float32, copy=False)
        )
    for own in parts.values():
        if "magnitude" in own:
            own["dora_scale"] = own.pop("magnitude").reshape(-1)
    alone = [place for place, own in parts.items() if own.keys() <= {"alpha", "dora_scale", "rescale", "ia3"}]
    for place in alone:  # a whole weight is no change, and neither is a scale of nothing
        del parts[place]
    if alone:
        gone = set(alone)
        unused += [name for name in tensors if (key := modules.find(name)) and (key.component, key.module) in gone]
    return parts, unused


def _of_module(
    module: str, parts: dict[str, Array], weights: Weights, scales: _Scales, component: str
) -> dict[str, Change]:
    """The changes of one module, or of those that are its rows. Raises `LoraError`."""
    shapes, joined = weights.shapes[component], weights.modules.joined
    both = {end: joined[f"{module}.{end}"] for end in ("weight", "bias") if f"{module}.{end}" in joined}
    if component != weights.denoiser or not both:
        return _changes(module, parts, shapes, scales, component)
    whole = {}
    for end, each in both.items():
        count = sum(rows for _, _, rows in each.rows)
        whole[f"{module}.{end}"] = (count, *shapes[each.rows[0][0]][1:])
    made: dict[str, Change] = {}
    for name, change in _changes(module, parts, whole, scales, component).items():
        own = both[name.rpartition(".")[2]]
        key = {"lora": "up", "full": "diff"}.get(change.form, "")
        if not key or "dora_scale" in change.parts:
            raise LoraError(f"a {change.form} of several weights at once, which cannot be told apart")
        of_rows = np.concatenate(np.split(change.parts[key], 2)[::-1]) if own.swapped else change.parts[key]
        for weight, start, rows in own.rows:
            cut = {**change.parts, key: of_rows[start : start + rows]}
            made[weight] = Change(change.form, cut, change.scale, shapes[weight])
    return made


def _changes(
    module: str, parts: dict[str, Array], shapes: Mapping[str, tuple[int, ...]], scales: _Scales, component: str
) -> dict[str, Change]:
    """The changes of the weights of one module, by their names. Raises `LoraError`."""
    made = {}
    weight, bias = f"{module}.weight", f"{module}.bias"
    scale = scales.for_module(component, module)
    own = {name: array for name, array in parts.items() if name not in ("diff_b", "b_norm", "w_norm", "up_bias")}
    if "w_norm" in parts:
        own["diff"] = parts["w_norm"]
    if own.keys() - {"alpha"}:
        if weight not in shapes:
            raise LoraError("a weight that the model has not")
        made[weight] = Change.of(own, shapes[weight], scale)
    for name in ("diff_b", "b_norm", "up_bias"):
        if name not in parts:
            continue
        if bias not in shapes:
            raise LoraError("a bias that the model has not")
        change = Change.of({"diff": parts[name]}, shapes[bias])
        if name == "up_bias":
            factor = made[weight].scale if weight in made else 1.0
            change = Change(change.form, change.parts, factor, change.shape)
        made[bias] = change
    return made


def _what(tensors: Mapping[str, Array], weights: Weights) -> str:
    """Why nothing of a file is for a checkpoint."""
    for name in tensors:
        for pattern, what in _OTHER:
            if pattern.search(name):
                kind = what if ":" in what else f"a LoRA for {what}, not for {weights.title}: give one for it"
                return f"is {kind}"
    first = next(iter(tensors))
    if all(each.ndim < 3 for each in tensors.values()) and len(tensors) < 3 and first.startswith("<"):
        return "is a textual inversion: give it with --embedding"
    return f"changes nothing in {weights.title} (its first key is {shown(first)}): give a LoRA for this model"


@dataclass(frozen=True, slots=True)
class _Scales:
    """What PEFT's configuration says of scales, by component; without one a change has the scale 1.

    They stand in the metadata of diffusers' files, and in `adapter_config.json` beside PEFT's.
    """

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, file: Path, metadata: Mapping[str, str]) -> _Scales:
        text, beside = metadata.get("lora_adapter_metadata"), file.parent / "adapter_config.json"
        stated: Any = {}
        if text:
            try:
                stated = json.loads(text)
            except (ValueError, RecursionError):
                raise LoraError(f"{file}: its metadata are damaged: download it again") from None
        elif beside.is_file() and file.name.startswith("adapter_model"):
            stated = {f"unet.{name}": value for name, value in read_json(beside, "the configuration of PEFT").items()}
        if not isinstance(stated, dict):
            raise LoraError(f"{file}: its metadata are damaged: download it again")
        configs: dict[str, dict[str, Any]] = {}
        for name, value in stated.items():
            component, _, option = name.partition(".")
            configs.setdefault(component, {})[option] = value
        for config in configs.values():
            patterns = config.get("alpha_pattern") or {}
            alphas = [config.get("lora_alpha", 1), *(patterns.values() if isinstance(patterns, dict) else [None])]
            stable = config.get("use_rslora")
            if not all(map(is_finite, alphas)) or not (stable is None or isinstance(stable, bool)):
                raise LoraError(f"{file}: its metadata say an alpha that is no number: download it again")
        return cls(configs)

    def for_module(self, component: str, module: str) -> Any:
        """The scale of a rank for this module, None where nothing is said of it."""
        config = self.configs.get(component)
        if config is None or "lora_alpha" not in config:
            return None

        def listed(option: str, usual: Any) -> float:
            patterns = config.get(option)
            for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
                if module == pattern or module.endswith(f".{pattern}"):
                    usual = value
            return float(usual)

        alpha = listed("alpha_pattern", config["lora_alpha"])
        stable = bool(config.get("use_rslora"))
        return lambda rank: alpha / (math.sqrt(rank) if stable else rank)


class Sum:
    """What several files add to one weight: a function of the weight."""

    def __init__(self) -> None:
        self.parts: list[tuple[Change, float]] = []

    def __call__(self, weight: Array) -> Array:
        """weight: float32. Returns what is added to it."""
        total = np.zeros((), np.float32)
        for change, strength in self.parts:
            total = total + change.added(weight, strength) if total.ndim else change.added(weight, strength)
        return total


def combined(files: Sequence[tuple[LoraFile, Mapping[str, float]]]) -> dict[str, dict[str, Sum]]:
    """The changes of several files together, by component and weight: each is of the bare weight, and they are added.

    files: each with its strength by component. What a strength of zero leaves as it is, is left out.
    """
    total: dict[str, dict[str, Sum]] = {}
    for file, strengths in files:
        for component, changes in file.changes.items():
            strength = strengths[component]
            for name, change in changes.items():
                if strength or "dora_scale" in change.parts:
                    total.setdefault(component, {}).setdefault(name, Sum()).parts.append((change, strength))
    return total
