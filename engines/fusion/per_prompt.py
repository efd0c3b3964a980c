"""What the prompt alone decides, cut off into a graph of its own that is run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .graph import FLOATS, dtype_of


def split(model: Any, per_prompt: Sequence[str]) -> Any:
    """Cut off what depends on the inputs `per_prompt` alone, as a model of its own; None when that is nothing.

    per_prompt: inputs that stay the same from step to step. What is made of them becomes inputs of `model`, but for
    sizes, which both compute: they belong to the processor. Both share the external weights.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    inputs = [value for value in graph.inputs if value.name in per_prompt]
    alone, constants, rest = set(inputs), set(graph.initializers.values()), []
    for node in graph:
        read = set(node.inputs) - {None}
        if read and read <= constants:  # the cast of a weight
            constants.update(node.outputs)
        if read & alone and all(value in alone or value in constants for value in read):
            alone.update(node.outputs)
        else:
            rest.append(node)
    used = {value for node in rest for value in node.inputs if value in alone and value not in inputs}
    crossing = {value.name: value for value in used if dtype_of(value) in FLOATS}
    if not crossing or any(value.shape is None for value in crossing.values()):
        return None
    part = onnx_ir.Model(
        onnx_ir.convenience.extract(graph, inputs, sorted(crossing)),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )
    weights = sorted(part.graph.initializers.items())  # they come in another order each time
    part.graph.initializers.clear()
    for _, weight in weights:
        part.graph.register_initializer(weight)
    for name, value in sorted(crossing.items()):
        given = onnx_ir.Value(name=name, type=value.type, shape=value.shape)
        onnx_ir.convenience.replace_all_uses_with(value, given)
        graph.inputs.append(given)
    RemoveUnusedNodesPass()(model)
    for each in (graph, part.graph):
        each.inputs[:] = [value for value in each.inputs if value.uses()]
    return part
