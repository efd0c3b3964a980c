"""What each layer's output loses when its input is rounded with a scale, measured beside the exact one in one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ..graph import key, raise_opset, read_blocked
from ..sessions import start
from .formats import Format
from .layers import Group
from .write import OPSET, Rounding

_SCALES = "diffoundry:scales"
_SIGNAL, _NOISE = ":signal", ":noise"


def losses(
    source: Path,
    component: str,
    form: Format,
    groups: Sequence[Group],
    candidates: Sequence[Mapping[str, float]],
    calls: Sequence[Mapping[str, Array]],
    told: Callable[[int, int], None],
) -> Array:
    """Noise over signal of each group's outputs, float64 (candidates, groups): its layers' mean, in the worst call.

    candidates: in each a scale for every group's value. calls: the feeds. told: called
    with the runs of the model that are done, and all of them.
    """
    model = read_blocked(source)
    raise_opset(model, OPSET, component)
    _probe(model, form, groups)
    engine = start(model, source.parent, component, fast=False)
    found = np.zeros((len(candidates), len(groups)))
    for k, feeds in enumerate(calls):
        for i, candidate in enumerate(candidates):
            scales = np.asarray([candidate[group.value] for group in groups], np.float32)
            made = engine({**feeds, _SCALES: scales})
            for j, group in enumerate(groups):
                parts = [(float(made[x.name + _NOISE]), float(made[x.name + _SIGNAL])) for x in group.layers]
                lost = float(np.mean([noise / signal if signal > 0 else 0.0 for noise, signal in parts]))
                found[i, j] = max(found[i, j], lost)
            told(k * len(candidates) + i + 1, len(candidates) * len(calls))
    return found


def _probe(model: Any, form: Format, groups: Sequence[Group]) -> None:
    """Let a model give the power of each layer's output and of its error, and nothing else."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph, rounding = model.graph, Rounding(model, form)
    nodes = {key(node): node for node in graph}
    number = onnx_ir.DataType.FLOAT
    scales = onnx_ir.val(_SCALES, number, [len(groups)])
    graph.inputs.append(scales)
    outputs = []
    for i, group in enumerate(groups):
        place = onnx_ir.val(f"scale:{i}", const_value=onnx_ir.tensor(np.asarray(i, np.int64), name=f"scale:{i}"))
        graph.register_initializer(place)
        first = nodes[group.layers[0].name]
        value = first.inputs[0]
        scale = onnx_ir.val(f"{group.value}:scale", number, [])
        before, rounded = rounding.nodes(value, scale)
        graph.insert_before(first, [onnx_ir.node("Gather", [scales, place], {"axis": 0}, outputs=[scale]), *before])
        for layer in group.layers:
            node = nodes[layer.name]
            exact = node.outputs[0]
            tape = onnx_ir.tape.Tape()
            again = onnx_ir.val(f"{layer.name}:again", exact.dtype, exact.shape)
            inputs, given = [rounded, *node.inputs[1:]], list(node.attributes.values())
            copy = onnx_ir.Node(node.domain, node.op_type, inputs, given, outputs=[again])
            for seen, suffix in ((exact, _SIGNAL), (tape.op("Sub", [again, exact]), _NOISE)):
                output = onnx_ir.val(layer.name + suffix, number, [])
                outputs.append(tape.op("ReduceSumSquare", [seen], {"keepdims": 0}, output=output))
            graph.insert_after(node, [copy, *tape.nodes])
    graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
