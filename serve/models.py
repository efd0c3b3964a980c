"""The bundles of a server by name: opened once, their engines loaded when they are needed and dropped by memory."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ..common.errors import DiffoundryError, RequestError
from ..runtime.pipeline import Pipeline


class NoModelError(DiffoundryError):
    """A request names a model that is not served."""


@dataclass(eq=False, slots=True)
class Model:
    """A bundle under a name. loras: the files that requests may ask for, by the name that they know.

    size: bytes that it takes, about, with all its components. used: when it was last needed.
    """

    name: str
    pipeline: Pipeline
    loras: dict[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    size: int = 0
    used: float = 0.0
    _sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipeline = self.pipeline
        self._sizes = {name: pipeline.weight_bytes(name) for name in pipeline.bundle.manifest.components}
        self.size = sum(self._sizes.values())

    @property
    def held(self) -> int:
        """Bytes of what is in memory, about."""
        return sum(self._sizes.get(name, 0) for name in self.pipeline.loaded)

    @property
    def preview_decoder(self) -> str:
        """The quickest decoder that it has."""
        return "tiny" if self.pipeline.bundle.manifest.with_role("preview") else "full"


class Models:
    """The models of a server, the first of which is the one that is meant where none is named."""

    def __init__(self, models: Collection[Model], memory: int | None = None) -> None:
        """memory: bytes that the engines of all may take, None for any.

        Raises `RequestError` where one of them alone takes more.
        """
        self._models = {model.name: model for model in models}
        self._memory = memory
        for model in models:
            if memory is not None and model.size > memory:
                raise RequestError(
                    f"{model.name} takes about {model.size / 2**30:.2f} GiB, and --memory is {memory / 2**30:.2f}: "
                    "raise it, or leave the bundle out"
                )

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def named(self, name: str | None) -> Model:
        """Raises `NoModelError`, which lists what there is."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise NoModelError(f"there is no model {name!r:.100}, only {', '.join(self._models)}")
        return self._models[name]

    def fits(self, model: Model, moving: Collection[Model]) -> bool:
        """Whether `model` can be in memory beside those that are `moving`."""
        return self._memory is None or model.size + sum(each.size for each in {*moving} - {model}) <= self._memory

    def make_room(self, model: Model, moving: Collection[Model]) -> None:
        """Drop the engines of others, those longest not used first, until `model` fits. None that is `moving` is."""
        model.used = time.monotonic()
        if self._memory is None:
            return
        idle = [each for each in self if each is not model and each not in moving and each.held]
        for each in sorted(idle, key=lambda other: other.used):
            if model.size + sum(other.held for other in self if other is not model) <= self._memory:
                return
            each.pipeline.release_all()
