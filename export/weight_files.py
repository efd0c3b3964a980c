"""The files that hold the weights of a model: which are read, and what keeps them from being read."""

from __future__ import annotations

import contextlib
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..common.errors import BundleError, CheckpointError, reason
from ..common.files import read_json, sha256_file, sha256_json

_NAMES = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
"""By library, the names of its weights in the order in which it looks for them."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and Lightning put into names; no model has such a part."""
_PARALLEL = "module."
_LANGUAGE_MODEL, _HEAD = "model.", "lm_head."
"""What a language model puts before the names of its layers, and its last layer, which a text encoder has not."""
_TOPS = ("text_model", "encoder", "decoder", "adapter")
"""Parts that all names of a sound model may begin with."""

_OF_TORCH = ("torch.", "collections.OrderedDict")
_LONGEST_NAME = 80
"""Of what a pickle names, in a message."""
_ORIGINAL = "give the checkpoint that it was made from"
_PICKLE = "give it the suffix .ckpt, or .bin in the folder of a model"
_ARCHIVE = "is an archive: unpack it and give what is in it"
_SAFETENSORS = "is a safetensors file: give it the suffix .safetensors"
_STARTS = (
    (rb"\Z", "is truncated to nothing (0 bytes): download it again"),
    (rb"(?s).{5}\0{3}\{", _SAFETENSORS),  # the length of a header is a number of eight bytes
    (rb"version https://git-lfs", "is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"),
    (rb"\s*<(?i:!doctype|html|\?xml)", "is a web page, not weights: download it again, logged in where its host asks"),
    (rb"\s*[\[{]\s*[\"}\]]", "is a JSON text, not weights: download it again"),
    (rb"GGUF", f"is a GGUF file, whose weights are quantized: {_ORIGINAL}"),
    (rb"7z\xbc\xaf|Rar!|\x1f\x8b|BZh|\xfd7zXZ", _ARCHIVE),
    (rb"\x08[\x03-\x14]\x12", f"is an ONNX model: {_ORIGINAL}"),
)
"""How files of other kinds begin, and what to do with them."""
_SUFFIXES = {
    ".onnx": f"an ONNX model: {_ORIGINAL}",
    ".gguf": f"a GGUF file, whose weights are quantized: {_ORIGINAL}",
    ".msgpack": "Flax weights: save them for PyTorch, `kind.from_pretrained(FOLDER, from_flax=True)` in diffusers",
    ".h5": "TensorFlow weights: give a checkpoint for PyTorch",
    ".xml": f"an OpenVINO model: {_ORIGINAL}",
}
BASE_LAYER = r"\.base_layer\."
FOREIGN = {
    BASE_LAYER: "a LoRA that was not merged into the weights (PEFT's base_layer): save the pipeline after "
    "`pipe.fuse_lora()` and `pipe.unload_lora_weights()`",
    r"\.((nested_)?(absmax|quant_map)|SCB)$|\.quant_state\.": f"weights quantized by bitsandbytes: {_ORIGINAL}",
    r"\.(qweight|qzeros|g_idx)$": f"weights quantized by GPTQ or AWQ: {_ORIGINAL}",
    r"\.weight\._(data|scale|shift|packed)$": f"weights quantized by quanto: {_ORIGINAL}",
    r"(weight|bias):?_?(qdata|zero_point)$|_packed_params": f"weights quantized by torchao or torch: {_ORIGINAL}",
    r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$": "weights in fp8 with "
    f"scales beside them: {_ORIGINAL}",
    r"^(online_model|ema_model|shadow_params)\.": "a moving average as its trainer keeps it: save the averaged model "
    "itself, with `save_pretrained`",
}
"""Names of tensors that no sound checkpoint has: what they show, and the remedy."""


