"""`compile`: checkpoint → bundle, stage by stage, each done once.

Work goes on in a folder beside the bundle (see `bundle.workspace`), which is renamed into place when all is done. What
a stage makes is found by the hash of everything that decides it (see `bundle.ledger`), from an earlier run or from the
bundle that stands there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle import FULL, Bundle
from ..bundle.ledger import Ledger
from ..bundle.precisions import AS_STORED, STORAGE_DTYPES, VALIDATIONS
from ..bundle.wiring import NAME
from ..bundle.workspace import UNPACKED, check_target, resolved, working
from ..calibration import Scan, hinted
from ..calibration.build import Goal, check_disk, later_stages, publish, wanted_lora
from ..calibration.eightbit import stage as eightbit
from ..calibration.stage import carry_over
from ..common.errors import CheckpointError, DiffoundryError, RequestError
from ..common.files import sha256_file, sha256_json
from ..common.machine import require_modules
from ..common.progress import Meter, Progress
from ..engines import EngineStore
from ..engines.tensorrt.target import Target
from ..families.parts import TRANSFORMER
from ..runtime.lora import as_inversions, as_loras
from ..runtime.request import Request
from ..runtime.schedule import Schedules
from .checkpoint import Checkpoint
from .configs import unet_config
from .fit import check_models, check_parts
from .ip_adapter import IPAdapterFile
from .lora import Fused, fuse, merged
from .reading import Asked, Reading
from .single_file.controlnet import ControlNetFile
from .stages.components import Tracer
from .stages.files import write_files
from .unpacked import unpack

_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
_TOOLS = ("torch", "diffusers", "transformers", "onnxscript", "onnxruntime")


def compile(
    checkpoint: str | Path,
    out: str | Path,
    *,
    engine: str = "onnxruntime",
    precision: str | None = FULL,
    storage_dtype: str | None = None,
    validate: str | None = None,
    target: Target | None = None,
    scan: Scan | None = None,
    calibration: str | Path | None = None,
    force: bool = False,
    family: str | None = None,
    tasks: Sequence[str] | None = None,
    components: Mapping[str, str | Path] | None = None,
    controlnets: Mapping[str, str | Path] | None = None,
    t2i_adapters: Mapping[str, str | Path] | None = None,
    ip_adapters: Mapping[str, str | Path] | None = None,
    image_encoder: str | Path | None = None,
    loras: Sequence[Any] = (),
    embeddings: Sequence[Any] = (),
    lora_rank: int | None = None,
    lora_layers: str | None = None,
    text_storage_dtype: str | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    default_steps: int | None = None,
    default_guidance: float | None = None,
    trace_scheduler: str | None = None,
    steps: Sequence[int] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Make the bundle `out` from a diffusers folder, a hub id, or a single file in the layout of the original authors.

    engine: what the bundle is run with by default, one of `engines.names.ENGINES`; what it needs is made, too: TensorRT
    plans for `target`, or graphs for CUDA, for which no GPU is needed. `auto` is the fastest of those that are
    installed for this processor, in a precision under fp32 where `precision` is None and the images are near enough.
    precision: fp32, fp16 or bf16. The lower ones are written beside fp32, with what must stay in fp32 found by running
    the loop as `scan` says; `calibration.QualityError` is raised when the images are too far from fp32.
    storage_dtype: of the weights of the fp32 models; by default `auto` for transformers and fp32 for U-Nets. `auto`
    keeps those of a component that the checkpoint stores in fp16 or bf16 as they are, which takes half the disk, and
    less memory to compile but more to run on the CPU; the models compute in float32 all the same.
    validate: what is held against torch of transformers and T5 in half precision: the `full` model, or a `twin` with a
    few of its layers and of its weights; by default the twin where there is no memory for the whole.
    family: overrides the family found by the pipeline class. progress: see `Progress`.
    tasks: of those that the checkpoint can do, the ones that the bundle is for (default: all); components that only
    the others need are left out. components: folders in place of components of the checkpoint, such as the U-Net of a
    distilled model with its scheduler, or of its models single files, by the names of diffusers or of the original
    authors; `vae_tiny` adds an `AutoencoderTiny` as a second decoder.
    controlnets: by the names that requests call them by, ControlNets in diffusers folders or in files. A bundle that
    stands gets them without anything else being traced again; name all that it is to have.
    t2i_adapters: the same of T2I-Adapters, in diffusers folders.
    ip_adapters: the same of IP-Adapters, each a file, or a folder with one. image_encoder: the folder of the image
    encoder that they were trained with (default: the folder `image_encoder` beside each).
    loras: that the weights are changed by for good, each as `Pipeline.set_loras` takes it. embeddings:
    textual inversions, each as `Pipeline.set_embeddings` takes it. lora_rank, lora_layers,
    text_storage_dtype: see `build`.
    config: for a single file, a diffusers folder whose configurations, scheduler and tokenizers go with its weights,
    and whose own weights are taken for what a file of FLUX.1, Stable Diffusion 3 or Z-Image lacks.
    prediction_type: for a single file, what its U-Net predicts, where the file does not tell.
    default_steps, default_guidance: what `run` asks for when it is not told (default: the family's).
    trace_scheduler: a diffusers class or `module:Class` that diffoundry has no function for; its tables are read off
    it for each of `steps` and kept in the bundle, which can then run it.
    Raises `CheckpointError`, `EngineError` or `DiffoundryError`; what was finished is kept for the next run, and
    `out` is either the old bundle or the whole new one.
    """
    if (trace_scheduler is None) != (not steps):
        raise DiffoundryError("a scheduler is traced for the step counts named: give both it and the counts")
    if validate not in (None, *VALIDATIONS):
        raise DiffoundryError(f"unknown validation {validate!r:.80}: choose one of {', '.join(VALIDATIONS)}")
    if storage_dtype not in (None, *STORAGE_DTYPES):
        raise DiffoundryError(f"unknown storage dtype {storage_dtype!r:.80}: choose one of {', '.join(STORAGE_DTYPES)}")
    goal = Goal.of(
        engine, precision, target, scan, calibration, force, wanted_lora(lora_rank, lora_layers), text_storage_dtype
    )
    require_modules("compile", _MODULES, "export")
    path, asked = (
        resolved(out),
        Asked(family, tasks, components or {}, default_steps, default_guidance, controlnets or {}),
    )
    asked = replace(asked, t2i_adapters=t2i_adapters or {})
    if image_encoder is not None and not ip_adapters:
        raise DiffoundryError("an image encoder goes with IP-Adapters: give one, or leave it out")
    encoder = None if image_encoder is None else Path(image_encoder)
    adapters = {name: IPAdapterFile.open(Path(file), encoder) for name, file in (ip_adapters or {}).items()}
    traced = None if trace_scheduler is None else (trace_scheduler, tuple(steps))
    with working(path, lambda: check_target(path, checkpoint)) as (work, _):
        opened = unpack(checkpoint, work, config, prediction_type, asked)
        source, asked = opened.source, replace(asked, components=opened.components)
        plain = partial(Reading.of, asked=replace(asked, controls={}, t2i_adapters={}), shown=checkpoint)
        if not opened.single:
            whole = merged(source.replace(asked.components), work / UNPACKED)
            asked = replace(asked, components={**asked.components, **whole})
        folders = _unpack_controls(asked, source, work, plain)
        files = _unpack_adapters(adapters, work)
        reading = Reading.of(source, replace(asked, controls=folders, adapters=files), checkpoint)
        fused = Fused(as_loras(loras), as_inversions(embeddings))
        if fused:
            changed = _fused(reading, fused, work, _keeps(storage_dtype, reading))
            asked = replace(asked, components={**asked.components, **changed})
            reading = Reading.of(source, replace(asked, controls=folders, adapters=files), checkpoint)
        name = Path(checkpoint).stem if opened.single else reading.source.root.resolve().name
        return _run(reading, name, goal, storage_dtype, validate, traced, Ledger(work, path), progress, fused.told())


