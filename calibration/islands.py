"""Which nodes of a component stay in float32, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.arrays import Array
from .graph import MOVES, Form, form, is_cheap, is_float, key, read, version_for
from .losses import Trial, islands_of, measure
from .precision import Precision

_AS_GOOD = 1.0
"""A larger island must be this much better, in dB, to be taken."""


@dataclass(frozen=True, slots=True)
class Island:
    """A node in float32. node: its first output. op: its operator.

    reason: `range`, measured is the largest magnitude; `loss`, measured is its signal-to-noise ratio in dB; `feeds`,
    what it makes would be rounded, measured is the ratio in dB of the node `of` without that; `joins`, it lies between
    float32 values; `operator`, it has no form in the lower type.
    """

    node: str
    op: str
    reason: str
    measured: float | None = None
    of: str = ""


class Islands:
    """The measurements of one component, and the nodes that they keep in float32."""

    def __init__(
        self,
        path: Path,
        component: str,
        precision: Precision,
        ranges: Mapping[str, float],
        calls: Sequence[Mapping[str, Array]],
        tick: Callable[[], None] | None = None,
    ) -> None:
        """path: the component's model. ranges: max |x| by value. calls: feeds to measure losses with.

        tick: called after each call of the model.
        """
        self._path, self._component, self._precision = path, component, precision
        self._ranges, self._calls, self._tick = ranges, calls, tick
        model = read(path)
        version = version_for(model, precision)
        self._forms: dict[str, Form | None] = {key(node): form(node, version, precision) for node in model.graph}
        self._floats = [key(node) for node in model.graph if any(is_float(value) for value in node.outputs)]
        over = self._over(model, precision.limit)
        tried = [key(node) for node in model.graph if self._computes(node) and key(node) not in over]
        ratios = self._measured([Trial(name) for name in tried])
        self._losses = dict(zip(tried, ratios, strict=True))
        self._grown: dict[str, list[tuple[frozenset[str], float]]] = {}

    def find(self, threshold: float, limit: float) -> list[Island]:
        """The nodes to keep in float32, in the order of the graph.

        threshold: the lowest signal-to-noise ratio of a node in the lower type, in dB. limit: the largest magnitude.
        """
        model = read(self._path)
        self._grow(model, [name for name, ratio in self._losses.items() if ratio < threshold])
        found = self._over(model, limit)
        ops = {key(node): node.op_type for node in model.graph}
        for name, ratio in self._losses.items():
            if ratio >= threshold or name in found:
                continue
            found[name] = Island(name, ops[name], "loss", round(ratio, 1))
            island, _ = _smallest(self._grown[name], threshold)
            for maker in island - {name}:
                if (self._forms[maker] or Form((), ())).outputs:
                    found.setdefault(maker, Island(maker, ops[maker], "feeds", round(self._grown[name][0][1], 1), name))
        for node in model.graph:
            if self._forms[key(node)] is None and key(node) in self._floats:
                found[key(node)] = Island(key(node), node.op_type, "operator")
        self._join(model, found)
        return [found[key(node)] for node in model.graph if key(node) in found]

    def types(self, islands: Sequence[Island]) -> dict[str, bool]:
        """Whether each node that makes floats computes in the lower type."""
        kept = {island.node for island in islands}
        return {name: name not in kept for name in self._floats if self._forms[name] is not None or name in kept}

    def lowest(self, islands: Sequence[Island]) -> float | None:
        """The lowest signal-to-noise ratio of a node in the lower type, in dB."""
        low = self.types(islands)
        return min((round(ratio, 1) for name, ratio in self._losses.items() if low[name]), default=None)

    def _computes(self, node: Any) -> bool:
        shape = self._forms[key(node)]
        return shape is not None and bool(shape.outputs) and node.op_type not in MOVES

    def _over(self, model: Any, limit: float) -> dict[str, Island]:
        """Nodes that read or make a value above `limit`."""
        found = {}
        for node in model.graph:
            shape = self._forms[key(node)]
            if shape is None or not shape.outputs:
                continue
            values = [*(node.inputs[i] for i in shape.inputs), *(node.outputs[i] for i in shape.outputs)]
            largest = max((self._ranges.get(str(value.name), 0.0) for value in values), default=0.0)
            if largest > limit:
                found[key(node)] = Island(key(node), node.op_type, "range", float(f"{largest:.4g}"))
        return found

    def _grow(self, model: Any, names: Sequence[str]) -> None:
        """Measure ever larger islands around each node that was not measured so far."""
        trials = [
            Trial(name, island) for name in names if name not in self._grown for island in islands_of(model, name)
        ]
        for trial, ratio in zip(trials, self._measured(trials), strict=True):
            self._grown.setdefault(trial.target, []).append((trial.island, ratio))

    def _measured(self, trials: Sequence[Trial]) -> list[float]:
        return measure(self._path, self._component, self._precision, trials, self._calls, self._tick)

    def _join(self, model: Any, found: dict[str, Island]) -> None:
        """Cheap nodes whose every float neighbour is in float32 join them: a cast costs as much as they do."""
        free = {
            key(node): node
            for node in model.graph
            if is_cheap(node) and key(node) not in found and (self._forms[key(node)] or Form((), ())).outputs
        }
        for name in list(free):
            if name not in free:
                continue
            group, edge, joins = {name: free.pop(name)}, [name], True
            while edge:
                node = group[edge.pop()]
                for near in _neighbours(node):
                    if near is None or key(near) in group or key(near) in found:
                        continue
                    if key(near) in free:
                        group[key(near)] = free.pop(key(near))
                        edge.append(key(near))
                    elif (self._forms[key(near)] or Form((), ())).outputs:
                        joins = False
            if joins:
                found.update({each: Island(each, node.op_type, "joins") for each, node in group.items()})


def _smallest(grown: Sequence[tuple[frozenset[str], float]], threshold: float) -> tuple[frozenset[str], float]:
    """The smallest island that reaches the threshold, or the smallest of the best."""
    best = max(ratio for _, ratio in grown)
    return next(each for each in grown if each[1] >= min(threshold, best - _AS_GOOD))


def _neighbours(node: Any) -> list[Any]:
    """The makers and readers of a node's float values; None for the graph's own inputs and outputs."""
    makers = [value.producer() for value in node.inputs if is_float(value) and not value.is_initializer()]
    return makers + [reader for value in node.outputs if is_float(value) for reader in value.consumers()]
