"""A model whose groups of layers are turned to eight bits and back by an input, rounded value by value.

What it computes in eight bits is what an engine computes but for the order of its sums: products of rounded values are
exact in float32's reach of them. One session serves every choice of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.files import remove
from ...engines import DeviceArray, DeviceBinding, Engine, HostBinding
from ...engines.fusion.attention import ATTENTION
from ...engines.fusion.attention import Attention as Found
from ...engines.fusion.graph import DOMAIN, drop, make_node, save, weight_of
from ..graph import block, key, raise_opset, read
from ..sessions import start
from .attention import Attention, nodes_of
from .formats import Format, Scale
from .layers import Group, Layer
from .write import OPSET, Rounding

_NAME, _CHOICE, _SHIFT = "switched.onnx", "diffoundry:low", "diffoundry:shift"


class SwitchedEngine(Engine):
    """A component whose groups and attentions are in eight bits where `choose` says so. At first none is.

    values: what they are known by.
    """

    def __init__(self, engine: Engine, values: Sequence[str]) -> None:
        own = [each for each in engine.inputs if each.name not in (_CHOICE, _SHIFT)]
        super().__init__(engine.component, own, engine.outputs)
        self._engine, self.values = engine, tuple(values)
        self._choice, self._shift = np.zeros(len(values), np.bool_), np.zeros((), np.float32)

    def choose(self, low: Collection[str], shift: bool = False) -> None:
        """Compute the groups of these values in eight bits, and no other. shift: whether outputs are shifted."""
        self._choice[:] = [value in low for value in self.values]
        self._shift[...] = shift

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        return self._engine.to_device(array)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._engine({**feeds, **self._own})

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        return self._engine.bind_host({**feeds, **self._own}, twice)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        return self._engine.bind_device(
            {**tensors, **{name: self._engine.to_device(each) for name, each in self._own.items()}}
        )

    @property
    def _own(self) -> dict[str, Array]:
        return {_CHOICE: self._choice, _SHIFT: self._shift}


def switched(
    source: Path,
    component: str,
    form: Format,
    scales: Mapping[str, Scale],
    groups: Sequence[Group],
    attentions: Sequence[Attention],
    shifts: Mapping[str, Array],
) -> tuple[SwitchedEngine, Callable[[], None]]:
    """The engine of the model `source`, and what removes the weights that it keeps beside it.

    groups, attentions: those that can be turned; scales: of all that they read. shifts: see `write`, taken where
    `shift` says so.
    """
    model = read(source)
    raise_opset(model, OPSET, component)
    turning = _Turning(model, form, scales, len(groups) + len(attentions))
    nodes = {key(node): node for node in model.graph}
    for i, group in enumerate(groups):
        for layer in group.layers:
            turning.layer(i, layer, nodes[layer.name], shifts.get(layer.name))
    found = nodes_of(model)  # they read what was just replaced
    for i, attention in enumerate(attentions, len(groups)):
        turning.attention(i, found[attention.value])
    block(model)
    paths = [source.parent / f"{_NAME}{end}" for end in ("", "_data")]

    def clear() -> None:
        for path in paths:
            remove(path)

    try:
        save(model, source.parent, _NAME)
        engine = start(model, source.parent, component, fast=False)
    except BaseException:
        clear()
        raise
    return SwitchedEngine(engine, [*(each.value for each in groups), *(each.value for each in attentions)]), clear


class _Turning:
    """Puts layers and attentions of a graph into an If each, with what rounds their inputs and weights."""

    def __init__(self, model: Any, form: Format, scales: Mapping[str, Scale], count: int) -> None:
        """count: of the choices, which are an input of the graph."""
        import onnx_ir

        self._graph, self._scales, self._rounding = model.graph, scales, Rounding(model, form)
        self._choice = onnx_ir.val(_CHOICE, onnx_ir.DataType.BOOL, [count])
        self._shift = onnx_ir.val(_SHIFT, onnx_ir.DataType.FLOAT, [])
        self._graph.inputs.extend([self._choice, self._shift])
        self._places = [
            onnx_ir.val(f"low:{i}", const_value=onnx_ir.tensor(np.asarray(i, np.int64), name=f"low:{i}"))
            for i in range(count)
        ]
        for place in self._places:
            self._graph.register_initializer(place)

    def layer(self, i: int, layer: Layer, node: Any, shift: Array | None) -> None:
        """Turn a layer by choice i. node: which it is. shift: of its channels."""
        inputs = list(node.inputs)
        scale = self._scales[str(inputs[0].name)]
        before, value = self._rounding.nodes(inputs[0], scale.scale, scale.factors)
        widen, weight = self._rounding.weight_node(layer, weight_of(inputs[1]), scale.factors)
        low = [*before, widen, _copy(node, [value, weight, *inputs[2:]], f"{layer.name}:low")]
        if shift is not None:
            low += _shifted(self._graph, layer, low[-1].outputs[0], shift, self._shift)
        self._turn(i, node, low, [_copy(node, inputs, f"{layer.name}:full")])

    def attention(self, i: int, found: Found) -> None:
        """Turn an attention by choice i; as it is, one operator computes it, in blocks."""
        low: list[Any] = []
        for node in (found.scores, found.softmax, found.product, found.merged, found.output):
            given = list(node.inputs)
            if low:
                given[0] = low[-1].outputs[0]
            if node is found.scores or node is found.product:
                for at, value in enumerate(node.inputs):
                    before, given[at] = self._rounding.nodes(given[at], self._scales[str(value.name)].scale)
                    low += before
            low.append(_copy(node, given, f"{key(node)}:low"))
        full = make_node(ATTENTION, *found.as_one, found.output.outputs)
        full.outputs[0].name = f"{key(found.output)}:full"
        self._turn(i, found.output, low, [full])
        self._graph.opset_imports[DOMAIN] = 1

    def _turn(self, i: int, node: Any, low: list[Any], full: list[Any]) -> None:
        """Let an If take the place of `node`, and of what it alone reads: `low` by choice i, else `full`."""
        import onnx_ir

        name = key(node)
        on = onnx_ir.val(f"{name}:turn", onnx_ir.DataType.BOOL, [])
        pick = onnx_ir.node("Gather", [self._choice, self._places[i]], {"axis": 0}, outputs=[on])
        for number, each in enumerate(low):  # a name is given once in all graphs
            for made in each.outputs:
                made.name = f"{made.name}:{name}:{number}"
        branches = {
            branch: onnx_ir.Graph([], [part[-1].outputs[0]], nodes=part, name=f"{name}:{branch}")
            for branch, part in (("then_branch", low), ("else_branch", full))
        }
        old = node.outputs[0]
        made = onnx_ir.val(f"{name}:either", old.dtype, old.shape)
        self._graph.insert_before(node, [pick, onnx_ir.node("If", [on], branches, outputs=[made])])
        _replace(self._graph, old, made)
        drop(self._graph, node)


def _shifted(graph: Any, layer: Layer, made: Any, by: Array, shift: Any) -> list[Any]:
    """The nodes that add `by` to each channel of what a layer made, times the input `shift`."""
    import onnx_ir

    name = f"{layer.name}:shift"
    array = by.reshape(-1, *(1,) * (len(layer.shape) - 2)) if layer.kind == "Conv" else by
    constant = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(array, np.float32), name=name))
    graph.register_initializer(constant)
    taken, moved = (onnx_ir.val(f"{name}:{each}", made.dtype) for each in ("taken", "moved"))
    moved.shape = made.shape
    return [
        onnx_ir.node("Mul", [constant, shift], outputs=[taken]),
        onnx_ir.node("Add", [made, taken], outputs=[moved]),
    ]


def _replace(graph: Any, old: Any, new: Any) -> None:
    """Let all that reads `old` read `new`, which takes its name, so that an output keeps it."""
    name = old.name
    old.name = f"{name}:old"
    new.name = name
    for reader, place in list(old.uses()):
        reader.replace_input_with(place, new)
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = new


def _copy(node: Any, inputs: Sequence[Any], name: str) -> Any:
    import onnx_ir

    made = onnx_ir.val(name, node.outputs[0].dtype, node.outputs[0].shape)
    return onnx_ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=[made])
