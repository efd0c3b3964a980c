"""A graph with ONNX Runtime's own operators written out in those of the standard, to be run where it lacks kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .graph import DOMAIN, add_sizes, attribute, dtype_of, rank


def in_standard_operators(model: Any) -> None:
    """Write out, in place, the operators that ONNX Runtime has on GPUs alone; attention stays one operator.

    Norms and attention compute in float32 and round their result, as the kernels do. A sum before a norm is rounded
    after each addition, the kernels' at the end: what is measured here is no better than what they give.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _Written(model.graph, node).out()


class _Written:
    """One operator, written out before `node`."""

    def __init__(self, graph: Any, node: Any) -> None:
        import onnx_ir

        self._graph, self._node, self._types = graph, node, onnx_ir.DataType
        self._type = node.outputs[0].dtype
        self._count = 0

    def out(self) -> None:
        import onnx_ir

        rules: dict[str, Callable[[], Sequence[Any]]] = {
            "NhwcConv": self._conv,
            "GroupNorm": self._group_norm,
            "SkipGroupNorm": self._group_norm,
            "SkipLayerNormalization": self._layer_norm,
            "BiasAdd": lambda: [self._add(*self._node.inputs)],
            "BiasGelu": lambda: [self._op("Gelu", [self._add(*self._node.inputs)])],
            "BiasSplitGelu": self._split_gelu,
            "QuickGelu": self._quick_gelu,
            "MultiHeadAttention": self._attention,
        }
        made = rules[self._node.op_type]()
        wanted = [value for value in self._node.outputs if value.name]
        for value, new in zip(wanted, made, strict=True):
            new.type, new.shape = value.type, value.shape
            if value.is_graph_output():
                new.name, value.name = value.name, new.name
            onnx_ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)

    def _op(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: dict[str, Any] | None = None,
        dtype: Any = None,
        count: int = 1,
        domain: str = "",
    ) -> Any:
        import onnx_ir

        base = self._node.outputs[0].name
        outputs = []
        for _ in range(count):
            self._count += 1
            type_ = onnx_ir.TensorType(self._type if dtype is None else dtype)
            outputs.append(onnx_ir.Value(name=f"{base}:written{self._count}", type=type_))
        self._graph.insert_before(
            self._node, onnx_ir.node(kind, inputs, attributes or {}, domain=domain, outputs=outputs)
        )
        return outputs[0] if count == 1 else outputs

    def _cast(self, value: Any, dtype: Any) -> Any:
        return value if value.dtype == dtype else self._op("Cast", [value], {"to": int(dtype)}, dtype)

    def _number(self, number: float) -> Any:
        import onnx_ir

        name = f"number:{number!r}:{dtype_of(self._node.outputs[0])}"
        if name not in self._graph.initializers:
            tensor = onnx_ir.tensor(np.array(number, np.float32), name=name)
            self._graph.register_initializer(onnx_ir.val(name, const_value=tensor))
        return self._graph.initializers[name]

    def _add(self, *values: Any) -> Any:
        total = values[0]
        for value in values[1:]:
            total = self._op("Add", [total, value])
        return total

    def _conv(self) -> list[Any]:
        x, weight, *bias = self._node.inputs
        first = {"perm": [0, 3, 1, 2]}
        moved = [self._op("Transpose", [x], first), self._op("Transpose", [weight], first)]
        attributes = {name: each.value for name, each in self._node.attributes.items()}
        made = self._op("Conv", [*moved, *bias], attributes)
        return [self._op("Transpose", [made], {"perm": [0, 2, 3, 1]})]

    def _group_norm(self) -> list[Any]:
        node, exact = self._node, self._types.FLOAT
        x, gamma, beta, *added = node.inputs
        if added and rank(added[0]) == 2:
            added[0] = self._op("Unsqueeze", [added[0], add_sizes(self._graph, 1, 2)])
        total = self._add(x, *added)
        groups = int(attribute(node, "groups"))
        sizes = add_sizes(self._graph, 0, -1, groups, int(gamma.shape[0]) // groups)
        split = self._op("Reshape", [self._cast(total, exact), sizes], dtype=exact)
        axes = add_sizes(self._graph, 1, 3)
        centred = self._op("Sub", [split, self._op("ReduceMean", [split, axes], dtype=exact)], dtype=exact)
        square = self._op("Mul", [centred, centred], dtype=exact)
        variance = self._op("ReduceMean", [square, axes], dtype=exact)
        shifted = self._op("Add", [variance, self._number(attribute(node, "epsilon"))], dtype=exact)
        normed = self._op("Div", [centred, self._op("Sqrt", [shifted], dtype=exact)], dtype=exact)
        shape = self._op("Shape", [total], dtype=self._types.INT64)
        whole = self._op("Reshape", [normed, shape], dtype=exact)
        made = self._op("Add", [self._op("Mul", [whole, gamma], dtype=exact), beta], dtype=exact)
        if attribute(node, "activation"):
            made = self._op("Mul", [made, self._op("Sigmoid", [made], dtype=exact)], dtype=exact)
        return [self._cast(made, self._type), *([total] if len(node.outputs) > 1 else [])]

    def _layer_norm(self) -> list[Any]:
        x, skip, gamma, *more = self._node.inputs
        beta, bias = [*more, None, None][:2]
        total = self._add(x, *([bias] if bias is not None else []), skip)
        weights = [gamma] if beta is None else [gamma, beta]
        attributes = {"axis": -1, "epsilon": attribute(self._node, "epsilon")}
        made = self._op("LayerNormalization", [total, *weights], attributes)
        return [made, *([total] if len(self._node.outputs) > 1 else [])]

    def _split_gelu(self) -> list[Any]:
        halves = self._op("Split", [self._add(*self._node.inputs)], {"axis": -1, "num_outputs": 2}, count=2)
        return [self._op("Mul", [halves[0], self._op("Gelu", [halves[1]])])]

    def _quick_gelu(self) -> list[Any]:
        x, exact = self._node.inputs[0], self._types.FLOAT
        wide = self._cast(x, exact)
        scaled = self._op("Mul", [wide, self._number(attribute(self._node, "alpha"))], dtype=exact)
        made = self._op("Mul", [wide, self._op("Sigmoid", [scaled], dtype=exact)], dtype=exact)
        return [self._cast(made, self._type)]

    def _attention(self) -> list[Any]:
        exact = self._types.FLOAT
        inputs = [None if value is None else self._cast(value, exact) for value in self._node.inputs]
        attributes = {name: each.value for name, each in self._node.attributes.items()}
        made = self._op("MultiHeadAttention", inputs, attributes, exact, domain=DOMAIN)
        return [self._cast(made, self._type)]
