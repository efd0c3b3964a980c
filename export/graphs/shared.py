"""The weights of the plain denoiser, which the graphs that are written over them have by a link."""

from __future__ import annotations

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

    Those are shared that have the same name, type and shape, and come from a weight of the checkpoint, or are a part
    of the module by their name.
    """
    import onnx_ir

    known = read_json(plain.with_name(WEIGHTS_NAME), "the sources of its weights")
    theirs = onnx_ir.load(plain).graph.initializers
    link_weights(plain, folder)
    for name, value in model.graph.initializers.items():
        of_module = name in known or name.startswith("model.")
        stored = theirs[name].const_value if of_module and name in theirs else None
        if isinstance(stored, onnx_ir.ExternalTensor) and _kind(stored) == _kind(value.const_value):
            value.const_value = in_plain(stored, folder)


def _kind(tensor: Any) -> Any:
    return None if tensor is None else (tensor.dtype, list(tensor.shape))
