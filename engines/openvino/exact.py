"""The sinusoidal embedding of the timestep, computed in float32 whatever the model is computed in.

A timestep of up to a thousand is an angle: in bfloat16, which rounds it by up to two, its sine and cosine are noise.
diffusers computes them in float32 as well (`get_timestep_embedding`). They are cut off into a model of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .device import module

_WAVES = ("Sin", "Cos")


def waves(model: Any, timestep: str) -> Any:
    """The part of `model` that makes the sine and cosine of its input `timestep`; None where there is none."""
    openvino = module()
    found = list(_of(model, timestep))
    if not found:
        return None
    for wave in found:
        wave.output(0).set_names({_name(wave)})
    results = [openvino.opset13.result(wave.output(0)) for wave in found]
    read = [each for each in model.get_parameters() if _leads_to(each, set(map(_key, found)))]
    return openvino.Model(results, read, "waves")


def without_waves(model: Any, timestep: str) -> Any:
    """`model` with those sines and cosines as inputs, and without `timestep` where nothing else reads it."""
    openvino = module()
    for wave in list(_of(model, timestep)):
        output = wave.output(0)
        given = openvino.opset13.parameter(output.get_partial_shape(), output.get_element_type(), _name(wave))
        given.output(0).set_names({_name(wave)})
        for reader in output.get_target_inputs():
            reader.replace_source_output(given.output(0))
        model.add_parameters([given])
    results = set(map(_key, model.get_results()))
    for each in model.get_parameters():
        if timestep in each.output(0).get_names() and not _leads_to(each, results):
            model.remove_parameter(each)
    model.validate_nodes_and_infer_types()
    return model


def _of(model: Any, timestep: str) -> Iterator[Any]:
    """The sines and cosines of what `timestep` decides, beside constants and sizes, in the order of the model."""
    alone: set[str] = set()
    others: set[str] = set()
    for node in model.get_ordered_ops():
        kind, sources = node.get_type_name(), {_key(each.get_source_output().get_node()) for each in node.inputs()}
        if kind == "Parameter":
            if timestep in node.output(0).get_names():
                alone.add(_key(node))
        elif kind == "ShapeOf" or sources <= others:
            others.add(_key(node))
        elif sources <= alone | others:
            alone.add(_key(node))
            if kind in _WAVES:
                yield node


def _key(node: Any) -> str:
    return str(node.get_friendly_name())


def _leads_to(parameter: Any, keys: set[str]) -> bool:
    """Whether a node of one of these keys hangs on this input."""
    todo, seen = [parameter], {_key(parameter)}
    while todo:
        node = todo.pop()
        if _key(node) in keys:
            return True
        readers = [each.get_node() for output in node.outputs() for each in output.get_target_inputs()]
        new = [each for each in readers if _key(each) not in seen]
        seen.update(map(_key, new))
        todo += new
    return False


def _name(wave: Any) -> str:
    return f"{_key(wave)}:wave"
