"""Attention as one operator, and the prompt's part cut off, in graphs beside the exported one for ONNX Runtime's CPU.

The exported graph holds the standard's operators alone, so that every tool reads it. There the scores of all tokens
by all tokens are a tensor; ONNX Runtime's own operator works through them in blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array

_FUSED, _PER_PROMPT = "fused.onnx", "per_prompt.onnx"
_DOMAIN = "com.microsoft"
_ON_THE_WAY = ("Mul", "Transpose", "Reshape")
"""What lies between the projections, (B, S, H·D), and the product of queries and keys."""


def fuse(model: Path, per_prompt: Sequence[str]) -> tuple[str, str] | None:
    """Write `fused.onnx` beside `model`; None when the model holds no attention to fuse.

    per_prompt: inputs that stay the same from step to step. What depends on them alone is cut off into
    `per_prompt.onnx`, whose outputs are inputs of the fused graph. Returns the names of the two graphs, "" for the
    second where there is nothing to cut off. All graphs share the external weights.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    loaded = onnx_ir.load(model)
    fused = [node for node in list(loaded.graph) if _fuse_attention(loaded.graph, node)]
    if not fused:
        return None
    loaded.graph.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(loaded)
    part = _split(loaded, per_prompt)
    if part is not None:
        onnx_ir.save(part, model.with_name(_PER_PROMPT))
    onnx_ir.save(loaded, model.with_name(_FUSED))
    return _FUSED, "" if part is None else _PER_PROMPT


def _split(model: Any, per_prompt: Sequence[str]) -> Any:
    """Cut off what depends on the inputs `per_prompt` alone, as a model of its own; None when that is nothing.

    What it makes becomes inputs of `model`.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    inputs = [value for value in graph.inputs if value.name in per_prompt]
    alone, constants, rest = set(inputs), set(graph.initializers.values()), []
    for node in graph:
        read = set(node.inputs) - {None}
        if read and read <= constants:  # the cast of a weight
            constants.update(node.outputs)
        if read & alone and all(value in alone or value in constants for value in read):
            alone.update(node.outputs)
        else:
            rest.append(node)
    crossing = {value.name: value for node in rest for value in node.inputs if value in alone and value not in inputs}
    if not crossing or any(value.shape is None for value in crossing.values()):
        return None
    part = onnx_ir.Model(
        onnx_ir.convenience.extract(graph, inputs, sorted(crossing)),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )
    for name, value in sorted(crossing.items()):
        given = onnx_ir.Value(name=name, type=value.type, shape=value.shape)
        onnx_ir.convenience.replace_all_uses_with(value, given)
        graph.inputs.append(given)
    RemoveUnusedNodesPass()(model)
    for each in (graph, part.graph):
        each.inputs[:] = [value for value in each.inputs if value.uses()]
    return part


def _fuse_attention(graph: Any, softmax: Any) -> bool:
    """Let one operator take the place of the attention around `softmax`; False when it is none or is masked."""
    import onnx_ir

    scores = softmax.inputs[0].producer() if softmax.op_type == "Softmax" else None
    product = _reader(softmax.outputs[0], "MatMul")
    if scores is None or scores.op_type != "MatMul" or product is None or product.inputs[0] is not softmax.outputs[0]:
        return False
    query, key, value = (_source(each) for each in (*scores.inputs, product.inputs[1]))
    merged = _reader(product.outputs[0], "Transpose")
    output = None if merged is None else _reader(merged.outputs[0], "Reshape")
    if query is None or key is None or value is None or output is None:
        return False
    heads, scale = query[2], query[1] * key[1]
    if heads < 1 or value[1] != 1 or not heads == key[2] == value[2] or not math.isfinite(scale):
        return False
    fused = onnx_ir.node(
        "MultiHeadAttention",
        [query[0], key[0], value[0]],
        {"num_heads": heads, "scale": scale},
        domain=_DOMAIN,
    )
    onnx_ir.convenience.replace_nodes_and_values(graph, output, [output], [fused], output.outputs, fused.outputs)
    return True


def _reader(value: Any, kind: str) -> Any:
    """The only reader of a tensor, if it is of this kind."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def _source(value: Any) -> tuple[Any, float, int] | None:
    """The projection that `value` was split from, the scale on the way, and the number of heads."""
    scale, heads = 1.0, 0
    while (node := value.producer()) is not None and node.op_type in _ON_THE_WAY:
        if node.op_type == "Mul":
            factor = _constant(node.inputs[1], 1)
            if factor is None:
                return None
            scale *= float(factor[0])
        elif node.op_type == "Reshape":
            heads = _heads(node.inputs[1])
        value = node.inputs[0]
    return (value, scale, heads) if heads else None


def _heads(shape: Any) -> int:
    """The third of four sizes that a Reshape makes, (B, S, H, D), where it is a constant; else 0."""
    concat = shape.producer()
    if concat is None:
        sizes = _constant(shape, 4)
        return 0 if sizes is None else int(sizes[2])
    third = _constant(concat.inputs[2], 1) if concat.op_type == "Concat" and len(concat.inputs) == 4 else None
    return 0 if third is None else int(third[0])


def _constant(value: Any, size: int) -> Array | None:
    """The numbers of an initializer of `size` numbers; None for any other value."""
    tensor = value.const_value
    return None if tensor is None or tensor.size != size else np.asarray(tensor.numpy()).reshape(-1)
