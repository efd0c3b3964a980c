"""The stage that writes the denoiser with the factors of LoRAs as inputs, over the weights of the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import FULL, STANDARD, Bundle, Component, Tensor, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.wiring import MOST_RANK, LoraInputs
from ..common.arrays import Array
from ..common.checks import is_whole
from ..common.errors import DiffoundryError, EngineError
from ..common.files import link_or_copy, remove, sha256_file, sha256_json
from ..common.progress import Meter
from ..engines.changed import new_values, sources_of
from ..engines.fusion.cpu import fuse_for_cpu
from ..engines.fusion.graph import moved, open_model, save
from ..engines.fusion.lora import DOWN, LAYERS, RANK, SETS, UP, Layer, add_lora, group_of, names_of
from ..engines.lora_denoiser import NAME
from ..engines.names import ONNXRUNTIME, OPENVINO
from ..engines.onnxruntime import load_variant
from ..engines.verify import compare_outputs, recorded_case, save_case
from .hinted import HINTED_ENGINES

RECORD = "lora_inputs"
_REVISION = 3
"""Raise it when the same models would give other graphs."""
_FILES = {FULL: "model.onnx", "fp16": "fp16.onnx", "bf16": "bf16.onnx"}
_SPARING = "sparing.onnx"
"""The fp32 graph for ONNX Runtime before its operators are fused: it spares layers that a set does not change."""
_OPENVINO = ("openvino.onnx", "openvino_per_prompt.onnx")
"""The fp32 graph for OpenVINO, which wants sizes that do not depend on what inputs hold."""
_PLAIN = "plain.{}_data"
"""The weights that a graph shares with the plain one."""
_PLAIN_FULL = _PLAIN.format("model")


@dataclass(frozen=True, slots=True)
class Wanted:
    """rank: the most of all LoRAs of a row together; 0 for a bundle without such a denoiser.

    layers: of `LAYERS`; by default all for the processor, where those that a set leaves as they are cost little, and
    what most trainers train for GPUs.
    """

    rank: int
    layers: str | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.rank) or not 0 <= self.rank <= MOST_RANK:
            raise DiffoundryError(
                f"the LoRA rank must be from 1 to {MOST_RANK}, or 0 for none, found {self.rank!r:.80}"
            )
        if self.layers not in (None, *LAYERS):
            raise DiffoundryError(f"unknown LoRA layers {self.layers!r:.80}: choose one of {', '.join(LAYERS)}")


@dataclass(frozen=True, slots=True)
class Adapted:
    """What was made: the variants of the component, its inputs, the weights that it takes factors for, and a case."""

    variants: dict[str, Variant]
    files: Files
    inputs: tuple[Tensor, ...]
    weights: tuple[str, ...]
    reference: Files

    def __post_init__(self) -> None:
        whole = all({each.model, each.per_prompt} <= {"", *each.files} for each in self.variants.values())
        if not whole or f"{FULL}/{STANDARD}" not in self.variants or not self.weights or not self.reference:
            raise ValueError("it is not whole")

    def all_files(self) -> Files:
        """The files of all variants and of the recorded case."""
        return Component("step", variants=self.variants, files=self.files).all_files() | self.reference


ADAPTED = Kind(Adapted, Adapted.all_files)


def without(bundle: Bundle) -> tuple[Bundle, Callable[[str], bool] | None, int]:
    """`bundle` without its denoiser that takes factors; which weights that took them, and of which rank."""
    manifest = bundle.manifest
    if not manifest.wiring.lora_inputs:
        return bundle, None, 0
    [(name, inputs)] = manifest.wiring.lora_inputs.items()
    components = {key: part for key, part in manifest.components.items() if key != name}
    files = {path: sha for path, sha in manifest.files.items() if path != _reference(name)}
    wiring = replace(manifest.wiring, lora_inputs={})
    plain = replace(bundle, manifest=replace(manifest, components=components, files=files, wiring=wiring))
    return plain, set(inputs.weights).__contains__, inputs.rank


def chosen(wanted: Wanted, on_cpu: bool) -> Callable[[str], bool]:
    """Whether a weight of this name is to take factors. on_cpu: whether the engine is of the processor."""
    layers = LAYERS[wanted.layers or ("all" if on_cpu else "transformer")]
    return lambda weight: layers.search(weight) is not None


def with_lora(bundle: Bundle, ledger: Ledger, wanted: Callable[[str], bool], lora_rank: int, meter: Meter) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with a denoiser that takes factors, in every precision.

    wanted: whether a weight of the checkpoint is to take them. lora_rank: the most.
    Raises `EngineError` where the graph does not give what the plain one gives with its weights changed.
    """
    manifest = bundle.manifest
    denoiser = manifest.named("denoiser")
    part, name = manifest.components[denoiser], NAME.format(denoiser)
    meter.show(f"LoRA inputs of {denoiser}")
    models = {p: asdict(part.variants[f"{p}/{STANDARD}"]) for p in _FILES if f"{p}/{STANDARD}" in part.variants}
    named = sorted(weight for source in sources_of(bundle, denoiser).values() for weight in source.weights)
    key = sha256_json({"revision": _REVISION, "models": models, "weights": [each for each in named if wanted(each)]})
    made = ledger.once(RECORD, key, ADAPTED, lambda: _adapted(bundle, denoiser, name, wanted))
    meter.step()
    variants = dict(made.variants)
    hinted = [own for own in part.variants if own.partition("/")[2] in HINTED_ENGINES]
    variants |= dict.fromkeys(hinted, variants[f"{FULL}/{OPENVINO}"])  # the same graph, computed in that precision
    component = Component("lora", made.inputs, part.outputs, variants, made.files, key)
    wiring = replace(manifest.wiring, lora_inputs={name: LoraInputs(lora_rank, made.weights, DOWN, UP)})
    components = manifest.components | {name: component}
    files = manifest.files | made.reference
    return replace(bundle, manifest=replace(manifest, components=components, wiring=wiring, files=files))


