"""The denoiser that takes the residuals of ControlNets: its plain graph with additions, of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...bundle import Tensor
from ...common.errors import CheckpointError
from ...common.files import link_or_copy
from .trace import DATA_NAME, MODEL_NAME
from .weights import WEIGHTS_NAME


def write_controlled(plain: Path, folder: Path, residuals: Sequence[Tensor]) -> None:
    """Write the graph `plain` with `residuals` as inputs into `folder`; large weights are linked, not written again.

    residuals: one for each skip of a U-Net, in the order in which its way down makes them, and the last for its middle.
    Each is added to what the way up reads (Zhang et al. 2023, section 3.2).
    Raises `CheckpointError` for a graph of another build.
    """
    import onnx_ir

    model = onnx_ir.load(plain)
    graph = model.graph
    joins = [node for node in graph if _joins_pictures(node)]
    *down, middle = residuals
    if len(joins) != len(down):
        raise CheckpointError(
            f"the U-Net joins {len(joins)} values on its way up where its configuration tells {len(down)}: it is built "
            "in another way, and takes no ControlNet"
        )
    for node, tensor in zip(joins, reversed(down), strict=True):
        _add(graph, node, 1, tensor)
    _add(graph, joins[0], 0, middle)
    order = {tensor.name: i for i, tensor in enumerate(residuals)}
    own = [value for value in graph.inputs if value.name not in order]
    graph.inputs[:] = [*own, *sorted((v for v in graph.inputs if v.name in order), key=lambda v: order[v.name])]
    for name in (DATA_NAME, WEIGHTS_NAME):
        if plain.with_name(name).exists():
            link_or_copy(plain.with_name(name), folder / name)
    onnx_ir.save(model, folder / MODEL_NAME)


def _joins_pictures(node: Any) -> bool:
    """Whether a node joins two values along their channels."""
    shape = node.outputs[0].shape
    return (
        node.op_type == "Concat"
        and node.attributes["axis"].as_int() == 1
        and len(node.inputs) == 2
        and (shape is not None and len(shape) == 4)
    )


def _add(graph: Any, node: Any, i: int, tensor: Tensor) -> None:
    """Let input i of `node` have a new input of the graph added to it."""
    import onnx_ir

    read = node.inputs[i]
    given = onnx_ir.Value(
        name=tensor.name, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(list(tensor.shape))
    )
    graph.inputs.append(given)
    total = onnx_ir.node("Add", [read, given], name=f"{tensor.name}_added")
    total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = f"{tensor.name}_sum", read.type, read.shape
    graph.insert_before(node, total)
    node.replace_input_with(i, total.outputs[0])
