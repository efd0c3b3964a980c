"""A denoiser that takes the factors of LoRAs as inputs: its graph with a product of two factors beside each weight.

Two inputs hold the factors of all layers, one after another along the second axis: `lora_down`, (sets, …, rank), a row
for each number that a layer reads, and `lora_up`, (sets, …, rank), a row for each that it gives. There is one set for
all rows of a call, or one for each. In a layer y = W x becomes y = W x + up (downᵀ x); in a convolution of k × k the
first product is made for every offset in the kernel, and a grouped convolution with ones and zeros adds up what lies
k × k about a pixel.

Layers are in groups, and the rows of a group lie together. Where a graph is to spare what does nothing, the factors of
a group that are all zero are cut to rank 1 before they are used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import numpy as np

from ...common.arrays import Array
from .graph import add_sizes, attribute, rank, weight_of

DOWN, UP, SETS, RANK = "lora_down", "lora_up", "lora_sets", "lora_rank"
"""The inputs, and the names of their first and last axis."""
_LAYERS = ("MatMul", "Gemm", "Conv")
_INT64, _BOOL = "INT64", "BOOL"
_GEOMETRY = ("strides", "pads", "dilations")


LAYERS = {
    "attention": re.compile(r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\.weight$"),
    "transformer": re.compile(
        r"(^|\.)(transformer_blocks|attentions|single_transformer_blocks|layers|noise_refiner|context_refiner)\."
    ),
    "all": re.compile(""),
}
"""Which weights take factors, by name: those of attentions; all in transformer blocks and before and after them, which
is what most trainers train; every matrix and convolution."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight of the checkpoint that is changed by factors: its name, and how many numbers it reads and gives."""

    weight: str
    reads: int
    gives: int


def group_of(weight: str) -> int:
    """The first of `LAYERS` that a weight is among: most LoRAs change the first, or the first two."""
    return next(i for i, layers in enumerate(LAYERS.values()) if layers.search(weight))


def add_lora(
    model: Any,
    weight_named: Callable[[str], str | None],
    group_of: Callable[[str], int | None],
    *,
    spares: bool = False,
) -> list[Layer]:
    """Give `model` the two inputs, in place. Returns the layers that take factors, in the order of their rows.

    weight_named: the weight of the checkpoint that an initializer is, None for one that is none. group_of: of those,
    the group of one that is to take factors, None for another. spares: whether a group whose factors are all zero
    takes less time; sizes within the graph then depend on what its inputs hold, which TensorRT does not take.
    """
    graph = model.graph
    found = []
    for node in graph:
        stored = weight_of(node.inputs[1]) if node.op_type in _LAYERS else None
        weight = None if stored is None else weight_named(str(stored.name))
        group = None if weight is None else group_of(weight)
        if stored is not None and weight is not None and group is not None and attribute(node, "group", 1) == 1:
            found.append((group, node, weight, [int(size) for size in stored.shape]))
    found.sort(key=lambda each: each[0])
    layers = [_layer(node, weight, shape) for _, node, weight, shape in found]
    if not layers:
        return []
    kinds = sorted({node.outputs[0].dtype for _, node, *_ in found})
    sizes = {DOWN: [layer.reads for layer in layers], UP: [layer.gives for layer in layers]}
    first, groups = graph[0], Counter(group for group, *_ in found)
    parts = {name: [_input(graph, name, sum(own))] for name, own in sizes.items()}
    counts = [len(layers)]
    if spares and len(groups) > 1:
        counts = [groups[group] for group in sorted(groups)]
        parts = _spared(graph, first, parts, sizes, counts)
    pieces = {}
    for name, kind in product(sizes, kinds):
        of_parts = zip(parts[name], _runs(sizes[name], counts), strict=True)
        pieces[name, kind] = [each for part, own in of_parts for each in _split(graph, first, part, kind, own)]
    for i, (_, node, _, shape) in enumerate(found):
        kind = node.outputs[0].dtype
        _add(graph, node, shape, pieces[DOWN, kind][i], pieces[UP, kind][i])
    return layers


def _layer(node: Any, weight: str, shape: Sequence[int]) -> Layer:
    if node.op_type == "Conv":
        return Layer(weight, int(np.prod(shape[1:])), shape[0])
    gives, reads = shape if node.op_type == "Gemm" and attribute(node, "transB", 0) else shape[::-1]
    return Layer(weight, reads, gives)


def _input(graph: Any, name: str, size: int) -> Any:
    import onnx_ir

    given = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        shape=onnx_ir.Shape([SETS, size, RANK]),
    )
    graph.inputs.append(given)
    return given


def _spared(
    graph: Any, first: Any, given: dict[str, list[Any]], sizes: dict[str, list[int]], counts: Sequence[int]
) -> dict[str, list[Any]]:
    """Both inputs by groups, those of a group cut to rank 1 where they add nothing. counts: layers of each group."""
    parts = {
        name: _divide(graph, first, value, list(map(sum, _runs(sizes[name], counts))))
        for name, [value] in given.items()
    }
    for i in range(len(counts)):
        up = parts[UP][i]
        before = _Before(graph, first, f"{up.name}:spared", up.dtype)
        largest = before.op("ReduceMax", [before.op("Abs", [up], up.shape)], [], keepdims=0)
        zero = before.op("Cast", [add_sizes(graph, 0)], [1], to=int(up.dtype))
        acts = before.op("Greater", [largest, zero], [1], kind=_BOOL)
        length = before.op("Shape", [up], [1], kind=_INT64, start=2, end=3)
        end = before.op("Where", [acts, length, add_sizes(graph, 1)], [1], kind=_INT64)
        for own in parts.values():
            inputs = [own[i], add_sizes(graph, 0), end, add_sizes(graph, 2)]
            own[i] = before.op("Slice", inputs, [*list(up.shape)[:1], own[i].shape[1], f"{RANK}:{i}"])
    return parts


