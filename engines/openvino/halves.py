"""What both halves of a guided call share, computed once.

With classifier-free guidance the second half of the rows holds the latents and timesteps of the first: until the model
reads a prompt, both halves are the same numbers. In a Stable Diffusion U-Net that is all before the first
cross-attention: a residual block and a self-attention, at the largest size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from ...common.arrays import Array
from .device import module


def with_one_half(model: Any, twice: Collection[str]) -> Any:
    """`model`, with what its inputs `twice` alone decide computed for the first half of their rows, then doubled.

    model: of static shapes. twice: inputs whose second half of rows repeats the first, or that have one row for all.
    The inputs and outputs stay as they are. Returns `model` itself where nothing can be shared.
    """
    rows = max((p.shape[0] for p in model.inputs if p.get_any_name() in twice and len(p.shape)), default=0)
    if rows < 2 or rows % 2:
        return model
    made = model.clone()
    alone = _alone(made, twice)
    crossing = [(output, readers) for output, readers in _crossing(made, alone) if not _is_input(output)]
    values = [each for each in crossing if each[0].get_element_type().is_real()]
    sizes = _sizes(model, [output for output, _ in crossing if not output.get_element_type().is_real()])
    if not values or sizes is None:
        return model
    openvino = module()
    op = openvino.opset13
    whole = {_port(output): list(output.shape) for output, _ in values}
    _halve(made, twice, rows, alone)
    read = [each for each in made.get_parameters() if each.output(0).get_any_name() in twice]
    openvino.Model([op.result(output) for output, _ in values], read, "half").validate_nodes_and_infer_types()
    for output, readers in crossing:
        name = _port(output)
        if name in sizes:
            source = op.constant(sizes[name]).output(0)
        elif list(output.shape) == whole[name]:  # it has no rows
            continue
        else:
            source = op.concat([output, output], 0).output(0)
            if list(source.shape) != whole[name]:
                return model
        for reader in readers:
            reader.replace_source_output(source)
    made.validate_nodes_and_infer_types()
    return made


def _alone(model: Any, twice: Collection[str]) -> set[str]:
    """The nodes that hang on the inputs `twice` and on no other; constants are not among them."""
    alone: set[str] = set()
    others: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {_key(each.get_source_output().get_node()) for each in node.inputs()}
        if node.get_type_name() == "Parameter":
            (alone if node.output(0).get_any_name() in twice else others).add(_key(node))
        elif sources & others:
            others.add(_key(node))
        elif sources & alone:
            alone.add(_key(node))
    return alone


def _crossing(model: Any, alone: set[str]) -> Iterator[tuple[Any, list[Any]]]:
    """The outputs of the nodes `alone` that others read, and where they read them."""
    for node in model.get_ordered_ops():
        if _key(node) in alone:
            for output in node.outputs():
                readers = [each for each in output.get_target_inputs() if _key(each.get_node()) not in alone]
                if readers:
                    yield output, readers


def _sizes(model: Any, asked: list[Any]) -> dict[str, Array] | None:
    """The values of outputs that the shapes of `model` decide, by `_port`; None when an input decides one of them."""
    wanted = {_port(output) for output in asked}
    if not wanted:
        return {}
    openvino, copy = module(), model.clone()
    op = openvino.opset13
    for node in list(copy.get_ordered_ops()):
        if node.get_type_name() == "ShapeOf":
            kind = node.output(0).get_element_type().to_dtype()
            size = op.constant(np.array(node.input(0).get_source_output().shape, kind)).output(0)
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(size)
    found = [output for node in copy.get_ordered_ops() for output in node.outputs() if _port(output) in wanted]
    names = [_port(output) for output in found]
    if len(names) < len(wanted) or any(_reads_an_input(output.get_node()) for output in found):
        return None
    part = openvino.Model([op.result(output) for output in found], [], "sizes")
    passes = import_module("openvino.passes")
    folding = passes.Manager()
    folding.register_pass(passes.ConstantFolding())
    folding.run_passes(part)
    constants = [result.input(0).get_source_output().get_node() for result in part.get_results()]
    if any(node.get_type_name() != "Constant" for node in constants):
        return None
    return {name: np.array(node.data) for name, node in zip(names, constants, strict=True)}


def _reads_an_input(node: Any) -> bool:
    todo, seen = [node], {_key(node)}
    while todo:
        each = todo.pop()
        if each.get_type_name() == "Parameter":
            return True
        sources = [port.get_source_output().get_node() for port in each.inputs()]
        todo += [source for source in sources if _key(source) not in seen]
        seen.update(map(_key, sources))
    return False


def _halve(model: Any, twice: Collection[str], rows: int, alone: set[str]) -> None:
    """Let the nodes `alone` read the first half of the rows of the inputs `twice`."""
    op = module().opset13
    for parameter in model.get_parameters():
        output = parameter.output(0)
        if output.get_any_name() not in twice or not output.shape or output.shape[0] != rows:
            continue
        readers = [each for each in output.get_target_inputs() if _key(each.get_node()) in alone]
        bounds = (op.constant(np.array([each], np.int64)) for each in (0, rows // 2, 1, 0))
        half = op.slice(output, *bounds).output(0)
        for reader in readers:
            reader.replace_source_output(half)


def _is_input(output: Any) -> bool:
    return bool(output.get_node().get_type_name() == "Parameter")


def _key(node: Any) -> str:
    return str(node.get_friendly_name())


def _port(output: Any) -> str:
    return f"{_key(output.get_node())}:{output.get_index()}"
