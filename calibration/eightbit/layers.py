"""The layers of a model that have a form in eight bits: convolutions and products with a constant weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...engines.fusion.graph import weight_of
from ..graph import is_float, key


@dataclass(frozen=True, slots=True)
class Layer:
    """A Conv, Gemm or MatMul. name: see `graph.key`. weight: its initializer. axis: of the output channels in it."""

    name: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    axis: int

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.shape[self.axis]

    def flops(self, elements: int) -> int:
        """Two for each product, when the output has so many elements."""
        return 2 * elements * prod(self.shape) // self.channels


@dataclass(frozen=True, slots=True)
class Group:
    """The layers that read one value. They share its scale, and are in eight bits together."""

    value: str
    layers: tuple[Layer, ...]

    @property
    def kinds(self) -> dict[str, str]:
        """The operators of its layers by their names."""
        return {layer.name: layer.kind for layer in self.layers}

    @property
    def is_linear(self) -> bool:
        """Whether its layers are products with matrices."""
        return all(layer.kind != "Conv" for layer in self.layers)

    def channel_axis(self, value: Any) -> int:
        """The axis of its `onnx_ir` value that layers add up over."""
        return len(value.shape) - 1 if self.is_linear else 1


def groups_of(model: Any) -> list[Group]:
    """The groups of an `onnx_ir` model that `graph.read` gave, in the order of its nodes."""
    found: dict[str, list[Layer]] = {}
    for node in model.graph:
        layer = _layer(node)
        if layer is not None:
            found.setdefault(str(node.inputs[0].name), []).append(layer)
    return [Group(value, tuple(layers)) for value, layers in found.items()]


def scales_of(array: Array, axis: int, largest: float) -> Array:
    """The scale of each output channel of a weight, float32 (channels,): its largest magnitude over `largest`."""
    others = tuple(i for i in range(array.ndim) if i != axis)
    amax = np.abs(array).max(axis=others).astype(np.float32)
    return np.asarray(np.where(amax > 0, amax, 1) / np.float32(largest), np.float32)


def bias_of(node: Any) -> tuple[Any, int] | None:
    """The node that adds a constant to each channel of what a layer's `node` makes, and the place of its input.

    That is the node itself, where it has or could have a bias, or the Add that alone reads it; None where none is.
    """
    if node.op_type == "Conv":
        return node, 2
    if node.op_type == "Gemm":
        return (node, 2) if node.attributes.get_float("beta", 1.0) == 1.0 else None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    reader, place = uses[0]
    bias = weight_of(reader.inputs[1 - place])
    return (reader, 1 - place) if bias is not None and bias.shape is not None and len(bias.shape) == 1 else None


def along(scales: Array, axis: int, rank: int) -> Array:
    """`scales` in a shape that multiplies a weight of this rank along `axis`."""
    return scales.reshape([-1 if i == axis else 1 for i in range(rank)])


def _layer(node: Any) -> Layer | None:
    """The layer that a node is, None where it has no form in eight bits."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    read, weight = node.inputs[0], weight_of(node.inputs[1])
    known = read is not None and read.shape is not None and weight is not None and weight.shape is not None
    if not known or not is_float(read) or weight_of(read) is not None:
        return None
    shape: Sequence[Any] = tuple(weight.shape)
    if not all(isinstance(size, int) for size in shape):
        return None
    if node.op_type == "Conv":
        return Layer(key(node), "Conv", str(weight.name), tuple(shape), 0)
    if len(shape) != 2 or (node.op_type == "Gemm" and node.attributes.get_int("transA", 0)):
        return None
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
    return Layer(key(node), str(node.op_type), str(weight.name), tuple(shape), 0 if turned else 1)
