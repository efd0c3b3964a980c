"""`bundle.json`: what a bundle holds. The schema is documented in the README, section "The bundle"."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..common.errors import BundleError

SCHEMA_VERSION = 2
"""Raised when a reader of the old version would misread the new manifest."""

MANIFEST_NAME = "bundle.json"
FULL = "fp32"
"""The precision that models are traced in."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHORTEST_WINDOW = 3  # start, one token, end
_SMALLEST = 1e-12
_LARGEST_TOKEN = 1 << 31
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a component; a `str` in `shape` is the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A component's model in one precision: the path of its graph, and the SHA-256 of it and of its external data."""

    model: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Component:
    """One ONNX model. `files` maps each of its files (models, external data, config) to its SHA-256.

    fused: the same model with operators that only ONNX Runtime has, on its CPU provider; "" when there is none.
    hoisted: the part of `fused` that the prompt alone decides, cut from it to run once; "" when there is none.
    typed: the model in lower precisions, by their names.
    """

    model: str
    dtype: str
    files: dict[str, str]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    key: str = ""
    fused: str = ""
    hoisted: str = ""
    typed: dict[str, Variant] = field(default_factory=dict)

    def model_files(self) -> dict[str, str]:
        """The files that decide what an engine of ONNX Runtime computes: the graphs and their weights."""
        return {path: sha for path, sha in self.files.items() if not path.endswith(".json")}

    def variant(self, precision: str) -> Variant | None:
        """The model in `precision`, with the operators of the ONNX standard alone; None when there is none."""
        if precision != FULL:
            return self.typed.get(precision)
        own = (self.model, f"{self.model}_data")
        return Variant(self.model, {path: self.files[path] for path in own if path in self.files})


@dataclass(frozen=True, slots=True)
class Latents:
    """How latents relate to pixels: `x_vae = x · std / scaling_factor + shift_factor + mean`, channel by channel.

    downscale: pixels a latent. tile: side of a tile, in latents, when large images are worked through in tiles.
    mean, std: one number a channel, or empty for 0 and 1. multiple: what the U-Net takes, in latents a side.
    """

    channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float = 0.0
    tile: int = 64
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    multiple: int = 1

    @property
    def unit(self) -> int:
        """What the sides of a picture must be multiples of, in pixels."""
        return self.downscale * self.multiple


@dataclass(frozen=True, slots=True)
class Prompt:
    """How text becomes the token ids of one text encoder, and which of its outputs the U-Net reads.

    hidden: the output that becomes `encoder_hidden_states`; skips: its replacements when 1, 2, … layers are skipped.
    pooled: the output that becomes `text_embeds`, "" where the U-Net takes none of this encoder.
    """

    tokenizer: str
    max_length: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    hidden: str = "last_hidden_state"
    skips: tuple[str, ...] = ()
    pooled: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest; see the README for each field.

    engine, precision: what the bundle was compiled for and is run with by default.
    scheduler: by task, options of the scheduler's configuration that the pipeline class changes, and their values.
    """

    family: str
    tasks: tuple[str, ...]
    precision: str
    components: dict[str, Component]
    files: dict[str, str]
    latents: Latents
    prompts: dict[str, Prompt]
    default_width: int
    default_height: int
    default_steps: int = 20
    default_guidance: float = 7.5
    engine: str = "onnxruntime"
    options: dict[str, bool] = field(default_factory=dict)
    scheduler: dict[str, dict[str, bool | int]] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def all_files(self) -> dict[str, str]:
        """Every file that the manifest vouches for, with its SHA-256."""
        files = dict(self.files)
        for component in self.components.values():
            files.update(component.files)
            for variant in component.typed.values():
                files.update(variant.files)
        return files


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a JSON object, schema version first."""
    value = asdict(manifest)
    return {"schema_version": value.pop("schema_version"), **value}


