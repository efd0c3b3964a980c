"""Norms as one operator each, with the activation after them and the sum before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...common.arrays import Array
from .graph import (
    FLOATS,
    add_weight,
    attribute,
    dims,
    dtype_of,
    make_node,
    maker,
    numbers_of,
    rank,
    reader,
    replace,
    same_shape,
    sides,
    weight_of,
)

_LARGEST_GROUP = 512
"""Channels of a group that ONNX Runtime's kernel takes."""
_RMS = "SimplifiedLayerNormalization"
_SMALLEST_EPSILON = 1e-6
"""In the place of one that float16 has no number for."""


def fuse_group_norms(graph: Any) -> None:
    """`GroupNorm` in the place of a norm over groups of channels, with a SiLU after it.

    They still have their channels first: `channels_last` moves them. What the kernel does not take stays as it is.
    """
    for node in list(graph):
        if node.op_type == "InstanceNormalization":
            _group_norm(graph, node)


def fuse_rms_norms(graph: Any) -> int:
    """`SimplifiedLayerNormalization` in the place of a root-mean-square norm (Zhang & Sennrich 2019); how many.

    It computes in float32 whatever its type.
    """
    return sum(_rms_norm(graph, node) for node in list(graph) if node.op_type == "Reciprocal")


def fuse_skips(graph: Any) -> None:
    """Let norms add up what they read: `SkipGroupNorm` and `SkipLayerNormalization`, with a bias before the sum."""
    for node in list(graph):
        if node.op_type == "GroupNorm" and rank(node.inputs[0]) == 4:
            _skip_group_norm(graph, node)
        elif node.op_type == "LayerNormalization":
            _skip_layer_norm(graph, node)
    graph.sort()  # they stand where the sum was made, before the cast of a weight, maybe


def _group_norm(graph: Any, norm: Any) -> None:
    import onnx_ir

    split = maker(norm.inputs[0], "Reshape")
    groups = 0 if split is None else _size(norm.inputs[1])
    plain = groups and _are(norm.inputs[1], groups, 1.0) and _are(norm.inputs[2], groups, 0.0)
    sizes = numbers_of(split.inputs[1], 3) if plain else None
    whole = _next(norm, "Reshape")
    scaled = None if whole is None else _next(whole, "Mul")
    moved = None if scaled is None else _next(scaled, "Add")
    if sizes is None or list(sizes) != [0, groups, -1] or moved is None:
        return
    x = split.inputs[0]
    gamma, beta = (_channels(node, rank(x)) for node in (scaled, moved))
    shape = dims(x)
    if gamma is None or beta is None or shape is None or len(shape) not in (3, 4) or dtype_of(x) not in FLOATS:
        return
    channels = _size(gamma)
    each = channels // groups
    if channels != _size(beta) or shape[1] != channels or channels % groups or each % 2 or each > _LARGEST_GROUP:
        return
    if dtype_of(x) != dtype_of(moved.outputs[0]):
        return
    attributes = {"epsilon": attribute(norm, "epsilon", 1e-5), "groups": groups, "activation": 0, "channels_last": 0}
    weights = [add_weight(graph, f"{w.name}:norm", w, onnx_ir.DataType.FLOAT, [channels], _flat) for w in (gamma, beta)]
    last = moved
    sigmoid = next((n for n, _ in moved.outputs[0].uses() if n.op_type == "Sigmoid"), None)
    silu = None if sigmoid is None else reader(sigmoid.outputs[0], "Mul")
    if silu is not None and {node for node, _ in moved.outputs[0].uses()} == {sigmoid, silu}:
        attributes["activation"], last = 1, silu
    replace(graph, last, make_node("GroupNorm", [x, *weights], attributes, last.outputs))


def _rms_norm(graph: Any, inverse: Any) -> bool:
    import onnx_ir

    root = maker(inverse.inputs[0], "Sqrt")
    moved = None if root is None else maker(root.inputs[0], "Add")
    mean = None if moved is None else maker(moved.inputs[0], "ReduceMean")
    squares = None if mean is None or len(mean.inputs) < 2 else maker(mean.inputs[0], "Pow")
    normed = _next(inverse, "Mul")
    if squares is None or mean is None or moved is None or normed is None or attribute(mean, "keepdims", 1) != 1:
        return False
    x, axes = squares.inputs[0], numbers_of(mean.inputs[1], 1)
    power, epsilon = numbers_of(squares.inputs[1], 1), numbers_of(moved.inputs[1], 1)
    last, scaled = (dims(x) or (None,))[-1], _next(normed, "Mul")
    if power is None or power[0] != 2 or axes is None or axes[0] not in (-1, rank(x) - 1) or epsilon is None:
        return False
    if not isinstance(last, int) or scaled is None or dtype_of(x) not in FLOATS:
        return False
    if not any(each is x or _same(each, x) for each in normed.inputs):
        return False
    weights = [each for each in scaled.inputs if dims(each) == (last,) and dtype_of(each) == dtype_of(x)]
    if len(weights) != 1 or dtype_of(scaled.outputs[0]) != dtype_of(x):
        return False
    made = [onnx_ir.Value(name=each.name, type=each.type, shape=each.shape) for each in scaled.outputs]
    attributes = {"axis": -1, "epsilon": float(epsilon[0]) or _SMALLEST_EPSILON, "stash_type": 1}
    replace(graph, scaled, onnx_ir.node(_RMS, [x, weights[0]], attributes, outputs=made))
    return True


def _same(value: Any, x: Any) -> bool:
    """Whether a cast of `x` makes it, or both are casts of one value."""
    a, b = maker(value, "Cast"), maker(x, "Cast")
    return (a is not None and a.inputs[0] is x) or (b is not None and b.inputs[0] is value)