def _run(
    reading: Reading,
    name: str,
    goal: Goal,
    storage_dtype: str | None,
    validate: str | None,
    traced: tuple[str, tuple[int, ...]] | None,
    ledger: Ledger,
    progress: Progress | None,
    told: Mapping[str, str],
) -> Bundle:
    """The stages, one after another. name: of the checkpoint. traced: a scheduler to be traced, and for which steps.

    told: what else the manifest says of the source.
    """
    source, specs = reading.source, reading.specs
    weights = {folder: source.weights(folder) for folder in sorted({name for spec in specs for name in spec.sources})}
    keep_half = _keeps(storage_dtype, reading)
    if storage_dtype == AS_STORED and not any(each.half for each in weights.values()):
        raise DiffoundryError(
            f"the storage dtype {AS_STORED} has no effect: {name} stores no component in fp16 or bf16: leave it out"
        )
    kinds = {part.source: source.kind(part.source)[1] for part in reading.pipeline.parts.values()}
    if goal.text_storage is not None and "T5EncoderModel" not in kinds.values():
        raise DiffoundryError(f"{name} has no T5 whose weights could be in int8: leave the text storage dtype out")
    bundle = write_files(reading, ledger.work, name, traced)
    _check_schedule(bundle, reading)
    check_parts(specs, reading.pipeline)
    check_models(specs)
    meter = Meter(progress, len(specs) + 3 + goal.parts(bundle.manifest))
    meter.show("hash the checkpoint")
    hashes = {folder: each.sha256() for folder, each in weights.items()}
    meter.step()
    # their keys decide whether they are ever used
    EngineStore(ledger.work / "engines").take(EngineStore(ledger.old / "engines"))
    new = {spec.source for spec in specs if not ledger.knows(spec.name)}
    sizes = sum(weights[folder].size * (2 if weights[folder].half and not keep_half else 1) for folder in new)
    check_disk(ledger.old, (1.0 + goal.written()) * sizes)
    # of the modules that are loaded: several distributions serve one, such as onnxruntime-gpu
    tools = {tool: str(importlib.import_module(tool).__version__) for tool in _TOOLS}
    manifest = replace(
        bundle.manifest,
        engine=str(goal.engine),
        precision=goal.precision,
        source=bundle.manifest.source | {"sha256": sha256_json(hashes), **told},
        versions=tools | {"diffoundry": __version__},
    )
    tracer = Tracer(source, ledger, tools, keep_half, validate)
    bundle = tracer.trace(replace(bundle, manifest=manifest), specs, hashes, meter)
    bundle = eightbit.carry_over(carry_over(bundle, ledger, goal.precision), ledger, goal.precision)
    bundle = hinted.carry_over(bundle, ledger, (str(goal.engine), goal.precision) if goal.hinted else None)
    return publish(later_stages(bundle, ledger, goal, meter), ledger, meter)


