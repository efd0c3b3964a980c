"""Trace a torch module to ONNX with named dynamic axes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import CheckpointError, reason
from ...common.files import write_json
from ...engines.fusion.graph import save
from ..weight_files import Place
from .shared import share_weights
from .simplify import simplify
from .spec import OPSET, ComponentSpec, argument
from .weights import WEIGHTS_NAME, weight_sources
from .weights import WIDENED as _WIDENED

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx_data"
_EXTERNAL_FROM_BYTES = 64 << 20
"""Models with more weights than this keep them beside the graph; a protobuf holds at most 2 GiB."""
_NAME = re.compile(r"[A-Za-z_]\w*")
_CHATTY = ("torch.onnx", "torch.fx", "torch.export", "onnxscript", "onnx_ir", "torch.utils._sympy", "torch._dynamo")


def trace(
    spec: ComponentSpec,
    module: Any,
    folder: Path,
    stored: Collection[str] = (),
    *,
    keep_half: bool = False,
    places: Mapping[str, Place] | None = None,
    shares: Path | None = None,
) -> None:
    """Write `module` as `folder/model.onnx` (and `model.onnx_data` when large), and `weights.json`.

    stored: the names of the weights in the checkpoint, none where there is none. The module has no weights after that.
    keep_half: write weights that the module holds in half precision as they are, each with a cast to float32 after it.
    places: where the weights lie by the module's names; they are then read from there, one at a time.
    shares: a graph of the same weights, whose large ones are linked and not written again.
    Raises `CheckpointError` when the exporter fails or fixed an axis that the spec names.
    """
    import onnx_ir
    import torch

    sizes = {name: axis.unit * (-(-axis.low // axis.unit) + 1 + i) for i, (name, axis) in enumerate(spec.axes.items())}
    sizes = spec.with_tied(sizes)
    drawn = spec.feeds(sizes, np.random.default_rng(0))
    feeds = {argument(name): torch.from_numpy(array) for name, array in drawn.items()}
    any_size = torch.export.Dim.DYNAMIC
    dynamic = {
        argument(t.name): {i: any_size for i, axis in enumerate(t.shape) if isinstance(axis, str)} for t in spec.inputs
    }
    with _quiet(), torch.no_grad():
        try:
            # the graph is captured without Dynamo, which takes several times as long and finds the same
            captured = torch.export.export(module, (), feeds, dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(
                captured,
                (),
                kwargs=feeds,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                output_names=[tensor.name for tensor in spec.outputs],
                verbose=False,
            )
        except Exception as error:  # the exporter wraps whatever the model raised
            raise CheckpointError(f"{spec.name} cannot be traced to ONNX: {reason(error)}") from error
    model = program.model
    called = {argument(tensor.name): tensor.name for tensor in spec.inputs}
    for value in model.graph.inputs:
        value.name = called.get(value.name, value.name)
    simplify(model)
    _name_axes(spec, model)
    _read_from(model, places or {})
    _fold_weights(model, keep_half)
    if spec.repeat:
        _repeat(spec.repeat, model)
    model.producer_name, model.producer_version = "diffoundry", ""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = DATA_NAME if weights > _EXTERNAL_FROM_BYTES else None
    if stored:
        write_json(folder / WEIGHTS_NAME, weight_sources(module, model, stored))
    if shares is None:
        onnx_ir.save(model, folder / MODEL_NAME, external_data=external)
    else:
        share_weights(model, shares, folder)
        save(model, folder, MODEL_NAME)
    _empty(module, model)


def _empty(module: Any, model: Any) -> None:
    """Let the weights go: the exporter's rules remember the last graph that they looked at, for good."""
    import torch

    for weight in (*module.parameters(), *module.buffers()):
        weight.data = torch.empty(0, dtype=weight.dtype)
    for value in model.graph.initializers.values():
        value.const_value = None


def _name_axes(spec: ComponentSpec, model: Any) -> None:
    """Give inputs and outputs the spec's names and axes. Raises `CheckpointError` when an axis became fixed."""
    import onnx_ir

    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    names: dict[str, str] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        value = values.get(tensor.name)
        if value is None or value.shape is None or len(value.shape) != len(tensor.shape):
            raise CheckpointError(
                f"{spec.name}: the traced model has no tensor {tensor.name!r} of rank {len(tensor.shape)}"
            )
        for i, axis in enumerate(tensor.shape):
            if isinstance(axis, str) and isinstance(value.shape[i], int):
                raise CheckpointError(
                    f"{spec.name}: axis {axis!r} of {tensor.name!r} was fixed to {value.shape[i]} in tracing"
                )
            if isinstance(axis, str):
                names.setdefault(str(value.shape[i]), axis)
        value.shape = onnx_ir.Shape(list(tensor.shape))
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = onnx_ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: dict[str, str]) -> int | str | None:
    """A size, or an expression of generated names, in the spec's names."""
    if isinstance(size, int):
        return size
    return None if size.value is None else _NAME.sub(lambda found: names.get(found[0], found[0]), size.value)


