"""Load models and tokenizers of a checkpoint, refusing what would load silently wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bundle import Tokenizer
from ..bundle.wiring import LONGEST_BESIDE
from ..common.errors import CheckpointError, reason
from .chat_template import rendered
from .weight_files import WeightFiles, find

_CLIP_FILES = ("vocab.json", "merges.txt")
_EXTRA = 128
"""T5's own tokenizer may have so many tokens more than its encoder, which stand for gaps and occur in no text."""
_SAID = "a lighthouse at dusk"
"""A prompt to see by what a chat template puts it between."""
_ODDLY_SAID = f" <{_SAID}> & \"'Ä'\"\n"
"""One by which a template shows that it changes what is said."""
_SHORTEST_WINDOW = 3  # start, one token, end


def load_pretrained(kind: Any, folder: Path) -> Any:
    """`kind.from_pretrained(folder)`, computing in float32. Raises `CheckpointError` for missing or damaged weights.

    Weights that are stored in half precision stay in it and are widened where they are used: it loses nothing and takes
    half the memory. The tracer writes them out in float32.
    """
    import diffusers
    import torch

    stored = find(folder, "diffusers" if issubclass(kind, diffusers.ModelMixin) else "transformers")
    half = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.half or "")
    dtype = half or torch.float32
    other: Any = ()
    try:
        with quiet():
            if stored.wrapped:
                model, missing = _load_unwrapped(kind, stored, dtype)
            else:
                model, info = kind.from_pretrained(
                    folder,
                    torch_dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are refused below, by their names
                    **stored.library_options,
                )
                missing, other = info.get("missing_keys", ()), info.get("mismatched_keys", ())
    except Exception as error:  # each library has its own ways of refusing a damaged configuration or file
        raise CheckpointError(f"{folder} cannot be loaded: {reason(error)}") from None
    if other:
        name, found, asked = sorted(other)[0]
        raise CheckpointError(
            f"{folder}: the weight {name} has the shape {tuple(found)}, its config.json asks for {tuple(asked)}: "
            "they are not of one model; give the config.json that belongs to these weights"
        )
    missing = sorted(name for name in missing if not name.endswith("position_ids"))
    if missing:
        raise CheckpointError(
            f"{folder} lacks the weights {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} "
            f"({len(missing)} in all): the checkpoint is incomplete, download it again"
        )
    model = model.eval().requires_grad_(False)
    return model.float() if half is None else _widened(model)


def load_mapped(
    kind: Any,
    folder: Path,
    config: Any,
    rename: Callable[[str], str] = lambda name: name,
    complete: Callable[[Any], None] = lambda model: None,
) -> Any:
    """A model whose weights are mapped from safetensors and read where they are used; else as `load_pretrained`.

    config: that of the model, or of one with fewer layers. rename: what a weight of the model is called in the files.
    complete: makes the buffers of a model that no file has, in place.
    Raises `CheckpointError` for missing weights.
    """
    import diffusers
    import torch

    of_diffusers = issubclass(kind, diffusers.ModelMixin)
    stored = find(folder, "diffusers" if of_diffusers else "transformers")
    tensors = stored.mapped() if stored.half else None
    if tensors is None:
        return load_pretrained(kind, folder)
    with torch.device("meta"), quiet():
        model = kind.from_config(config) if of_diffusers else kind(config)
    complete(model)
    wanted = {name: tensors[rename(name)] for name in model.state_dict() if rename(name) in tensors}
    wrong = [name for name, tensor in wanted.items() if tensor.shape != model.state_dict()[name].shape]
    if wrong:
        raise CheckpointError(
            f"{folder}: the weight {rename(wrong[0])} has the shape {tuple(wanted[wrong[0]].shape)}, its config.json "
            f"asks for {tuple(model.state_dict()[wrong[0]].shape)}: they are not of one model; give the config.json "
            "that belongs to these weights"
        )
    model.load_state_dict(wanted, strict=False, assign=True)
    if not of_diffusers:
        model.tie_weights()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = sorted(name for name, tensor in held.items() if tensor.is_meta)
    if missing:
        raise CheckpointError(
            f"{folder} lacks the weights {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} "
            f"({len(missing)} in all): the checkpoint is incomplete, download it again"
        )
    return _widened(model.eval().requires_grad_(False))


def _load_unwrapped(kind: Any, stored: WeightFiles, dtype: Any) -> tuple[Any, Iterable[str]]:
    """The model of weights that are stored under the names of a wrapper, and what they lack."""
    import diffusers
    import torch

    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.read().items()
    }
    if not issubclass(kind, diffusers.ModelMixin):
        model, info = kind.from_pretrained(
            None,
            config=kind.config_class.from_pretrained(stored.folder),
            state_dict=tensors,
            torch_dtype=dtype,
            output_loading_info=True,
        )
        return model, info.get("missing_keys", ())
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(stored.folder))
    return model, model.load_state_dict(tensors, strict=False, assign=True).missing_keys


