"""A denoiser that takes the factors of LoRAs as inputs: its graph with a product of two factors beside each weight.

Two inputs hold the factors of all layers, one after another along the second axis: `lora_down`, (sets, …, rank), a row
for each number that a layer reads, and `lora_up`, (sets, …, rank), a row for each that it gives. There is one set for
all rows of a call, or one for each. In a layer y = W x becomes y = W x + up (downᵀ x); in a convolution of k × k the
first product is made for every offset in the kernel, and a grouped convolution with ones and zeros adds up what lies
k × k about a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.arrays import Array
from .graph import add_sizes, attribute, rank, weight_of

DOWN, UP, SETS, RANK = "lora_down", "lora_up", "lora_sets", "lora_rank"
"""The inputs, and the names of their first and last axis."""
_LAYERS = ("MatMul", "Gemm", "Conv")
_GEOMETRY = ("strides", "pads", "dilations")


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight of the checkpoint that is changed by factors: its name, and how many numbers it reads and gives."""

    weight: str
    reads: int
    gives: int


def add_lora(model: Any, weight_named: Callable[[str], str | None], wanted: Callable[[str], bool]) -> list[Layer]:
    """Give `model` the two inputs, in place. Returns the layers that take factors, in the order of their rows.

    weight_named: the weight of the checkpoint that an initializer is, None for one that is none. wanted: of those, the
    ones that are to take factors.
    """
    import onnx_ir

    graph = model.graph
    found = []
    for node in graph:
        stored = weight_of(node.inputs[1]) if node.op_type in _LAYERS else None
        weight = None if stored is None else weight_named(str(stored.name))
        if stored is not None and weight is not None and wanted(weight) and attribute(node, "group", 1) == 1:
            found.append((node, weight, [int(size) for size in stored.shape]))
    layers = [_layer(node, weight, shape) for node, weight, shape in found]
    if not layers:
        return []
    kinds = sorted({node.outputs[0].dtype for node, _, _ in found})
    pieces: dict[tuple[str, Any], Sequence[Any]] = {}
    for name, sizes in ((DOWN, [layer.reads for layer in layers]), (UP, [layer.gives for layer in layers])):
        given = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            shape=onnx_ir.Shape([SETS, sum(sizes), RANK]),
        )
        graph.inputs.append(given)
        for kind in kinds:
            pieces[name, kind] = _split(graph, given, kind, sizes)
    for i, (node, _, shape) in enumerate(found):
        kind = node.outputs[0].dtype
        _add(graph, node, shape, pieces[DOWN, kind][i], pieces[UP, kind][i])
    return layers


def _layer(node: Any, weight: str, shape: Sequence[int]) -> Layer:
    if node.op_type == "Conv":
        return Layer(weight, int(np.prod(shape[1:])), shape[0])
    gives, reads = shape if node.op_type == "Gemm" and attribute(node, "transB", 0) else shape[::-1]
    return Layer(weight, reads, gives)


