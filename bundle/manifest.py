"""`bundle.json`: what a bundle holds. Its fields are described in the documentation of the bundle format."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from ..common.checks import LARGEST_SIDE, is_whole
from ..common.errors import BundleError
from . import schema1
from .reader import FieldError, Rule, read
from .wiring import (
    MODE,
    MOST_TOKENS,
    PICTURE,
    STEPPING,
    AtLeast1,
    Control,
    Latents,
    Role,
    TextEncoder,
    Tokenizer,
    Wiring,
)

SCHEMA_VERSION = 2
"""Raised when a reader of the old version would misread the new manifest."""

MANIFEST_NAME = "bundle.json"
AS_EXPORTED = "as exported"
"""The precision of a folder that another tool wrote."""
STANDARD = "onnx"
"""The backend of a variant that has the operators of the ONNX standard alone, and runs anywhere."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
Sha256 = Annotated[str, Rule(lambda value: _SHA256.fullmatch(value) is not None, "be a SHA-256 hash")]
Files = dict[str, Sha256]
"""Paths in the bundle, with `/`, and the hash of what they hold."""
_NotEmpty = Rule(bool, "not be empty")
_OF_FEW = ("mode_names", "most", "reads", "shifted", "masked", "guess", "of_prompt")
_USUAL = {name: value for name, value in asdict(Control("", 1)).items() if name in _OF_FEW}
"""What few controls have another value of; the others leave it out."""
_USUAL_PROMPT = {"stretched": False, "negative": "usual", "several": True}
"""The same of image prompts."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a component; a `str` in `shape` is the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A component's model in one precision, for one backend.

    model: the path of its graph. files: the hashes of its graphs and of their weights. per_prompt: the graph of what
    the prompt alone decides, which makes some inputs of `model` and is run once; "" where the model is in one graph.
    """

    model: str
    files: Files
    per_prompt: str = ""


