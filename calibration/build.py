"""`build`: what of a bundle needs no torch, made where it will run: a lower precision, and what an engine runs."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle import EIGHT_BIT, FULL, MANIFEST_NAME, STANDARD, Bundle, Manifest
from ..bundle.ledger import Ledger
from ..bundle.manifest import SCHEMA_VERSION, from_json, to_json
from ..bundle.precisions import check_precision
from ..bundle.reports import read_report
from ..bundle.workspace import STAGES, check_replaceable, resolved, swap, sweep, working
from ..common.errors import BundleError, DiffoundryError, EngineError
from ..common.files import link_or_copy, read_json, remove, write_json
from ..common.machine import require_modules
from ..common.progress import Meter, Progress
from ..engines import EngineStore
from ..engines.names import ONNXRUNTIME, OPENVINO, EngineName
from ..engines.openvino.device import Device
from ..engines.runnable import check_runnable
from ..engines.tensorrt.backend import BACKENDS
from ..engines.tensorrt.build import clean
from ..engines.tensorrt.bundle_plans import BuildMachine, build_plans, count_plans, resolve_machine
from ..engines.tensorrt.target import Target
from ..engines.tensorrt.variants import BESIDE
from . import fusion, hinted, lora_inputs, text_storage
from .choice import AUTO, RECORD, candidates, choose
from .damage import without_damaged
from .eightbit import stage as eightbit
from .eightbit.controlled import CONTROLLED
from .eightbit.half import record_names, write_half
from .eightbit.times import check_time
from .hinted import HINTED_ENGINES
from .scan import Scan
from .stage import convert, record_name
from .text_storage import check_dtype

_MODULES = ("onnx", "onnx_ir", "ml_dtypes")
_FP32 = f"{FULL}/{STANDARD}"
_DISK_MARGIN = 1.1
"""Disk needed, as a multiple of the weights of the models, converted models and engines that are written."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a bundle is to be run with.

    machine: what its plans are built with and for, None where it has none. converts: whether a precision is to be made.
    chooses: whether the engine is to be chosen by time, and a precision under fp32 with it where `lower` says so.
    lora: the denoiser that takes factors of LoRAs, None for as it is.
    text_storage: the type that the weights of T5 are to be stored in, None for as they are.
    """

    engine: EngineName
    precision: str
    target: Target
    scan: Scan
    machine: BuildMachine | None
    converts: bool
    chooses: bool = False
    lower: bool = False
    calibration: Path | None = None
    force: bool = False
    lora: lora_inputs.Wanted | None = None
    text_storage: str | None = None

    @classmethod
    def of(
        cls,
        engine: str,
        precision: str | None,
        target: Target | None,
        scan: Scan | None,
        calibration: str | Path | None = None,
        force: bool = False,
        lora: lora_inputs.Wanted | None = None,
        text_storage: str | None = None,
    ) -> Goal:
        """Hold what is asked for against this machine, before any work is done.

        engine: or `auto`, the fastest of those that are installed for the processor; with a precision under fp32 it is
        onnxruntime, which leaves the choice open. precision: None for fp32, or what is within the budget and faster.
        calibration, force: of eight bits, see `build`.
        Raises `DiffoundryError` for an option of another kind, or one that has no effect, and `EngineError` when the
        engine is not there or cannot build what is asked.
        """
        chooses, lower = engine == AUTO and precision in (None, FULL), precision is None and engine == AUTO
        precision = FULL if precision is None else check_precision(precision)
        name = EngineName.parse(engine if engine != AUTO else _default(precision))
        for what, value, kind in (("target", target, Target), ("scan", scan, Scan)):
            if value is not None and not isinstance(value, kind):
                raise DiffoundryError(f"the {what} must be a diffoundry.{kind.__name__}, found {type(value).__name__}")
        if target is not None and name.backend not in BACKENDS:
            raise DiffoundryError(
                f"the engine {name} builds no plans: leave out what is said of them "
                "(architectures, shapes, batch, flags, memory)"
            )
        check_dtype(text_storage)
        if scan is not None and precision == FULL and not lower and text_storage is None:
            raise DiffoundryError("fp32 needs no scan: leave its prompts, steps, size and PSNR out")
        if scan is not None and scan.budget is not None:
            scan.budget.check()
        if precision not in EIGHT_BIT and (calibration is not None or force):
            raise DiffoundryError(
                f"{precision} takes no calibration file and needs no force: they go with {' and '.join(EIGHT_BIT)}"
            )
        if force and (precision != "int8" or name.backend in BACKENDS):
            raise DiffoundryError(
                f"{precision} for {name} is not timed here, so that nothing is to be forced: leave force out"
            )
        able = [OPENVINO, ONNXRUNTIME, *BACKENDS] if precision == "int8" else list(BACKENDS)
        if precision in EIGHT_BIT and str(name) not in able:
            raise EngineError(f"{precision} runs with {', '.join(able)}, not with {name}: choose --engine {able[-1]}")
        if calibration is not None and not Path(calibration).is_file():
            raise DiffoundryError(f"there is no calibration file {calibration}: leave it out, and it is measured anew")
        if name.backend in HINTED_ENGINES:
            Device.open(name.provider, FULL if precision in EIGHT_BIT else precision)
        plans = name.backend in BACKENDS
        machine = resolve_machine(name.backend, precision, target or Target()) if plans else None
        asked = scan or (Scan(prompts=Scan().prompts[:1]) if lower else Scan())
        file = None if calibration is None else Path(calibration)
        made = (name, precision, target or Target(), asked, machine, precision != FULL, chooses, lower, file, force)
        goal = cls(*made, lora, text_storage)
        if text_storage is not None and not goal.for_processor:
            raise DiffoundryError(
                f"text encoders in {text_storage} are for engines of the processor, not for {precision} with {name}: "
                "leave the text storage dtype out, or choose --engine onnxruntime or openvino"
            )
        return goal

    @property
    def for_processor(self) -> bool:
        """Whether text encoders run on the processor, from their fp32 models."""
        return self.engine.on_cpu and (not self.converts or self.hinted or self.eight_bit)

    @property
    def hinted(self) -> bool:
        """Whether the engine computes the fp32 models in this precision, so that none are written in it."""
        return self.engine.backend in HINTED_ENGINES and self.precision not in (FULL, *EIGHT_BIT)

    @property
    def eight_bit(self) -> bool:
        """Whether the denoiser is in eight bits, and nothing else is."""
        return self.precision in EIGHT_BIT

    def parts(self, manifest: Manifest) -> int:
        """How many parts the work has."""
        return (
            self.converts
            + (self.eight_bit and self.machine is None) * (2 if self.engine.backend in HINTED_ENGINES else 1)
            + 2 * (self.eight_bit and self.machine is not None)
            + self.chooses
            + self.engine.fused
            + (self.text_storage is not None)
            + bool(self.lora.rank if self.lora is not None else manifest.wiring.lora_inputs)
            + (0 if self.machine is None else count_plans(manifest, self.target))
        )

    def records(self, manifest: Manifest) -> list[str]:
        """The names of the records of what is made."""
        made = [record_name(self.precision)] if self.converts and not self.hinted else []
        if self.eight_bit and self.machine is not None:
            made += [record_name(BESIDE), *record_names(manifest, self.precision)]
        if self.converts and self.hinted:
            made = [hinted.record_name(self.engine, self.precision)]
        if self.chooses:
            made += [RECORD, *(hinted.record_name(EngineName.parse(each), p) for each, p in candidates(self.lower))]
        fused = [fusion.record_name(self.engine, self.precision, name) for name in manifest.components]
        adapted = manifest.wiring.lora_inputs or (self.lora is not None and self.lora.rank)
        stored = [text_storage.RECORD] if self.text_storage is not None else []
        return [*made, *(fused if self.engine.fused else ()), *([lora_inputs.RECORD] if adapted else []), *stored]

    def written(self) -> float:
        """The weights that are written, as a multiple of those in fp32."""
        width = 1.0 if self.precision == FULL else 0.5  # eight bits: of the denoiser alone, and once more for GPUs
        made = width * ((self.converts and not self.hinted) + self.engine.fused) + 0.3 * (self.text_storage is not None)
        return made + (0.0 if self.machine is None else width * self.target.count())


def build(
    bundle: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    target: Target | None = None,
    scan: Scan | None = None,
    calibration: str | Path | None = None,
    force: bool = False,
    lora_rank: int | None = None,
    lora_layers: str | None = None,
    text_storage_dtype: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Give `bundle` a lower precision, what an engine runs, or both; neither torch nor the checkpoint is needed.

    engine, precision: what the bundle is run with by default from now on. `auto` is the fastest engine of those that
    are installed for this processor, and the default for a bundle that runs on it, where no precision is named; else
    the default is what the bundle was made for. With an engine of TensorRT plans are built for `target`, with
    onnxruntime:cuda its graphs are written, with openvino a lower precision is measured. A precision that the bundle
    has is taken as it is, unless `scan` says what it is to be measured with; see `compile` for both.
    calibration: for eight bits, a file of statistics of the same model, which are then not gathered again.
    force: take eight bits also where they are slower on this machine.
    lora_rank: make a denoiser that takes LoRAs as inputs, of up to so much rank in all, 0 for none any more.
    lora_layers: of it, those that take them, see `lora_inputs.Wanted`.
    text_storage_dtype: `int8` for weights of T5 in eight bits in the place of its own, where the pictures of the scan
    stay near; what it computes stays in floats. Only compiling again brings the others back.
    Raises `BundleError` for what is no bundle or was changed, `calibration.QualityError` when the images are too far
    from fp32, `EngineError` or `DiffoundryError`; what was finished is kept for the next run, and `bundle` is either
    the old one or the whole new one.
    """
    path = resolved(bundle)
    lora = wanted_lora(lora_rank, lora_layers)

    text = text_storage_dtype

    with working(path, lambda: _checked(path, engine, precision, target, scan, calibration, force, lora, text)) as (
        work,
        (old, goal),
    ):
        check_disk(path, goal.written() * _weights(old))
        ledger, meter = Ledger(work, path), Meter(progress, goal.parts(old.manifest) + 1)
        made = later_stages(_linked(old, ledger, goal), ledger, goal, meter)
        if made.manifest == old.manifest == Bundle.open(path).manifest and _keys(made) == _keys(old):
            remove(work / STAGES)  # nothing is new: the working folder goes
            return old
        ledger.adopt(but=goal.records(made.manifest))
        return publish(made, ledger, meter)