def _widened(model: Any) -> Any:
    """Let each half-precision weight of `model` read as float32; what is stored stays as it is."""
    import torch
    from torch.nn.utils import parametrize

    class Widen(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.float()

    widen = Widen()
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dtype in (torch.float16, torch.bfloat16):
                parametrize.register_parametrization(module, name, widen, unsafe=True)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                module.register_buffer(name, buffer.float(), persistent=False)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No loading bars, no advice on how to save, and no warnings of missing weights: those are errors here."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def _write_clip_files(model: dict[str, Any], target: Path) -> None:
    """Write the two files that readers older than `tokenizer.json` want, where the checkpoint has them no more."""
    vocabulary, merges = (target / name for name in _CLIP_FILES)
    if not vocabulary.exists():
        vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    if not merges.exists():
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        merges.write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def load_tokenizer(source: Path, target: Path, window: int, vocabulary: int) -> Tokenizer:
    """Copy a CLIP tokenizer to `target`, with the `tokenizer.json` of the `tokenizers` library beside its own files.

    window, vocabulary: the positions and tokens that the text encoder knows.
    Raises `CheckpointError` when files are missing or the tokenizer has other tokens than the text encoder.
    """
    from transformers import CLIPTokenizerFast

    _check_kind(source, "BPE", "CLIP")
    if not (source / "tokenizer.json").is_file() and not all((source / f).is_file() for f in _CLIP_FILES):
        raise CheckpointError(
            f"{source} holds neither tokenizer.json nor {' and '.join(_CLIP_FILES)}: download it again"
        )
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(source)
        length = min(int(tokenizer.model_max_length), window)
        bos, eos, pad = (int(each) for each in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {source} cannot be loaded ({error}): download it again") from None
    if largest >= vocabulary or length < _SHORTEST_WINDOW:
        raise CheckpointError(
            f"the tokenizer in {source} has token {largest} and windows of {length}, the text encoder {vocabulary} "
            "tokens: they are not of one checkpoint, download it again"
        )
    _write_clip_files(json.loads(_write_tokenizer(source, target, tokenizer))["model"], target)
    return Tokenizer(length, bos, eos, pad)


def load_unigram_tokenizer(source: Path, target: Path, window: int, vocabulary: int) -> Tokenizer:
    """Copy a T5 tokenizer to `target`, as the `tokenizer.json` of the `tokenizers` library.

    window: the tokens that are read at most. vocabulary: those that the text encoder knows.
    Raises `CheckpointError` when files are missing or the tokenizer has other tokens than the text encoder.
    """
    from transformers import T5TokenizerFast

    _check_kind(source, "Unigram", "T5")
    if not any((source / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise CheckpointError(f"{source} holds neither tokenizer.json nor spiece.model: download it again")
    try:
        with quiet():
            tokenizer = T5TokenizerFast.from_pretrained(source)
        eos, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {source} cannot be loaded ({error}): download it again") from None
    if max(eos, pad) >= vocabulary or largest >= vocabulary + _EXTRA:
        raise CheckpointError(
            f"the tokenizer in {source} has token {largest}, the text encoder {vocabulary} tokens: they are not of "
            "one checkpoint, download it again"
        )
    _write_tokenizer(source, target, tokenizer)
    return Tokenizer(window, None, eos, pad)


def load_chat_tokenizer(source: Path, target: Path, window: int, vocabulary: int) -> Tokenizer:
    """Copy the tokenizer of a language model to `target`; a prompt is what its user says first.

    window: the tokens that are read at most. vocabulary: those that the text encoder knows.
    Raises `CheckpointError` when files are missing, there is no chat template, it changes what the user says or takes
    too long.
    """
    from transformers import Qwen2TokenizerFast

    _check_kind(source, "BPE", "Qwen")
    if not (source / "tokenizer.json").is_file() and not all((source / f).is_file() for f in _CLIP_FILES):
        raise CheckpointError(
            f"{source} holds neither tokenizer.json nor {' and '.join(_CLIP_FILES)}: download it again"
        )

    try:
        with quiet():
            tokenizer = Qwen2TokenizerFast.from_pretrained(source)
        pad, largest = int(tokenizer.pad_token_id), max(tokenizer.get_vocab().values())
        template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
        tokens = tokenizer.special_tokens_map
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {source} cannot be loaded ({reason(error)}): download it again"
        ) from None
    if not template:
        raise CheckpointError(
            f"the tokenizer in {source} has no chat template (chat_template.jinja): give the tokenizer that the model "
            "was published with"
        )
    if max(largest, pad) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer in {source} has token {max(largest, pad)}, the text encoder {vocabulary} tokens: they are "
            "not of one checkpoint, download it again"
        )
    usual, odd = rendered(template, tokens, (_SAID, _ODDLY_SAID), source)
    before, _, after = usual.partition(_SAID)
    if odd != f"{before}{_ODDLY_SAID}{after}":
        raise CheckpointError(
            f"the chat template of the tokenizer in {source} changes what the user says, which is not supported: give "
            "the tokenizer that the model was published with"
        )
    if max(len(before), len(after)) > LONGEST_BESIDE:
        raise CheckpointError(
            f"the chat template of the tokenizer in {source} puts {max(len(before), len(after))} characters beside the "
            f"prompt, {LONGEST_BESIDE} are supported: give the tokenizer that the model was published with"
        )
    around = len(tokenizer(before + after, add_special_tokens=False).input_ids)
    if window < around + _SHORTEST_WINDOW:
        raise CheckpointError(
            f"the text encoder reads {window} tokens (max_position_embeddings), of which the chat template in {source} "
            f"takes {around}: give the config.json that the text encoder was published with"
        )
    _write_tokenizer(source, target, tokenizer)
    return Tokenizer(window, None, None, pad, before, after)


def _check_kind(source: Path, kind: str, whose: str) -> None:
    """Raise `CheckpointError` for a `tokenizer.json` with a model of another kind."""
    path = source / "tokenizer.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else {}
        found = model.get("type", kind)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # its reader says what is wrong
    if found != kind:
        raise CheckpointError(
            f"the tokenizer in {source} is a {found!s:.20} model, a {whose} text encoder has a {kind}: give the "
            "tokenizer that belongs to it"
        )


def _write_tokenizer(source: Path, target: Path, tokenizer: Any) -> str:
    """Copy the files of a tokenizer, with its `tokenizer.json`, whose contents are returned."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt") and path.is_file():
            shutil.copyfile(path, target / path.name)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    text: str = tokenizer.backend_tokenizer.to_str()
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    return text