def _skip_group_norm(graph: Any, norm: Any) -> None:
    """Let `norm` add up its input. Of the two parts one may be (B, C, 1, 1), the other has the whole shape."""
    total = norm.inputs[0]
    added = maker(total, "Add")
    if added is None or dtype_of(total) not in FLOATS:
        return
    parts = [(x, skip) for x, skip in (added.inputs, added.inputs[::-1]) if same_shape(x, total)]
    parts = [(x, skip) for x, skip in parts if same_shape(skip, total) or _spread(skip, total)]
    if not parts:
        return
    convs = [maker(x, "Conv") is not None and len(list(x.uses())) == 1 for x, _ in parts]
    x, skip = parts[convs.index(True)] if True in convs else parts[0]
    bias = _take_bias(graph, x)
    inputs = [x, norm.inputs[1], norm.inputs[2], skip] + ([bias] if bias is not None else [])
    fused = make_node(
        "SkipGroupNorm", inputs, {n: a.value for n, a in norm.attributes.items()}, [norm.outputs[0], total]
    )
    _with_sum(graph, norm, fused, added)


def _spread(value: Any, total: Any) -> bool:
    """Whether `value` is (B, C, 1, 1) and holds a number for each row and channel of `total`."""
    return per_channel(value) is not None and (dims(value) or ())[:2] == (dims(total) or ())[:2]


def _take_bias(graph: Any, x: Any) -> Any:
    """The bias of the convolution that makes `x` for this norm alone, taken away from it; None where there is none.

    There a bias costs a pass over the whole output, in the norm nothing.
    """
    conv = maker(x, "Conv")
    if conv is None or len(conv.inputs) < 3 or len(list(x.uses())) > 1 or x.is_graph_output():
        return None
    bias = conv.inputs[2]
    if weight_of(bias) is None or dtype_of(bias) != dtype_of(x):
        return None
    conv.resize_inputs(2)
    return bias


def _skip_layer_norm(graph: Any, norm: Any) -> None:
    import onnx_ir

    total = norm.inputs[0]
    added = maker(total, "Add")
    last, others = attribute(norm, "axis", -1), norm.outputs[1:]
    if added is None or rank(total) != 3 or last not in (-1, 2) or any(o.uses() or o.is_graph_output() for o in others):
        return
    if not all(dims(weight) == (dims(total) or ())[-1:] for weight in norm.inputs[1:]):
        return
    if not all(same_shape(value, total) and weight_of(value) is None for value in added.inputs):
        return
    (x, skip), bias = added.inputs, None
    for biased, other in sides(added, "Add"):
        found = bias_of(biased)
        if found is not None and reader(biased.outputs[0], "Add") is not None:
            (x, bias), skip = found, other
            break
    inputs = [x, skip, *norm.inputs[1:]]
    if bias is not None:
        inputs = [*inputs, *[None] * (4 - len(inputs)), bias]
    likes = [norm.outputs[0]]
    if len(list(total.uses())) > 1 or total.is_graph_output():
        likes += [onnx_ir.Value(name=""), onnx_ir.Value(name=""), total]  # mean and deviation, which nobody reads
    epsilon = attribute(norm, "epsilon", 1e-5)
    _with_sum(graph, norm, make_node("SkipLayerNormalization", inputs, {"epsilon": epsilon}, likes), added)


def _with_sum(graph: Any, norm: Any, fused: Any, added: Any) -> None:
    """Put `fused` in the place of `norm`, where the sum was made; its last output takes the place of the sum."""
    import onnx_ir

    total = added.outputs[0]
    graph.insert_after(added, fused)
    onnx_ir.convenience.replace_all_uses_with(norm.outputs[0], fused.outputs[0], replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    if len(fused.outputs) > 1:
        onnx_ir.convenience.replace_all_uses_with(total, fused.outputs[-1], replace_graph_outputs=True)
    graph.remove(added, safe=True)


def bias_of(added: Any) -> tuple[Any, Any] | None:
    """Of an `Add` what a matrix product made and the bias, an initializer with one axis; None where it is no such."""
    for product, bias in sides(added, "MatMul"):
        if (
            weight_of(bias) is not None
            and dims(bias) == (dims(added.outputs[0]) or ())[-1:]
            and dtype_of(bias) == dtype_of(added.outputs[0])
        ):
            return product.outputs[0], bias
    return None


def per_channel(value: Any) -> Any:
    """What a value (B, C, 1, 1) was made of by adding axes, (B, C); None where it is no such."""
    node = maker(value, "Unsqueeze")
    axes = None if node is None else numbers_of(node.inputs[1], 2)
    return node.inputs[0] if axes is not None and list(axes) == [2, 3] and rank(node.inputs[0]) == 2 else None


def _next(node: Any, kind: str) -> Any:
    """The only reader of a node, if it is of this kind, past a cast."""
    value = node.outputs[0]
    cast = reader(value, "Cast")
    return reader(value if cast is None else cast.outputs[0], kind)


def _channels(node: Any, axes: int) -> Any:
    """The initializer (C, 1, …) that a node reads beside its input of so many axes; None where there is none."""
    for value in node.inputs:
        shape, weight = dims(value), weight_of(value)
        if weight is not None and shape and len(shape) == axes - 1 and all(axis == 1 for axis in shape[1:]):
            return weight
    return None


def _are(value: Any, size: int, number: float) -> bool:
    found = numbers_of(value, size)
    return found is not None and bool(np.all(found == number))


def _size(value: Any) -> int:
    """How many numbers an initializer has; 0 for any other value."""
    return 0 if value is None or value.const_value is None else int(value.const_value.size)


def _flat(array: Array) -> Array:
    return array.astype(np.float32).reshape(-1)
