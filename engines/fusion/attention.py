"""Attention as one operator, where the exported graph has the scores of all tokens by all tokens as a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from .graph import (
    DOMAIN,
    add_sizes,
    attribute,
    dims,
    dtype_of,
    make_node,
    maker,
    map_tensor,
    numbers_of,
    rank,
    reader,
    replace,
)

ATTENTION = "MultiHeadAttention"
"""The operator of ONNX Runtime."""
_ON_THE_WAY = ("Cast", "Mul", "Transpose", "Reshape")
"""What lies between the projections, (B, S, H·D), and the product of queries and keys."""
_APART = (0, 2, 1, 3)
"""(B, S, H, D) to (B, H, S, D), and back."""
_KEY_MOVES: list[list[tuple[int, ...]]] = [[(0, 2, 3, 1)], [_APART, (0, 1, 3, 2)], [_APART, (0, 2, 1)]]
"""(B, S, H, D) to (B, H, D, S); the last of them by way of (B·H, S, D)."""
_TURNED = (0, 2, 1)
_KEYS_APART: list[list[tuple[int, ...]]] = [[(0, 1, 3, 2)], [_TURNED]]
"""(B, H, S, D) to (B, H, D, S)."""
_MASKED = -1e4
"""A score that is this low or lower has no weight."""


def fuse_attention(model: Any, *, masked: bool) -> int:
    """Let `MultiHeadAttention` take the place of each attention that it can; returns of how many.

    It computes the scores in float32 whatever their type. masked: whether those with a mask are fused, too: a causal
    mask becomes an attribute, any other an input.
    """
    found = [_fuse(model, attention, masked) for attention in attentions_of(model, joined=True)]
    if any(found):
        model.graph.opset_imports[DOMAIN] = 1
    return sum(found)


@dataclass(frozen=True, slots=True)
class Source:
    """A projection (B, S, H·D), and what was done to it: by what it was scaled, its heads, and its transpositions.

    apart: whether its heads are apart in `value`, (B, S, H, D), or (B, H, S, D) where there are no transpositions but
    of keys: what is normed, turned or joined head by head.
    """

    value: Any
    scale: float
    heads: int
    moves: list[tuple[int, ...]]
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention as it was exported, with the scores of all tokens by all tokens.

    scores, softmax, product, merged, output: its operators: the product of queries and keys, what makes weights of the
    scores, the product with the values, and the Transpose and the Reshape that join its heads. query, key, value: the
    projections that it reads. mask: what is added to the scores, None where nothing is. guarded: whether NaN is set to
    0 after the softmax.
    """

    scores: Any
    softmax: Any
    product: Any
    merged: Any
    output: Any
    query: Source
    key: Source
    value: Source
    mask: Any
    guarded: bool

    @property
    def as_one(self) -> tuple[list[Any], dict[str, Any]]:
        """The inputs and attributes of the operator that computes it, without its mask."""
        attributes = {"num_heads": self.query.heads, "scale": self.query.scale * self.key.scale}
        return [self.query.value, self.key.value, self.value.value], attributes


def attentions_of(model: Any, *, joined: bool = False) -> list[Attention]:
    """All attentions of a model, in the order of its nodes. joined: also those whose heads were apart before."""
    found = (_found(node, joined) for node in list(model.graph) if node.op_type == "Softmax")
    return [each for each in found if each is not None]


def _found(softmax: Any, joined: bool) -> Attention | None:
    scores, mask = _before(softmax)
    product, guarded = _after(softmax)
    if scores is None or product is None or attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    merged = reader(product.outputs[0], "Transpose")
    output = None if merged is None else reader(merged.outputs[0], "Reshape")
    query, key, value = (_source(each) for each in (*scores.inputs, product.inputs[1]))
    if joined and (query is None or key is None or value is None):
        query, key, value = (_source_apart(each) for each in (*scores.inputs, product.inputs[1]))
    if query is None or key is None or value is None or output is None:
        return None
    moved = query.moves == value.moves == [_APART] and key.moves in _KEY_MOVES
    moved |= query.apart and query.moves == value.moves == [] and key.moves in _KEYS_APART
    apart = moved and _moves(merged) == _APART
    heads, scale = query.heads, query.scale * key.scale
    if not apart or heads < 1 or value.scale != 1 or not heads == key.heads == value.heads or not math.isfinite(scale):
        return None
    read = (query.value, key.value, value.value)
    if len({dtype_of(each) for each in (*read, output.outputs[0])}) > 1 or rank(output.outputs[0]) != 3:
        return None
    return Attention(scores, softmax, product, merged, output, query, key, value, mask, guarded)


