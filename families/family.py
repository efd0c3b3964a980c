"""A family: how the pipeline classes of one kind read the configurations of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..bundle import Tensor
from ..bundle.wiring import Latents, Role, Wiring

Changes = dict[str, bool | int]
"""Options of a scheduler's configuration, and what a pipeline class sets them to."""


class Configs(Protocol):
    """The configurations of a checkpoint in the layout of diffusers, or of a folder that was exported from one."""

    @property
    def index(self) -> Mapping[str, Any]:
        """The contents of `model_index.json`."""

    def has(self, name: str) -> bool:
        """Whether there is a model `name`, such as `text_encoder`, `unet` or `vae`."""

    def config(self, name: str) -> Mapping[str, Any]:
        """The configuration of the model `name`, with what it leaves out as its class takes it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a pipeline. source: the model of the checkpoint that it is made of.

    wrapper: of a transformer, `module:Class` of the torch module that gives it the inputs of the wiring; "" where
    diffoundry has one for its class.
    """

    role: Role
    source: str
    wrapper: str = ""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a pipeline is. parts: by the names of components, smallest first, of all tasks.

    inputs: of the denoiser, as its configuration says. width, height: in pixels, what is drawn by default.
    steps, guidance: what is run by default, where that is not what the family runs.
    """

    tasks: tuple[str, ...]
    parts: dict[str, Part]
    wiring: Wiring
    latents: Latents
    inputs: tuple[Tensor, ...]
    width: int
    height: int
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of pipeline.

    name: what people call it. pipelines: the pipeline classes of diffusers. models: the classes that each model and
    tokenizer may have; those of `optional` some checkpoints do without. describe: what the pipeline of a checkpoint is;
    it may raise `CheckpointError` for what the classes refuse, and `LookupError`, `TypeError` or `ValueError` for a
    damaged configuration. steps, guidance: what is run by default.
    scheduler: by task, what its pipeline class sets options of the scheduler to, where the scheduler has them.
    """

    name: str
    pipelines: tuple[str, ...]
    models: Mapping[str, tuple[str, ...]]
    describe: Callable[[Configs], Pipeline]
    steps: int
    guidance: float
    optional: tuple[str, ...] = ()
    scheduler: Mapping[str, Changes] = field(default_factory=dict)

    def scheduler_changes(self, tasks: Iterable[str], config: Mapping[str, Any]) -> dict[str, Changes]:
        """For each task what its pipeline class changes of a scheduler with all the options in `config`."""
        found = {}
        for task in tasks:
            changes = self.scheduler.get(task, {}).items()
            different = {name: value for name, value in changes if name in config and config[name] != value}
            if different:
                found[task] = different
        return found
