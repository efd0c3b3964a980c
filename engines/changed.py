"""New values for initializers of a model that stands: its weights changed without tracing or building anything.

`weights.json` of a component says which weight of the checkpoint each initializer is. A change of a weight is
evaluated in float32 and stored in the type that the initializer has; all other weights stay those of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import Bundle
from ..common.arrays import Array
from ..common.errors import BundleError, EngineError
from ..common.files import read_json
from .fusion.lora import unsuffixed
from .initializers import Initializer, read_initializers

WEIGHTS_NAME = "weights.json"
Change = Callable[[Array], Array]
"""Of a weight as the checkpoint has it, float32, what is added to it."""
Changes = Mapping[str, Change]
"""By the names of weights in the checkpoint."""
Rows = Mapping[str, Mapping[int, Array]]
"""Rows in place of a weight's own, or after them, by the names of weights in the checkpoint: of new words."""


@dataclass(frozen=True, slots=True)
class Source:
    """The weight that an initializer is. axes: its order of the weight's axes."""

    weights: tuple[str, ...]
    axes: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class NewValue:
    """What an initializer is to be, in its own type and layout."""

    initializer: Initializer
    value: Array


def together(first: Changes, second: Changes) -> dict[str, Change]:
    """What both add to the bare weights."""

    def both(a: Change, b: Change) -> Change:
        return lambda weight: a(weight) + b(weight)

    shared = first.keys() & second.keys()
    return {**first, **second, **{name: both(first[name], second[name]) for name in shared}}


def sources_of(bundle: Bundle, name: str) -> dict[str, Source]:
    """The weight of the checkpoint that each initializer of component `name` is.

    Raises `BundleError` for a bundle that does not say it, or says it wrong.
    """
    path = bundle.path(f"{name}/{WEIGHTS_NAME}")
    if f"{name}/{WEIGHTS_NAME}" not in bundle.component(name).files:
        raise BundleError(
            f"{bundle.root} does not say which weights its {name} was made of: compile the checkpoint again"
        )
    found = {}
    for initializer, entry in read_json(path, "the sources of weights").items():
        names, axes = (entry.get("weights"), entry.get("axes")) if isinstance(entry, dict) else (None, None)
        whole = isinstance(names, list) and bool(names) and all(isinstance(each, str) for each in names)
        ordered = axes is None or (
            isinstance(axes, list) and sorted(map(str, axes)) == [str(i) for i in range(len(axes))]
        )
        if names is None or not whole or not ordered:
            raise BundleError(f"{path}: {initializer:.100} is damaged: compile the checkpoint again")
        found[initializer] = Source(tuple(names), None if axes is None else tuple(axes))
    return found


def shapes_of(bundle: Bundle, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of component `name`, as the checkpoint has them."""
    component = bundle.component(name)
    variant = component.variant("fp32") or next(iter(component.variants.values()))
    held = read_initializers(bundle.path(variant.model))
    shapes = {}
    for initializer, source in sources_of(bundle, name).items():
        if initializer in held:
            shape = held[initializer].shape
            for weight in source.weights:
                shapes[weight] = _turned_back(shape, source.axes)
    return shapes


def weights_in(bundle: Bundle, name: str, wanted: Collection[str]) -> dict[str, Array]:
    """The values of these weights of component `name`, float32, as the checkpoint has them."""
    component = bundle.component(name)
    variant = component.variant("fp32") or next(iter(component.variants.values()))
    held = read_initializers(bundle.path(variant.model))
    found = {}
    for initializer, source in sources_of(bundle, name).items():
        for weight in source.weights:
            if weight in wanted and initializer in held:
                value = np.asarray(held[initializer].read(), np.float32)
                found[weight] = value if source.axes is None else value.transpose(np.argsort(source.axes))
    return found


def new_values(
    bundle: Bundle, name: str, graphs: Sequence[Path], changes: Changes, sources: str, rows: Rows | None = None
) -> dict[Path, list[NewValue]]:
    """For each of the graphs of component `name` what its initializers become; see `places`.

    rows: of weights, in place of their own rows or behind them.
    """
    rows = rows or {}
    return {
        graph: [
            NewValue(held, _changed(held, axes, changes.get(weight), rows.get(weight, {})))
            for held, axes, weight in found
        ]
        for graph, found in places(bundle, name, graphs, {*changes, *rows}, sources).items()
    }


def places(
    bundle: Bundle, name: str, graphs: Sequence[Path], changes: Collection[str], sources: str
) -> dict[Path, list[tuple[Initializer, tuple[int, ...] | None, str]]]:
    """For each of the graphs of component `name` the initializers that change: each with its axes and its weight.

    sources: the component whose weights they are, whose `weights.json` tells of them where this one has none.
    Raises `EngineError` for a weight that the graphs hold in a form that cannot be changed.
    """
    told = f"{name}/{WEIGHTS_NAME}" in bundle.component(name).files
    known = sources_of(bundle, name if told else sources)
    made: dict[Path, list[tuple[Initializer, tuple[int, ...] | None, str]]] = {graph: [] for graph in graphs}
    done: set[str] = set()
    for graph in graphs:
        for initializer, held in read_initializers(graph).items():
            source = known.get(unsuffixed(initializer))
            wanted = [] if source is None else [weight for weight in source.weights if weight in changes]
            if source is None or not wanted:
                continue
            if len(source.weights) > 1:
                raise EngineError(
                    f"{name}: {wanted[0]} and {len(source.weights) - 1} other weights of equal values are one in "
                    f"{bundle.root}, and a LoRA changes some of them: give it to `compile --lora`"
                )
            if held.is_float:
                made[graph].append((held, source.axes, wanted[0]))
                done.add(wanted[0])
    fixed = sorted(set(changes) - done)
    if fixed:
        raise EngineError(
            f"{name}: {len(fixed)} of the {len(changes)} weights that are to be changed are folded or in eight bits in "
            f"this model ({fixed[0]}): run it with --precision fp32, or give the LoRA to `compile --lora`"
        )
    return made


def _changed(
    held: Initializer, axes: tuple[int, ...] | None, change: Change | None, rows: Mapping[int, Array]
) -> Array:
    value = np.array(held.read(), np.float32, order="C")
    weight = value if axes is None else value.transpose(np.argsort(axes))
    if change is not None:
        weight += change(weight)
    if rows:
        more = max(0, max(rows) + 1 - len(weight))
        weight = np.concatenate([weight, np.zeros((more, *weight.shape[1:]), np.float32)])
        for i, row in rows.items():
            weight[i] = row
        value = weight if axes is None else weight.transpose(axes)
    return held.stored(value)


def _turned_back(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape if axes is None else tuple(shape[axes.index(i)] for i in range(len(axes)))
