"""The graphs that ONNX Runtime's CPU provider runs fastest.

The exported graph holds the standard's operators alone, so that every tool reads it. There the scores of all tokens
by all tokens are a tensor; ONNX Runtime's own operator works through them in blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .attention import fuse_attention
from .norms import fuse_rms_norms
from .per_prompt import split

_FUSED, _PER_PROMPT = "fused.onnx", "per_prompt.onnx"


def fuse_for_cpu(
    model: Path, per_prompt: Sequence[str], names: tuple[str, str] = (_FUSED, _PER_PROMPT)
) -> tuple[str, str] | None:
    """Write the first of `names` beside `model`; None when the model has neither attention nor anything to cut off.

    per_prompt: inputs that stay the same from step to step. What depends on them alone is cut off into
    the second, whose outputs are inputs of the fused graph. Returns the names of the two graphs, "" for the
    second where there is nothing to cut off. All graphs share the external weights.
    """
    import onnx_ir

    loaded = onnx_ir.load(model)
    fused, part = fuse_model_for_cpu(loaded, per_prompt)
    if not fused and part is None:
        return None
    if part is not None:
        onnx_ir.save(part, model.with_name(names[1]))
    onnx_ir.save(loaded, model.with_name(names[0]))
    return names[0], "" if part is None else names[1]


def fuse_model_for_cpu(model: Any, per_prompt: Sequence[str]) -> tuple[int, Any | None]:
    """The same with an `onnx_ir.Model`, in place. Returns how many operators were made, and the part cut off."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fused = fuse_attention(model, masked=False) + fuse_rms_norms(model.graph)
    RemoveUnusedNodesPass()(model)
    return fused, split(model, per_prompt)
