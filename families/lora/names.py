"""Which weight a key of a file is for, whoever trained it.

    unet.down_blocks.0.….to_q.lora_A.weight         PEFT, and diffusers since
    ….attn1.processor.to_q_lora.down.weight         diffusers before that
    lora_unet_down_blocks_0_…_to_q.lora_down.weight kohya and LyCORIS; `lora_te_`, `lora_te1_`, `lora_te2_` beside it
    lora_unet_input_blocks_4_1_….alpha              the same, by the names of the original authors
    lora_unet_double_blocks_0_img_attn_qkv.…        of a transformer: three weights of diffusers at once
    double_blocks.0.processor.qkv_lora1.down.weight xlabs' names of those; single_blocks.0.processor.qkv_lora.…

A name is compared without its dots and with both kinds of names for each module, so that no table of them is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..original import unet_names
from ..original_transformer import joined

_OLD = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"(self_attn)\.to_([qkv])_lora\."), r"\1.\2_proj.lora."),
    (re.compile(r"(self_attn)\.to_out_lora\."), r"\1.out_proj.lora."),
    (re.compile(r"\.to_([qkv])_lora\."), r".to_\1.lora."),
    (re.compile(r"\.to_out_lora\."), ".to_out.0.lora."),
    (re.compile(r"\.to_out\.lora_magnitude_vector"), ".to_out.0.lora_magnitude_vector"),
    (re.compile(r"(double_blocks\.\d+)\.(qkv|proj)_lora1\."), r"\1.img_attn.\2.lora."),
    (re.compile(r"(double_blocks\.\d+)\.(qkv|proj)_lora2\."), r"\1.txt_attn.\2.lora."),
    (re.compile(r"(single_blocks\.\d+)\.qkv_lora\."), r"\1.qkv.lora."),
    (re.compile(r"(single_blocks\.\d+)\.proj_lora[12]?\."), r"\1.linear2.lora."),
    (re.compile(r"\.default(_\d+)?\.(weight|bias)$"), r".\2"),
)
"""What names were before, and the names of adapters that PEFT puts into them."""
_PARTS = (
    (r"(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)(?:\.weight)?", "down"),
    (r"(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.weight)?", "up"),
    (r"lora_B\.bias", "up_bias"),
    (r"lora_mid(?:\.weight)?", "mid"),
    (r"lora_magnitude_vector(?:\.weight|\.default)?", "magnitude"),
    (r"(dora_scale|alpha|rescale|oft_blocks|on_input|diff|diff_b|w_norm|b_norm)", ""),
    (r"(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))", ""),
    (r"([ab][12]|bm)\.weight", ""),
    (r"weight", "ia3"),
)
_PART = re.compile("|".join(f"(?P<p{i}>{pattern})" for i, (pattern, _) in enumerate(_PARTS)))
_PREFIXES = (
    (re.compile(r"base_model\.model\."), ""),
    (re.compile(r"lora_unet_|unet[._]|diffusion_model[._]|lora_transformer_|transformer[._]"), "denoiser"),
    (re.compile(r"lora_te2_|text_encoder_2\."), "text_2"),
    (re.compile(r"lora_te3_|text_encoder_3\."), "text_3"),
    (re.compile(r"lora_te1?_|text_encoder\."), "text"),
)


_FUSED = re.compile(r"(single_blocks\.\d+)\.linear1\.weight")
"""Queries, keys and values with a product of their own beside them, which xlabs leaves as it is."""


class Key(NamedTuple):
    """A key of a file: the component and the module that it is for, and which part of a change it is."""

    component: str
    module: str
    part: str


class Modules:
    """The modules of the components of a checkpoint, found by what files call them."""

    def __init__(
        self,
        weights: Mapping[str, Mapping[str, tuple[int, ...]]],
        denoiser: str,
        texts: tuple[str, ...],
        layers: int,
        kind: str = "",
    ) -> None:
        """weights: the shapes of weights by component. texts: the text encoders that are there.

        layers: `layers_per_block` of a U-Net, 0 for another denoiser. kind: the class of a transformer.
        """
        self._roles = {"denoiser": denoiser}
        self._roles |= {name.replace("_encoder", ""): name for name in texts}
        self._found: dict[tuple[str, str], str] = {}
        for component, names in weights.items():
            for name in sorted({name.rpartition(".")[0] for name in names}):
                for alias in _aliases(name):
                    self._found.setdefault((component, _bare(alias)), name)
            if component == denoiser and layers:
                for name, original in unet_names(sorted(names), layers).items():
                    module = name.rpartition(".")[0]
                    self._found.setdefault((component, _bare(original.rpartition(".")[0])), module)
        single, self.joined = joined(kind, weights.get(denoiser, {}))
        for original, own in list(self.joined.items()):
            of_block = _FUSED.fullmatch(original)
            if of_block:
                self.joined[f"{of_block[1]}.qkv.weight"] = own._replace(rows=own.rows[:3])
        for original, name in (*single.items(), *((each, each) for each in self.joined)):
            alias, module = (each.rpartition(".")[0] for each in (original, name))
            self._found.setdefault((denoiser, _bare(alias)), module)

    def find(self, key: str) -> Key | None:
        """What a key is for; None for one of no known form, or for a module that is not there."""
        for pattern, new in _OLD:
            key = pattern.sub(new, key)
        found = _split(key)
        if found is None:
            return None
        name, part = found
        role = "denoiser"
        for prefix, meant in _PREFIXES:
            match = prefix.match(name)
            if match:
                name = name[match.end() :]
                role = meant or role
                if meant:
                    break
        component = self._roles.get(role, "")
        module = self._found.get((component, _bare(name)))
        return None if module is None else Key(component, module, part)


def _split(key: str) -> tuple[str, str] | None:
    """The name of a module and of a part of its change."""
    for dot in (found.start() for found in re.finditer(r"\.", key)):
        match = _PART.fullmatch(key, dot + 1)
        if match:
            [number] = [i for i in range(len(_PARTS)) if match[f"p{i}"] is not None]
            pattern, part = _PARTS[number]
            if not part:
                part = next(group for group in re.compile(pattern).fullmatch(match[0]).groups() if group)  # type: ignore[union-attr]
            return key[:dot], part
    return None


def _bare(name: str) -> str:
    return name.replace(".", "_")


def _aliases(module: str) -> list[str]:
    """The names of a module, with and without the part that versions of transformers have in front."""
    top = "text_model."
    return [module, module.removeprefix(top)] if module.startswith(top) else [module, top + module]
