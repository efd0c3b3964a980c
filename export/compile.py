"""`compile`: checkpoint → bundle, stage by stage, each done once.

Work goes on in a folder beside the bundle (see `place`), which is renamed into place when all is done. A stage writes
its record last; a record whose key and file hashes hold is taken over, from an earlier run or from the bundle that
stands there. The key is the hash of everything that decides the stage.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import FULL, MANIFEST_NAME, PRECISIONS, Bundle, Component, Manifest, Tokenizer
from ..bundle.manifest import to_json
from ..bundle.wiring import TASKS
from ..calibration import Scan
from ..common.errors import CheckpointError, DiffoundryError
from ..common.files import (
    check_tree,
    disk_error,
    exclusive,
    read_json,
    remove,
    sha256_file,
    sha256_json,
    sha256_tree,
    write_json,
)
from ..engines import EngineStore
from ..engines.names import ONNXRUNTIME, EngineName
from ..engines.onnxruntime import require_provider
from ..engines.tensorrt.backend import BACKENDS
from ..engines.tensorrt.build import clean
from ..families import FAMILIES, Family, Pipeline, family_named, family_of
from ..runtime.loop.guidance import Guidance
from ..runtime.request import Request
from . import step_graph
from .checkpoint import Checkpoint
from .components import Components, Stage
from .fit import check_models, check_parts
from .place import STAGES, UNPACKED, check_target, prepare, recover, swap, tidy, work_folder
from .plan import ComponentPlan
from .plans import Site, build_plans, count_plans, site, warnings_of
from .precision import Lowered, lower_bundle, others, variants
from .single_file import SingleFile, is_single_file
from .target import Target

Progress = Callable[[str, float, int], None]
"""`progress(stage, done, total)`, before each stage, while a long one goes on, and once at the end."""

_TOOLS = ("torch", "diffusers", "transformers", "onnxscript", "onnxruntime", "diffoundry")
_DAMAGED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What a damaged configuration may make of the code that reads it."""
_DISK_MARGIN = 1.1
"""Disk needed, as a multiple of the weights of the models, typed models and engines that are written."""