@dataclass(frozen=True, slots=True)
class Place:
    """The bytes of a tensor in a file. kind: of its numbers, as safetensors names it."""

    path: Path
    offset: int
    size: int
    kind: str
    shape: tuple[int, ...]

    def read(self) -> Array:
        """The tensor, read and not mapped, so that its memory is free when it is done with."""
        import ml_dtypes

        dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[self.kind]
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return np.frombuffer(file.read(self.size), dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of one model in `folder`.

    variant: in the names of the files, as diffusers' `variant=` takes it. index: of the shards, None for one file.
    types: of each tensor by its stored name, as safetensors names them. names: what the model calls each tensor, where
    a wrapper of the model (torch.compile, DataParallel …) was saved in place of the model.
    """

    folder: Path
    variant: str | None
    index: Path | None
    files: tuple[Path, ...]
    types: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def safetensors(self) -> bool:
        """Whether they are safetensors; else they are pickles."""
        return self.files[0].suffix == ".safetensors"

    @property
    def library_options(self) -> dict[str, Any]:
        """What makes `from_pretrained` of either library read these files.

        Asked for .bin, diffusers takes shards before a single file; asked for nothing, it finds the single file.
        """
        shards = self.index is None and self.folder.joinpath(f"{self.files[0].name}.index.json").is_file()
        return {"variant": self.variant, "use_safetensors": self.safetensors or (None if shards else False)}

    @property
    def wrapped(self) -> bool:
        """Whether tensors are stored under other names than the model's."""
        return any(stored != name for stored, name in self.names.items())

    @property
    def half(self) -> str | None:
        """F16 or BF16 where all floating-point tensors are stored in it."""
        kinds = {kind for kind in self.types.values() if "F" in kind}
        return next(iter(kinds)) if kinds in ({"F16"}, {"BF16"}) else None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)

    def sha256(self) -> str:
        """A hash of the configuration and of the files that are read, and of no others."""
        read = [path for path in (self.folder / "config.json", self.index, *self.files) if path and path.is_file()]
        return sha256_json({path.name: sha256_file(path) for path in read})

    def mapped(self) -> dict[str, Any] | None:
        """The tensors by the model's names, mapped and not read; None for pickles."""
        from safetensors.torch import load_file

        if not self.safetensors:
            return None
        return {self.names[name]: tensor for path in self.files for name, tensor in load_file(path).items()}

    def places(self) -> dict[str, Place]:
        """Where the bytes of each tensor lie, by the model's names; none of pickles."""
        found = {}
        for path in self.files if self.safetensors else ():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name in self.names:
                    start, end = entry["data_offsets"]
                    place = Place(path, 8 + length + start, end - start, entry["dtype"], tuple(entry["shape"]))
                    found[self.names[name]] = place
        return found

    def read(self) -> dict[str, Any]:
        """The tensors by the model's names, mapped where the files can be."""
        from safetensors.torch import load_file

        tensors: dict[str, Any] = {}
        for path in self.files:
            tensors.update(load_file(path) if self.safetensors else read_pickle(path))
        return {self.names[stored]: tensor for stored, tensor in tensors.items() if stored in self.names}


def find(folder: Path, library: str, *, adapted: bool = False) -> WeightFiles:
    """The weights that are read from `folder`, whole and of a kind that can be. library: diffusers or transformers.

    adapted: whether they may have an adapter beside them, as PEFT saves a model that has one.

    The rules are those of the library's `from_pretrained`, full precision first:

    1. Files are known by their whole names (diffusion_pytorch_model.safetensors and .bin; in transformers
       model.safetensors and pytorch_model.bin) and by their index of shards. No other file is looked at.
    2. Weights without a variant in their name come before all variants: a .bin in float32 before an fp16 .safetensors.
    3. Then .safetensors before .bin; of one file and shards the file, but in diffusers' .safetensors the shards.
    4. Without such weights the one variant there is (fp16, bf16, ema …) is read; of several `fp32`, and else none is.

    Raises `CheckpointError`.
    """
    config = _config(folder)
    variant, path = _chosen(folder, library, config)
    types, files = _shards(path) if path.suffix == ".json" else (stored_types(path), (path,))
    check_names(path, types, adapted=adapted)
    odd = [
        f"{name} ({kind})" for name, kind in types.items() if name.endswith((".weight", ".bias")) and "F" not in kind
    ]
    if odd:
        raise CheckpointError(f"{path} holds {odd[0]}, a weight that is quantized: {_ORIGINAL}")
    names = unwrapped(path, types)
    if library == "transformers" and all(name.startswith((_LANGUAGE_MODEL, _HEAD)) for name in names.values()):
        names = {
            stored: name.removeprefix(_LANGUAGE_MODEL) for stored, name in names.items() if not name.startswith(_HEAD)
        }
    first = {name.partition(".")[0] for name in names.values()}
    if len(names) > 1 and len(first) == 1 and not first <= set(_TOPS):
        raise CheckpointError(
            f"{path}: every weight is below {next(iter(first))!r}, as a module that holds the model saves it: "
            "save the model in it by its own `save_pretrained`"
        )
    return WeightFiles(folder, variant, path if path.suffix == ".json" else None, files, types, names)


def holds_weights(folder: Path) -> bool:
    """Whether a model's folder holds any; one that only lends its configuration does not."""
    return any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*"))


