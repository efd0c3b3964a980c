"""Weights of products in eight bits beside values in floats.

Each output of a matrix product reads its weights in blocks of 32 that share a scale, their largest magnitude over 127
(symmetric, so that zero stays zero). `DequantizeLinear` of ONNX, opset 21, stands between the weights and the product;
ONNX Runtime on the processor makes one operator of both, OpenVINO one kernel, and neither keeps the weights as floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...common.arrays import Array
from .graph import add_weight, dims, dtype_of, map_tensor, weight_of

BLOCK = 32
_OPSET = 21
"""The first in which scales are by block."""
_MOST = 127
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


def store_in_int8(model: Any) -> list[str]:
    """Let all products with matrices in `model` read int8 weights, in place. Returns the names of the weights.

    Weights are read, rounded and written one at a time, when the model is saved, and all of them are then its own.
    Matrices stay that have no whole number of blocks.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph, stored = model.graph, []
    for node in list(graph):
        weight = weight_of(node.inputs[1]) if node.op_type == "MatMul" else None
        shape = dims(weight) or ()
        if weight is None or len(shape) != 2 or shape[0] % BLOCK or dtype_of(weight) not in _FLOATS:
            continue
        reads, gives = shape
        whole = add_weight(graph, f"{weight.name}:int8", weight, onnx_ir.DataType.INT8, shape, _whole)
        size = (reads // BLOCK, gives)
        scales = add_weight(graph, f"{weight.name}:scales", weight, onnx_ir.DataType.FLOAT, size, block_scales)
        widened = onnx_ir.node("DequantizeLinear", [whole, scales], {"axis": 0, "block_size": BLOCK})
        [made] = widened.outputs
        made.name, made.type, made.shape = f"{node.name}:weight", node.inputs[1].type, onnx_ir.Shape(shape)
        graph.insert_before(node, widened)
        node.replace_input_with(1, made)
        stored.append(str(weight.name))
    RemoveUnusedNodesPass()(model)
    for value in graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            value.const_value = _copied(value.const_value)
    graph.opset_imports[""] = max(_OPSET, graph.opset_imports[""])
    return stored


def block_scales(weight: Array) -> Array:
    """The scales of a matrix (reads, gives), float32 (reads / `BLOCK`, gives); of a block of zeros it is 1."""
    blocks = np.abs(weight, dtype=np.float32).reshape(-1, BLOCK, weight.shape[1])
    scales: Array = blocks.max(axis=1) / np.float32(_MOST)
    scales[scales == 0] = 1
    return scales


def _whole(weight: Array) -> Array:
    scales = block_scales(weight)
    blocks = weight.astype(np.float32).reshape(len(scales), BLOCK, -1) / scales[:, None]
    return np.rint(blocks).clip(-_MOST, _MOST).astype(np.int8).reshape(weight.shape)


def _copied(tensor: Any) -> Any:
    """A tensor of another file as one of the model's own, which is read when it is written."""
    import onnx_ir

    def read() -> Any:
        return onnx_ir.tensor(map_tensor(tensor, np.array), dtype=tensor.dtype, name=tensor.name)

    return onnx_ir.LazyTensor(read, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
