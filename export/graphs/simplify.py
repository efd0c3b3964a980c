"""A traced graph without what does nothing and what names the machine that it was traced on."""

from __future__ import annotations

from typing import Any

_ROUNDS = 2
_RULES = (
    "mul_by_1_rule",
    "add_0_rule",
    "sub_0_rule",
    "div_by_1_rule",
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "flatten_to_reshape_rule",
    "reshape_reshape_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "squeeze_reshape_1d_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
)
"""Of onnxscript's rules, those for operators that diffusion models have, in its order.

It tries each rule at each node, and compares each Slice with all nodes for one of those that are not here.
"""
_COMMUTE = ("mul_by_1_rule", "add_0_rule")


def simplify(model: Any) -> None:
    """Simplify an `onnx_ir.Model` of the exporter in place.

    It computes the same but for rounding. The same model gives the same graph wherever it is traced.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as known

    rules: list[Any] = []
    for name in _RULES:
        rule = getattr(known, name)
        rules += rule.commute() if name in _COMMUTE else [rule]
    rewrite = RewritePass(rules)
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        changed = fold_constants_ir(model, onnx_shape_inference=True).modified
        changed |= rewrite(model).modified
        common.RemoveUnusedNodesPass()(model)
        if not changed:
            break
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    _forget(model)


def _forget(model: Any) -> None:
    """Drop what the exporter notes of the program that was traced: paths of its files, half the size of a graph."""
    graph = model.graph
    values = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()
        part.doc_string = None