def _adapted(bundle: Bundle, denoiser: str, name: str, wanted: Callable[[str], bool]) -> Adapted:
    part, folder = bundle.component(denoiser), bundle.root / name
    sources = {key: source.weights for key, source in sources_of(bundle, denoiser).items()}

    def add(model: Any, *, spares: bool = False) -> list[Layer]:
        return add_lora(
            model, names_of(sources), lambda weight: group_of(weight) if wanted(weight) else None, spares=spares
        )

    remove(folder)
    folder.mkdir()
    variants: dict[str, Variant] = {}
    layers: list[Layer] = []
    for precision, file in _FILES.items():
        plain = part.variants.get(f"{precision}/{STANDARD}")
        if plain is None:
            continue
        own = _write(bundle.path(plain.model), folder, file, add)
        if layers and own != layers:
            raise EngineError(f"the {precision} model of {denoiser} has other layers than that in fp32: build it again")
        layers = own
        variants[f"{precision}/{STANDARD}"] = _variant(bundle.root, folder, file)
    if not layers:
        raise DiffoundryError(f"{denoiser} has none of the layers that are to take LoRAs: choose --lora-layers all")
    per_prompt = bundle.manifest.per_prompt(denoiser)
    variants[f"{FULL}/{OPENVINO}"] = _fused(folder, _FILES[FULL], per_prompt, _OPENVINO)
    plain_model = bundle.path(part.variants[f"{FULL}/{STANDARD}"].model)
    _write(plain_model, folder, _SPARING, partial(add, spares=True), _PLAIN_FULL)
    variants[f"{FULL}/{ONNXRUNTIME}:cpu"] = _fused(folder, _SPARING, per_prompt)
    if _SPARING not in variants[f"{FULL}/{ONNXRUNTIME}:cpu"].model:
        remove(folder / _SPARING)
    given = tuple(
        Tensor(input_name, "float32", (SETS, sum(sizes), RANK))
        for input_name, sizes in ((DOWN, [each.reads for each in layers]), (UP, [each.gives for each in layers]))
    )
    described = {}
    for file in ("config.json", "weights.json"):
        link_or_copy(bundle.path(f"{denoiser}/{file}"), folder / file)
        described[f"{name}/{file}"] = sha256_file(folder / file)
    reference = _checked(bundle, denoiser, name, variants, layers)
    return Adapted(variants, described, (*part.inputs, *given), tuple(each.weight for each in layers), reference)


