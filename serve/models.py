"""The bundles of a server by name: opened once, their engines loaded when they are needed and dropped by memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import DiffoundryError, RequestError
from ..runtime.pipeline import Pipeline

_SWITCH = 64
"""Rounds after which models that are in memory give way to one that does not fit beside them."""


class NoModelError(DiffoundryError):
    """A request names a model that is not served."""


@dataclass(eq=False, slots=True)
class Model:
    """A bundle under a name. loras: the files that requests may ask for, by the name that they know.

    used: when it was last needed.
    """

    name: str
    pipeline: Pipeline
    loras: dict[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = 0.0
    _sizes: dict[str, int] = field(default_factory=dict)
    _abilities: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipeline = self.pipeline
        names = {*pipeline.bundle.manifest.components, *filter(None, [pipeline.lora_denoiser])}
        self._sizes = {name: pipeline.weight_bytes(name) for name in names}

    @property
    def size(self) -> int:
        """Bytes that it takes, about, with all its components, and a denoiser for LoRAs where it has any."""
        components = self.pipeline.bundle.manifest.components
        return sum(size for name, size in self._sizes.items() if self.loras or name in components)

    @property
    def held(self) -> int:
        """Bytes of what is in memory, about."""
        return sum(self._sizes.get(name, 0) for name in self.pipeline.loaded)

    @property
    def abilities(self) -> dict[str, Any]:
        """See `Pipeline.abilities`; found out once."""
        if not self._abilities:
            self._abilities = self.pipeline.abilities()
        return self._abilities

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
        self._together: list[Model] = []
        self._blocked: Counter[Model] = Counter()
        for model in models:
            if memory is not None and model.size > memory:
                raise RequestError(
                    f"{model.name} takes about {model.size / 2**30:.2f} GiB, and --memory is {memory / 2**30:.2f}: "
                    "raise it, or leave the bundle out"
                )

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def has_bound(self) -> bool:
        """Whether they may have to give way to each other."""
        return self._memory is not None

    def named(self, name: str | None) -> Model:
        """Raises `NoModelError`, which lists what there is."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise NoModelError(f"there is no model {name!r:.100}, only {', '.join(self._models)}")
        return self._models[name]

    def together(self, wanted: Sequence[Model], decoding: Collection[Model] = ()) -> list[Model]:
        """Those of `wanted`, the most wanted first, whose turn it is to be in memory: as many as fit beside each other.

        What is there stays while it is wanted. One that does not fit beside it waits for some rounds, and then has it
        give way, when its pictures are decoded. decoding: models whose pictures are; one that stays for this alone is
        in memory, but not among those returned.
        """
        kept: list[Model] = []
        decode = [model for model in self._together if model in decoding]
        overdue = [model for model in wanted if self._blocked[model] >= _SWITCH][:1]
        for model in (*decode, *overdue, *(each for each in self._together if each in wanted), *wanted):
            if model not in kept and self._fits([*kept, model]):
                kept.append(model)
        self._blocked.update(model for model in wanted if model not in kept)
        for model in kept:
            del self._blocked[model]
        self._together = kept
        gives_way = any(model not in kept for model in overdue)
        return [model for model in kept if not (gives_way and model in decode)]

    def make_room(self, model: Model) -> None:
        """Drop the engines of models whose turn it is not, those longest not used first, until `model` fits."""
        model.used = time.monotonic()
        if self._memory is None:
            return
        idle = [each for each in self if each is not model and each not in self._together and each.held]
        for each in sorted(idle, key=lambda other: other.used):
            if model.size + sum(other.held for other in self if other is not model) <= self._memory:
                return
            each.pipeline.release_all()

    def _fits(self, models: Sequence[Model]) -> bool:
        return self._memory is None or sum(model.size for model in models) <= self._memory
