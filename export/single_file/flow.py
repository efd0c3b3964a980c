"""Checkpoints of FLUX.1, Stable Diffusion 3 and Z-Image in one file: what is in them, and what they are by themselves.

The sizes of Stable Diffusion 3 can be read off its weights, and CLIP's tokenizer is built in; those of T5 and Qwen3 are
not, so that what has one needs the diffusers folder of a checkpoint of its make.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError
from ...common.files import write_json
from ..weight_files import check_names
from .configs import BY_CONFIG, CHANNELS_A_HEAD, Config, Part, heads, part_in, text_sizes, unread, vae_sizes
from .layouts import transformer_kind
from .part_names import T5, held, is_scale
from .tokenizer import END, write_clip_tokenizer
from .weights import Weights, open_weights

TITLES = {
    "FluxTransformer2DModel": "FLUX.1",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "ZImageTransformer2DModel": "Z-Image",
}
"""By the class of the transformer."""
_T5_HOME = "text_encoder_3"
_PADS = {"text_encoder": END, "text_encoder_2": "!"}
"""What fills the window of each text encoder of Stable Diffusion 3."""


@dataclass(frozen=True, slots=True)
class FlowFile:
    """A file with a transformer of one of `TITLES`, alone or with other parts. kind: its class."""

    weights: Weights
    kind: str

    @classmethod
    def of(cls, weights: Weights) -> FlowFile | None:
        """None for a file of another kind. Raises `CheckpointError` for weights that cannot be read."""
        kind = transformer_kind(weights)
        if kind is None:
            return None
        check_names(weights.path, (name for name in weights.shapes if not is_scale(name)))
        return cls(weights, kind)

    @property
    def title(self) -> str:
        """The name of the model."""
        return TITLES[self.kind]

    def write_outline(self, root: Path, replaced: Mapping[str, str | Path]) -> None:
        """Write what a diffusers folder of this checkpoint has beside its weights to `root`.

        replaced: files and folders that are given in place of components of it.
        Raises `CheckpointError` where the weights do not say their sizes, and where there is a T5 or Qwen3.
        """
        if self.kind != "SD3Transformer2DModel" or held(self.weights, _T5_HOME, T5) or _T5_HOME in replaced:
            text = "Qwen3" if self.kind.startswith("ZImage") else "T5"
            raise CheckpointError(
                f"{self.weights.path}, a {self.title} checkpoint, goes with a {text}, whose tokenizer is not built in: "
                f"{BY_CONFIG}"
            )
        published = json.loads((files(__package__) / "data" / "stable-diffusion-3.json").read_text(encoding="utf-8"))
        for name in ("vae", *_PADS):
            if name not in replaced and not held(self.weights, name, ""):
                raise missing(self.weights.path, name, None)
        configs = {"transformer": published["transformer"] | _transformer_sizes(self._part("transformer"))}
        for name in ("vae", *_PADS):
            place = self._part(name) if name not in replaced else _given(name, Path(replaced[name]))
            if place is not None:
                configs[name] = published[name] | _sizes(name, place, published[name])
        index = published["model_index"]
        write_json(root / "model_index.json", index)
        for folder, config in (*configs.items(), ("scheduler", published["scheduler"])):
            (root / folder).mkdir(parents=True)
            write_json(root / folder / f"{'scheduler_' * (folder == 'scheduler')}config.json", config)
        for name, pad in _PADS.items():
            window = int(configs.get(name, {}).get("max_position_embeddings", 77))
            write_clip_tokenizer(root / name.replace("text_encoder", "tokenizer"), pad, window)

    def _part(self, name: str) -> Part:
        """The shapes of a component of Stable Diffusion 3. Raises `CheckpointError` where its names do not tell it."""
        return part_in(self.weights, name) or unread(self.weights.path, name)


def missing(path: Path, name: str, config: Path | None) -> CheckpointError:
    """The error for a file and a folder of configurations that both lack a component."""
    neither = f", and {config} has no weights of it" if config else ""
    return CheckpointError(f"{path} holds no {name}{neither}: give it with --component {name}=FILE")


def _given(name: str, path: Path) -> Part | None:
    """The shapes of a component in a file of its own, None for a folder, which has its configuration."""
    if path.is_dir():
        return None
    return part_in(open_weights(path), name) or unread(path, name)


def _sizes(name: str, part: Part, published: Config) -> Config:
    if name == "vae":
        return vae_sizes(part, published)
    return text_sizes(part, "positional_embedding" in part.shapes, None, published)


def _transformer_sizes(part: Part) -> dict[str, Any]:
    """What the shapes say of an `SD3Transformer2DModel`."""
    width, patch = part.size(0, "x_embedder.proj.weight"), part.size(3, "x_embedder.proj.weight")
    return {
        "attention_head_dim": CHANNELS_A_HEAD,
        "caption_projection_dim": part.size(0, "context_embedder.weight"),
        "dual_attention_layers": part.indices(r"joint_blocks\.(\d+)\.x_block\.attn2\."),
        "in_channels": part.size(1, "x_embedder.proj.weight"),
        "joint_attention_dim": part.size(1, "context_embedder.weight"),
        "num_attention_heads": heads(part, width),
        "num_layers": part.count(r"joint_blocks\.(\d+)\."),
        "out_channels": part.size(0, "final_layer.linear.weight") // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": part.size(1, "y_embedder.mlp.0.weight"),
        "pos_embed_max_size": math.isqrt(part.size(1, "pos_embed")),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in part.shapes else None,
    }