def wanted_lora(lora_rank: int | None, lora_layers: str | None) -> lora_inputs.Wanted | None:
    """The denoiser that takes LoRAs, None where nothing is said of it. Raises `DiffoundryError`."""
    if lora_rank is None:
        if lora_layers is not None:
            raise DiffoundryError("LoRA layers go with a LoRA rank: give --lora-rank too")
        return None
    return lora_inputs.Wanted(lora_rank, lora_layers)


def _checked(
    path: Path,
    engine: str | None,
    precision: str | None,
    target: Target | None,
    scan: Scan | None,
    calibration: str | Path | None,
    force: bool,
    lora: lora_inputs.Wanted | None,
    text: str | None,
) -> tuple[Bundle, Goal]:
    """The bundle at `path` and what it is to be run with. Raises for what cannot be built of it."""
    bundle = Bundle.open(path)
    own = bundle.manifest
    open_choice = own.precision == FULL or EngineName.parse(own.engine).backend in HINTED_ENGINES
    said = (engine, precision, target, lora, text)
    if said == (None,) * 5 and open_choice and EngineName.parse(own.engine).on_cpu:
        engine = AUTO
    if engine is None and precision in EIGHT_BIT and target is None and EngineName.parse(own.engine).on_cpu:
        engine = AUTO
    if engine != AUTO:
        precision = own.precision if precision is None else precision
    goal = Goal.of(own.engine if engine is None else engine, precision, target, scan, calibration, force, lora, text)
    if text is not None:
        text_storage.check_storable(bundle)
    elif text_storage.is_stored(bundle) and not goal.for_processor:
        raise DiffoundryError(
            f"{path} has text encoders in int8, which are for engines of the processor, not for {goal.precision} with "
            f"{goal.engine}: compile the checkpoint again, without --text-storage-dtype"
        )
    bundle = without_damaged(bundle, goal.precision)
    own = bundle.manifest
    key = f"{goal.precision}/{goal.engine.backend if goal.hinted else STANDARD}"
    parts = [part for part in own.components.values() if part.role != "step"]
    needed = [own.components[own.named("denoiser")]] if goal.hinted or goal.eight_bit else parts
    if goal.eight_bit and read_report(bundle, "quality").get(goal.precision, {}).get(CONTROLLED, {}).get("kept"):
        needed += [own.components[name] for name in own.with_role("controlled")]
    converted = all(key in part.variants for part in needed)
    if goal.converts and scan is None and calibration is None and converted:
        goal = replace(goal, converts=False)
    if (goal.converts and not goal.hinted) or goal.engine.fused or goal.machine is not None or lora is not None or text:
        require_modules("build", _MODULES, "build")
    check_runnable(bundle)
    lacking = [name for name, part in own.components.items() if _FP32 not in part.variants]
    if lacking:
        raise BundleError(f"{path} has no fp32 model of {lacking[0]} to build from: compile the checkpoint again")
    bundle.check()
    check_replaceable(path)
    return bundle, goal


