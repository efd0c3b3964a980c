"""What the configurations of a checkpoint say, before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundle import FULL, Component, Manifest
from ..bundle.reader import read
from ..bundle.wiring import SOURCES, TASKS, Tokenizer, plain
from ..common.errors import CheckpointError, DiffoundryError
from ..common.files import check_tree
from ..families import FAMILIES, Family, Pipeline, family_named, family_of, parts
from ..families.control import T2I_PREFIX, controlled, with_t2i_adapters
from ..families.image_prompt import FLUX, PREFIX, SD3, TRANSFORMERS, UNET, Adapter, halvings, with_image_prompts
from ..families.transformer_control import width, with_controlnets
from ..runtime.loop.guidance import Guidance
from ..runtime.loop.step import STEP_INPUTS, STEP_NAME, STEP_OUTPUTS
from ..runtime.request import Request
from .checkpoint import Checkpoint
from .configs import Complete, check_classes, control_config, t2i_config, transformer_config, unet_config
from .graphs.spec import ComponentSpec
from .guard import guarded
from .ip_adapter import ENCODER, IPAdapterFile


@dataclass(frozen=True, slots=True)
class Asked:
    """What `compile` is asked to make of a checkpoint; None and empty stand for what the checkpoint says itself."""

    family: str | None
    tasks: Sequence[str] | None
    components: Mapping[str, str | Path]
    steps: int | None
    guidance: float | None
    controls: Mapping[str, str | Path] = field(default_factory=dict)
    adapters: Mapping[str, IPAdapterFile] = field(default_factory=dict)
    t2i_adapters: Mapping[str, str | Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A checkpoint and what it says. specs: of the components that the tasks need. steps, guidance: run by default."""

    source: Checkpoint
    family: Family
    pipeline: Pipeline
    tasks: tuple[str, ...]
    steps: int
    guidance: float
    specs: list[ComponentSpec]

    @classmethod
    def of(cls, source: Checkpoint, asked: Asked, shown: str | Path) -> Reading:
        """shown: what the user calls the checkpoint.

        Raises `CheckpointError` or `DiffoundryError` for what the checkpoint is not, or cannot do.
        """
        source = source.replace(asked.components).with_controls(asked.controls)
        source = source.with_controls(asked.t2i_adapters, T2I_PREFIX)
        encoders = encoder_names(asked.adapters)
        source = source.beside({name: folder for folder, name in encoders.items()})
        source = source.beside({PREFIX + name: file.path.parent for name, file in asked.adapters.items()})
        for folder in (source.root, *source.replaced.values()):
            check_tree(folder, held=False)  # a pipe would be waited for
        family = _family(source, asked.family)
        if parts.UNET not in [each for kinds in family.models.values() for each in kinds]:
            _refuse_unet_only(asked, source.class_name)
        pipeline = with_controls(source, described(source, family), asked.controls)
        if asked.t2i_adapters:
            with _undamaged(source):
                found = {name: t2i_config(source, name) for name in asked.t2i_adapters}
                pipeline = with_t2i_adapters(pipeline, unet_config(source), found)
        if asked.adapters:
            pipeline = _with_adapters(source, pipeline, asked.adapters, encoders)
        tasks = _chosen_tasks(shown, pipeline.tasks, asked.tasks)
        steps = next(each for each in (asked.steps, pipeline.steps, family.steps) if each is not None)
        guidance = next(each for each in (asked.guidance, pipeline.guidance, family.guidance) if each is not None)
        Request(steps=steps, guidance=Guidance(guidance))  # refuses what cannot be run
        return cls(source, family, pipeline, tasks, steps, float(guidance), _specs(source, pipeline, tasks))

    def draft(
        self, tokenizers: dict[str, Tokenizer], scheduler: dict[str, dict[str, bool | int]], name: str
    ) -> Manifest:
        """The manifest before any file is made. name: of the checkpoint."""
        components = self.pipeline.parts
        drafts = {spec.name: Component(components[spec.name].role, spec.inputs, spec.outputs) for spec in self.specs}
        drafts[STEP_NAME] = Component("step", STEP_INPUTS, STEP_OUTPUTS)
        unit = next(spec.axes["height"].unit for spec in self.specs if components[spec.name].role == "denoiser")
        latents = replace(self.pipeline.latents, multiple=unit)
        width, height = (
            -(-side // latents.unit) * latents.unit for side in (self.pipeline.width, self.pipeline.height)
        )
        return Manifest(
            family=self.family.name,
            tasks=self.tasks,
            precision=FULL,
            components=drafts,
            wiring=self.pipeline.wiring,
            latents=latents,
            tokenizers=tokenizers,
            files={},
            default_width=width,
            default_height=height,
            default_steps=self.steps,
            default_guidance=self.guidance,
            scheduler=scheduler,
            source={"name": name, "pipeline": self.source.class_name},
        )


def described(source: Checkpoint, family: Family) -> Pipeline:
    """What the family makes of the configurations. Raises `CheckpointError` for a model that it does not take."""
    check_classes(source, family)
    if family in FAMILIES.values():
        with _undamaged(source):
            return family.describe(Complete(source))
    with guarded(f"the family {family.name!s:.80} cannot describe {source.root}"):
        found = family.describe(Complete(source))
        _check_described(found)
        return found


def _check_described(found: Any) -> None:
    """Raise `TypeError` or `ValueError` for what a user's own family made that is no pipeline."""
    if not isinstance(found, Pipeline):
        raise TypeError(f"its describe gives a {type(found).__name__}, a diffoundry.families.Pipeline is due")
    if not found.tasks or not set(found.tasks) <= set(TASKS):
        raise ValueError(f"its tasks are {found.tasks}, {', '.join(TASKS)} are known")
    read(Pipeline, asdict(found))
    roles = [part.role for part in found.parts.values()]
    absent = [role for role in ("denoiser", *TASKS[found.tasks[0]]) if roles.count(role) != 1]
    if absent:
        raise ValueError(f"its parts have {roles.count(absent[0])} of the role {absent[0]}, one is due")
    if found.wiring.flow is None and any(part.source == parts.TRANSFORMER for part in found.parts.values()):
        raise ValueError("its wiring has no flow, which a transformer needs: give it a diffoundry.bundle.wiring.Flow")
    named, wired = {tensor.name for tensor in found.inputs}, found.wiring.inputs
    if named != set(wired):
        raise ValueError(f"inputs and wiring do not agree on {', '.join(sorted(named ^ set(wired)))}")
    sources = wired.values()
    unknown = [each for each in sources if each not in SOURCES]
    if unknown:
        raise ValueError(f"an input of the denoiser is fed from {unknown[0]!r}; known are {', '.join(SOURCES)}")
    lacking = [each for each in ("latents", "timestep", "text.hidden") if each not in map(plain, sources)]
    if lacking:
        raise ValueError(f"no input of the denoiser is fed from {lacking[0]}")
    if found.width < 1 or found.height < 1:
        raise ValueError(f"it draws {found.width} by {found.height} pixels by default")


def with_controls(source: Checkpoint, pipeline: Pipeline, names: Collection[str]) -> Pipeline:
    """`pipeline` with the ControlNets of these names. Raises `CheckpointError` for one that does not go with it."""
    if not names:
        return pipeline
    with _undamaged(source):
        found = {name: control_config(source, name) for name in names}
        if source.has(parts.TRANSFORMER):
            return with_controlnets(pipeline, transformer_config(source), found)
        return controlled(pipeline, unet_config(source), found)


def encoder_names(adapters: Mapping[str, IPAdapterFile]) -> dict[Path, str]:
    """The names of the components that the image encoders of adapters become, by their folders."""
    folders = dict.fromkeys(file.encoder for file in adapters.values() if file.encoder is not None)
    return {folder: ENCODER + (f"_{i}" if i > 1 else "") for i, folder in enumerate(folders, 1)}


def _with_adapters(
    source: Checkpoint, pipeline: Pipeline, adapters: Mapping[str, IPAdapterFile], encoders: Mapping[Path, str]
) -> Pipeline:
    """`pipeline` with IP-Adapters. Raises `CheckpointError` for one that does not go with it."""
    from .modules.control import cross_attentions

    if source.has(parts.TRANSFORMER):
        return _with_adapters_of_transformer(source, pipeline, adapters, encoders)
    with _undamaged(source):
        found = _described(adapters, encoders)
        attentions, unet = cross_attentions(source), unet_config(source)
        shapes = list(attentions.values())
        levels = [halvings(each, len(unet["block_out_channels"])) for each in attentions]
        made = with_image_prompts(pipeline, found, UNET, int(unet["cross_attention_dim"]), len(levels), levels)
    for name, file in adapters.items():
        own = [tuple(each.shape) for pair in file.layers() for each in pair]
        if own != [shape for shape in shapes for _ in range(2)]:
            raise CheckpointError(
                f"the keys and values of the IP-Adapter {name} have other shapes than the checkpoint's: it is damaged, "
                "or was made for another model; give one that was trained with this kind of checkpoint"
            )
    return made


def _described(adapters: Mapping[str, IPAdapterFile], encoders: Mapping[Path, str]) -> dict[str, Adapter]:
    return {
        name: file.describe("" if file.encoder is None else encoders[file.encoder]) for name, file in adapters.items()
    }


def _with_adapters_of_transformer(
    source: Checkpoint, pipeline: Pipeline, adapters: Mapping[str, IPAdapterFile], encoders: Mapping[Path, str]
) -> Pipeline:
    with _undamaged(source):
        config, first = transformer_config(source), next(iter(adapters))
        kind = config["_class_name"]
        if kind not in TRANSFORMERS or any(part.wrapper for part in pipeline.parts.values()):
            raise CheckpointError(
                f"a {kind} takes no IP-Adapter, those of {' and '.join(TRANSFORMERS.values())} do: leave {first} out"
            )
        if set(pipeline.wiring.inputs_from("latents")) != {"sample"}:
            raise CheckpointError(f"the pipelines of {source.class_name} take no IP-Adapter: leave {first} out")
        of = TRANSFORMERS[kind]
        if of == SD3 and len(adapters) > 1:
            raise CheckpointError(
                f"Stable Diffusion 3 takes one IP-Adapter, found {', '.join(adapters)}: give one of them"
            )
        inner, text = width(config), int(config["joint_attention_dim"])
        doubled = len(config.get("dual_attention_layers") or ())
        made = with_image_prompts(
            pipeline,
            _described(adapters, encoders),
            of,
            text if of == FLUX else inner,
            int(config["num_layers"]) + doubled,
        )
    due = inner, text if of == FLUX else inner
    for name, file in adapters.items():
        shapes = [tuple(tensor.shape) for pair in file.layers() for tensor in pair]
        wrong = [shape for shape in shapes if shape != due]
        if wrong:
            raise CheckpointError(
                f"a key or a value of the IP-Adapter {name} has the shape {wrong[0]}, this checkpoint takes {due}: it "
                "was made for another model; give one that was trained with this kind of checkpoint"
            )
    return made


def _refuse_unet_only(asked: Asked, kind: str) -> None:
    """Raise `DiffoundryError` for what goes with a U-Net alone."""
    if asked.t2i_adapters:
        raise DiffoundryError(f"a T2I-Adapter goes with a U-Net, a {kind} has a transformer: leave it out")


def _family(source: Checkpoint, name: str | None) -> Family:
    """The family called `name`, or the one of the checkpoint's pipeline class. Raises `CheckpointError`."""
    found = family_named(name) if name is not None else family_of(source.class_name)
    if found is None:
        known = ", ".join(sorted(each for family in FAMILIES.values() for each in family.pipelines))
        raise CheckpointError(
            f"{source.root} is a {source.class_name or 'pipeline without a class name'}; "
            f"the pipeline classes known are {known}; one that is like another of these can be read as it with "
            '--family, and one that is not takes a family of your own (--family module:FAMILY, see "A family of your '
            'own" in docs/transformers.md)'
        )
    return found


@contextmanager
def _undamaged(source: Checkpoint) -> Iterator[None]:
    """Raise `CheckpointError` for what a damaged configuration makes of the code that reads it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        replaced = "".join(f" or {folder}" for folder in source.replaced.values())
        raise CheckpointError(
            f"a config.json in {source.root}{replaced} is damaged or of another kind "
            f"({type(error).__name__}: {error}): give the configuration that the part was saved with"
        ) from None


def _specs(source: Checkpoint, pipeline: Pipeline, tasks: tuple[str, ...]) -> list[ComponentSpec]:
    """How the components that the tasks need are traced."""
    from .modules import component_specs

    of_tasks = {role for roles in TASKS.values() for role in roles}
    needed = {role for task in tasks for role in TASKS[task]}
    needed |= {"encoder"} if any(each.encoded for each in pipeline.wiring.controls.values()) else set()
    spare = of_tasks - needed
    with _undamaged(source):
        return [spec for spec in component_specs(source, pipeline) if pipeline.parts[spec.name].role not in spare]


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
