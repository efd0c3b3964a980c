"""The denoiser that takes residuals and tokens of pictures: its plain graph with additions, of the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import CheckpointError
from ...common.files import link_or_copy, read_json
from ...engines.fusion.graph import save
from ...families.control import slot
from .shared import in_plain, link_weights
from .trace import MODEL_NAME
from .weights import WEIGHTS_NAME


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of pictures that cross-attentions read. tokens, scale, masks: inputs of the graph.

    layers: for each of the cross-attentions called `names`, as the checkpoint calls them, the weights of keys and of
    values, float32 (C, width), and which of the masks is of its size.
    """

    tokens: Tensor
    scale: Tensor
    masks: Sequence[Tensor]
    names: Sequence[str]
    layers: Sequence[tuple[Array, Array, int]]


def write_controlled(
    plain: Path,
    folder: Path,
    residuals: Sequence[Tensor],
    tokens: Sequence[Tokens] = (),
    intrablocks: Sequence[tuple[int, Tensor]] = (),
    slots: tuple[int, int] = (1, 1),
) -> None:
    """Write the graph `plain` with further inputs into `folder`; its large weights are linked, not written again.

    residuals: one for each skip of a U-Net, in the order in which its way down makes them, and the last for its middle;
    each is added to what the way up reads (Zhang et al. 2023, section 3.2); () for none. tokens: each has an attention
    of its own beside that to the text (Ye et al. 2023, equation 5). intrablocks: each is added to the skip of this
    number where it is made, or to the middle (Mou et al. 2023, section 3.3). slots: how often there are residuals, and
    intrablocks, as inputs; see `families.control.slot`.
    Raises `CheckpointError` for a graph of another build.
    """
    import onnx_ir

    model = onnx_ir.load(plain)
    graph = model.graph
    joins = [node for node in graph if _joins_pictures(node)]
    *down, middle = residuals or (None,)
    if residuals and len(joins) != len(down):
        raise CheckpointError(
            f"the U-Net joins {len(joins)} values on its way up where its configuration tells {len(down)}: it is built "
            "in another way, and takes no ControlNet"
        )
    for k, (number, tensor) in itertools.product(range(slots[1]), intrablocks):
        made = joins[0].inputs[0] if number == len(joins) else joins[len(joins) - 1 - number].inputs[1]
        _add_where_made(graph, made, _give(graph, tensor, k))
    for k, tensor in itertools.product(range(slots[0]), residuals):
        _give(graph, tensor, k)
    if middle is not None:
        for k in range(slots[0]):
            for node, tensor in zip(joins, reversed(down), strict=True):
                _add(graph, node, 1, slot(tensor.name, k))
            _add(graph, joins[0], 0, slot(middle.name, k))
    if tokens:
        sources = read_json(plain.with_name(WEIGHTS_NAME), "the sources of its weights")
        for each in tokens:
            _read_tokens(graph, each, sources)
    link_weights(plain, folder)
    if plain.with_name(WEIGHTS_NAME).exists():
        link_or_copy(plain.with_name(WEIGHTS_NAME), folder / WEIGHTS_NAME)
    for value in graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            value.const_value = in_plain(value.const_value, folder)
    save(model, folder, MODEL_NAME)