def from_json(value: dict[str, Any], where: str) -> Manifest:
    """Check `value` and return the manifest. Raises `BundleError` naming the field that is wrong."""
    version = value.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{where} has no schema_version: it is not a diffoundry bundle, or it is damaged")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version}; this diffoundry reads up to {SCHEMA_VERSION}: upgrade diffoundry"
        )
    if version < 1:
        raise BundleError(f"{where} has schema version {version}, which never existed: compile the bundle again")
    reader = _Reader(where)
    components = {
        name: reader.component(f"components.{name}", part)
        for name, part in reader.get(value, "components", dict).items()
    }
    latents = reader.get(value, "latents", dict)
    if not components:
        raise reader.fail("components", "is empty")
    if not value.get("tasks"):
        raise reader.fail("tasks", "is missing or empty")
    return Manifest(
        family=reader.get(value, "family", str),
        tasks=tuple(reader.strings("tasks", reader.get(value, "tasks", list))),
        precision=reader.get(value, "precision", str),
        components=components,
        files=reader.hashes("files", reader.get(value, "files", dict)),
        latents=Latents(
            channels=reader.positive(latents, "channels", "latents."),
            downscale=reader.positive(latents, "downscale", "latents."),
            scaling_factor=reader.nonzero(latents, "scaling_factor", "latents."),
            shift_factor=reader.number(latents, "shift_factor", "latents."),
            tile=reader.positive({"tile": 64, **latents}, "tile", "latents."),
            multiple=reader.positive({"multiple": 1, **latents}, "multiple", "latents."),
            **reader.deviations(latents),
        ),
        prompts={
            name: reader.prompt(f"prompts.{name}.", part) for name, part in reader.get(value, "prompts", dict).items()
        },
        default_width=reader.positive(value, "default_width"),
        default_height=reader.positive(value, "default_height"),
        default_steps=reader.positive({"default_steps": 20, **value}, "default_steps"),
        default_guidance=reader.number({"default_guidance": 7.5, **value}, "default_guidance"),
        engine=reader.get({"engine": "onnxruntime", **value}, "engine", str),
        options=reader.flags("options", reader.get({"options": {}, **value}, "options", dict)),
        scheduler={
            task: reader.changes(f"scheduler.{task}", changes)
            for task, changes in reader.get({"scheduler": {}, **value}, "scheduler", dict).items()
        },
        source=reader.texts("source", reader.get(value, "source", dict)),
        versions=reader.texts("versions", reader.get(value, "versions", dict)),
        schema_version=version,
    )


