"""Which nodes of a component stay in float32, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..common.arrays import Array
from ..engines.fusion.graph import weight_of
from .graph import CONTRACTIONS, MOVES, Castable, castable, is_float, key, read, version_for
from .losses import Trial, measure, regions_around
from .precision import Precision

_AS_GOOD = 1.0
"""A larger region must be this much better, in dB, to be taken."""


@dataclass(frozen=True, slots=True)
class Fp32Node:
    """A node in float32. node: its first output. op: its operator.

    reason: `range`, measured is the largest magnitude; `loss`, measured is its signal-to-noise ratio in dB;
    `feeds_sensitive`, rounding what it makes spoils the node `of`, measured is that node's ratio in dB; `isolated`, it
    lies between float32 values; `operator`, its operator does not admit the lower type.
    """

    node: str
    op: str
    reason: str
    measured: float | None = None
    of: str = ""


class Fp32Nodes:
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
        self._path, self._ranges = path, ranges
        self._measure = partial(measure, path, component, precision, calls=calls, tick=tick)
        model = read(path)
        version = version_for(model, precision)
        self._castable: dict[str, Castable] = {key(node): castable(node, version, precision) for node in model.graph}
        self._floats = [
            key(node)
            for node in model.graph
            if any(is_float(value) and weight_of(value) is None for value in node.outputs)
        ]
        over = self._over(model, precision.limit)
        tried = [key(node) for node in model.graph if self._computes(node) and key(node) not in over]
        ratios = self._measure([Trial(name) for name in tried])
        self._losses = dict(zip(tried, ratios, strict=True))
        self._grown: dict[str, list[tuple[frozenset[str], float]]] = {}

    def find(self, threshold: float, limit: float) -> list[Fp32Node]:
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
            found[name] = Fp32Node(name, ops[name], "loss", round(ratio, 1))
            region, _ = _smallest(self._grown[name], threshold)
            for maker in region - {name}:
                if self._castable[maker].outputs:
                    found.setdefault(
                        maker, Fp32Node(maker, ops[maker], "feeds_sensitive", round(self._grown[name][0][1], 1), name)
                    )
        for node in model.graph:
            if not self._castable[key(node)].outputs and key(node) in self._floats:
                found[key(node)] = Fp32Node(key(node), node.op_type, "operator")
        found |= self._isolated(model, found)
        return [found[key(node)] for node in model.graph if key(node) in found]

    def types(self, nodes: Sequence[Fp32Node]) -> dict[str, bool]:
        """Whether each node that makes floats computes in the lower type."""
        kept = {each.node for each in nodes}
        return {name: name not in kept for name in self._floats if self._castable[name].outputs or name in kept}

    def lowest(self, nodes: Sequence[Fp32Node]) -> float | None:
        """The lowest signal-to-noise ratio of a node in the lower type, in dB."""
        low = self.types(nodes)
        return min((round(ratio, 1) for name, ratio in self._losses.items() if low[name]), default=None)

    def _computes(self, node: Any) -> bool:
        return bool(self._castable[key(node)].outputs) and node.op_type not in MOVES

    def _over(self, model: Any, limit: float) -> dict[str, Fp32Node]:
        """Nodes that read or make a value above `limit`."""
        found = {}
        for node in model.graph:
            taken = self._castable[key(node)]
            if not taken.outputs:
                continue
            values = [*(node.inputs[i] for i in taken.inputs), *(node.outputs[i] for i in taken.outputs)]
            largest = max((self._ranges.get(str(value.name), 0.0) for value in values), default=0.0)
            if largest > limit:
                found[key(node)] = Fp32Node(key(node), node.op_type, "range", float(f"{largest:.4g}"))
        return found

    def _grow(self, model: Any, names: Sequence[str]) -> None:
        """Measure ever larger regions around each node that was not measured so far."""
        fresh = [name for name in names if name not in self._grown]
        trials = [Trial(name, region) for name in fresh for region in regions_around(model, name)]
        for trial, ratio in zip(trials, self._measure(trials), strict=True):
            self._grown.setdefault(trial.target, []).append((trial.region, ratio))

    def _isolated(self, model: Any, found: Mapping[str, Fp32Node]) -> dict[str, Fp32Node]:
        """Cheap nodes all whose float neighbours are in float32: a cast costs as much as they do."""
        low = {key(node): node for node in model.graph if self._castable[key(node)].outputs and key(node) not in found}
        isolated = {}
        for group in _connected({name: node for name, node in low.items() if node.op_type not in CONTRACTIONS}):
            near = {key(near) for node in group.values() for near in _neighbours(node)}
            if not near & low.keys() - group.keys():
                isolated.update({name: Fp32Node(name, node.op_type, "isolated") for name, node in group.items()})
        return isolated


def _smallest(grown: Sequence[tuple[frozenset[str], float]], threshold: float) -> tuple[frozenset[str], float]:
    """The smallest region that reaches the threshold, or the smallest of the best."""
    best = max(ratio for _, ratio in grown)
    return next(each for each in grown if each[1] >= min(threshold, best - _AS_GOOD))


def _connected(nodes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The groups of `nodes` that float values connect."""
    left = dict(nodes)
    while left:
        group = dict([left.popitem()])
        edge = list(group.values())
        while edge:
            near = {key(each): each for each in _neighbours(edge.pop()) if left.pop(key(each), None)}
            group |= near
            edge += near.values()
        yield group


def _neighbours(node: Any) -> list[Any]:
    """The makers and readers of a node's float values."""
    makers = [value.producer() for value in node.inputs if is_float(value)]
    readers = [reader for value in node.outputs if is_float(value) for reader in value.consumers()]
    return [each for each in makers + readers if each is not None]
