"""LoRAs and new words fused into a checkpoint: the folders of the components that they change, changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.build import check_disk
from ..common.errors import CheckpointError, DiffoundryError, LoraError
from ..common.files import remove, sha256_file, sha256_json, write_json
from ..families.lora import LoraFile, Weights, combined
from ..families.lora.embeddings import matrix_of
from ..runtime.lora import Lora, TextualInversion, open_inversions, open_loras
from .checkpoint import Checkpoint
from .weight_files import BASE_LAYER, WeightFiles, read_stated

_ADAPTED = "unet"
"""The model that diffusers saves with an adapter inside."""
_FILES = {True: "diffusion_pytorch_model.safetensors", False: "model.safetensors"}
"""Of a denoiser, and of a text encoder."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What checkpoints are changed by for good."""

    loras: tuple[Lora, ...] = ()
    inversions: tuple[TextualInversion, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.loras or self.inversions)

    def told(self) -> dict[str, str]:
        """For the manifest: what the weights are made of beside the checkpoint."""
        both = {"loras": self.loras, "embeddings": self.inversions}
        return {name: ", ".join(map(str, each)) for name, each in both.items() if each}


def fuse(
    source: Checkpoint, asked: Fused, denoiser: str, texts: Mapping[str, str], folder: Path, *, keep_half: bool
) -> dict[str, Path]:
    """The components that are changed, and the tokenizers with new words, each in a folder of its own in `folder`.

    denoiser: its name. texts: of each text encoder the folder of its tokenizer. keep_half: store what is changed in the
    type that it had; in float32 otherwise, so that nothing of the change is rounded. Each is made once for each
    content. Raises `LoraError` for files that are damaged or for another model, before anything is written.
    """
    stored = {name: source.weights(name) for name in (denoiser, *texts)}
    tensors = {name: files.read() for name, files in stored.items()}  # mapped, where they are safetensors
    config = source.config(denoiser)
    layers = config.get("layers_per_block")
    weights = Weights(
        {name: {key: tuple(each.shape) for key, each in own.items()} for name, own in tensors.items()},
        denoiser,
        layers if isinstance(layers, int) else 0,
        str(source.root),
        str(config.get("_class_name", "")),
    )
    opened = open_loras(asked.loras, weights)
    changes, words = combined(opened), open_inversions(asked.inversions, weights)
    said = [[file.sha256, dict(strengths)] for file, strengths in opened]
    said += [[each.token or "", sha256_file(Path(each.file))] for each in asked.inversions]
    changed = [name for name in stored if name in changes or name in words]
    check_disk(folder, 1.0 * sum(stored[name].size for name in changed))
    made = {}
    for name in changed:
        home = folder / f"lora-{sha256_json([said, stored[name].sha256(), keep_half])[:16]}-{name}"
        own, rows = tensors.pop(name), {}
        if name in words:
            made[texts[name]], ids = _with_words(source, texts[name], list(words[name]), home)
            rows = {matrix_of(weights, name)[0]: {ids[word]: row for word, row in words[name].items()}}
        made[name] = home
        if not home.is_dir():
            _write(home, stored[name], own, changes.get(name, {}), rows, name == denoiser, keep_half)
    return made


def merged(source: Checkpoint, folder: Path) -> dict[str, Path]:
    """The U-Net of `source` with the adapter merged that PEFT left inside, in `folder`; nothing where there is none.

    Such a file does not say its alpha: it is taken for the rank, as PEFT sets it by default.
    """
    try:
        files = source.weights(_ADAPTED, adapted=True)
    except CheckpointError:  # which is said when it is read
        return {}
    if not any(re.search(BASE_LAYER, key) for key in files.types):
        return {}
    home = folder / f"merged-{files.sha256()[:16]}"
    if not home.is_dir():
        tensors = files.read()
        plain = {re.sub(BASE_LAYER, ".", key): each for key, each in tensors.items() if ".lora_" not in key}
        factors = {f"unet.{key}": each.float().numpy() for key, each in tensors.items() if ".lora_" in key}
        shapes = {_ADAPTED: {key: tuple(each.shape) for key, each in plain.items()}}
        opened = LoraFile.of(files.files[0], factors, {}, Weights(shapes, _ADAPTED, 0, str(source.root)))
        _write(home, files, plain, combined([(opened, {_ADAPTED: 1.0})])[_ADAPTED], {}, diffuses=True, keep_half=False)
    return {_ADAPTED: home}


def _with_words(source: Checkpoint, tokenizer: str, words: list[str], beside: Path) -> tuple[Path, dict[str, int]]:
    """A tokenizer with new words, in a folder beside `beside`, and their ids. Raises `LoraError` for one it has."""
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(source.folder(tokenizer))
    known = [word for word in words if word in loaded.get_vocab()]
    if known:
        raise LoraError(f"the word {known[0]!r:.60} is a token already: give another for it, FILE=WORD")
    loaded.add_tokens(words)
    folder = beside.with_name(f"{beside.name}-{tokenizer}")
    remove(folder)
    loaded.save_pretrained(folder)
    return folder, {word: int(loaded.convert_tokens_to_ids(word)) for word in words}


def _write(
    target: Path,
    files: WeightFiles,
    tensors: dict[str, Any],
    changes: Mapping[str, Any],
    rows: Mapping[str, Mapping[int, Any]],
    diffuses: bool,
    keep_half: bool,
) -> None:
    """The folder of a component with its weights changed, whole or not at all.

    rows: of weights, in place of their own rows or behind them.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = read_stated(files.folder / "config.json", "the configuration")
    for name in (*changes, *(each for each in rows if each not in changes)):
        weight = tensors[name].float().numpy()
        change = changes.get(name)
        made = torch.from_numpy(weight + (0 if change is None else change(weight)))
        if name in rows:
            count = max(len(made), max(rows[name]) + 1)
            made = torch.cat([made, torch.zeros(count - len(made), *made.shape[1:])])
            for i, row in rows[name].items():
                made[i] = torch.from_numpy(row)
            config["vocab_size"] = count
        tensors[name] = made.to(tensors[name].dtype) if keep_half else made
    beside = target.with_name(f"{target.name}.part")
    remove(beside)
    beside.mkdir(parents=True)
    write_json(beside / "config.json", config)
    whole = {name: tensor.clone() if tensor.is_shared() else tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, beside / _FILES[diffuses], metadata={"format": "pt"})
    except SafetensorError as error:
        remove(beside)
        raise DiffoundryError(f"{target} cannot be written ({error}): free some disk space and try again") from None
    beside.replace(target)