def _candidates(library: str, variant: str | None = None) -> list[str]:
    """The names that weights may have, in the library's order."""
    order = []
    for name in _NAMES[library]:
        stem, _, suffix = name.rpartition(".")
        if variant is None:
            both = [f"{name}.index.json", name]
        else:
            both = [f"{name}.index.{variant}.json", f"{stem}.{variant}.{suffix}"]
            if library == "diffusers":
                both.insert(1, f"{name}.{variant}.index.json")  # as it was spelt before diffusers 0.31
        order += both if library == "diffusers" and suffix != "bin" else both[::-1]
    return order


def _chosen(folder: Path, library: str, config: Mapping[str, Any]) -> tuple[str | None, Path]:
    """The variant that is read, and its file or index of shards."""
    plain = _candidates(library)
    if library == "transformers" and isinstance(config.get("transformers_weights"), str):
        plain = [Path(config["transformers_weights"]).name]
    patterns = [re.escape(name).replace("VARIANT", "(.+)") for name in _candidates(library, "VARIANT")]
    matches = [re.fullmatch(pattern, path.name) for path in folder.iterdir() for pattern in patterns]
    variants = sorted({match[1] for match in matches if match and not _SHARD.search(match[1])})
    chosen = ["fp32"] if "fp32" in variants else variants
    of_variants = ((variant, name) for variant in chosen for name in _candidates(library, variant))
    named = (*((None, name) for name in plain), *of_variants)
    found = next(((variant, folder / name) for variant, name in named if (folder / name).is_file()), None)
    if found is None:
        raise _no_weights(folder, library)
    if found[0] and len(chosen) > 1:
        raise CheckpointError(
            f"{folder} holds the variants {', '.join(variants)} and no weights without a variant: "
            "give a copy of it that holds one of them"
        )
    return found