def _fused(
    folder: Path, model: str, per_prompt: Sequence[str], names: tuple[str, str] = ("fused.onnx", "per_prompt.onnx")
) -> Variant:
    """`model`, whose weights are those of the fp32 one, with the operators of ONNX Runtime's CPU provider."""
    both = fuse_for_cpu(folder / model, per_prompt, names)
    graphs = [each for each in both or (model,) if each]
    data = [_PLAIN_FULL, f"{model}_data"]
    files = [name for name in (*graphs, *data) if (folder / name).is_file()]
    hashes = {f"{folder.name}/{name}": sha256_file(folder / name) for name in files}
    return Variant(f"{folder.name}/{graphs[0]}", hashes, *(f"{folder.name}/{each}" for each in graphs[1:]))


def _write(
    plain: Path, folder: Path, file: str, change: Callable[[Any], list[Layer]], linked: str | None = None
) -> list[Layer]:
    """Write the graph in `plain`, changed, into `folder`; its large weights are linked, not written again.

    linked: the name of their file there.
    """
    import onnx_ir

    model = open_model(plain)
    made = change(model)
    linked = linked or _PLAIN.format(Path(file).stem)
    for value in model.graph.initializers.values():
        stored = value.const_value
        if isinstance(stored, onnx_ir.ExternalTensor):
            if not (folder / linked).exists():
                link_or_copy(plain.with_name(str(stored.location)), folder / linked)
            value.const_value = moved(stored, folder, linked)
    save(model, folder, file)
    return made


def _variant(root: Path, folder: Path, file: str) -> Variant:
    names = [file, _PLAIN.format(Path(file).stem), f"{file}_data"]
    paths = [folder / each for each in names if (folder / each).is_file()]
    files = {path.relative_to(root).as_posix(): sha256_file(path) for path in paths}
    return Variant(next(iter(files)), files)


def _checked(bundle: Bundle, denoiser: str, name: str, variants: dict[str, Variant], layers: list[Layer]) -> Files:
    """Hold the graph against the plain one with its weights changed, and record a case. Raises `EngineError`."""
    generator = np.random.default_rng(0)
    feeds, _ = recorded_case(bundle, denoiser)
    most = 4

    def factors(sizes: list[int]) -> Array:
        return (generator.standard_normal((1, sum(sizes), most)) * 0.05).astype(np.float32)

    down, up = factors([each.reads for each in layers]), factors([each.gives for each in layers])
    rows = zip(
        _cut(down[0], [each.reads for each in layers]), _cut(up[0], [each.gives for each in layers]), strict=True
    )
    changes = {
        layer.weight: (lambda weight, a=a, b=b: (b @ a.T).reshape(weight.shape))
        for layer, (a, b) in zip(layers, rows, strict=True)
    }
    part = bundle.component(denoiser)
    plain = part.variant(FULL, f"{ONNXRUNTIME}:cpu")
    assert plain is not None  # `build` looked
    graphs = [bundle.path(graph) for graph in (plain.model, plain.per_prompt) if graph]
    changed = new_values(bundle, denoiser, graphs, changes, denoiser)
    expected = load_variant(bundle.root, denoiser, plain, changed=changed)(feeds)
    own = variants[f"{FULL}/{ONNXRUNTIME}:cpu"]
    feeds = {**feeds, DOWN: down, UP: up}
    check = compare_outputs(name, FULL, load_variant(bundle.root, name, own)(feeds), expected)
    if not check.passed:
        raise EngineError(
            f"{name}: with factors it is off by {check.max_abs_error:.1e} from the plain graph with its weights "
            f"changed, {check.allowed:.1e} is allowed: report it"
        )
    path = bundle.root / _reference(name)
    save_case(path, feeds, expected)
    return {_reference(name): sha256_file(path)}


def _cut(array: Array, sizes: list[int]) -> list[Array]:
    return np.split(array, [int(each) for each in np.cumsum(sizes)[:-1]])


def _reference(name: str) -> str:
    return f"reports/reference/{name}.npz"
