"""The largest magnitude of every value of a component, over all calls of the real loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arrays import Array
from ..engines.fusion.graph import map_tensor
from .graph import MOVES, add_constant, float_weights, holds_masks, is_float, read
from .precision import MASK
from .sessions import RecordedEngine, start

_WITHIN_ONE = frozenset(("Cos", "Sigmoid", "Sin", "Softmax", "Tanh"))
_HIGH, _LOW = ":highest", ":lowest"


class Ranges:
    """Gathers max |x| of each float32 value of a component. Infinity and what stands for it are left out."""

    def __init__(self, path: Path, component: str) -> None:
        """path: the component's model."""
        self._path, self._component = path, component
        self._largest: dict[str, float] = {}

    def engine(self, on_call: Any) -> RecordedEngine:
        """An engine of the component that gathers as it runs, and calls `on_call` after each call.

        The largest values are computed inside the graph, so that no activation outlives its reader.
        """
        model = read(self._path)
        outputs = len(model.graph.outputs)
        _probe(model, masked=holds_masks(model))
        engine = start(model, self._path.parent, self._component)

        def gather(feeds: Mapping[str, Array], made: Mapping[str, Array]) -> None:
            for name, value in made.items():
                if name.endswith((_HIGH, _LOW)):
                    of = name.rpartition(":")[0]
                    found = abs(value.item())
                    found = np.inf if np.isnan(found) else found
                    self._largest[of] = max(found, self._largest.get(of, 0.0))
            on_call(feeds, {name: value for name, value in made.items() if not name.endswith((_HIGH, _LOW))})

        return RecordedEngine(engine, gather, outputs)

    def largest(self) -> dict[str, float]:
        """max |x| of each float32 value and weight, by name."""
        model = read(self._path)
        found = dict(self._largest)
        for name, value in float_weights(model).items():
            found[name] = map_tensor(value.const_value, magnitude)
        for node in model.graph:
            for made in node.outputs:
                if is_float(made) and made.name not in found:
                    bounded = node.op_type in _WITHIN_ONE
                    sources = [found.get(value.name, 0.0) for value in node.inputs if is_float(value)]
                    found[made.name] = 1.0 if bounded else max(sources, default=0.0)
        return found


def magnitude(array: Array) -> float:
    """max |x| over what is finite and does not stand for infinity."""
    absolute = np.abs(array)
    return float(np.max(absolute, initial=0.0, where=absolute < MASK))


def _probe(model: Any, *, masked: bool) -> None:
    """Let a model give the largest and the smallest element of each value that a node computes."""
    import onnx_ir

    graph = model.graph
    if masked:
        bound, zero = add_constant(graph, "mask:bound", MASK), add_constant(graph, "mask:zero", 0.0)
    for node in list(graph):
        if node.op_type in MOVES | _WITHIN_ONE:
            continue
        for made in node.outputs:
            if not is_float(made) or not made.name:
                continue
            tape, seen = onnx_ir.tape.Tape(), made
            if masked:
                absolute = tape.op("Abs", [made])
                seen = tape.op("Where", [tape.op("Less", [absolute, bound]), absolute, zero])
            for op, suffix in [("ReduceMax", _HIGH), ("ReduceMin", _LOW)][: 1 if masked else 2]:
                output = onnx_ir.val(f"{made.name}{suffix}", onnx_ir.DataType.FLOAT, [])
                graph.outputs.append(tape.op(op, [seen], {"keepdims": 0}, output=output))
            graph.insert_after(node, tape.nodes)
