"""What follows a matrix product, in one operator each: bias and residual, and the activations."""

from __future__ import annotations

from typing import Any

from .graph import (
    FLOATS,
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
)
from .norms import bias_of

SPLIT_GELU_WIDTHS = (1280, 2560, 3072, 5120, 6144)
"""Outputs of the GEGLU that ONNX Runtime 1.31 has kernels for."""


def fuse_activations(graph: Any) -> None:
    """`BiasSplitGelu` for GEGLU, `BiasGelu`, and `QuickGelu` for x·sigmoid(αx)."""
    for node in list(graph):
        if node.op_type == "Mul" and not _split_gelu(graph, node):
            _quick_gelu(graph, node)
        elif node.op_type == "Gelu" and attribute(node, "approximate", "none") == "none":
            _bias_gelu(graph, node)


def fuse_residuals(graph: Any) -> None:
    """`BiasAdd` where a matrix product gets a bias and then a residual."""
    for node in list(graph):
        if node.op_type != "Add" or rank(node.outputs[0]) != 3 or dtype_of(node.outputs[0]) not in FLOATS:
            continue
        for biased, other in sides(node, "Add"):
            found = bias_of(biased)
            if found and reader(biased.outputs[0], "Add") is node and same_shape(other, biased.outputs[0]):
                replace(graph, node, make_node("BiasAdd", [*found, other], {}, node.outputs))
                break


def _split_gelu(graph: Any, product: Any) -> bool:
    for gelu, left in sides(product, "Gelu"):
        halves = maker(left, "Split")
        if halves is None or len(halves.outputs) != 2 or attribute(gelu, "approximate", "none") != "none":
            continue
        added = maker(halves.inputs[0], "Add")
        found = None if added is None else bias_of(added)
        if found is None:
            continue
        alone = reader(added.outputs[0], "Split") is halves and reader(gelu.outputs[0], "Mul") is product
        across = attribute(halves, "axis", 0) in (-1, rank(halves.inputs[0]) - 1)
        wanted = across and left is halves.outputs[0] and gelu.inputs[0] is halves.outputs[1]
        width = (dims(product.outputs[0]) or (0,))[-1]
        if alone and wanted and width in SPLIT_GELU_WIDTHS and dtype_of(product.outputs[0]) in FLOATS:
            replace(graph, product, make_node("BiasSplitGelu", list(found), {}, product.outputs))
            return True
    return False


def _bias_gelu(graph: Any, gelu: Any) -> None:
    added = maker(gelu.inputs[0], "Add")
    found = None if added is None else bias_of(added)
    if found and reader(added.outputs[0], "Gelu") is gelu:
        replace(graph, gelu, make_node("BiasGelu", list(found), {}, gelu.outputs))


def _quick_gelu(graph: Any, product: Any) -> None:
    for sigmoid, x in sides(product, "Sigmoid"):
        factor = [1.0] if sigmoid.inputs[0] is x else _factor(sigmoid.inputs[0], x)
        alone = reader(sigmoid.outputs[0], "Mul") is product and rank(x) == rank(product.outputs[0])
        if factor is not None and alone:
            alpha = float(factor[0])
            replace(graph, product, make_node("QuickGelu", [x], {"alpha": alpha}, product.outputs))
            return


def _factor(scaled: Any, x: Any) -> Any:
    """The number that `x` was multiplied with to give `scaled`, alone in an array; None where there is none."""
    node = maker(scaled, "Mul")
    other = [value for value in node.inputs if value is not x] if node is not None and x in node.inputs else []
    return numbers_of(other[0], 1) if other else None
