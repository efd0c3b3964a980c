"""The graph that ONNX Runtime's CUDA provider runs fastest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .attention import fuse_attention
from .channels_last import channels_last, merge_sizes
from .graph import open_model, save
from .linear import fuse_activations, fuse_residuals
from .norms import fuse_group_norms, fuse_skips
from .per_prompt import split


def fuse_for_cuda(source: Path, per_prompt: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Write the model `source` for CUDA beside it, in its own types.

    Attention, norms and what follows a matrix product become one operator each, feature maps have their channels last.
    per_prompt: inputs that stay the same from step to step, see `per_prompt.split`.
    Returns the files of the graph, and those of the graph that is run once, none where there is nothing to cut off.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    model = open_model(source)
    fuse_attention(model, masked=True)
    fuse_group_norms(model.graph)
    fuse_activations(model.graph)
    fuse_skips(model.graph)
    fuse_residuals(model.graph)
    channels_last(model)
    merge_sizes(model.graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    part = split(model, per_prompt)
    name = source.stem if source.stem != "model" else "fp32"
    once = [] if part is None else save(part, source.parent, f"{name}.cuda.per_prompt.onnx")
    return save(model, source.parent, f"{name}.cuda.onnx"), once