def _check_schedule(bundle: Bundle, reading: Reading) -> None:
    """Raise `CheckpointError` for a scheduler of a model of flow matching that makes no schedule by default."""
    manifest = bundle.manifest
    if manifest.wiring.flow is None:
        return
    try:
        Schedules(bundle).of(Request(), (manifest.default_width, manifest.default_height))
    except RequestError as error:
        raise CheckpointError(f"the scheduler_config.json of {reading.source.root} cannot be used: {error}") from None


def _keeps(storage_dtype: str | None, reading: Reading) -> bool:
    """Whether weights that are stored in half precision stay in it."""
    return storage_dtype == AS_STORED or (storage_dtype is None and reading.pipeline.wiring.flow is not None)


def _fused(reading: Reading, asked: Fused, work: Path, keep_half: bool) -> dict[str, Path]:
    """The folders of the components that LoRAs and new words change."""
    [denoiser] = [name for name, part in reading.pipeline.parts.items() if part.role == "denoiser"]
    texts = {encoder.component: encoder.tokenizer for encoder in reading.pipeline.wiring.text}
    return fuse(reading.source, asked, denoiser, texts, work / UNPACKED, keep_half=keep_half)


def _unpack_adapters(adapters: Mapping[str, IPAdapterFile], work: Path) -> dict[str, IPAdapterFile]:
    """Each of the IP-Adapters in a folder of its own, as `Checkpoint` reads models, once for each content."""
    found = {}
    for name, file in adapters.items():
        if not NAME.fullmatch(name):
            raise CheckpointError(f"the name of an IP-Adapter has letters, digits and _, found {name!r:.80}")
        folder = work / UNPACKED / f"ip-{sha256_file(file.path)[:16]}"
        if not folder.is_dir():
            file.write(folder)
        found[name] = IPAdapterFile.open(folder, file.encoder)
    return found


def _unpack_controls(
    asked: Asked, source: Checkpoint, work: Path, read: Callable[[Checkpoint], Reading]
) -> dict[str, str | Path]:
    """The folders of ControlNets, of which those in one file are unpacked, once for each content.

    read: the checkpoint without them.
    """
    folders = dict(asked.controls)
    files = {name: Path(path) for name, path in folders.items() if Path(path).is_file()}
    if not files:
        return folders
    reading = read(source)
    if reading.source.has(TRANSFORMER):
        raise CheckpointError(
            f"{next(iter(files.values()))} is a file: of a ControlNet of a transformer give the diffusers folder, with "
            "config.json and weights"
        )
    unet = unet_config(reading.source)
    for name, path in files.items():
        found = ControlNetFile(path, unet)
        decided = sha256_json([sha256_file(path), found.config])
        folders[name] = work / UNPACKED / f"control-{decided[:16]}"
        if not Path(folders[name]).is_dir():
            found.write(Path(folders[name]))
    return folders
