"""A bundle in a lower precision on the CPU, rounded value by value as a GPU rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..bundle import STANDARD, Bundle
from ..common.errors import EngineError
from ..engines import Engine
from .precision import precision_of
from .sessions import start
from .typed import emulated


def emulation(bundle: Bundle, precision: str) -> dict[str, Callable[[], Engine]]:
    """What loads each component that `bundle` has in `precision`, for the `engines` of a `Pipeline`.

    Raises `DiffoundryError` for an unknown precision, `EngineError` when the bundle was not compiled for it.
    """
    rule = precision_of(precision)

    def load(name: str, model: str) -> Engine:
        path = bundle.path(model)
        return start(emulated(path, rule), path.parent, name)

    components = bundle.manifest.components.items()
    found = {name: found.model for name, part in components if (found := part.variants.get(f"{precision}/{STANDARD}"))}
    if not found:
        raise EngineError(f"{bundle.root} has no {precision} models: compile it with --precision {precision}")
    return {name: partial(load, name, model) for name, model in found.items()}