def _for_the_processor(bundle: Bundle, ledger: Ledger, goal: Goal, meter: Meter) -> Bundle:
    """The denoiser in eight bits, what else OpenVINO computes in bf16, and the time that it takes with this engine."""
    precision, backend = goal.precision, goal.engine.backend
    if goal.converts:
        bundle = eightbit.convert(bundle, ledger, precision, goal.scan, goal.calibration, meter)
    if f"{precision}/{backend}" in read_report(bundle, eightbit.REPORT) and not goal.converts:
        return bundle
    if backend in HINTED_ENGINES:
        bundle = hinted.measure_beside(bundle, ledger, goal.engine, precision, goal.scan, meter)
    return check_time(bundle, goal.engine, precision, goal.force, meter)


def _for_gpus(bundle: Bundle, ledger: Ledger, goal: Goal, meter: Meter) -> Bundle:
    """The denoiser in eight bits beside fp16, all else in fp16. Which of it is faster shows on the GPU alone."""
    parts = [part for part in bundle.manifest.components.values() if part.role != "step"]
    if not all(part.variant(BESIDE) for part in parts):
        usual = replace(goal.scan, budget_db=None, budget=None)
        bundle = convert(bundle, ledger, BESIDE, usual, meter)
    else:
        meter.step()
    if goal.converts:
        bundle = eightbit.convert(bundle, ledger, goal.precision, goal.scan, goal.calibration, meter)
    return write_half(bundle, ledger, goal.precision, meter)


