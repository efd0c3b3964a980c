"""The graph that ONNX Runtime's CUDA provider runs fastest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .attention import fuse_attention
from .channels_last import channels_last, merge_sizes
from .graph import DOMAIN, dtype_of, open_model, save
from .linear import fuse_activations, fuse_residuals
from .norms import fuse_group_norms, fuse_rms_norms, fuse_skips
from .per_prompt import split

# fmt: off
_BFLOAT16 = {
    "Add", "BiasGelu", "Cast", "Concat", "Conv", "Div", "Expand", "Gather", "GatherND", "Gelu", "Gemm", "Identity",
    "LayerNormalization", "MatMul", "Mul", "MultiHeadAttention", "QuickGelu", "Reshape", "Sigmoid",
    "SkipLayerNormalization", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}
# fmt: on
"""Operators that have kernels for bfloat16 on CUDA."""


def fuse_for_cuda(source: Path, per_prompt: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Write the model `source` for CUDA beside it, in its own types.

    Attention, norms and what follows a matrix product become one operator each, feature maps have their channels last.
    per_prompt: inputs that stay the same from step to step, see `per_prompt.split`.
    Returns the files of the graph, and those of the graph that is run once, none where there is nothing to cut off.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    model = open_model(source)
    model.graph.opset_imports[DOMAIN] = 1
    fuse_attention(model, masked=True)
    fuse_rms_norms(model.graph)
    fuse_group_norms(model.graph)
    fuse_activations(model.graph)
    fuse_skips(model.graph)
    fuse_residuals(model.graph)
    channels_last(model)
    _widen(model.graph)
    merge_sizes(model.graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    part = split(model, per_prompt)
    name = source.stem if source.stem != "model" else "fp32"
    once = [] if part is None else save(part, source.parent, f"{name}.cuda.per_prompt.onnx")
    return save(model, source.parent, f"{name}.cuda.onnx"), once


def _widen(graph: Any) -> None:
    """Let operators that lack a kernel for their type compute in float32, in which token ids are exact, too."""
    import onnx_ir

    wide, narrow = onnx_ir.DataType.FLOAT, onnx_ir.DataType.BFLOAT16

    def cast(value: Any, to: Any, name: str) -> Any:
        made = onnx_ir.Value(name=name, type=onnx_ir.TensorType(to), shape=value.shape)
        return onnx_ir.node("Cast", [value], {"to": int(to)}, outputs=[made])

    for node in list(graph):
        is_whole = node.op_type == "ArgMax" and dtype_of(node.inputs[0]).startswith("INT")
        is_narrow = node.op_type not in _BFLOAT16
        for place, value in enumerate(node.inputs):
            if is_whole or (is_narrow and dtype_of(value) == narrow.name):
                before = cast(value, wide, f"{node.outputs[0].name}:wide{place}")
                graph.insert_before(node, before)
                node.replace_input_with(place, before.outputs[0])
        for made in node.outputs:
            if is_narrow and dtype_of(made) == narrow.name:
                after = cast(made, narrow, f"{made.name}:narrow")
                onnx_ir.convenience.replace_all_uses_with(made, after.outputs[0], replace_graph_outputs=True)
                after.replace_input_with(0, made)
                made.type = onnx_ir.TensorType(wide)
                graph.insert_after(node, after)
