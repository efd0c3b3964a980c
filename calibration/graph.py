"""A component's ONNX graph as calibration sees it: its values in float32, and which nodes have a form in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import DiffoundryError
from ..engines.fusion.attention import fuse_attention
from ..engines.fusion.graph import map_tensor, open_model, weight_of
from .precision import MASK, Precision

MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose")
) | {"Unsqueeze", "DepthToSpace", "SpaceToDepth"}
"""Operators whose output holds values of their inputs and no others."""
CONTRACTIONS = frozenset(("Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
"""Operators that take time for their arithmetic rather than for the bytes they move."""
MAKERS = frozenset(("Cast", "ConstantOfShape"))
"""Operators that make floats of something else, in a type that an attribute names."""
CAST = "cast:"
"""What the name of a cast between the types begins with."""
_LARGEST_MASK = 1 << 16


@dataclass(frozen=True, slots=True)
class Castable:
    """Which inputs and outputs of a node take a lower type."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def read(path: Path) -> Any:
    """The `onnx_ir.Model` in `path`, its external weights on disk, constants as initializers, every type known.

    Raises `DiffoundryError` when it is no ONNX model or has control flow or functions of its own.
    """
    model = open_model(path)
    graph = model.graph
    if not len(graph) or list(graph.subgraphs()) or model.functions:
        what = "no nodes" if not len(graph) else "control flow or functions of its own"
        raise DiffoundryError(f"{path} has {what} and cannot be calibrated: use --precision fp32")
    untyped = [value for node in graph for value in node.outputs if value.name and value.dtype is None]
    if untyped:
        _infer(untyped, path)
    return model


def read_blocked(path: Path) -> Any:
    """The model that `read` gives, with attentions as one operator that works in blocks: faster to measure with.

    All else of it has the names that it has there.
    """
    model = read(path)
    block(model)
    return model


def block(model: Any) -> None:
    """Let one operator take the place of each attention, see `read_blocked`."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if fuse_attention(model, masked=False):
        RemoveUnusedNodesPass()(model)


def _infer(untyped: list[Any], path: Path) -> None:
    """Fill in the types that the file does not tell. Raises `DiffoundryError` when they cannot be inferred."""
    import onnx
    import onnx_ir

    proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    known = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    for value in untyped:
        if not known.get(value.name):
            raise DiffoundryError(f"{path}: the type of {value.name!r} is not known: compile it again")
        value.dtype = onnx_ir.DataType(known[value.name])


def key(node: Any) -> str:
    """What a node is called here: its first output."""
    return str(node.outputs[0].name)


def is_float(value: Any) -> bool:
    """Whether a value, or a missing input, is a float32 tensor."""
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def opset(model: Any) -> int:
    """The version of the standard's operators that a model uses."""
    return int(model.opset_imports.get("", 1))


def version_for(model: Any, precision: Precision) -> int:
    """The version of the operators that a model uses once it is in `precision`."""
    return max(opset(model), precision.opset)


def castable(node: Any, version: int, precision: Precision) -> Castable:
    """What `node` of opset `version` can take and make in `precision`: nothing where its operator does not admit it.

    A node without a float output, such as a comparison, may only take it.
    """
    import onnx

    if any(weight_of(made) is not None for made in node.outputs):
        return Castable()  # its readers take the weight that it widens
    floats = [i for i, value in enumerate(node.inputs) if is_float(value)]
    made = [i for i, value in enumerate(node.outputs) if is_float(value)]
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return Castable()
    wanted = f"tensor({precision.dtype.lower()})"
    admits = {t.type_param_str for t in schema.type_constraints if wanted in t.allowed_type_strs}
    ins = {i: schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in floats}
    outs = {i: schema.outputs[min(i, len(schema.outputs) - 1)].type_str for i in made}
    if not admits.issuperset(outs.values()):
        return Castable()
    if not made:
        return Castable(tuple(i for i, kind in ins.items() if kind in admits))
    shared = set(outs.values())
    taken = tuple(i for i, kind in ins.items() if kind in shared)
    return Castable(taken, tuple(outs)) if taken or node.op_type in MAKERS else Castable()


def raise_opset(model: Any, version: int, component: str) -> None:
    """Let `model` use the operators of opset `version`, when each differs from its old self in admitted types alone.

    Raises `DiffoundryError` for an operator that changed in more than that.
    """
    import onnx

    old = opset(model)
    if old >= version:
        return
    for name in sorted({node.op_type for node in model.graph if node.domain == ""}):
        before, after = (onnx.defs.get_schema(name, each) for each in (old, version))
        if before.since_version != after.since_version and _shape_of(before) != _shape_of(after):
            raise DiffoundryError(
                f"{component}: the operator {name} means something else in opset {version} than in {old}: "
                "use --precision fp32 or fp16"
            )
    model.graph.opset_imports[""] = version


def holds_masks(model: Any) -> bool:
    """Whether a constant is infinite or stands for it. Masks are small: large weights are not read for it."""
    small = [v.const_value for v in float_weights(model).values() if v.const_value.size <= _LARGEST_MASK]
    return any(map_tensor(tensor, lambda array: bool((np.abs(array) >= MASK).any())) for tensor in small)


def float_weights(model: Any) -> dict[str, Any]:
    """The float32 initializers by name."""
    return {name: value for name, value in model.graph.initializers.items() if is_float(value)}


def add_constant(graph: Any, name: str, number: Any) -> Any:
    """A new float32 initializer of `graph`."""
    import onnx_ir

    value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(number, np.float32), name=name))
    graph.register_initializer(value)
    return value


def make_cast(value: Any, to: Any, name: str, kind: str = CAST) -> Any:
    """A node that casts `value` to the type `to`."""
    import onnx_ir

    made = onnx_ir.val(name, to, value.shape)
    return onnx_ir.node("Cast", [value], {"to": int(to)}, outputs=[made], name=f"{kind}{name}")


def _shape_of(schema: Any) -> tuple[Any, ...]:
    """What a schema asks for, but for types and texts."""
    return (
        [(p.name, p.type_str, p.option) for p in schema.inputs],
        [(p.name, p.type_str, p.option) for p in schema.outputs],
        sorted((a.name, str(a.type), a.required, str(a.default_value)) for a in schema.attributes.values()),
    )