def _fold_weights(model: Any, keep_half: bool) -> None:
    """Let one float32 weight take the place of a half-precision one and of its casts and transpositions.

    The exporter folds small ones alone. Here each is made when it is written, so that one at a time is in memory.
    keep_half: let it be a half-precision one with its axes in order, and one cast.
    """
    import onnx_ir

    graph = model.graph
    half: dict[str, tuple[Any, list[int]]] = {}
    for node in [node for node in graph if node.op_type in ("Cast", "Transpose")]:
        stored, made = node.inputs[0], node.outputs[0]
        if stored is None or stored.name not in graph.initializers or stored.const_value is None:
            continue
        if made.dtype != onnx_ir.DataType.FLOAT:
            continue
        axes = list(node.attributes["perm"].as_ints() if node.op_type == "Transpose" else range(len(stored.shape)))
        name = "_".join([str(stored.name), "axes", *map(str, axes)])
        whole, order = half.get(stored.name, (stored.const_value, list(range(len(stored.shape)))))
        half[name] = whole, [order[axis] for axis in axes]
        _replace(graph, node, _folded(stored.const_value, axes, name))
    if keep_half:
        place = {node: i for i, node in enumerate(graph)}
        for name, (whole, order) in half.items():
            if name in graph.initializers and whole.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16):
                reader = min(graph.initializers[name].consumers(), key=place.__getitem__)
                _narrow(graph, name, whole, order, reader)


def _narrow(graph: Any, name: str, whole: Any, order: list[int], reader: Any) -> None:
    """Hold the float32 weight `name` as it is stored, with its axes in this order, and cast it before its `reader`."""
    import onnx_ir

    wide = graph.initializers.pop(name)
    value = onnx_ir.Value(name=name, shape=wide.shape, type=onnx_ir.TensorType(whole.dtype))
    value.const_value = onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.asarray(whole.numpy().transpose(order), order="C"), dtype=whole.dtype, name=name),
        dtype=whole.dtype,
        shape=wide.shape,
        name=name,
    )
    graph.register_initializer(value)
    cast = onnx_ir.node("Cast", [value], {"to": int(onnx_ir.DataType.FLOAT)}, name=f"{name}_float")
    wide.name, cast.outputs[0].name = None, f"{name}_float"
    cast.outputs[0].dtype, cast.outputs[0].shape = onnx_ir.DataType.FLOAT, wide.shape
    onnx_ir.convenience.replace_all_uses_with(wide, cast.outputs[0])
    graph.insert_before(reader, cast)


def _read_from(model: Any, places: Mapping[str, Place]) -> None:
    """Let the weights of the module be read from their files when they are written, rather than from its memory."""
    import onnx_ir

    for value in model.graph.initializers.values():
        place = places.get(_WIDENED.sub(r".\1", str(value.name).removeprefix("model.")))
        tensor = value.const_value
        kinds = {"BF16": onnx_ir.DataType.BFLOAT16, "F16": onnx_ir.DataType.FLOAT16, "F32": onnx_ir.DataType.FLOAT}
        if place is None or tensor is None or kinds.get(place.kind) != tensor.dtype:
            continue
        if tuple(tensor.shape) == place.shape:
            value.const_value = onnx_ir.LazyTensor(
                lambda place=place, tensor=tensor: onnx_ir.tensor(place.read(), dtype=tensor.dtype, name=tensor.name),
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
            )


def _folded(tensor: Any, axes: list[int], name: str) -> Any:
    """The value of the initializer `name`: `tensor` in float32 with its axes in another order, made when it is read."""
    import onnx_ir

    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.asarray(tensor.numpy().astype(np.float32).transpose(axes), order="C"), name=name),
        dtype=onnx_ir.DataType.FLOAT,
        shape=onnx_ir.Shape([tensor.shape[axis] for axis in axes]),
        name=name,
    )


def _replace(graph: Any, node: Any, tensor: Any) -> None:
    """Let an initializer of the value `tensor` take the place of `node`."""
    import onnx_ir

    stored, made = node.inputs[0], node.outputs[0]
    weight = graph.initializers.get(tensor.name)
    if weight is None:
        weight = onnx_ir.Value(name=tensor.name, shape=tensor.shape, type=made.type)
        weight.const_value = tensor
        graph.register_initializer(weight)
    onnx_ir.convenience.replace_all_uses_with(made, weight)
    graph.remove(node, safe=True)
    if not stored.uses():
        del graph.initializers[stored.name]


def _repeat(name: str, model: Any) -> None:
    """Let the vector input `name` hold one value for all rows: expand it to the rows of the first input."""
    import onnx_ir

    graph = model.graph
    vector = next(value for value in graph.inputs if value.name == name)
    rows = onnx_ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1}, name="rows_of_batch")
    expand = onnx_ir.node("Expand", [vector, rows.outputs[0]], name=f"{name}_of_rows")
    expand.outputs[0].name, expand.outputs[0].dtype, expand.outputs[0].shape = (
        f"{name}_of_rows",
        vector.dtype,
        vector.shape,
    )
    rows.outputs[0].name = "rows_of_batch"
    onnx_ir.convenience.replace_all_uses_with(vector, expand.outputs[0])
    expand.replace_input_with(0, vector)
    graph.insert_before(graph[0], [rows, expand])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on itself; its failures are exceptions."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
