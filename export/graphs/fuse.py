"""Attention as one operator, and the prompt's part cut off, in graphs beside the exported one for ONNX Runtime's CPU.

The exported graph holds the standard's operators alone, so that every tool reads it. There the scores of all tokens
by all tokens are a tensor; ONNX Runtime's own operator works through them in blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FUSED, _PER_PROMPT = "fused.onnx", "per_prompt.onnx"
_DOMAIN = "com.microsoft"
_ON_THE_WAY = ("Mul", "Transpose", "Reshape")
"""What lies between the projections, (B, S, H·D), and the product of queries and keys."""


@dataclass(frozen=True, slots=True)
class _Attention:
    query: str
    key: str
    value: str
    output: str
    heads: int
    scale: float


def fuse(model: Path, per_prompt: Sequence[str]) -> tuple[str, str] | None:
    """Write `fused.onnx` beside `model`; None when the model holds no attention to fuse.

    per_prompt: inputs that stay the same from step to step. What depends on them alone is cut off into
    `per_prompt.onnx`, whose outputs are inputs of the fused graph. Returns the names of the two graphs, "" for the
    second where there is nothing to cut off. All graphs share the external weights.
    """
    import onnx

    proto = onnx.load(model, load_external_data=False)
    graph = _Graph(proto.graph)
    found = [attention for attention in map(graph.attention, list(proto.graph.node)) if attention]
    if not found:
        return None
    for attention in found:
        node = onnx.helper.make_node(
            "MultiHeadAttention",
            [attention.query, attention.key, attention.value],
            [attention.output],
            domain=_DOMAIN,
            num_heads=attention.heads,
            scale=attention.scale,
        )
        graph.replace(attention.output, node)
    graph.prune()
    proto.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    part = _split(proto, set(per_prompt))
    if part is not None:
        onnx.save(part, model.with_name(_PER_PROMPT))
    onnx.save(proto, model.with_name(_FUSED))
    return _FUSED, "" if part is None else _PER_PROMPT


def _split(proto: Any, per_prompt: set[str]) -> Any:
    """Cut off what depends on the inputs `per_prompt` alone, as a model of its own; None when that is nothing."""
    import onnx

    graph = proto.graph
    constants = {constant.name for constant in graph.initializer}
    made: set[str] = set()
    for node in graph.node:
        inputs = set(filter(None, node.input))
        if inputs and inputs <= constants:  # the cast of a weight
            constants.update(node.output)
        if inputs & (per_prompt | made) and inputs <= constants | per_prompt | made:
            made.update(node.output)
    rest = [node for node in graph.node if not made.intersection(node.output)]
    cut = sorted(made & {name for node in rest for name in node.input})
    known = {info.name: info for info in graph.value_info}
    if not cut or not known.keys() >= set(cut):
        return None
    boundary = [known[name] for name in cut]
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    _set(part.graph.output, boundary)
    _set(graph.node, rest)
    graph.input.extend(boundary)
    for each in (proto.graph, part.graph):
        _Graph(each).prune()
        read = {name for node in each.node for name in node.input}
        _set(each.input, [value for value in each.input if value.name in read])
    return part


def _set(field: Any, items: Sequence[Any]) -> None:
    """Let a repeated field hold `items`."""
    kept = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(kept)


class _Graph:
    """An ONNX graph with its edges: who makes a tensor and who reads it."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants = {constant.name: constant for constant in graph.initializer}

    def attention(self, softmax: Any) -> _Attention | None:
        """The attention whose weights `softmax` makes, or None when it is none or is masked."""
        if softmax.op_type != "Softmax":
            return None
        scores = self._maker.get(softmax.input[0])
        product = self._reader(softmax.output[0], "MatMul")
        if scores is None or scores.op_type != "MatMul" or product is None or product.input[0] != softmax.output[0]:
            return None
        query, key, value = (self._source(name) for name in (*scores.input, product.input[1]))
        merged = self._reader(product.output[0], "Transpose")
        output = None if merged is None else self._reader(merged.output[0], "Reshape")
        if query is None or key is None or value is None or output is None:
            return None
        heads = query[2] or 0
        scale = query[1] * key[1]
        if heads < 1 or value[1] != 1 or (query[2], key[2]) != (key[2], value[2]) or not math.isfinite(scale):
            return None
        return _Attention(query[0], key[0], value[0], output.output[0], heads, scale)

    def _reader(self, name: str, kind: str) -> Any:
        """The only reader of a tensor, if it is of this kind."""
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def _source(self, name: str) -> tuple[str, float, int | None] | None:
        """The projection that `name` was split from, the scale on the way, and the number of heads."""
        scale, heads = 1.0, None
        while True:
            node = self._maker.get(name)
            if node is None or node.op_type not in _ON_THE_WAY:
                return None if heads is None else (name, scale, heads)
            if node.op_type == "Mul":
                factor = self._scalar(node.input[1])
                if factor is None:
                    return None
                scale *= factor
            elif node.op_type == "Reshape":
                heads = self._heads(node.input[1])
            name = node.input[0]

    def _heads(self, shape: str) -> int | None:
        """The third of four sizes that a Reshape makes, (B, S, H, D), where it is a constant."""
        node = self._maker.get(shape)
        if node is None:
            values = self._values(shape)
            return values[2] if values is not None and len(values) == 4 else None
        if node.op_type != "Concat" or len(node.input) != 4:
            return None
        values = self._values(node.input[2])
        return values[0] if values is not None and len(values) == 1 else None

    def _values(self, name: str) -> list[int] | None:
        from onnx import numpy_helper

        constant = self._constants.get(name)
        if constant is None or constant.external_data:
            return None
        return [int(value) for value in numpy_helper.to_array(constant).reshape(-1)]

    def _scalar(self, name: str) -> float | None:
        from onnx import numpy_helper

        constant = self._constants.get(name)
        if constant is None or constant.external_data or math.prod(constant.dims) != 1:
            return None
        return float(numpy_helper.to_array(constant).reshape(-1)[0])

    def replace(self, output: str, node: Any) -> None:
        """Let `node` make the tensor `output`, in the place of what made it."""
        place = list(self._graph.node).index(self._maker[output])
        del self._graph.node[place]
        self._graph.node.insert(place, node)
        self._maker[output] = node

    def prune(self) -> None:
        """Drop the nodes and constants that no output needs."""
        wanted, kept = [value.name for value in self._graph.output], set()
        needed = set(wanted)
        while wanted:
            node = self._maker.get(wanted.pop())
            if node is not None and id(node) not in kept:
                kept.add(id(node))
                wanted.extend(node.input)
                needed.update(node.input)
        made = {name for node in self._maker.values() if id(node) in kept for name in node.output}
        _set(self._graph.node, [node for node in self._graph.node if made.intersection(node.output)])
        _set(self._graph.initializer, [constant for constant in self._graph.initializer if constant.name in needed])
        _set(self._graph.value_info, [info for info in self._graph.value_info if info.name in made])
