"""A model with QuantizeLinear and DequantizeLinear around what is in eight bits, in the places where engines fuse them.

A value is rounded once for all the layers that read it; a weight is stored in eight bits, with a scale for each output
channel, behind a DequantizeLinear alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...engines.fusion.graph import map_tensor, save, weight_of
from ..graph import key, raise_opset, read
from .attention import nodes_of
from .formats import Format, Scale
from .layers import Group, Layer, along, bias_of, groups_of, scales_of

OPSET = 19
"""The first in which QuantizeLinear makes floats of eight bits."""


def write(
    source: Path,
    component: str,
    form: Format,
    scales: Mapping[str, Scale],
    low: Collection[str],
    name: str,
    shifts: Mapping[str, Array] | None = None,
) -> list[Path]:
    """Write the model `source` as `name` beside it, with the groups and attentions of the values `low` in eight bits.

    scales: of each value, and of what attentions read. shifts: what is added to each channel that a layer makes, by its
    name. The same input gives the same bytes. Returns the files of the model, see `graph.save`.
    """
    model = read(source)
    raise_opset(model, OPSET, component)
    rounding = Rounding(model, form)
    nodes = {key(node): node for node in model.graph}
    for group in groups_of(model):
        if group.value in low:
            found = scales[group.value]
            rounded = rounding.value(group, found)
            for layer in group.layers:
                node = nodes[layer.name]
                node.replace_input_with(0, rounded)
                node.replace_input_with(1, rounding.weight(layer, node, found.factors))
                if shifts and layer.name in shifts:
                    rounding.shift(layer, node, shifts[layer.name])
    for value, attention in nodes_of(model).items():
        if value in low:
            for node in (attention.scores, attention.product):
                rounding.inputs(node, scales)
    drop_unused(model)
    return save(model, source.parent, name)


class Rounding:
    """Makes the nodes that round values and weights of one model."""

    def __init__(self, model: Any, form: Format) -> None:
        import onnx_ir

        self._graph, self._form = model.graph, form
        self._type = onnx_ir.DataType[form.dtype]
        self._weights: dict[tuple[str, int, bytes | None], Any] = {}
        self._values = {str(value.name): value for value in model.graph.inputs}
        self._values |= {str(made.name): made for node in model.graph for made in node.outputs}

    def value(self, group: Group, scale: Scale) -> Any:
        """The group's value after rounding; its nodes follow the node that makes it."""
        value = self._values[group.value]
        nodes, made = self.nodes(value, scale.scale, scale.factors)
        if value.producer() is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(value.producer(), nodes)
        return made

    def inputs(self, node: Any, scales: Mapping[str, Scale]) -> None:
        """Let a product of two values read what they are after rounding."""
        for place, value in enumerate(list(node.inputs)):
            nodes, made = self.nodes(value, scales[str(value.name)].scale)
            self._graph.insert_before(node, nodes)
            node.replace_input_with(place, made)

    def nodes(self, value: Any, scale: Any, factors: Array | None = None) -> tuple[list[Any], Any]:
        """The nodes that round a value with a scale, a number or a value, in no graph yet, and what they make.

        factors: of its last axis, multiplied with it first.
        """
        import onnx_ir

        first = []
        if factors is not None:
            by = self._constant(f"{value.name}:factors", factors)
            smooth = onnx_ir.val(f"{value.name}:smooth", value.dtype, value.shape)
            first = [onnx_ir.node("Mul", [value, by], outputs=[smooth])]
            value = smooth
        with_scale = scale
        if not isinstance(scale, onnx_ir.Value):
            with_scale = self._constant(f"{value.name}:scale", np.asarray(scale, np.float32))
        zero = self._constant(f"{value.name}:zero", np.zeros((), self._form.numpy))
        stored = onnx_ir.val(f"{value.name}:{self._form.name}", self._type, value.shape)
        quantize = onnx_ir.node("QuantizeLinear", [value, with_scale, zero], outputs=[stored])
        made = onnx_ir.val(f"{value.name}:rounded", value.dtype, value.shape)
        widen = onnx_ir.node("DequantizeLinear", [stored, with_scale, zero], outputs=[made])
        return [*first, quantize, widen], made

    def weight(self, layer: Layer, reader: Any, factors: Array | None = None) -> Any:
        """The weight of a layer over `factors`, from eight bits; its node stands before `reader`."""
        import onnx_ir

        key = layer.weight, layer.axis, None if factors is None else factors.tobytes()
        found = self._weights.get(key)
        if found is not None:
            return found
        node, made = self.weight_node(layer, weight_of(reader.inputs[1]), factors)
        self._graph.insert_before(self._graph[0], [node])
        assert isinstance(made, onnx_ir.Value)
        self._weights[key] = made
        return made

    def weight_node(self, layer: Layer, weight: Any, factors: Array | None = None) -> tuple[Any, Any]:
        """The node that takes a weight over `factors` from eight bits, in no graph yet, and what it makes."""
        import onnx_ir

        name, largest = f"{layer.weight}:{layer.axis}", self._form.largest
        if factors is not None:
            name = f"{name}:{layer.name}"
        scales = map_tensor(
            weight.const_value, lambda array: scales_of(over(wide(array), factors, layer.axis), layer.axis, largest)
        )
        stored = self._stored(f"{name}:{self._form.name}", weight, layer, scales, factors)
        with_scale = self._constant(f"{name}:scale", scales)
        zero = self._constant(f"{name}:zero", np.zeros(len(scales), self._form.numpy))
        made = onnx_ir.val(f"{name}:float", onnx_ir.DataType.FLOAT, layer.shape)
        node = onnx_ir.node("DequantizeLinear", [stored, with_scale, zero], {"axis": layer.axis}, outputs=[made])
        return node, made

    def shift(self, layer: Layer, node: Any, by: Array) -> None:
        """Add `by` to the bias of a layer, the one that `layers.bias_of` finds."""
        import onnx_ir

        found = bias_of(node)
        assert found is not None  # `shifts` are of those that have one
        reader, place = found
        old = weight_of(reader.inputs[place]) if place < len(reader.inputs) else None
        array = by if old is None else map_tensor(old.const_value, lambda array: wide(array) + by)
        name = f"{layer.name}:bias"
        made = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(array, np.float32), name=name))
        self._graph.register_initializer(made)
        if place < len(reader.inputs):
            reader.replace_input_with(place, made)
        else:
            reader.resize_inputs(place + 1)
            reader.replace_input_with(place, made)

    def _stored(self, name: str, weight: Any, layer: Layer, scales: Array, factors: Array | None) -> Any:
        """The weight in eight bits, made when it is written, so that one at a time is in memory."""
        import onnx_ir

        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor, form = weight.const_value, self._form

        def make() -> Any:
            step = along(scales, layer.axis, len(layer.shape))
            array = map_tensor(tensor, lambda array: form.stored(over(wide(array), factors, layer.axis), step))
            return onnx_ir.tensor(array, dtype=self._type, name=name)

        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(layer.shape), type=onnx_ir.TensorType(self._type))
        value.const_value = onnx_ir.LazyTensor(make, dtype=self._type, shape=value.shape, name=name)
        self._graph.register_initializer(value)
        return value

    def _constant(self, name: str, array: Array) -> Any:
        import onnx_ir

        if name in self._graph.initializers:
            return self._graph.initializers[name]
        kind = self._type if array.dtype == np.dtype(self._form.numpy) else onnx_ir.DataType.FLOAT
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, dtype=kind, name=name))
        self._graph.register_initializer(value)
        return value


def drop_unused(model: Any) -> None:
    """Leave out weights, and casts of weights, that nobody reads any more."""
    graph = model.graph
    for node in list(graph):
        if weight_of(node.outputs[0]) is not None and not node.outputs[0].uses():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def over(weight: Array, factors: Array | None, axis: int) -> Array:
    """A matrix over the factors of what it is multiplied with. axis: of the output channels."""
    return weight if factors is None else np.asarray(weight / along(factors, 1 - axis, 2), np.float32)


def copied(array: Array) -> Array:
    """A copy in float32, which outlives the file that `array` is mapped from."""
    return np.array(array, np.float32)


def wide(array: Array) -> Array:
    """In float32."""
    return array.astype(np.float32, copy=False)