def _default(precision: str) -> str:
    """The engine for a precision where none is named: that which computes in eight bits, if it is installed."""
    there = precision in EIGHT_BIT and importlib.util.find_spec(OPENVINO) is not None
    return OPENVINO if there else ONNXRUNTIME


def later_stages(bundle: Bundle, ledger: Ledger, goal: Goal, meter: Meter) -> Bundle:
    """`bundle`, whose fp32 models lie in the ledger's working folder, with all else that the goal asks for."""
    bundle, adapted, lora_rank = lora_inputs.without(bundle)
    if goal.text_storage is not None:
        text_storage.check_storable(bundle)
        bundle = text_storage.store(bundle, ledger, goal.scan, meter)
    if goal.lora is not None:
        adapted, lora_rank = lora_inputs.chosen(goal.lora, goal.engine.on_cpu), goal.lora.rank
    if goal.chooses:
        bundle, engine, precision = choose(bundle, ledger, goal.lower, goal.scan, meter)
        bundle = replace(bundle, manifest=replace(bundle.manifest, engine=str(engine), precision=precision))
    elif goal.converts and goal.hinted:
        bundle = hinted.measure(bundle, ledger, goal.engine, goal.precision, goal.scan, meter)
    elif goal.eight_bit and goal.machine is not None:
        bundle = _for_gpus(bundle, ledger, goal, meter)
    elif goal.eight_bit:
        bundle = _for_the_processor(bundle, ledger, goal, meter)
    elif goal.converts:
        bundle = convert(bundle, ledger, goal.precision, goal.scan, meter)
    if adapted is not None and lora_rank:
        bundle = lora_inputs.with_lora(bundle, ledger, adapted, lora_rank, meter)
    bundle = fusion.forget_removed(bundle)
    if goal.engine.fused:
        bundle = fusion.fuse(bundle, ledger, goal.engine, goal.precision, meter)
    if goal.machine is not None:
        bundle = build_plans(bundle, goal.machine, goal.precision, goal.target, meter)
    return bundle