def _read_tokens(graph: Any, given: Tokens, sources: Mapping[str, Any]) -> None:
    """Let each of the cross-attentions have an attention to the tokens of pictures added, times its scale.

    Each group of tokens has an attention of its own, as a row of a batch, and is read where its mask says.
    """
    tokens, scale, masks = _give(graph, given.tokens), _give(graph, given.scale), [_give(graph, m) for m in given.masks]
    named = {weight: name for name, each in sources.items() for weight in each["weights"]}
    readers = {node.inputs[1].name: node for node in graph if node.op_type == "MatMul" and node.inputs[1] is not None}
    flat = None
    for i, (name, (*weights, size)) in enumerate(zip(given.names, given.layers, strict=True)):
        query = readers.get(named.get(f"{name}.to_q.weight", ""))
        out = readers.get(named.get(f"{name}.to_out.0.weight", ""))
        split = [use.node for use in query.outputs[0].uses() if use.node.op_type == "Reshape"] if query else []
        if query is None or out is None or len(split) != 1:
            raise CheckpointError(f"the U-Net has no {name} to read an IP-Adapter: it is built in another way")
        keys, values = (
            _weight(graph, f"{given.tokens.name}.{name}.to_{kind}_ip", weight)
            for kind, weight in zip("kv", weights, strict=True)
        )
        before, attention = _Before(graph, out), out.inputs[0]
        heads = tuple(int(each) for each in split[0].outputs[0].shape[2:])
        rows = attention.shape[0]
        _, seen, width = tokens.shape[1:]
        picked = before.op("Gather", [scale, before.numbers(i)], [rows, 1], axis=1)
        own = before.op("Unsqueeze", [picked, before.numbers(2, 3)], [rows, 1, 1, 1])
        where = before.op("Mul", [masks[size], own], masks[size].shape)
        if flat is None:
            flat = before.flat(tokens, (given.tokens.name, seen, width))
        found = before.attention(before.repeated(query.outputs[0], where), flat, keys, values, heads)
        scaled = before.op("Mul", [found, before.column(where, found.shape)], found.shape)
        total = before.summed(scaled, where, attention.shape)
        out.replace_input_with(0, before.op("Add", [attention, total], attention.shape))


@dataclass(frozen=True, slots=True)
class _Before:
    """Puts new nodes before `node`."""

    graph: Any
    node: Any

    def op(self, kind: str, inputs: Sequence[Any], shape: Sequence[Any], int64: bool = False, **attributes: Any) -> Any:
        """The value of this shape that an operator makes, of floats where it is not of whole numbers."""
        import onnx_ir

        made = onnx_ir.node(kind, inputs, attributes)
        self.graph.insert_before(self.node, made)
        [value] = made.outputs
        kind_of = onnx_ir.DataType.INT64 if int64 else onnx_ir.DataType.FLOAT
        value.name, value.type = f"{self.node.name}:{made.name}", onnx_ir.TensorType(kind_of)
        value.shape = onnx_ir.Shape(list(shape))
        return value

    def flat(self, value: Any, shape: Sequence[Any]) -> Any:
        """`value`, (B, G, N, C), as (B·G, N, C), which are called `shape`."""
        rows, _, channels = shape
        whole = self.op("Flatten", [value], [rows, f"{rows}:whole"], axis=2)
        return self.op("Reshape", [whole, self.numbers(0, -1, channels)], shape)

    def repeated(self, query: Any, where: Any) -> Any:
        """`query`, (B, N, C), once for each group of `where`, (B, G, H, W): (B·G, N, C)."""
        rows, pixels, channels = query.shape
        groups = self.op("Shape", [where], [1], int64=True, start=1, end=2)
        sizes = [self.numbers(1), groups, self.numbers(1, 1)]
        shape = self.op("Concat", sizes, [4], int64=True, axis=0)
        apart = self.op("Unsqueeze", [query, self.numbers(1)], [rows, 1, pixels, channels])
        every = self.op("Expand", [apart, shape], [rows, where.shape[1], pixels, channels])
        return self.flat(every, (f"{where.shape[1]}_of_rows", pixels, channels))

    def column(self, where: Any, shape: Sequence[Any]) -> Any:
        """`where`, (B, G, H, W), as (B·G, H·W, 1)."""
        rows, pixels, _ = shape
        flat = self.op("Flatten", [where], [rows, pixels], axis=2)
        return self.op("Unsqueeze", [flat, self.numbers(2)], [rows, pixels, 1])

    def summed(self, value: Any, where: Any, shape: Sequence[Any]) -> Any:
        """`value`, (B·G, N, C), summed over the groups of `where`, (B, G, H, W): (B, N, C), called `shape`."""
        rows, pixels, channels = shape
        sizes = [self.op("Shape", [where], [2], int64=True, start=0, end=2), self.numbers(-1)]
        whole = self.op("Concat", sizes, [3], int64=True, axis=0)
        apart = self.op("Reshape", [value, whole], [rows, where.shape[1], f"{pixels}:whole"])
        total = self.op("ReduceSum", [apart, self.numbers(1)], [rows, f"{pixels}:whole"], keepdims=0)
        return self.op("Reshape", [total, self.numbers(0, -1, channels)], shape)

    def numbers(self, *numbers: int) -> Any:
        """Whole numbers, one initializer for all uses."""
        return _weight(self.graph, f"ip:{','.join(map(str, numbers))}", np.array(numbers, np.int64))

    def attention(self, query: Any, tokens: Any, keys: Any, values: Any, heads: tuple[int, ...]) -> Any:
        """What `query`, (B, N, C), reads of `tokens`. heads: how many, and of what width."""
        count, width = heads
        rows, pixels, channels = query.shape
        seen = tokens.shape[1]
        split = self.numbers(0, 0, count, width)
        factor = _weight(self.graph, f"ip:factor.{width}", np.array([width**-0.5], np.float32))

        def by_head(value: Any, length: Any, axes: list[int]) -> Any:
            whole = [rows, length, count, width]
            parts = self.op("Reshape", [value, split], whole)
            return self.op("Transpose", [parts], [whole[axis] for axis in axes], perm=axes)

        q = by_head(self.op("Mul", [query, factor], query.shape), pixels, [0, 2, 1, 3])
        k = by_head(self.op("MatMul", [tokens, keys], [rows, seen, channels]), seen, [0, 2, 3, 1])
        v = by_head(self.op("MatMul", [tokens, values], [rows, seen, channels]), seen, [0, 2, 1, 3])
        scores = self.op("MatMul", [q, k], [rows, count, pixels, seen])
        likely = self.op("Softmax", [scores], scores.shape, axis=-1)
        read = self.op("MatMul", [likely, v], [rows, count, pixels, width])
        moved = self.op("Transpose", [read], [rows, pixels, count, width], perm=[0, 2, 1, 3])
        return self.op("Reshape", [moved, self.numbers(0, 0, -1)], query.shape)