def _runs(sizes: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """`sizes` in runs of so many."""
    ends = list(accumulate(counts))
    return [list(sizes[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def _split(graph: Any, first: Any, given: Any, kind: Any, sizes: Sequence[int]) -> list[Any]:
    """The factors of each layer, (sets, size, rank), in the type that it computes in, made before the node `first`."""
    if kind != given.dtype:
        given = _Before(graph, first, f"{given.name}:{kind.name}", kind).op("Cast", [given], given.shape, to=int(kind))
    return _divide(graph, first, given, sizes)


def _divide(graph: Any, first: Any, given: Any, sizes: Sequence[int]) -> list[Any]:
    import onnx_ir

    name = f"{given.name}:split"
    node = onnx_ir.node("Split", [given, add_sizes(graph, *sizes)], {"axis": 1}, num_outputs=len(sizes), name=name)
    for i, (value, size) in enumerate(zip(node.outputs, sizes, strict=True)):
        value.name, value.type = f"{name}:{i}", onnx_ir.TensorType(given.dtype)
        value.shape = onnx_ir.Shape([SETS, size, given.shape[2]])
    graph.insert_before(first, node)
    return list(node.outputs)


def _add(graph: Any, node: Any, shape: Sequence[int], down: Any, up: Any) -> None:
    """Let all that reads what `node` gives read its sum with the product of the factors."""
    made, read = node.outputs[0], node.inputs[0]
    readers, last = list(made.uses()), made.is_graph_output()
    after = _After(graph, node, f"{made.name}:lora", made.dtype)
    if node.op_type == "Conv":
        added = _convolved(after, node, shape, read, down, up)
    else:
        turned = after.op("Transpose", [up], [SETS, up.shape[2], up.shape[1]], perm=[0, 2, 1])
        flat = rank(read) == 2
        if flat:
            read = after.op("Unsqueeze", [read, add_sizes(graph, 1)], [read.shape[0], 1, read.shape[1]])
        less = after.op("MatMul", [read, down], [*list(read.shape)[:-1], down.shape[2]])
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
    count, rows, ranks = int(np.prod(kernel)), read.shape[0], down.shape[2]
    strided = any(step != 1 for step in attribute(node, "strides", [1]))
    flat = after.op("Reshape", [read, add_sizes(graph, 0, reads, -1)], [rows, reads, f"{read.name}:pixels"])
    if count == 1 and not strided:
        turned = after.op("Transpose", [down], [SETS, ranks, reads], perm=[0, 2, 1])
        less = after.op("MatMul", [turned, flat], [rows, ranks, flat.shape[2]])
    else:
        both = f"{ranks}x{count}"
        apart = after.op("Reshape", [down, add_sizes(graph, 0, reads, count, -1)], [SETS, reads, count, ranks])
        moved = after.op("Transpose", [apart], [SETS, ranks, count, reads], perm=[0, 3, 2, 1])
        turned = after.op("Reshape", [moved, add_sizes(graph, 0, -1, reads)], [SETS, both, reads])
        every = after.op("MatMul", [turned, flat], [rows, both, flat.shape[2]])
        sides = after.op("Shape", [read], [2], kind=_INT64, start=2, end=4)
        whole = after.op("Concat", [add_sizes(graph, -1, count), sides], [4], kind=_INT64, axis=0)
        each = f"{rows}:{ranks}"
        offsets = after.op("Reshape", [every, whole], [each, count, *list(read.shape)[2:]])
        picks = _picks(graph, kernel, made.dtype)
        how: dict[str, Any] = {name: list(attribute(node, name)) for name in _GEOMETRY if name in node.attributes}
        summed = after.op("Conv", [offsets, picks], [each, 1, *list(made.shape)[2:]], **how)
        first = after.op("Shape", [made], [1], kind=_INT64, start=0, end=1)
        second = after.op("Shape", [up], [1], kind=_INT64, start=2, end=3)
        whole = after.op("Concat", [first, second, add_sizes(graph, -1)], [3], kind=_INT64, axis=0)
        less = after.op("Reshape", [summed, whole], [rows, ranks, f"{made.name}:pixels"])
    added = after.op("MatMul", [up, less], [rows, gives, less.shape[2]])
    sizes = after.op("Shape", [made], [4], kind=_INT64)
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

    def op(self, what: str, inputs: Sequence[Any], shape: Any, kind: str = "", **attributes: Any) -> Any:
        """The value of this shape that an operator makes. kind: its type where it is another one."""
        import onnx_ir

        self._count += 1
        name = f"{self.name}:{self._count}:{what}"
        made = onnx_ir.node(what, inputs, attributes, name=name)
        self.put(made)
        [value] = made.outputs
        value.name, value.type = name, onnx_ir.TensorType(onnx_ir.DataType[kind] if kind else self._kind)
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
