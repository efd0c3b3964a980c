"""Read a folder in the layout of `optimum-cli export onnx` as if it had a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import AS_EXPORTED, STANDARD, Bundle, Component, Manifest, Variant
from ..bundle.tokens import read_tokens
from ..bundle.wiring import Tokenizer
from ..common.errors import BundleError, CheckpointError
from ..common.files import read_json
from . import parts
from .family import Family
from .known import FAMILIES, family_of

_HIDDEN = "hidden_states."
_CLIP_TOKENS = 49408
"""The vocabulary of a text encoder whose configuration does not say."""


def open_bundle(root: str | Path) -> Bundle:
    """Open a bundle, or a folder that `optimum-cli export onnx` wrote. Raises `BundleError`; see `Bundle.open`."""
    return Bundle.open(root, describe)


def describe(root: Path) -> Manifest:
    """A manifest for the ONNX folder `root`, without hashes. Raises `BundleError` when it is no such folder."""
    try:
        return _describe(root)
    except CheckpointError as error:
        raise BundleError(f"{root}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ArithmeticError) as error:
        raise BundleError(f"{root}: a configuration file is damaged ({error}): export the model again") from None


class _Folder:
    """The configurations of an exported folder; see `families.Configs`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index: Mapping[str, Any] = read_json(root / "model_index.json", "the pipeline index")

    def has(self, name: str) -> bool:
        return (self.root / self.component(name) / "model.onnx").is_file()

    def config(self, name: str) -> dict[str, Any]:
        config = read_json(self.root / self.component(name) / "config.json", f"the {name} configuration")
        return {"_class_name": parts.KL, **config} if name == parts.VAE else config

    @staticmethod
    def component(name: str) -> str:
        """The component whose folder has the configuration of the model `name`."""
        return "vae_decoder" if name == parts.VAE else name


def _describe(root: Path) -> Manifest:
    folder = _Folder(root)
    family = _family(folder)
    needed = [name for name in family.models if not name.startswith("tokenizer") and name not in family.optional]
    missing = [folder.component(name) for name in needed if not folder.has(name)]
    if missing:
        raise BundleError(
            f"{root} has no ONNX model for {', '.join(missing)}: it is a checkpoint or an incomplete export; "
            "make a bundle of it with `diffoundry compile`"
        )
    pipeline = family.describe(folder)
    present = {name: part for name, part in pipeline.parts.items() if (root / name / "model.onnx").is_file()}
    encodes = any(part.role == "encoder" for part in present.values())
    tasks = tuple(task for task in pipeline.tasks if encodes or task == "txt2img")
    # an export of another tool has no `clip_skip` outputs
    skips = [tuple(name for name in encoder.skips if name.startswith(_HIDDEN)) for encoder in pipeline.wiring.text]
    text = tuple(replace(encoder, skips=each) for encoder, each in zip(pipeline.wiring.text, skips, strict=True))
    scheduler = read_json(root / "scheduler" / "scheduler_config.json", "the scheduler configuration")
    return Manifest(
        family=family.name,
        tasks=tasks,
        precision=AS_EXPORTED,
        components={
            name: Component(
                part.role,
                pipeline.inputs if part.role == "denoiser" else (),
                variants={f"{AS_EXPORTED}/{STANDARD}": Variant(f"{name}/model.onnx", {})},
            )
            for name, part in present.items()
        },
        wiring=replace(pipeline.wiring, text=text),
        latents=pipeline.latents,
        tokenizers={
            encoder.tokenizer: read_tokenizer(root / encoder.tokenizer, folder.config(encoder.component))
            for encoder in text
        },
        files={},
        default_width=pipeline.width,
        default_height=pipeline.height,
        default_steps=family.steps,
        default_guidance=family.guidance,
        scheduler=family.scheduler_changes(tasks, scheduler),
    )


def _family(folder: _Folder) -> Family:
    name = str(folder.index.get("_class_name"))
    family = family_of(name.removeprefix("ORT"))
    if family is None:
        known = ", ".join(each for family in FAMILIES.values() for each in family.pipelines)
        raise BundleError(f"{folder.root} holds a {name}; without a bundle.json only {known} can be run")
    return family


def read_tokenizer(path: Path, text: Mapping[str, Any]) -> Tokenizer:
    """How the CLIP tokenizer in the folder `path` is used with the text encoder of the configuration `text`.

    Raises `BundleError` when it lacks a token that the encoder needs.
    """
    config = read_json(path / "tokenizer_config.json", "the tokenizer configuration")
    if (path / "vocab.json").is_file():
        vocabulary = read_json(path / "vocab.json", "the vocabulary")
    else:
        vocabulary = read_json(path / "tokenizer.json", "the tokenizer").get("model", {}).get("vocab", {})
    tokens = read_tokens(path)
    known = {**vocabulary, **tokens.ids(vocabulary)}
    ids = []
    for each in ("bos_token", "eos_token", "pad_token"):
        token = tokens.named.get(each, "")
        if known.get(token, _CLIP_TOKENS) >= text.get("vocab_size", _CLIP_TOKENS):
            raise BundleError(f"{path} has no token {token!r}: export the model again")
        ids.append(int(known[token]))
    bos, eos, pad = ids
    window = min(int(config.get("model_max_length", 77)), int(text["max_position_embeddings"]))
    return Tokenizer(window, bos, eos, pad)