def _fuse(model: Any, attention: Attention, masked: bool) -> bool:
    import onnx_ir

    mask, output = attention.mask, attention.output
    if mask is not None and not masked:
        return False
    inputs, attributes = attention.as_one
    if mask is not None and _is_causal(model, mask):
        attributes["unidirectional"] = 1
    elif attention.guarded:  # the operator has no zeros for a row that is masked as a whole
        return False
    elif mask is not None:
        shape = dims(mask) or ()
        if dtype_of(mask) != dtype_of(inputs[0]) or not 2 <= len(shape) <= 4 or {1, None} & set(shape[-2:]):
            return False
        if len(shape) < 4:
            wide = onnx_ir.Value(name=f"{mask.name}:{output.outputs[0].name}", type=mask.type)
            given = [mask, add_sizes(model.graph, *range(4 - len(shape)))]
            model.graph.insert_before(output, onnx_ir.node("Unsqueeze", given, outputs=[wide]))
            mask = wide
        inputs += [None, None, mask]
    for i, source in enumerate((attention.query, attention.key, attention.value)):
        if source.apart:
            inputs[i] = _together(model.graph, source, i, output)
    replace(model.graph, output, make_node(ATTENTION, inputs, attributes, output.outputs))
    return True


def _before(softmax: Any) -> tuple[Any, Any]:
    """The product of queries and keys, None where there is none, and the mask added to it, None where there is none."""
    value, mask = _uncast(softmax.inputs[0]), None
    if (added := maker(value, "Add")) is not None:
        a, b = (_uncast(each) for each in added.inputs)
        value, mask = (a, added.inputs[1]) if maker(a, "MatMul") else (b, added.inputs[0])
    return maker(value, "MatMul"), mask


def _after(softmax: Any) -> tuple[Any, bool]:
    """The product of the weights and the values, None where there is none, and whether NaN is set to 0 before it.

    A row of scores that is masked as a whole, by infinity, gives NaN.
    """
    value, guarded = softmax.outputs[0], False
    readers = {node.op_type: node for node, _ in value.uses()}
    if readers.keys() == {"IsNaN", "Where"} and readers["Where"].inputs[2] is value:
        chosen = readers["Where"]
        zero, made = numbers_of(chosen.inputs[1], 1), reader(readers["IsNaN"].outputs[0], "Where")
        if made is not chosen or chosen.inputs[0] is not readers["IsNaN"].outputs[0] or zero is None or zero[0] != 0:
            return None, False
        value, guarded = chosen.outputs[0], True
    if (cast := reader(value, "Cast")) is not None:
        value = cast.outputs[0]
    product = reader(value, "MatMul")
    return (product if product is not None and product.inputs[0] is value else None), guarded