def _weight(graph: Any, name: str, array: Array) -> Any:
    """The initializer `name`, made where it is not there."""
    import onnx_ir

    if name not in graph.initializers:
        tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
        value = onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
        value.const_value = tensor
        graph.register_initializer(value)
    return graph.initializers[name]


def _give(graph: Any, tensor: Tensor, number: int = 0) -> Any:
    """A new input of the graph. number: of its slot."""
    import onnx_ir

    given = onnx_ir.Value(
        name=slot(tensor.name, number),
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        shape=onnx_ir.Shape(list(tensor.shape)),
    )
    graph.inputs.append(given)
    return given


def _joins_pictures(node: Any) -> bool:
    """Whether a node joins two values along their channels."""
    shape = node.outputs[0].shape
    return (
        node.op_type == "Concat"
        and node.attributes["axis"].as_int() == 1
        and len(node.inputs) == 2
        and (shape is not None and len(shape) == 4)
    )


def _add_where_made(graph: Any, value: Any, given: Any) -> None:
    """Let all that reads `value` read its sum with `given`."""
    import onnx_ir

    total = onnx_ir.node("Add", [value, given], name=f"{given.name}_added")
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = f"{given.name}_sum", value.type, value.shape
    onnx_ir.convenience.replace_all_uses_with(value, total.outputs[0])
    total.replace_input_with(0, value)
    graph.insert_after(value.producer(), total)


def _add(graph: Any, node: Any, i: int, name: str) -> None:
    """Let input i of `node` have the input `name` of the graph added to it."""
    import onnx_ir

    read, given = node.inputs[i], next(value for value in graph.inputs if value.name == name)
    total = onnx_ir.node("Add", [read, given], name=f"{name}_added")
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = f"{name}_sum", read.type, read.shape
    graph.insert_before(node, total)
    node.replace_input_with(i, total.outputs[0])
