"""A component's ONNX in a lower precision, and the same computed in float32 with every value rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.fusion.graph import map_tensor, save, weight_of
from .graph import (
    MAKERS,
    MOVES,
    Castable,
    castable,
    key,
    make_cast,
    opset,
    raise_opset,
    read,
)
from .precision import MASK, Precision


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """A component in a lower precision.

    model: its path in the bundle, such as `unet/fp16.onnx`. files: the SHA-256 of the model and of its external data.
    report: JSON; which nodes stayed in float32 and why, how many nodes compute in each type, and how that was measured.
    """

    model: str
    files: dict[str, str]
    report: dict[str, Any]


def write(source: Path, component: str, precision: Precision, low: Mapping[str, bool]) -> list[Path]:
    """Write the model `source` in `precision` beside it.

    low: whether each node that makes floats, by `graph.key`, computes in the lower type; other nodes, such as
    comparisons, read the type that is there. The same input gives the same bytes.
    Returns the files of the model: the graph, its weights where they are large, and the file of the weights of `source`
    where it shares some. Raises `DiffoundryError` when the disk is full; what stood there before then still stands.
    """
    model = read(source)
    raise_opset(model, precision.opset, component)
    convert(model, precision, low)
    return save(model, source.parent, f"{precision.name}.onnx")


def convert(model: Any, precision: Precision, low: Mapping[str, bool]) -> None:
    """Put `model`, whose opset admits it, into `precision` in place; see `write` for `low`."""
    _Rewriter(model, precision).run(low)


def emulated(model: Any, precision: Precision) -> Any:
    """The converted `model` with its nodes in float32, where every value of the lower type is rounded to it.

    ONNX Runtime's CPU computes a 16-bit graph in float32 and drops the casts between, which hides an overflow, and has
    no kernels for some types; explicit pairs of casts it keeps. It is changed in place.
    """
    import onnx_ir

    graph = model.graph
    low = onnx_ir.DataType[precision.dtype]
    order = {node: i for i, node in enumerate(graph)}
    for value in [value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == low]:
        readers = list(value.uses())
        raised = make_cast(value, onnx_ir.DataType.FLOAT, f"{value.name}:float", "raise:")
        if readers:  # right before the first, so that one weight at a time is in float32
            graph.insert_before(min((node for node, _ in readers), key=order.__getitem__), raised)
        for node, place in readers:
            node.replace_input_with(place, raised.outputs[0])
    for node in list(graph):
        for made in [made for made in node.outputs if made.dtype == low]:
            name, readers, casts = made.name, list(made.uses()), []
            if node.op_type in MOVES:
                made.dtype = onnx_ir.DataType.FLOAT
                continue
            if node.op_type in MAKERS:
                made.name, stored = f"{name}:{precision.name}", made
            else:
                made.name, made.dtype = f"{name}:exact", onnx_ir.DataType.FLOAT
                casts.append(make_cast(made, low, f"{name}:{precision.name}", "round:"))
                stored = casts[0].outputs[0]
            up = make_cast(stored, onnx_ir.DataType.FLOAT, str(name), "raise:")
            graph.insert_after(node, [*casts, up])
            for reader, place in readers:
                reader.replace_input_with(place, up.outputs[0])
    return model


class _Rewriter:
    """Rewrites a float32 model in place."""

    def __init__(self, model: Any, precision: Precision) -> None:
        import onnx_ir

        self._graph, self._precision = model.graph, precision
        self._version = opset(model)
        self._low, self._float = onnx_ir.DataType[precision.dtype], onnx_ir.DataType.FLOAT
        self._made: dict[tuple[str, Any], Any] = {}

    def run(self, low: Mapping[str, bool]) -> None:
        widened = {node for node in self._graph if weight_of(node.outputs[0]) is not None}
        nodes = [(node, castable(node, self._version, self._precision)) for node in self._graph if node not in widened]
        for node, taken in nodes:
            if not (low[key(node)] if taken.outputs else self._reads_low(node, taken)):
                taken = Castable()
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype in (self._low, self._float):
                    wanted = self._low if i in taken.inputs else self._float
                    if value.dtype != wanted:
                        node.replace_input_with(i, self._converted(value, wanted, node))
            if taken.outputs:
                self._convert_outputs(node, taken)
        self._drop_unused()

    def _reads_low(self, node: Any, taken: Castable) -> bool:
        """Whether a node that makes no float finds the lower type in all that it reads of other nodes."""
        read = [node.inputs[i] for i in taken.inputs if weight_of(node.inputs[i]) is None]
        return all(value.dtype == self._low for value in read)

    def _convert_outputs(self, node: Any, taken: Castable) -> None:
        import onnx_ir

        if node.op_type == "Cast":
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(self._low))
        elif node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            value = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            node.attributes["value"] = onnx_ir.AttrTensor("value", _rounded(value, self._precision, "value"))
        for i in taken.outputs:
            made = node.outputs[i]
            made.dtype = self._low
            if made.is_graph_output():
                name, place = made.name, self._graph.outputs.index(made)
                made.name = f"{name}:{self._precision.name}"
                raised = make_cast(made, self._float, name)
                self._graph.insert_after(node, raised)
                self._graph.outputs[place] = raised.outputs[0]
                self._made[made.name, self._float] = raised.outputs[0]

    def _converted(self, value: Any, wanted: Any, reader: Any) -> Any:
        made = self._made.get((value.name, wanted))
        if made is None:
            suffix = self._precision.name if wanted == self._low else "float"
            weight = weight_of(value)
            if weight is not None and wanted == self._low:
                made = weight if weight.dtype == wanted else self._weight(weight, f"{weight.name}:{suffix}")
            else:
                cast = make_cast(value, wanted, f"{value.name}:{suffix}")
                self._graph.insert_before(reader, cast)
                made = cast.outputs[0]
            self._made[value.name, wanted] = made
        return made

    def _weight(self, value: Any, name: str) -> Any:
        """An initializer of the lower type, made when it is written, so that one at a time is in memory."""
        import onnx_ir

        tensor, precision = value.const_value, self._precision
        made = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(self._low))
        made.const_value = onnx_ir.LazyTensor(
            lambda: map_tensor(tensor, lambda array: _rounded(array, precision, name)),
            dtype=self._low,
            shape=tensor.shape,
            name=name,
        )
        self._graph.register_initializer(made)
        return made

    def _drop_unused(self) -> None:
        """Leave out weights, and casts of weights, that nobody reads any more."""
        for node in list(self._graph):
            if weight_of(node.outputs[0]) is not None and not node.outputs[0].uses():
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if value.dtype.is_floating_point() and not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]


def round_to(array: Any, precision: Precision) -> Any:
    """An array in the lower type. What stands for infinity becomes the largest finite value, as it must add."""
    import ml_dtypes

    kind = np.float16 if precision.name == "fp16" else ml_dtypes.bfloat16
    array = array.astype(np.float32, copy=False)
    masks = np.isfinite(array) & (np.abs(array) >= MASK)
    if masks.any():
        array = np.where(masks, np.sign(array) * np.float32(precision.largest), array)
    with np.errstate(over="ignore"):
        return np.asarray(array.astype(kind), order="C")


def _rounded(array: Any, precision: Precision, name: str) -> Any:
    import onnx_ir

    return onnx_ir.tensor(round_to(array, precision), name=name)
