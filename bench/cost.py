"""What a call of an ONNX model costs, read from its graph alone: operations, and bytes that are read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import FULL, STANDARD, Bundle, Variant
from ..common.errors import BenchError, reason
from ..common.machine import require_modules

_LARGEST_VALUE = 4096
"""Numbers in a tensor that shapes are computed with."""
_UNCOUNTED = {
    *("Attention", "Einsum", "GRU", "LSTM", "RNN", "If", "Loop", "Scan", "DFT", "STFT"),
    *("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DeformConv"),
}
"""Operators with products of matrices that are not counted here."""
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
"""Operators that give the same bytes under another shape; nothing is read or written."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: of products of matrices and convolutions, two for a multiplication and an addition.

    bytes: of weights, inputs and outputs of all nodes, as if nothing stayed in a cache.
    """

    flops: int
    bytes: int


def require_onnx() -> None:
    """Raise `DiffoundryError` that says how to get `onnx` where it is missing."""
    require_modules("counting operations and bytes", ["onnx"], "build")


def cost_of(bundle: Bundle, name: str, precision: str, shapes: Mapping[str, Shape]) -> Cost:
    """The cost of a call of a component with inputs of these shapes, of its model as it was exported.

    Where an engine computes the float32 model in another precision, its numbers count in that.
    Raises `BenchError` when its graph cannot be read or holds what is not counted.
    """
    variant, part = exported(bundle, name, precision)
    counted = model_cost(bundle.path(variant.model), shapes)
    return Cost(counted.flops, int(counted.bytes * part))


def exported(bundle: Bundle, name: str, precision: str) -> tuple[Variant, float]:
    """The model of a component with standard operators, and the part of its bytes that count in this precision.

    Raises `BenchError` when there is none.
    """
    variants = bundle.component(name).variants
    for kind, part in ((precision, 1.0), (FULL, 0.5)):
        if f"{kind}/{STANDARD}" in variants:
            return variants[f"{kind}/{STANDARD}"], part
    raise BenchError(f"{name} has no {precision} model with standard operators")


def model_cost(path: Path, shapes: Mapping[str, Shape]) -> Cost:
    """The cost of a call of the model in `path`; its weights are not read. shapes: of all inputs.

    Raises `BenchError` when it cannot be read, or a shape stays unknown.
    """
    require_onnx()
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        return _Walk(model, shapes).cost()
    except BenchError:
        raise
    except Exception as error:  # onnx raises several families of exceptions
        raise BenchError(f"{path} cannot be counted: {reason(error)}") from None


class _Walk:
    """Goes through the nodes in order, with the type of every tensor, and the values of those that shapes are made of.

    Shape inference by the whole graph loses the shapes behind arithmetic on shapes, which is why each node is inferred
    by itself, and what is known is computed.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape]) -> None:
        import onnx
        from onnx import helper, numpy_helper

        self._model, self._onnx = model, onnx
        self._types: dict[str, Any] = {}
        self._values: dict[str, np.ndarray[Any, Any]] = {}
        for tensor in model.graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _LARGEST_VALUE:
                self._values[tensor.name] = numpy_helper.to_array(tensor)
        for each in model.graph.input:
            if each.name in self._types:
                continue
            if each.name not in shapes:
                raise BenchError(f"no shape is given for the input {each.name!r}")
            kind = each.type.tensor_type.elem_type
            self._types[each.name] = helper.make_tensor_type_proto(kind, shapes[each.name])

    def cost(self) -> Cost:
        """Of all nodes."""
        flops = moved = 0
        for node in self._model.graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type in _UNCOUNTED:
                raise BenchError(f"the operator {node.domain or 'ai.onnx'}.{node.op_type} is not counted")
            self._infer(node)
            if all(name in self._values for name in node.output):  # computed ahead, or of a few numbers
                continue
            flops += self._flops(node)
            if node.op_type not in _VIEWS:
                moved += sum(self._bytes(name) for name in (*node.input, *node.output) if name)
        return Cost(flops, moved)

    def _infer(self, node: Any) -> None:
        """Note the types of a node's outputs, and their values where these are known."""
        onnx = self._onnx
        made = self._computed(node)
        if made is not None:
            for name, value in zip(node.output, made, strict=False):
                if name:
                    value = np.asarray(value)
                    self._values[name] = value
                    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
                    self._types[name] = onnx.helper.make_tensor_type_proto(kind, value.shape)
            return
        versions = {each.domain: each.version for each in self._model.opset_import}
        schema = onnx.defs.get_schema(node.op_type, versions.get("", 1))
        known = {name: onnx.numpy_helper.from_array(self._values[name]) for name in node.input if name in self._values}
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            node,
            {name: self._types[name] for name in node.input if name},
            known,
            opset_imports=list(self._model.opset_import),
            ir_version=self._model.ir_version,
        )
        for name in filter(None, node.output):
            if name not in found or _shape(found[name]) is None:
                raise BenchError(f"the shape of {name!r}, which {node.op_type} makes, is not known")
            self._types[name] = found[name]

    def _computed(self, node: Any) -> list[Any] | None:
        """The outputs of a node that only shapes decide, None for the others."""
        if node.op_type == "Shape":
            start, end = (_attribute(node, name) for name in ("start", "end"))
            return [np.array(self._shape(node.input[0])[start or 0 : end], np.int64)]
        if not all(name in self._values for name in node.input if name):
            return None
        from onnx.reference import ReferenceEvaluator

        made: list[Any] = ReferenceEvaluator(node).run(None, {name: self._values[name] for name in node.input if name})
        return made if all(np.size(value) <= _LARGEST_VALUE for value in made) else None

    def _flops(self, node: Any) -> int:
        kind = node.op_type
        if kind == "MatMul":
            return 2 * math.prod(self._shape(node.output[0])) * self._shape(node.input[0])[-1]
        if kind == "Gemm":
            inner = self._shape(node.input[0])[0 if _attribute(node, "transA") else 1]
            return 2 * math.prod(self._shape(node.output[0])) * inner
        if kind == "Conv":
            return 2 * math.prod(self._shape(node.output[0])) * math.prod(self._shape(node.input[1])[1:])
        if kind == "ConvTranspose":
            return 2 * math.prod(self._shape(node.input[0])) * math.prod(self._shape(node.input[1])[1:])
        return 0

    def _shape(self, name: str) -> Shape:
        shape = _shape(self._types[name])
        if shape is None:
            raise BenchError(f"the shape of {name!r} is not known")
        return shape

    def _bytes(self, name: str) -> int:
        tensor = self._types[name].tensor_type
        each = np.dtype(self._onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).itemsize
        return math.prod(self._shape(name)) * each


def _shape(kind: Any) -> Shape | None:
    """The shape of a tensor's type, None where a side is not known."""
    if not kind.tensor_type.HasField("shape"):
        return None
    sides = kind.tensor_type.shape.dim
    return tuple(side.dim_value for side in sides) if all(side.HasField("dim_value") for side in sides) else None


def _attribute(node: Any, name: str) -> int | None:
    return next((int(each.i) for each in node.attribute if each.name == name), None)