def _split(graph: Any, given: Any, kind: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """The factors of each layer, (sets, size, rank), in the type that it computes in."""
    import onnx_ir

    before = _Before(graph, graph[0], f"{given.name}:{kind.name}", kind)
    if kind != given.dtype:
        given = before.op("Cast", [given], given.shape, to=int(kind))
    node = onnx_ir.node(
        "Split",
        [given, add_sizes(graph, *sizes)],
        {"axis": 1},
        num_outputs=len(sizes),
        name=f"{given.name}:split",
    )
    for i, (value, size) in enumerate(zip(node.outputs, sizes, strict=True)):
        value.name, value.type = f"{before.name}:{i}", onnx_ir.TensorType(kind)
        value.shape = onnx_ir.Shape([SETS, size, RANK])
    graph.insert_before(before.node, node)
    return list(node.outputs)


def _add(graph: Any, node: Any, shape: Sequence[int], down: Any, up: Any) -> None:
    """Let all that reads what `node` gives read its sum with the product of the factors."""
    made, read = node.outputs[0], node.inputs[0]
    readers, last = list(made.uses()), made.is_graph_output()
    after = _After(graph, node, f"{made.name}:lora", made.dtype)
    if node.op_type == "Conv":
        added = _convolved(after, node, shape, read, down, up)
    else:
        turned = after.op("Transpose", [up], [SETS, RANK, up.shape[1]], perm=[0, 2, 1])
        flat = rank(read) == 2
        if flat:
            read = after.op("Unsqueeze", [read, add_sizes(graph, 1)], [read.shape[0], 1, read.shape[1]])
        less = after.op("MatMul", [read, down], [*list(read.shape)[:-1], RANK])
        added = after.op("MatMul", [less, turned], [*list(read.shape)[:-1], up.shape[1]])
        if flat:
            added = after.op("Squeeze", [added, add_sizes(graph, 1)], made.shape)
    total = after.op("Add", [made, added], made.shape)
    for reader, place in readers:
        reader.replace_input_with(place, total)
    if last:
        graph.outputs[graph.outputs.index(made)] = total
        total.name, made.name = made.name, f"{made.name}:bare"


def _convolved(after: _After, node: Any, shape: Sequence[int], read: Any, down: Any, up: Any) -> Any:
    graph, made = after.graph, node.outputs[0]
    gives, reads, *kernel = shape
    count, rows = int(np.prod(kernel)), read.shape[0]
    strided = any(step != 1 for step in attribute(node, "strides", [1]))
    flat = after.op("Reshape", [read, add_sizes(graph, 0, reads, -1)], [rows, reads, f"{read.name}:pixels"])
    if count == 1 and not strided:
        turned = after.op("Transpose", [down], [SETS, RANK, reads], perm=[0, 2, 1])
        less = after.op("MatMul", [turned, flat], [rows, RANK, flat.shape[2]])
    else:
        both = f"{RANK}:{count}"
        apart = after.op("Reshape", [down, add_sizes(graph, 0, reads, count, -1)], [SETS, reads, count, RANK])
        moved = after.op("Transpose", [apart], [SETS, RANK, count, reads], perm=[0, 3, 2, 1])
        turned = after.op("Reshape", [moved, add_sizes(graph, 0, -1, reads)], [SETS, both, reads])
        every = after.op("MatMul", [turned, flat], [rows, both, flat.shape[2]])
        sides = after.op("Shape", [read], [2], int64=True, start=2, end=4)
        whole = after.op("Concat", [add_sizes(graph, -1, count), sides], [4], int64=True, axis=0)
        each = f"{rows}:{RANK}"
        offsets = after.op("Reshape", [every, whole], [each, count, *list(read.shape)[2:]])
        picks = _picks(graph, kernel, made.dtype)
        how: dict[str, Any] = {name: list(attribute(node, name)) for name in _GEOMETRY if name in node.attributes}
        summed = after.op("Conv", [offsets, picks], [each, 1, *list(made.shape)[2:]], **how)
        first = after.op("Shape", [made], [1], int64=True, start=0, end=1)
        second = after.op("Shape", [up], [1], int64=True, start=2, end=3)
        whole = after.op("Concat", [first, second, add_sizes(graph, -1)], [3], int64=True, axis=0)
        less = after.op("Reshape", [summed, whole], [rows, RANK, f"{made.name}:pixels"])
    added = after.op("MatMul", [up, less], [rows, gives, less.shape[2]])
    sizes = after.op("Shape", [made], [4], int64=True)
    return after.op("Reshape", [added, sizes], made.shape)


def _picks(graph: Any, kernel: Sequence[int], kind: Any) -> Any:
    """The weight of a convolution that takes, of the channel of each offset, the pixel at that offset, and adds up."""
    import onnx_ir

    name = f"lora:picks:{'x'.join(map(str, kernel))}:{kind.name}"
    if name not in graph.initializers:
        count = int(np.prod(kernel))
        ones: Array = np.eye(count, dtype=np.float32).reshape(1, count, *kernel)
        tensor = onnx_ir.tensor(ones.astype(kind.numpy()), dtype=kind, name=name)
        graph.register_initializer(onnx_ir.val(name, const_value=tensor))
    return graph.initializers[name]


class _Before:
    """Puts new nodes before `node`. kind: the type of what they make."""

    def __init__(self, graph: Any, node: Any, name: str, kind: Any) -> None:
        self.graph, self.node, self.name, self._kind, self._count = graph, node, name, kind, 0

    def op(self, what: str, inputs: Sequence[Any], shape: Any, int64: bool = False, **attributes: Any) -> Any:
        """The value of this shape that an operator makes."""
        import onnx_ir

        self._count += 1
        name = f"{self.name}:{self._count}:{what}"
        made = onnx_ir.node(what, inputs, attributes, name=name)
        self.put(made)
        [value] = made.outputs
        value.name, value.type = name, onnx_ir.TensorType(onnx_ir.DataType.INT64 if int64 else self._kind)
        value.shape = onnx_ir.Shape(list(shape))
        return value

    def put(self, made: Any) -> None:
        """Place a node."""
        self.graph.insert_before(self.node, made)


class _After(_Before):
    """Puts new nodes after `node`, in order."""

    def put(self, made: Any) -> None:
        """Place a node."""
        self.graph.insert_after(self.node, made)
        self.node = made


def unsuffixed(name: str) -> str:
    """The name of an initializer without what a lower precision puts behind it."""
    stem, _, last = name.rpartition(":")
    return stem if last in ("fp16", "bf16", "float") else name


def names_of(sources: Mapping[str, Sequence[str]]) -> Callable[[str], str | None]:
    """What `add_lora` asks for. sources: the weights that each initializer of the fp32 model is."""

    def named(initializer: str) -> str | None:
        weights = sources.get(unsuffixed(initializer), ())
        return weights[0] if len(weights) == 1 else None

    return named