def compile(
    checkpoint: str | Path,
    out: str | Path,
    *,
    engine: str = "onnxruntime",
    precision: str = FULL,
    target: Target | None = None,
    scan: Scan | None = None,
    family: str | None = None,
    tasks: Sequence[str] | None = None,
    components: Mapping[str, str | Path] | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    default_steps: int | None = None,
    default_guidance: float | None = None,
    trace_scheduler: str | None = None,
    steps: Sequence[int] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Make the bundle `out` from a diffusers folder, a hub id, or a single file in the layout of the original authors.

    engine: what the bundle is run with by default, one of `engines.names.ENGINES`; with ONNX Runtime each component is
    validated on its provider against torch, else on the CPU, and plans are built for `target`.
    precision: fp32, fp16 or bf16. The lower ones are written beside fp32, with what must stay in fp32 found by running
    the loop as `scan` says; `calibration.QualityError` is raised when the images are too far from fp32.
    family: overrides the family found by the pipeline class. progress: see `Progress`.
    tasks: of those that the checkpoint can do, the ones that the bundle is for (default: all); components that only
    the others need are left out. components: folders in place of components of the checkpoint, such as the U-Net of a
    distilled model with its scheduler; `vae_tiny` adds an `AutoencoderTiny` as a second decoder.
    config: for a single file, a diffusers folder whose configurations, scheduler and tokenizer go with its weights.
    prediction_type: for a single file, what its U-Net predicts, where the file does not tell.
    default_steps, default_guidance: what `run` asks for when it is not told (default: the family's).
    trace_scheduler: a diffusers class or `module:Class` that diffoundry has no function for; its tables are read off
    it for each of `steps` and kept in the bundle, which can then run it.
    Raises `CheckpointError`, `EngineError` or `DiffoundryError`; what was finished is kept for the next run, and
    `out` is either the old bundle or the whole new one.
    """
    name = EngineName.parse(engine)
    if precision not in PRECISIONS:
        raise DiffoundryError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    for what, value, kind in (("target", target, Target), ("scan", scan, Scan)):
        if value is not None and not isinstance(value, kind):
            raise DiffoundryError(f"the {what} must be a diffoundry.{kind.__name__}, found {type(value).__name__}")
    if target is not None and name.backend not in BACKENDS:
        raise DiffoundryError(
            f"the engine {name} builds no plans: leave out what is said of them "
            "(architectures, shapes, batch, flags, memory)"
        )
    if scan is not None and precision == FULL:
        raise DiffoundryError("fp32 needs no scan: leave its prompts, steps, size and PSNR out")
    if (trace_scheduler is None) != (not steps):
        raise DiffoundryError("a scheduler is traced for the step counts named: give both it and the counts")
    place = site(name.backend, precision, target or Target()) if name.backend in BACKENDS else None
    require_provider(name.provider or "cpu")
    _require_export()
    if not isinstance(out, (str, Path)) or not str(out):
        raise DiffoundryError(f"the output must be a path, found {out!r}")
    try:
        path = _resolved(out)
        with exclusive(path):
            recover(path)
            check_target(path, checkpoint)
            try:
                prepare(path)
                wanted = _Wanted(name, precision, target or Target(), scan or Scan(), place)

                def prepared(source: Checkpoint) -> _Build:
                    source = source.replace(components or {})
                    for folder in (source.root, *source.replaced.values()):
                        check_tree(folder, held=False)  # a pipe would be waited for
                    found = _family(source, family)
                    build = _Build(source, found, described(source, found), path, wanted, progress)
                    build.tasks = _chosen_tasks(checkpoint, build.pipeline.tasks, tasks)
                    build.defaults = _defaults(found, default_steps, default_guidance)
                    build.traced = (trace_scheduler, tuple(steps)) if trace_scheduler is not None else None
                    return build

                def check(source: Checkpoint) -> None:
                    prepared(source).read()

                single = _unpack(checkpoint, work_folder(path), config, prediction_type, check)
                build = prepared(Checkpoint.open(single or checkpoint))
                if single is not None:
                    build.name = Path(checkpoint).stem
                return build.run()
            finally:
                tidy(path)
    except OSError as error:
        raise disk_error(error) from error


def _resolved(out: str | Path) -> Path:
    """The absolute path of the output. Raises `DiffoundryError` for one that no bundle can be written to."""
    try:
        path = Path(out).resolve()
    except (RuntimeError, ValueError):  # a loop of links, a null character
        raise DiffoundryError(f"the output {str(out)!r} is no path to a folder: choose another --output") from None
    if not path.name:
        raise DiffoundryError(f"{path} is a root folder: choose an --output below it, such as {path / 'new.bundle'}")
    return path


def _unpack(
    checkpoint: str | Path,
    work: Path,
    config: str | Path | None,
    prediction_type: str | None,
    check: Callable[[Checkpoint], None],
) -> Path | None:
    """The diffusers folder made of a single file, once for each content; None when `checkpoint` is no file.

    check: raises for what the configurations already tell, before the file is hashed and unpacked.
    """
    if not isinstance(checkpoint, (str, Path)) or not is_single_file(Path(checkpoint)):
        for name, value in (("config", config), ("prediction type", prediction_type)):
            if value is not None:
                raise DiffoundryError(f"the {name} goes with a single file, which {checkpoint} is not: leave it out")
        return None
    path = Path(checkpoint)
    folder = None if config is None else Path(config)
    single = SingleFile.open(path, config=folder, prediction_type=prediction_type)
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as outline:
        single.write_outline(Path(outline))
        try:
            check(Checkpoint.open(outline))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(outline, str(path))) from None
        told = [sha256_file(path), sha256_tree(Path(outline))]
    unpacked = work / UNPACKED / sha256_json(told)[:16]
    if not unpacked.is_dir():
        remove(work / UNPACKED)
        unpacked.parent.mkdir()
        single.write(unpacked)
    return unpacked


def _chosen_tasks(checkpoint: str | Path, known: tuple[str, ...], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks of the bundle, of those known. Raises `DiffoundryError` for one that the checkpoint cannot do."""
    if asked is None:
        return known
    wrong = [task for task in asked if task not in known]
    if wrong or not asked:
        raise DiffoundryError(
            f"{checkpoint} cannot do the task {', '.join(wrong) or '(none)'}: choose from {', '.join(known)}"
        )
    return tuple(task for task in known if task in asked)


def _family(source: Checkpoint, name: str | None) -> Family:
    """The family called `name`, or the one of the checkpoint's pipeline class. Raises `CheckpointError`."""
    found = family_named(name) if name is not None else family_of(source.class_name)
    if found is None:
        known = ", ".join(sorted(each for family in FAMILIES.values() for each in family.pipelines))
        raise CheckpointError(
            f"{source.root} is a {source.class_name or 'pipeline without a class name'}; "
            f"the pipeline classes known are {known} (--family overrides)"
        )
    return found


def described(source: Checkpoint, family: Family) -> Pipeline:
    """What the family makes of the configurations. Raises `CheckpointError` for a model that it does not take."""
    from .configs import Complete, check_classes

    check_classes(source, family)
    try:
        return family.describe(Complete(source))
    except _DAMAGED as error:
        raise _damaged(source, error) from None


def _damaged(source: Checkpoint, error: Exception) -> CheckpointError:
    replaced = "".join(f" or {folder}" for folder in source.replaced.values())
    return CheckpointError(
        f"a config.json in {source.root}{replaced} is damaged or of another kind "
        f"({type(error).__name__}: {error}): give the configuration that the part was saved with"
    )


def _defaults(rules: Family, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """What is run by default. Raises `DiffoundryError` for what cannot be run."""
    chosen = rules.steps if steps is None else steps, rules.guidance if guidance is None else guidance
    Request(steps=chosen[0], guidance=Guidance(chosen[1]))
    return chosen[0], float(chosen[1])


def _require_export() -> None:
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        found = None
        with contextlib.suppress(ImportError):
            found = importlib.util.find_spec(name)
        if found is None:
            raise DiffoundryError(f"compile needs {name}: run `pip install 'diffoundry[export]'`")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the bundle is to be run with. site: where plans are built for, None where the engine has none."""

    engine: EngineName
    precision: str
    target: Target
    scan: Scan
    site: Site | None

    @property
    def provider(self) -> str:
        """The provider of ONNX Runtime that components are validated on."""
        return self.engine.provider or "cpu"


class _Build:
    """One compile: the paths it works in and the stages it runs."""

    def __init__(
        self,
        source: Checkpoint,
        family: Family,
        pipeline: Pipeline,
        target: Path,
        wanted: _Wanted,
        progress: Progress | None,
    ) -> None:
        self.source, self.family, self.pipeline, self.target = source, family, pipeline, target
        self.wanted = wanted
        self.progress = progress or (lambda stage, done, total: None)
        self.work = work_folder(target)
        self.store = EngineStore(self.work / "engines")
        # of the modules that are loaded: several distributions serve one, such as onnxruntime-gpu
        self.versions = {name: str(importlib.import_module(name).__version__) for name in _TOOLS}
        store = self.store if wanted.engine.backend == ONNXRUNTIME else None
        makers = {name: version for name, version in self.versions.items() if name != "diffoundry"}
        self.components = Components(source, target, wanted.provider, store, makers)
        self.name = source.root.resolve().name
        self.tasks: tuple[str, ...] = ()
        self.defaults = family.steps, family.guidance
        self.traced: tuple[str, tuple[int, ...]] | None = None
        self.changes: dict[str, dict[str, bool | int]] = {}

    def run(self) -> Bundle:
        plans = self.read()
        weights = {name: self.source.weights(name) for name in sorted({plan.source for plan in plans})}
        tokenizers = self._write_small()
        check_parts(plans, self.pipeline)
        check_models(plans)
        self.progress("hash the checkpoint", 0, len(plans) + 2)
        hashes = {name: each.sha256() for name, each in weights.items()}
        self.store.take(EngineStore(self.target / "engines"))  # their keys decide whether they are ever used
        self._check_disk(plans)
        manifest = self._manifest(plans, tokenizers, sha256_json(hashes))
        lowers, site = self.wanted.precision != FULL, self.wanted.site
        built = 0 if site is None else count_plans(manifest, self.wanted.target)
        total = len(plans) + 2 + lowers + built
        stages = {}
        for i, plan in enumerate(plans):
            self.progress(plan.name, i + 1, total)
            stages[plan.name] = self.components.make(plan, hashes[plan.source])
        self.progress("step", len(plans) + 1, total)
        stages[step_graph.NAME] = self.components.make_step()
        manifest = self._with_files(manifest, stages)
        bundle = Bundle(self.work, replace(manifest, engine=ONNXRUNTIME, precision=FULL))
        kept: dict[str, frozenset[str]] = {}
        lowered = others(bundle, self.target, self.wanted.precision)
        if lowers:
            part = self._part(len(plans) + 1, total)
            made = lower_bundle(bundle, self.target, self.wanted.precision, self.wanted.scan, part)
            kept = made.kept(self.work)
            lowered[self.wanted.precision] = made
        typed = variants(lowered)
        components = {
            name: replace(component, variants=component.variants | typed.get(name, {}))
            for name, component in manifest.components.items()
        }
        manifest = replace(manifest, components=components)
        described: list[dict[str, Any]] = []
        if site is not None:
            described = build_plans(
                self.work,
                manifest,
                self.store,
                site,
                self.wanted.precision,
                self.wanted.target,
                kept,
                lambda what, done, part: self.progress(what, total - 1 - built + done + part, total),
            )
        self.progress("write the bundle", total - 1, total)
        self._write(stages, manifest, lowered, described)
        self._sweep(manifest)
        swap(self.target)
        self.progress("done", total, total)
        return Bundle.open(self.target)

    def _part(self, done: int, total: int) -> Progress:
        """Progress of a stage that tells its own steps."""
        return lambda text, step, steps: self.progress(
            f"{self.wanted.precision}, {text} {int(step)}/{steps}", done, total
        )

    def _manifest(
        self,
        plans: list[ComponentPlan],
        tokenizers: dict[str, Tokenizer],
        source: str,
    ) -> Manifest:
        """The manifest before any file is made, which the target of the plans is held against."""
        parts = self.pipeline.parts
        drafts = {plan.name: Component(parts[plan.name].role, plan.inputs, plan.outputs) for plan in plans}
        drafts[step_graph.NAME] = Component("step", step_graph.INPUTS, step_graph.OUTPUTS)
        unit = next(plan.axes["height"].unit for plan in plans if parts[plan.name].role == "denoiser")
        latents = replace(self.pipeline.latents, multiple=unit)
        width, height = (
            -(-side // latents.unit) * latents.unit for side in (self.pipeline.width, self.pipeline.height)
        )
        return Manifest(
            family=self.family.name,
            tasks=self.tasks,
            precision=self.wanted.precision,
            components=drafts,
            wiring=self.pipeline.wiring,
            latents=latents,
            tokenizers=tokenizers,
            files={},
            default_width=width,
            default_height=height,
            default_steps=self.defaults[0],
            default_guidance=self.defaults[1],
            engine=str(self.wanted.engine),
            scheduler=self.changes,
            source={"name": self.name, "pipeline": self.source.class_name, "sha256": source},
            versions=self.versions,
        )

    def _with_files(self, manifest: Manifest, stages: dict[str, Stage]) -> Manifest:
        """The manifest with what the stages made, and the hashes of what is there."""
        components = {
            name: replace(draft, variants=made.variants, files=made.files, key=made.key)
            for name, draft in manifest.components.items()
            for made in [stages[name].component]
        }
        return replace(manifest, components=components, files=self._hashes(self._small_files()))

    def _small_files(self) -> list[str]:
        names = ["model_index.json"]
        for folder in ("scheduler", "tokenizer", "tokenizer_2"):
            found = sorted(path for path in (self.work / folder).rglob("*") if path.is_file())
            names += [path.relative_to(self.work).as_posix() for path in found]
        return names

    def _hashes(self, names: Sequence[str]) -> dict[str, str]:
        return {name: sha256_file(self.work / name) for name in names}

    def read(self) -> list[ComponentPlan]:
        """How the components that the tasks need are traced, before any work is done."""
        from .modules import component_plans

        needed = {"text", "denoiser", "preview", *(role for task in self.tasks for role in TASKS[task])}
        parts = self.pipeline.parts
        try:
            plans = component_plans(self.source, self.pipeline)
            return [plan for plan in plans if parts[plan.name].role in needed]
        except _DAMAGED as error:
            raise _damaged(self.source, error) from None

    def _write_small(self) -> dict[str, Tokenizer]:
        """Tokenizer, scheduler and pipeline index: before the long work, so that what is wrong with them shows."""
        from .modules.clip import tokenizer
        from .scheduler import changes, scheduler_config, write_traced

        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            remove(self.work / name)
        tokenizers = {
            each.tokenizer: tokenizer(self.source, each.component, each.tokenizer, self.work)
            for each in self.pipeline.wiring.text
        }
        self.changes = changes(self.source, self.family, self.tasks)
        (self.work / "scheduler").mkdir()
        write_json(self.work / "scheduler" / "scheduler_config.json", scheduler_config(self.source))
        if self.traced:
            write_traced(self.work / "scheduler", self.changes.get(self.tasks[0], {}), *self.traced)
        self._check_default_steps()
        index = {
            name: [None, None] if name in ("safety_checker", "feature_extractor", "image_encoder") else value
            for name, value in self.source.index.items()
        }
        write_json(self.work / "model_index.json", {**index, "requires_safety_checker": False})
        return tokenizers

    def _check_default_steps(self) -> None:
        config = read_json(self.work / "scheduler" / "scheduler_config.json", "the scheduler configuration")
        most = config.get("num_train_timesteps", 1000)
        if isinstance(most, int) and self.defaults[0] > most:
            raise DiffoundryError(
                f"the model has {most} timesteps, {self.defaults[0]} steps by default are more: ask for fewer"
            )

    def _check_disk(self, plans: list[ComponentPlan]) -> None:
        wanted = self.wanted
        width = 1.0 if wanted.precision == FULL else 0.5
        models = 1.0 + (0.0 if wanted.precision == FULL else width)
        models += 1.0 if wanted.site is None else width * wanted.target.count()
        needed = 0.0
        for name in {plan.source for plan in plans if not self.components.is_known(plan.name)}:
            weights = self.source.weights(name)
            needed += _DISK_MARGIN * models * weights.size * (2 if weights.half else 1)
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise DiffoundryError(
                f"the bundle needs about {needed / 1e6:,.0f} MB at {self.target.parent}, "
                f"{free / 1e6:,.0f} MB are free: free some disk space and run the same command again"
            )

    def _write(
        self,
        stages: dict[str, Stage],
        manifest: Manifest,
        lowered: dict[str, Lowered],
        plans: list[dict[str, Any]],
    ) -> None:
        """The reports, and the manifest with the hash of every file."""
        work = self.work
        reports: dict[str, Any] = {"parity": {name: stage.parity for name, stage in stages.items()}}
        if lowered:
            reports["precision"] = {precision: each.reports() for precision, each in lowered.items()}
            reports["quality"] = {precision: each.quality for precision, each in lowered.items()}
        if plans:
            reports["plans"] = {"warnings": warnings_of(plans), "plans": plans}
        for name, report in reports.items():
            write_json(work / "reports" / f"{name}.json", report)
        remove(work / "reports" / "stages")
        (work / "reports" / "stages").mkdir()
        for path in sorted((work / STAGES).glob("*.json")):
            shutil.copyfile(path, work / "reports" / "stages" / path.name)
        files = self._hashes([*self._small_files(), *(f"reports/{name}.json" for name in reports)])
        for stage in stages.values():
            files.update(stage.reference)
        write_json(work / MANIFEST_NAME, to_json(replace(manifest, files=files)))

    def _sweep(self, manifest: Manifest) -> None:
        """Remove what interrupted runs left: files that the bundle does not list, engines of other models."""
        listed = manifest.all_files()
        for name in manifest.components:
            for path in (self.work / name).iterdir():
                if path.relative_to(self.work).as_posix() not in listed:
                    remove(path)
        sources = [each.files for component in manifest.components.values() for each in component.variants.values()]
        clean(self.store)
        self.store.prune(sources)