def _uncast(value: Any) -> Any:
    """The value that a cast was given."""
    cast = maker(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _source(value: Any) -> Source | None:
    """The projection that `value` was split from; None where there is none."""
    scale, heads = 1.0, 0
    moves: list[tuple[int, ...]] = []
    while (node := value.producer()) is not None and node.op_type in _ON_THE_WAY:
        if node.op_type == "Mul":
            factor = numbers_of(node.inputs[1], 1)
            if factor is None:
                return None
            scale *= float(factor[0])
        elif node.op_type == "Reshape":
            heads = _heads(node)
        elif node.op_type == "Transpose":
            moves.insert(0, _moves(node))
        elif heads:
            break  # the cast of the projection itself
        value = node.inputs[0]
    return Source(value, scale, heads, moves) if heads and rank(value) == 3 else None


def _source_apart(value: Any) -> Source | None:
    """What `value` is of a value whose heads are apart; None where that is not known."""
    scale = 1.0
    moves: list[tuple[int, ...]] = []
    while (node := value.producer()) is not None:
        if node.op_type == "Mul":
            factor = numbers_of(node.inputs[1], 1)
            if factor is None:
                break
            scale *= float(factor[0])
        elif node.op_type == "Transpose":
            moves.insert(0, _moves(node))
        elif node.op_type != "Reshape" or not (_turned(node.inputs[0]) or _turned(*_readers(value))):
            break
        value = node.inputs[0]
    shape: tuple[Any, ...] = dims(value) or ()
    heads = shape[2 if _APART in moves or _KEY_MOVES[0][0] in moves else 1] if len(shape) == 4 else None
    return Source(value, scale, heads, moves, apart=True) if isinstance(heads, int) else None


def _readers(value: Any) -> list[Any]:
    return [made for node, _ in value.uses() for made in node.outputs][:1]


def _turned(value: Any = None) -> bool:
    """Whether keys of all rows and heads were transposed to make `value`, (B·H, D, S)."""
    node = None if value is None else maker(value, "Transpose")
    return node is not None and _moves(node) == _TURNED


def _together(graph: Any, source: Source, place: int, before: Any) -> Any:
    """The heads of a source joined, (B, S, H·D), before the node `before`."""
    import onnx_ir

    value, name, kind = source.value, f"{before.outputs[0].name}:{place}", source.value.type
    shape: tuple[Any, ...] = dims(value) or ()
    size = shape[3]
    if source.moves in ([], *_KEYS_APART):
        moved = onnx_ir.Shape([value.shape[i] for i in _APART])
        made = onnx_ir.Value(name=f"{name}:apart", type=kind, shape=moved)
        graph.insert_before(before, onnx_ir.node("Transpose", [value], {"perm": _APART}, outputs=[made]))
        value = made
    joined = onnx_ir.Value(name=f"{name}:joined", type=kind)
    if isinstance(size, int):
        joined.shape = onnx_ir.Shape([value.shape[0], value.shape[1], source.heads * size])
    graph.insert_before(before, onnx_ir.node("Reshape", [value, add_sizes(graph, 0, 0, -1)], outputs=[joined]))
    return joined


def _moves(transpose: Any) -> tuple[int, ...]:
    return tuple(attribute(transpose, "perm", ()))


def _heads(split: Any) -> int:
    """The heads H that a Reshape from (B, S, H·D) to (B, S, H, D) makes; 0 where they are not known."""
    joined, width = maker(split.inputs[1], "Concat"), (dims(split.inputs[0]) or (None,))[-1]
    if joined is None:
        sizes = numbers_of(split.inputs[1], 4)
        last = () if sizes is None else tuple(map(int, sizes[2:]))
    else:
        found = [numbers_of(value, 1) for value in joined.inputs]
        last = tuple(int(each[0]) for each in found[2:] if each is not None) if len(found) == 4 else ()
    if len(last) != 2 or not isinstance(width, int):
        return 0
    heads, size = last
    return heads if heads > 0 else width // size


def _is_causal(model: Any, mask: Any) -> bool:
    """Whether a mask hides from each token those after it and no others: it is computed, for two lengths.

    It must depend on the shape of the inputs alone.
    """
    import onnx_ir

    from ..onnxruntime import tensors_of
    from ..wheel import ort

    graph = model.graph
    edge, seen = [mask], set()
    while edge:
        value = edge.pop()
        node = value.producer()
        if node is None and not value.is_initializer():
            return False
        if node is not None and node not in seen and node.op_type != "Shape":
            seen.add(node)
            edge += [each for each in node.inputs if each is not None]
    part = onnx_ir.Model(onnx_ir.convenience.extract(graph, list(graph.inputs), [mask]), ir_version=model.ir_version)
    _in_float32(part.graph)
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(
            onnx_ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = tensors_of("", session.get_inputs())
        masks = [
            session.run(None, {each.name: _zeros(each, *sizes) for each in given})[0] for sizes in ((2, 5), (1, 8))
        ]
    except Exception:  # ONNX Runtime raises its own family of exceptions
        return False
    return all(_hides_later(found) for found in masks)


def _in_float32(graph: Any) -> None:
    """Let a graph compute in float32 where it does in bfloat16, for which the CPU has no kernels."""
    import onnx_ir

    narrow, wide = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.dtype == narrow:
            value.const_value = onnx_ir.tensor(map_tensor(value.const_value, lambda array: array.astype(np.float32)))
            value.type = onnx_ir.TensorType(wide)  # its own: types are shared with the graph that this is a part of
    for node in graph:
        if attribute(node, "to") == int(narrow):
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(wide))
        for made in node.outputs:
            if made.dtype == narrow:
                made.type = onnx_ir.TensorType(wide)


def _zeros(tensor: Tensor, rows: int, length: int) -> Array:
    """What is fed to an input: its named axes are as long as asked."""
    shape = [axis if isinstance(axis, int) else length if i else rows for i, axis in enumerate(tensor.shape)]
    return np.zeros(shape, tensor.dtype)


def _hides_later(mask: Array) -> bool:
    size = mask.shape[-1]
    if mask.ndim < 2 or mask.shape[-2] != size:
        return False
    seen = np.tri(size, dtype=bool)
    return bool((mask[..., seen] == 0).all() and (mask[..., ~seen] <= _MASKED).all())