@dataclass(frozen=True, slots=True)
class Component:
    """One model. variants: by `precision/backend`, see `variant`. files: of its configuration. key: of its stage.

    storage: `int8` where its weights are in eight bits, whatever it computes in; "" for those of the checkpoint.
    """

    role: Role
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    variants: dict[str, Variant] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    key: str = ""
    storage: Literal["", "int8"] = ""

    def variant(self, precision: str, backend: str = STANDARD) -> Variant | None:
        """The model in `precision` for `backend`, else with standard operators; None where there is none."""
        return self.variants.get(f"{precision}/{backend}") or self.variants.get(f"{precision}/{STANDARD}")

    @property
    def precisions(self) -> list[str]:
        """The precisions that it is there in."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.variants))

    def all_files(self) -> Files:
        """Its files and those of all variants."""
        return {**self.files, **{path: sha for each in self.variants.values() for path, sha in each.files.items()}}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest.

    family: what people call the kind of pipeline; nothing hangs on it. engine, precision: what the bundle was compiled
    for and is run with by default. tokenizers: by folder. files: what belongs to no component.
    scheduler: by task, options of the scheduler's configuration that the pipeline class changes, and their values.
    source: what it was compiled from. versions: of what it was compiled with.
    """

    family: str
    tasks: Annotated[tuple[str, ...], _NotEmpty]
    precision: str
    components: Annotated[dict[str, Component], _NotEmpty]
    wiring: Wiring
    latents: Latents
    tokenizers: dict[str, Tokenizer]
    files: Files
    default_width: AtLeast1
    default_height: AtLeast1
    default_steps: AtLeast1 = 20
    default_guidance: float = 7.5
    engine: str = "onnxruntime"
    scheduler: dict[str, dict[str, bool | int]] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for encoder in self.wiring.text:
            if encoder.component not in self.components or encoder.tokenizer not in self.tokenizers:
                raise ValueError(
                    f"wiring.text names {encoder.component!r} and {encoder.tokenizer!r}, which are not both there"
                )
            tokenizer = self.tokenizers[encoder.tokenizer]
            of_clip = bool(encoder.skips or encoder.pooled)
            if of_clip and None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
                raise ValueError(
                    f"tokenizers.{encoder.tokenizer} must have a bos_token_id and an eos_token_id, between which "
                    f"{encoder.component!r} reads a prompt"
                )

    def with_role(self, role: Role) -> list[str]:
        """The names of the components with this role."""
        return [name for name, component in self.components.items() if component.role == role]

    def named(self, role: Role) -> str:
        """The name of the component with this role, "" where there is none."""
        return next(iter(self.with_role(role)), "")

    def tokens_of(self, encoder: TextEncoder) -> int:
        """The tokens of a window of a text encoder, where a request does not choose another number."""
        return encoder.length or self.tokenizers[encoder.tokenizer].max_length

    @property
    def largest_side(self) -> int:
        """The largest width and height that a picture may have, in pixels."""
        flow, unit = self.wiring.flow, self.latents.unit
        tokens = 0 if flow is None else flow.most * flow.patch * self.latents.downscale
        return min(LARGEST_SIDE, tokens // unit * unit) if tokens else LARGEST_SIDE

    @property
    def longest_text(self) -> int:
        """The most tokens that a request may choose to have of a prompt, 0 where it may not choose."""
        most = [self.tokenizers[each.tokenizer].max_length for each in self.wiring.text if each.length]
        most += [each.most for each in self.wiring.text if each.most]
        return min([*most, *([MOST_TOKENS] if self.wiring.zeros else [])], default=0)

    def text_tokens(self, chosen: int | None = None) -> int:
        """The tokens that the denoiser reads of a prompt of one window, where a request chooses so many, or none."""
        total = 0
        for encoder in self.wiring.text:
            if encoder.hidden:
                own = (encoder.length and chosen) or self.tokens_of(encoder)
                total = total + own if encoder.join == "sequence" else max(total, own)
        return total + ((self.wiring.zeros and chosen) or self.wiring.zeros)

    def per_prompt(self, name: str) -> tuple[str, ...]:
        """The inputs of component `name` that stay the same from step to step, () for one that does not step."""
        component = self.components[name]
        if component.role not in STEPPING:
            return ()
        told = {name for each in self.wiring.image_prompts.values() for name in each.inputs if name != each.scale}
        own = {
            each for control in self.wiring.controls.values() if control.component == name for each in control.of_prompt
        }
        fixed = {*self.wiring.per_prompt(), *told, *own, PICTURE, MODE}
        return tuple(tensor.name for tensor in component.inputs if tensor.name in fixed)

    def all_files(self) -> Files:
        """Every file that the manifest vouches for, with its hash."""
        parts = self.components.values()
        return {**self.files, **{path: sha for part in parts for path, sha in part.all_files().items()}}


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a JSON object, schema version first. What few bundles have is left out where it is empty."""
    value = asdict(manifest)
    for name in ("controls", "image_prompts", "lora_inputs", "flow", "zeros", "picture_sizes", "guidance_added"):
        if not value["wiring"][name]:
            del value["wiring"][name]
    for control in value["wiring"].get("controls", {}).values():
        for name in [name for name in _USUAL if control[name] == _USUAL[name]]:
            del control[name]
    for prompt in value["wiring"].get("image_prompts", {}).values():
        for name in [name for name in _USUAL_PROMPT if prompt[name] == _USUAL_PROMPT[name]]:
            del prompt[name]
    for encoder in value["wiring"]["text"]:
        for name in ("length", "bucket", "most"):
            if not encoder[name]:
                del encoder[name]
    for tokenizer in value["tokenizers"].values():
        for name in ("before", "after"):
            if not tokenizer[name]:
                del tokenizer[name]
    for part in value["components"].values():
        if not part["storage"]:
            del part["storage"]
    return {"schema_version": value.pop("schema_version"), **value}


def from_json(value: dict[str, Any], where: str) -> Manifest:
    """Check `value` and return the manifest. Raises `BundleError` naming the field that is wrong."""
    version = value.get("schema_version")
    if not is_whole(version):
        raise BundleError(f"{where} has no schema_version: it is not a diffoundry bundle, or it is damaged")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version}; this diffoundry reads up to {SCHEMA_VERSION}: upgrade diffoundry"
        )
    if version < 1:
        raise BundleError(f"{where} has schema version {version}, which never existed: compile the bundle again")
    try:
        manifest = read(Manifest, schema1.upgraded(value) if "wiring" not in value else value)
        for name, component in manifest.components.items():
            for key, variant in component.variants.items():
                for graph in (variant.model, *filter(None, [variant.per_prompt])):
                    if graph not in variant.files:
                        raise FieldError(f"components.{name}.variants.{key}.files has no hash for the model {graph!r}")
            if not component.variants:
                raise FieldError(f"components.{name}.variants is empty")
    except FieldError as error:
        problem = " ".join(str(error).split())  # a key may hold anything
        raise BundleError(f"{where}: {problem}; compile the bundle again") from None
    return manifest
