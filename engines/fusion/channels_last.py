"""Feature maps with their channels last, as tensor cores take them, through a whole graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...common.arrays import Array
from .graph import (
    DOMAIN,
    FLOATS,
    add_sizes,
    add_weight,
    attribute,
    dims,
    dtype_of,
    maker,
    numbers_of,
    rank,
    weight_of,
)
from .norms import per_channel

_UNARY = ("Cast", "Sigmoid", "Relu", "Tanh", "Gelu", "QuickGelu", "Identity", "Clip")
_BINARY = ("Add", "Sub", "Mul", "Div")


def channels_last(model: Any) -> None:
    """Let convolutions, norms and all that lies between them work on (B, H, W, C) in place of (B, C, H, W).

    Convolutions become `NhwcConv`, with their weights as (O, H, W, I). What must have its channels first, such as the
    inputs and outputs of the model, is transposed where it enters and leaves.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    _ChannelsLast(model.graph).run()
    RemoveUnusedNodesPass()(model)


class _ChannelsLast:
    """last: of values that have their channels first, the same with the channels last.

    superseded: nodes whose outputs are all in `last`, which nobody reads in the end. first: those of their outputs that
    a node which stays reads all the same, with the channels first again.
    """

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._last: dict[Any, Any] = {}
        self._first: dict[Any, Any] = {}
        self._superseded: set[Any] = set()
        # each makes what a node makes with the channels last, or returns False: then the node stays as it is
        self._rules: dict[str, Callable[[Any], bool]] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_BINARY, self._binary),
            "Conv": self._conv,
            "GroupNorm": self._group_norm,
            "SkipGroupNorm": self._group_norm,
            "Concat": self._concat,
            "Resize": self._resize,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
        }

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self._graph):
            rule = self._rules.get(node.op_type)
            if rule is not None and rule(node):
                self._superseded.add(node)
            else:
                self._feed(node)
        for value in list(self._graph.outputs):
            if self._is_superseded(value):
                self._give_output(value)

    def _feed(self, node: Any) -> None:
        """Give a node that stays as it is its inputs with their channels first."""
        for place, value in enumerate(node.inputs):
            if self._is_superseded(value):
                node.replace_input_with(place, self._standing(value, node))

    def _standing(self, value: Any, node: Any) -> Any:
        """`value` with its channels first, for `node`."""
        if not self._is_superseded(value):
            return value
        if value not in self._first:
            self._first[value] = self._transposed(self._last[value], value, node, forward=False)
        return self._first[value]

    def _is_superseded(self, value: Any) -> bool:
        return value in self._last and value.producer() in self._superseded

    def _give_output(self, value: Any) -> None:
        name = value.name
        moved = self._transposed(self._last[value], value, None, forward=False)
        self._graph.outputs[list(self._graph.outputs).index(value)] = moved
        value.name, moved.name = f"{name}:first", name

    def _transposed(self, source: Any, like: Any, before: Any, *, forward: bool) -> Any:
        """`source` with its channels last (forward) or first, which has the type of `like`."""
        axes = len(dims(like) or ())
        perm = [0, *range(2, axes), 1] if forward else [0, axes - 1, *range(1, axes - 1)]
        shape = _moved(like) if forward else like.shape
        return self._emit(
            "Transpose", [source], {"perm": perm}, f"{like.name}:{'last' if forward else 'first'}", like, shape, before
        )

    def _emit(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: dict[str, Any],
        name: str,
        like: Any,
        shape: Any,
        before: Any,
        domain: str = "",
    ) -> Any:
        """The output of a new node right before `before`, or at the end."""
        import onnx_ir

        made = onnx_ir.Value(name=name, type=like.type, shape=shape)
        node = onnx_ir.node(kind, inputs, attributes, domain=domain, outputs=[made])
        if before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(before, node)
        return made

    def _make(self, node: Any, kind: str, inputs: Sequence[Any], attributes: dict[str, Any], domain: str = "") -> bool:
        """A node that makes what `node` makes, with the channels last."""
        import onnx_ir

        outputs = [onnx_ir.Value(name=f"{v.name}:last", type=v.type, shape=_moved(v)) for v in node.outputs]
        self._graph.insert_before(node, onnx_ir.node(kind, inputs, attributes, domain=domain, outputs=outputs))
        self._last.update(zip(node.outputs, outputs, strict=True))
        return True

    def _moved_input(self, value: Any, node: Any) -> Any:
        """`value` with its channels last, for `node`."""
        if value not in self._last:
            self._last[value] = self._transposed(value, value, node, forward=True)
        return self._last[value]

    def _conv(self, node: Any) -> bool:
        import onnx_ir

        x, weight = node.inputs[0], node.inputs[1]
        shape = dims(weight)
        if weight_of(weight) is None or shape is None or len(shape) != 4 or rank(x) != 4:
            return False
        if attribute(node, "group", 1) != 1 or dtype_of(x) not in FLOATS:
            return False
        if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            return False
        attributes = {n: a.value for n, a in node.attributes.items() if n not in ("auto_pad", "group")}
        moved = self._moved_input(x, node)
        pads = list(attribute(node, "pads", [0] * 4))
        if pads[:2] != pads[2:]:  # cuDNN pads both ends alike
            sizes = add_sizes(self._graph, 0, *pads[:2], 0, 0, *pads[2:], 0)
            padded = onnx_ir.Shape([None, None, None, shape[1]])
            moved = self._emit("Pad", [moved, sizes], {}, f"{node.outputs[0].name}:padded", x, padded, node)
            attributes["pads"] = [0] * 4
        order = [shape[0], shape[2], shape[3], shape[1]]
        kernel = self._moved_weight(weight, order, lambda array: array.transpose(0, 2, 3, 1), node)
        return self._make(node, "NhwcConv", [moved, kernel, *node.inputs[2:]], attributes, DOMAIN)

    def _group_norm(self, node: Any) -> bool:
        import onnx_ir

        x, axes = node.inputs[0], rank(node.inputs[0])
        attributes = {**{n: a.value for n, a in node.attributes.items()}, "channels_last": 1}
        moved = self._moved_input(x, node)
        if axes == 4:
            inputs = [moved, *node.inputs[1:]]
            if node.op_type == "SkipGroupNorm":
                channel = per_channel(node.inputs[3])
                inputs[3] = self._moved_input(node.inputs[3], node) if channel is None else channel
            return self._make(node, node.op_type, inputs, attributes, DOMAIN)
        one, out = add_sizes(self._graph, 1), node.outputs[0]
        batch, length, channels = _moved(x)
        wide = onnx_ir.Shape([batch, 1, length, channels])
        moved = self._emit("Unsqueeze", [moved, one], {}, f"{out.name}:wide", x, wide, node)
        moved = self._emit(
            "GroupNorm", [moved, *node.inputs[1:]], attributes, f"{out.name}:normed", out, wide, node, DOMAIN
        )
        self._last[out] = self._emit("Squeeze", [moved, one], {}, f"{out.name}:last", out, _moved(out), node)
        return True

    def _unary(self, node: Any) -> bool:
        if node.inputs[0] not in self._last:
            return False
        inputs = [self._last[node.inputs[0]], *node.inputs[1:]]
        return self._make(node, node.op_type, inputs, {n: a.value for n, a in node.attributes.items()}, node.domain)

    def _binary(self, node: Any) -> bool:
        if not any(value in self._last for value in node.inputs):
            return False
        axes = rank(node.outputs[0])
        inputs = [self._operand(value, axes, node) for value in node.inputs]
        return None not in inputs and self._make(node, node.op_type, inputs, {})

    def _operand(self, value: Any, axes: int, node: Any) -> Any:
        """An operand that is broadcast to `axes` axes, with its channels last; None where that cannot be had."""
        shape = dims(value)
        if shape is None or value in self._last:
            return self._last[value] if shape is not None and len(shape) == axes else None
        if all(axis == 1 for axis in shape):
            return value
        channel = per_channel(value)
        if channel is not None and axes == 4:
            wide = _moved(value)
            return self._emit(
                "Unsqueeze", [channel, add_sizes(self._graph, 1, 2)], {}, f"{value.name}:last", value, wide, node
            )
        if weight_of(value) is not None and len(shape) == axes - 1 and all(axis == 1 for axis in shape[1:]):
            order = [1] * (axes - 2) + [shape[0]]
            return self._moved_weight(value, order, lambda array: array.reshape(order), node)
        return self._moved_input(value, node) if len(shape) == axes else None

    def _moved_weight(self, value: Any, shape: list[int], make: Callable[[Array], Array], node: Any) -> Any:
        """`make` of a weight, with the cast that widens it, if there is one."""
        import onnx_ir

        stored = weight_of(value)
        moved = add_weight(self._graph, f"{stored.name}:last", stored, stored.dtype, shape, make)
        if stored is value:
            return moved
        return self._emit(
            "Cast", [moved], {"to": int(value.dtype)}, f"{value.name}:last", value, onnx_ir.Shape(shape), node
        )

    def _concat(self, node: Any) -> bool:
        axes = rank(node.outputs[0])
        if (
            axes not in (3, 4)
            or attribute(node, "axis") not in (1, 1 - axes)
            or not any(value in self._last for value in node.inputs)
        ):
            return False
        inputs = [self._moved_input(value, node) for value in node.inputs]
        return self._make(node, "Concat", inputs, {"axis": axes - 1})

    def _resize(self, node: Any) -> bool:
        x = node.inputs[0]
        if x not in self._last or rank(x) != 4 or attribute(node, "mode", "nearest") != "nearest":
            return False
        if "axes" in node.attributes or (node.inputs[1] is not None and numbers_of(node.inputs[1], 0) is None):
            return False
        last = [None if value is None else self._moved_sizes(value, node) for value in node.inputs[2:]]
        inputs = [self._last[x], None, *last]
        return self._make(node, "Resize", inputs, {n: a.value for n, a in node.attributes.items()})

    def _moved_sizes(self, value: Any, node: Any) -> Any:
        """The sizes, or scales, of four axes in their new order."""
        import onnx_ir

        order = [0, 2, 3, 1]
        if value.is_initializer():
            return add_weight(self._graph, f"{value.name}:last", value, value.dtype, [4], lambda array: array[order])
        joined = maker(value, "Concat")
        four = joined is not None and len(joined.inputs) == 4
        kind, attributes = ("Concat", {"axis": 0}) if four else ("Gather", {"axis": 0})
        inputs = [joined.inputs[i] for i in order] if four else [value, add_sizes(self._graph, *order)]
        return self._emit(
            kind, inputs, attributes, f"{value.name}:{node.outputs[0].name}", value, onnx_ir.Shape([4]), node
        )

    def _transpose(self, node: Any) -> bool:
        import onnx_ir

        x, out = node.inputs[0], node.outputs[0]
        perm, axes = list(attribute(node, "perm", [])), rank(x)
        if x in self._last and perm == [0, *range(2, axes), 1] and not out.is_graph_output():
            onnx_ir.convenience.replace_all_uses_with(out, self._last[x])
            return True
        if axes in (3, 4) and perm == [0, axes - 1, *range(1, axes - 1)]:
            self._last[out] = self._standing(x, node)
            return True
        return False

    def _reshape(self, node: Any) -> bool:
        """(B, C, H, W) to (B, C, H·W) and back."""
        x, out = node.inputs[0], node.outputs[0]
        if x not in self._last:
            return False
        before, after = dims(x), dims(out)
        if before is None or after is None or before[0] is None or before[:2] != after[:2]:
            return False
        if not isinstance(before[1], int):
            return False
        if (len(before), len(after)) == (4, 3):
            sizes = add_sizes(self._graph, 0, -1, before[1])
        elif (len(before), len(after)) == (3, 4):
            sizes = self._split_sizes(node, before[1])
        else:
            return False
        if sizes is None:
            return False
        self._last[out] = self._emit("Reshape", [self._last[x], sizes], {}, f"{out.name}:last", out, _moved(out), node)
        return True

    def _split_sizes(self, node: Any, channels: int) -> Any:
        """The sizes (B, H, W, C) of a Reshape to (B, C, H, W); None where H or W stands for an axis of the input."""
        sizes = numbers_of(node.inputs[1], 4)
        if sizes is not None:
            batch, _, height, width = map(int, sizes)
            return None if 0 in (height, width) else add_sizes(self._graph, batch, height, width, channels)
        return self._moved_sizes(node.inputs[1], node)


def merge_sizes(graph: Any) -> None:
    """Let (B, H, W, C) become (B, H·W, C) by constant sizes, so that nothing is computed for it."""
    for node in graph:
        before, after = (
            (dims(value) for value in (node.inputs[0], node.outputs[0])) if node.op_type == "Reshape" else (None, None)
        )
        if before is None or after is None or (len(before), len(after)) != (4, 3):
            continue
        if before[0] is not None and before[0] == after[0] and before[3] == after[2] and isinstance(after[2], int):
            node.replace_input_with(1, add_sizes(graph, 0, -1, after[2]))
            node.attributes.pop("allowzero", None)


def _moved(value: Any) -> Any:
    import onnx_ir

    return None if value.shape is None else onnx_ir.Shape([value.shape[0], *value.shape[2:], value.shape[1]])