class _Reader:
    """Takes typed fields out of untrusted JSON and says which one is wrong."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, name: str, problem: str) -> BundleError:
        return BundleError(f"{self.where}: field {name!r} {problem}; compile the bundle again")

    def get(self, value: Any, name: str, kind: type[_T], prefix: str = "") -> _T:
        if not isinstance(value, dict) or name not in value:
            raise self.fail(prefix + name, "is missing")
        found = value[name]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self.fail(prefix + name, f"must be of type {kind.__name__}, found {type(found).__name__}")
        return found

    def positive(self, value: Any, name: str, prefix: str = "") -> int:
        found = self.get(value, name, int, prefix)
        if found < 1:
            raise self.fail(prefix + name, f"must be at least 1, found {found}")
        return found

    def number(self, value: Any, name: str, prefix: str = "") -> float:
        found = value.get(name) if isinstance(value, dict) else None
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found or abs(found) > 1e30:
            raise self.fail(prefix + name, "must be a finite number")
        return float(found)

    def nonzero(self, value: Any, name: str, prefix: str = "") -> float:
        found = self.number(value, name, prefix)
        if abs(found) < _SMALLEST:
            raise self.fail(prefix + name, "must not be zero")
        return found

    def per_channel(self, latents: dict[str, Any], name: str) -> tuple[float, ...]:
        values = self.get({name: [], **latents}, name, list, "latents.")
        numbers = tuple(self.number({name: value}, name, "latents.") for value in values)
        if numbers and len(numbers) != latents["channels"]:
            raise self.fail(f"latents.{name}", "must hold one number a channel")
        return numbers

    def deviations(self, latents: dict[str, Any]) -> dict[str, tuple[float, ...]]:
        mean, std = (self.per_channel(latents, name) for name in ("mean", "std"))
        if len(mean) != len(std) or not all(abs(value) > _SMALLEST for value in std):
            raise self.fail("latents.std", "must go with latents.mean and hold no zero")
        return {"mean": mean, "std": std}

    def flags(self, name: str, values: dict[Any, Any]) -> dict[str, bool]:
        if not all(isinstance(item, bool) for item in values.values()):
            raise self.fail(name, "must map names to true or false")
        return values

    def changes(self, name: str, values: Any) -> dict[str, bool | int]:
        if not isinstance(values, dict) or not all(isinstance(item, (bool, int)) for item in values.values()):
            raise self.fail(name, "must map options to true, false or whole numbers")
        return values

    def strings(self, name: str, values: list[Any]) -> list[str]:
        if not all(isinstance(item, str) for item in values):
            raise self.fail(name, "must be a list of strings")
        return values

    def texts(self, name: str, values: dict[Any, Any]) -> dict[str, str]:
        if not all(isinstance(item, str) for item in values.values()):
            raise self.fail(name, "must map names to strings")
        return values

    def hashes(self, name: str, values: dict[Any, Any]) -> dict[str, str]:
        if not all(isinstance(item, str) and _SHA256.fullmatch(item) for item in values.values()):
            raise self.fail(name, "must map paths to SHA-256 hashes")
        return values

    def tensors(self, name: str, values: list[Any]) -> tuple[Tensor, ...]:
        result = []
        for item in values:
            shape = self.get(item, "shape", list, f"{name}.")
            if not all(isinstance(axis, (int, str)) for axis in shape):
                raise self.fail(f"{name}.shape", "must hold sizes and axis names")
            result.append(
                Tensor(self.get(item, "name", str, f"{name}."), self.get(item, "dtype", str, f"{name}."), tuple(shape))
            )
        return tuple(result)

    def component(self, name: str, value: Any) -> Component:
        model = self.get(value, "model", str, f"{name}.")
        files = self.hashes(f"{name}.files", self.get(value, "files", dict, f"{name}."))
        if model not in files:
            raise self.fail(f"{name}.files", f"does not vouch for the model {model!r}")
        fused, hoisted = (self.get({part: "", **value}, part, str, f"{name}.") for part in ("fused", "hoisted"))
        for part in filter(None, (fused, hoisted)):
            if part not in files:
                raise self.fail(f"{name}.files", f"does not vouch for the model {part!r}")
        return Component(
            model=model,
            dtype=self.get(value, "dtype", str, f"{name}."),
            files=files,
            inputs=self.tensors(f"{name}.inputs", self.get(value, "inputs", list, f"{name}.")),
            outputs=self.tensors(f"{name}.outputs", self.get(value, "outputs", list, f"{name}.")),
            key=self.get(value, "key", str, f"{name}."),
            fused=fused,
            hoisted=hoisted,
            typed={
                str(precision): self.variant(f"{name}.typed.{precision}", part)
                for precision, part in self.get({"typed": {}, **value}, "typed", dict, f"{name}.").items()
            },
        )

    def variant(self, name: str, value: Any) -> Variant:
        model = self.get(value, "model", str, f"{name}.")
        files = self.hashes(f"{name}.files", self.get(value, "files", dict, f"{name}."))
        if model not in files:
            raise self.fail(f"{name}.files", f"does not vouch for the model {model!r}")
        return Variant(model, files)

    def prompt(self, prefix: str, value: Any) -> Prompt:
        numbers = {
            name: self.get(value, name, int, prefix)
            for name in ("max_length", "bos_token_id", "eos_token_id", "pad_token_id")
        }
        for name, number in numbers.items():
            if not (_SHORTEST_WINDOW if name == "max_length" else 0) <= number < _LARGEST_TOKEN:
                raise self.fail(prefix + name, f"is out of range, found {number}")
        outputs = {"hidden": "last_hidden_state", "pooled": "", "skips": [], **value}
        return Prompt(
            tokenizer=self.get(value, "tokenizer", str, prefix),
            hidden=self.get(outputs, "hidden", str, prefix),
            skips=tuple(self.strings(f"{prefix}skips", self.get(outputs, "skips", list, prefix))),
            pooled=self.get(outputs, "pooled", str, prefix),
            **numbers,
        )