def _no_weights(folder: Path, library: str) -> CheckpointError:
    wanted = " or ".join(_NAMES[library])
    others = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    for path in others:
        if path.name in _candidates(library):
            return CheckpointError(f"{path} is no file, or a link to none: download it again")
        if path.suffix in _SUFFIXES:
            return CheckpointError(f"{folder} holds no weights ({wanted}), but {_SUFFIXES[path.suffix]}")
    named = [path.name for path in others if path.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth")]
    if named:
        return CheckpointError(
            f"{folder} holds no weights under a name that {library} reads ({wanted}), but {', '.join(named[:3])}: "
            "rename it where it holds this model's weights"
        )
    return CheckpointError(f"{folder} holds no weights ({wanted}): the checkpoint is incomplete, download it again")


def read_stated(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises `CheckpointError`. what: the name of the file in messages."""
    try:
        return read_json(path, what)
    except BundleError as error:
        raise CheckpointError(f"{error}: download the checkpoint again") from None


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of the model in `folder`, whose weights must be neither quantized nor an adapter's."""
    config = read_stated(folder / "config.json", "the configuration")
    stated = config.get("quantization_config")
    if stated:
        method = stated.get("quant_method", "an unknown method") if isinstance(stated, Mapping) else stated
        raise CheckpointError(f"{folder / 'config.json'} says that its weights are quantized by {method}: {_ORIGINAL}")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter beside its weights (adapter_config.json): merge it into them, with "
            "`merge_and_unload()` of PEFT, and save the model alone"
        )
    return config


def _shards(index: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """The types of all tensors of the shards of `index`, which must be of one save with it, and the shards."""
    mapped = read_stated(index, "the index of shards").get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(shard, str) for shard in mapped.values()):
        raise CheckpointError(f"{index} names no shards (weight_map): download it again")
    shards = sorted(set(mapped.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names the shard {outside[0]!r}, which is no file beside it: do not use it")
    plain = index.name.replace(".index.json", "")
    beside = index.with_name(plain).is_file() and plain != index.name
    remedy = f"remove the index if {plain} holds the weights" if beside else "download it and its shards again"
    types: dict[str, str] = {}
    for shard in shards:
        path = index.with_name(shard)
        if not path.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is not there: {remedy}")
        held = stored_types(path)
        absent = sorted(name for name, where in mapped.items() if where == shard and name not in held)
        twice = sorted(held.keys() & types.keys())
        if absent or twice:
            what = f"{absent[0]} is not in {shard}" if absent else f"{twice[0]} is in two shards"
            raise CheckpointError(f"{index} and its shards are not of one save ({what}): {remedy}")
        types.update(held)
    return types, tuple(index.with_name(shard) for shard in shards)


def check_names(path: Path, names: Iterable[str], *, adapted: bool = False) -> None:
    """Raise `CheckpointError` for weights that no reader of plain checkpoints understands. adapted: see `find`."""
    joined = "\n".join(names)
    for pattern, what in FOREIGN.items():
        if not (adapted and pattern == BASE_LAYER) and re.search(pattern, joined, re.MULTILINE):
            raise CheckpointError(f"{path} holds {what}")


def unwrapped(path: Path, names: Iterable[str]) -> dict[str, str]:
    """What the model calls each tensor: wrappers of the whole model or of parts of it leave their marks in names.

    Raises `CheckpointError` when two tensors would have one name.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    while bare and all(name.startswith(_PARALLEL) for name in bare.values()):
        bare = {stored: name.removeprefix(_PARALLEL) for stored, name in bare.items()}
    if len(set(bare.values())) < len(bare):
        raise CheckpointError(f"{path} holds weights twice, with and without the names of a wrapper: save it again")
    return bare


def stored_types(path: Path) -> dict[str, str]:
    """The type of each tensor in a weight file, spelt as safetensors spells it (F32, F16, BF16 …).

    Only headers are read. Raises `CheckpointError` for a file that is damaged, of another kind or holds code.
    """
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            names = file.keys()
            return {name: file.get_slice(name).get_dtype() for name in names}
    content = read_pickle(path, headers=True)
    tensors = {str(name): type_name(value) for name, value in content.items() if hasattr(value, "dtype")}
    if not tensors:
        held = ", ".join(repr(name) for name in list(content)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights by name, but {held}: save the model's `state_dict()`, or the model by its "
            "`save_pretrained`"
        )
    return tensors


def type_name(tensor: Any) -> str:
    """The type of a torch tensor, its floats spelt as safetensors spells them."""
    return str(tensor.dtype).removeprefix("torch.").removesuffix("fn").upper().replace("FLOAT", "F")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises `CheckpointError` when it is truncated, damaged or another kind of file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise other_kind(path) or CheckpointError(
            f"{path} is truncated or damaged, {path.stat().st_size} bytes ({reason(error)}): download it again"
        ) from None


def read_pickle(path: Path, headers: bool = False) -> Mapping[str, Any]:
    """What a pickle holds, as weights only. headers: tensors without values.

    Raises `CheckpointError` when it is damaged, holds code or is another kind of file.
    """
    import torch

    damaged = f"{path} is truncated or no checkpoint ({path.stat().st_size} bytes): download it again"
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")) or (zipped and not _is_torch(path)):
        raise other_kind(path) or CheckpointError(damaged)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            content = torch.load(path, map_location="meta" if headers else "cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch has a kind for each way of being damaged
        found = re.search(r"GLOBAL (\S+)", str(error))
        name = found[1] if found else _named_in(path, zipped) if isinstance(error, pickle.UnpicklingError) else None
        if name or "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} holds code, not only weights{f' ({name})' if name else ''}: "
                "convert it to .safetensors where you trust it"
            ) from None
        raise CheckpointError(damaged) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}, not weights by name: it is no checkpoint")
    return content


def _named_in(path: Path, zipped: bool) -> str | None:
    """The first function or class that a pickle names and that is not torch's own; None where there is none to read."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        stack.enter_context(contextlib.suppress(Exception))  # what is no pickle fails in many ways
        if zipped:
            archive = stack.enter_context(zipfile.ZipFile(file))
            file = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        while True:  # one after another, as torch wrote them before 1.6
            texts: list[str] = []
            for operation, value, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    name = ".".join(texts[-2:]) if value is None else str(value).replace(" ", ".")
                    if not name.startswith(_OF_TORCH):
                        return name[:_LONGEST_NAME]
                elif isinstance(value, str):
                    texts.append(value)
    return None


def other_kind(path: Path) -> CheckpointError | None:
    """What `path` is by its first bytes, and the remedy; None for a kind that is not known here."""
    with path.open("rb") as file:
        start = file.read(64)
    what = next((what for pattern, what in _STARTS if re.match(pattern, start)), None)
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        what = f"is a pickle of torch: {_PICKLE}" if _is_torch(path) else _ARCHIVE
    elif path.suffix in (".safetensors", ".sft") and start.startswith(b"\x80"):
        what = f"is a pickle: {_PICKLE}"
    elif path.suffix in (".safetensors", ".sft") and what == _SAFETENSORS:
        return None
    return CheckpointError(f"{path} {what}") if what else None


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return True  # truncated: torch says so