def publish(bundle: Bundle, ledger: Ledger, meter: Meter) -> Bundle:
    """Write the manifest of the finished bundle in the working folder, and put it in the place of the old one."""
    meter.show("write the bundle")
    ledger.publish()
    written = to_json(replace(bundle.manifest, schema_version=SCHEMA_VERSION))
    write_json(bundle.root / MANIFEST_NAME, written)
    from_json(read_json(bundle.root / MANIFEST_NAME, "the manifest"), str(bundle.root / MANIFEST_NAME))  # or it stays
    sweep(bundle.root, bundle.manifest.all_files())
    store = EngineStore(bundle.root / "engines")
    clean(store)
    store.prune([each.files for part in bundle.manifest.components.values() for each in part.variants.values()])
    swap(ledger.old)
    meter.end()
    return Bundle.open(ledger.old)


def check_disk(target: Path, needed: float) -> None:
    """Raise `DiffoundryError` when the disk of `target` has not `needed` bytes for weights, and some to spare."""
    free = shutil.disk_usage(target.parent).free
    if free < needed * _DISK_MARGIN:
        raise DiffoundryError(
            f"the bundle needs about {needed * _DISK_MARGIN / 1e6:,.0f} MB at {target.parent}, "
            f"{free / 1e6:,.0f} MB are free: free some disk space and run the same command again"
        )


def _linked(old: Bundle, ledger: Ledger, goal: Goal) -> Bundle:
    """The bundle in the working folder, by links, without what the goal converts anew."""

    def is_made_anew(key: str) -> bool:
        precision, _, backend = key.partition("/")
        if not goal.converts or precision != goal.precision:
            return False
        return backend == goal.engine.backend if goal.hinted else goal.eight_bit or backend not in HINTED_ENGINES

    components = {
        name: replace(part, variants={key: each for key, each in part.variants.items() if not is_made_anew(key)})
        for name, part in old.manifest.components.items()
    }
    manifest = replace(old.manifest, components=components, engine=str(goal.engine), precision=goal.precision)
    for name in manifest.all_files():
        link_or_copy(old.root / name, ledger.work / name)
    EngineStore(ledger.work / "engines").take(EngineStore(old.root / "engines"))
    return Bundle(ledger.work, manifest)


def _weights(bundle: Bundle) -> int:
    """The bytes of its models in fp32."""
    models = [part.variants[_FP32].files for part in bundle.manifest.components.values()]
    return sum(bundle.path(path).stat().st_size for files in models for path in files)


def _keys(bundle: Bundle) -> list[str]:
    """The keys of its engines."""
    return [record["key"] for record in EngineStore(bundle.root / "engines").records()]
