"""The weights of the plain denoiser, which the graphs that are written over them have by a link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...common.files import link_or_copy, read_json
from ...engines.fusion.graph import moved
from .weights import WEIGHTS_NAME

PLAIN_DATA = "plain.onnx_data"
"""What the large weights of the plain graph are called beside the other."""


def link_weights(plain: Path, folder: Path) -> None:
    """Link the large weights of the graph `plain`, where it has some beside it, into `folder`."""
    data = plain.with_name(f"{plain.name}_data")
    if data.exists():
        link_or_copy(data, folder / PLAIN_DATA)


def in_plain(stored: Any, folder: Path) -> Any:
    """The tensor `stored`, which lies beside the plain graph, as one of a graph in `folder`."""
    return moved(stored, folder, PLAIN_DATA)


def share_weights(model: Any, plain: Path, folder: Path) -> None:
    """Let `model`, which was traced from the same weights as the graph `plain`, read the large ones from a link.

    Those are shared that come from the same weight of the checkpoint in the same order, or are the same part of the
    module by their name, and have the same type and shape. The exporter's own names are other ones in each graph.
    """
    import onnx_ir

    known = {_source(entry): name for name, entry in _sources(plain.parent).items()}
    own, theirs = _sources(folder), onnx_ir.load(plain).graph.initializers
    link_weights(plain, folder)
    for name, value in model.graph.initializers.items():
        same = known.get(_source(own[name])) if name in own else name if name.startswith("model.") else None
        stored = theirs[same].const_value if same in theirs else None
        if isinstance(stored, onnx_ir.ExternalTensor) and _kind(stored) == _kind(value.const_value):
            value.const_value = in_plain(stored, folder)


def _sources(folder: Path) -> dict[str, Any]:
    """By the names of initializers, which weights the graph in `folder` has them of."""
    found: dict[str, Any] = read_json(folder / WEIGHTS_NAME, "the sources of its weights")
    return found


def _source(entry: Any) -> str:
    return json.dumps(entry, sort_keys=True)


def _kind(tensor: Any) -> Any:
    return None if tensor is None else (tensor.dtype, list(tensor.shape))
