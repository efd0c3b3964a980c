"""What each node loses when it reads values and weights of a lower type: its signal-to-noise ratio, in dB."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.arrays import Array
from ..engines.fusion.graph import map_tensor, weight_of
from .graph import (
    add_constant,
    castable,
    holds_masks,
    is_float,
    key,
    make_cast,
    read,
    version_for,
)
from .precision import MASK, Precision
from .rewrite import round_to
from .sessions import start

LOSSLESS = 200.0
"""Stands for an infinite ratio, in dB."""
_DEEPEST = 6
_LARGEST_REGION = 16
_SMALL = 1 << 16
"""Weights up to this many numbers are rounded once, larger ones in each call: in memory they are there once."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Node `target` computed by the nodes `region` in float32, or, when that is empty, in the lower type.

    What comes into it from outside is rounded; of a weight, only when the node is in the lower type.
    """

    target: str
    region: frozenset[str] = frozenset()


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB, within ±`LOSSLESS`."""
    if not math.isfinite(noise):
        return -LOSSLESS
    if noise <= 0:
        return LOSSLESS
    return max(-LOSSLESS, min(LOSSLESS, 10 * math.log10(signal / noise))) if signal > 0 else -LOSSLESS


def measure(
    path: Path,
    component: str,
    precision: Precision,
    trials: Sequence[Trial],
    calls: Sequence[Mapping[str, Array]],
    tick: Callable[[], None] | None = None,
) -> list[float]:
    """The signal-to-noise ratio of each trial, in dB, the lowest over `calls`, in the order of `trials`.

    tick: called after each call of the model.
    """
    if not trials:
        return []
    model = read(path)
    _probe(model, precision, trials)
    engine = start(model, path.parent, component, fast=False)
    lowest = [LOSSLESS] * len(trials)
    for feeds in calls:
        made = engine(feeds)
        ratios = [decibels(float(made[f"signal:{i}"]), float(made[f"noise:{i}"])) for i in range(len(trials))]
        lowest = [min(pair) for pair in zip(lowest, ratios, strict=True)]
        if tick is not None:
            tick()
    return lowest


def regions_around(model: Any, target: str) -> list[frozenset[str]]:
    """Ever larger regions that make the value of node `target`: itself, itself and its makers, and so on."""
    makers = {key(node): node for node in model.graph}
    region, edge, found = {target}, [makers[target]], [frozenset((target,))]
    for _ in range(_DEEPEST):
        edge = [v.producer() for node in edge for v in node.inputs if is_float(v) and v.producer() is not None]
        new = {key(node) for node in edge} - region
        if not new or len(region | new) > _LARGEST_REGION:
            break
        region |= new
        found.append(frozenset(region))
    return found


def _probe(model: Any, precision: Precision, trials: Sequence[Trial]) -> None:
    """Let a model give the power of each trial's target and of its error, and nothing else."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    probe = _Probe(model, precision)
    outputs = [output for i, trial in enumerate(trials) for output in probe.add(i, trial)]
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)


class _Probe:
    def __init__(self, model: Any, precision: Precision) -> None:
        import onnx_ir

        self._graph, self._precision = model.graph, precision
        self._version = version_for(model, precision)
        self._nodes = {key(node): node for node in model.graph}
        self._places = {name: i for i, name in enumerate(self._nodes)}
        self._float, self._low = onnx_ir.DataType.FLOAT, onnx_ir.DataType[precision.dtype]
        self._rounded: dict[str, Any] = {}
        self._masked = holds_masks(model)
        self._bound = add_constant(self._graph, "mask:bound", MASK)
        self._zero = add_constant(self._graph, "mask:zero", 0.0)

    def add(self, i: int, trial: Trial) -> list[Any]:
        """The two outputs of trial i: signal and noise."""
        target = self._nodes[trial.target]
        made: dict[str, Any] = {}
        last = target
        for name in sorted(trial.region or {trial.target}, key=self._places.__getitem__):
            node = self._nodes[name]
            clone = self._clone(node, i, made, low=not trial.region)
            self._graph.insert_after(last, clone)
            last = clone
            for old, new in zip(node.outputs, clone.outputs, strict=True):
                made[str(old.name)] = new
        at = next(j for j, value in enumerate(target.outputs) if is_float(value))
        return self._compare(i, target.outputs[at], made[str(target.outputs[at].name)], last)

    def _clone(self, node: Any, i: int, made: Mapping[str, Any], *, low: bool) -> Any:
        import onnx_ir

        taken = castable(node, self._version, self._precision).inputs
        inputs = []
        for place, value in enumerate(node.inputs):
            if value is not None and value.name in made:
                value = made[value.name]
            elif is_float(value) and (place in taken if low else value.producer() and weight_of(value) is None):
                value = self._round(value)
            inputs.append(value)
        clone = onnx_ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            if old.name:
                new.name, new.dtype = f"{old.name}:trial{i}", old.dtype
        return clone

    def _round(self, value: Any) -> Any:
        name, graph = str(value.name), self._graph
        if name not in self._rounded:
            if name in graph.initializers and value.const_value.size <= _SMALL:
                tensor = map_tensor(value.const_value, lambda array: round_to(array, self._precision))
                self._rounded[name] = add_constant(graph, f"{name}:rounded", tensor)
            else:
                down = make_cast(value, self._low, f"{name}:low")
                up = make_cast(down.outputs[0], self._float, f"{name}:rounded")
                if value.producer() is None:
                    graph.insert_before(graph[0], [down, up])
                else:
                    graph.insert_after(value.producer(), [down, up])
                self._rounded[name] = up.outputs[0]
        return self._rounded[name]

    def _compare(self, i: int, exact: Any, trial: Any, last: Any) -> list[Any]:
        """Outputs `signal:i` and `noise:i`. Infinity, and what stands for it, is left out where there are masks."""
        import onnx_ir

        tape = onnx_ir.tape.Tape()
        error = tape.op("Sub", [exact, trial])
        if self._masked:
            finite = tape.op("Less", [tape.op("Abs", [exact]), self._bound])
            exact, error = (tape.op("Where", [finite, each, self._zero]) for each in (exact, error))
        outputs = [onnx_ir.val(f"{name}:{i}", self._float, []) for name in ("signal", "noise")]
        for value, output in zip((exact, error), outputs, strict=True):
            tape.op("ReduceSumSquare", [value], {"keepdims": 0}, output=output)
        self._graph.insert_after(last, tape.nodes)
        return outputs
