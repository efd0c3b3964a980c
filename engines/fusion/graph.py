"""What passes over a graph share: its constants, its readers, types and shapes, and files with their weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...common.arrays import Array
from ...common.errors import DiffoundryError
from ...common.files import disk_error, inside, remove

Value = TypeVar("Value")

DOMAIN = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
FLOATS = ("FLOAT", "FLOAT16")
"""Types that ONNX Runtime's own operators for pictures have kernels for on CUDA, and that NumPy has."""
_EXTERNAL_FROM_BYTES = 64 << 20
"""Models with more weights than this keep them beside the graph; a protobuf holds at most 2 GiB."""
_EMBEDDED_BYTES = 256
"""Weights up to this size stay in the graph all the same."""


def open_model(path: Path) -> Any:
    """The `onnx_ir.Model` in `path`, its external weights on disk, constants as initializers.

    Raises `DiffoundryError` when it is no ONNX model.
    """
    import onnx_ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    try:
        model = onnx_ir.load(path)
    except FileNotFoundError:
        raise DiffoundryError(f"{path} is missing: compile the checkpoint again") from None
    except Exception as error:  # protobuf and onnx_ir raise exceptions of their own
        raise DiffoundryError(f"{path} is not an ONNX model: compile the checkpoint again") from error
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def moved(tensor: Any, folder: Path, name: str) -> Any:
    """The external tensor `tensor` as one of the same bytes in the file `name` of `folder`."""
    import onnx_ir

    return onnx_ir.ExternalTensor(
        name, tensor.offset, tensor.length, tensor.dtype,
        shape=tensor.shape, name=str(tensor.name), base_dir=folder,
    )  # fmt: skip


def save(model: Any, folder: Path, name: str) -> list[Path]:
    """Write `model` as `name` into `folder`, weights that it made beside it where they are large.

    Returns the files of the model: the graph, its own weights, and the files of weights that it shares with others in
    `folder`. Raises `DiffoundryError` when the disk is full; what stood there before then still stands.
    """
    import onnx_ir

    model.producer_name, model.producer_version = "diffoundry", ""
    weights = [v for v in model.graph.initializers.values() if v.const_value is not None]
    own = [value for value in weights if not isinstance(value.const_value, onnx_ir.ExternalTensor)]
    shared = sorted({str(value.const_value.location) for value in weights if value not in own})
    names = [f"{name}_data", name]
    work = folder / f".{name}.{os.getpid()}.part"
    remove(work)
    try:
        work.mkdir()
        if sum(value.const_value.nbytes for value in own) > _EXTERNAL_FROM_BYTES:
            large = [value for value in own if value.const_value.nbytes > _EMBEDDED_BYTES]
            tensors = [value.const_value for value in large]
            external = onnx_ir.external_data.convert_tensors_to_external(tensors, work, names[0])
            for value, tensor in zip(large, external, strict=True):
                value.const_value = tensor
        onnx_ir.save(model, work / names[1])
        made = [each for each in names if (work / each).is_file()]
        for each in made:  # the graph last: where it is, its weights are
            (work / each).replace(folder / each)
        if len(made) == 1:
            remove(folder / names[0])
    except OSError as error:
        raise disk_error(error) from error
    finally:
        remove(work)
    return [folder / each for each in (*reversed(made), *shared)]


def map_tensor(tensor: Any, what: Callable[[Array], Value]) -> Value:
    """`what` of the numbers that a tensor holds; `what` keeps none of them. Its file is mapped for that long."""
    import onnx_ir

    if isinstance(tensor, onnx_ir.ExternalTensor):
        # With its folder named, onnx_ir refuses a file of several links, as a bundle and the one made of it share.
        path = inside(Path(tensor.base_dir), str(tensor.location)).absolute()
        tensor = onnx_ir.ExternalTensor(
            path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(tensor.name)
        )
    made = what(tensor.numpy())
    if hasattr(tensor, "release"):
        tensor.release()
    return made


def weight_of(value: Any) -> Any:
    """The initializer that `value` is, or that a cast widens to it; None where other nodes make it."""
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "Cast":
        value = maker.inputs[0]
    return value if value is not None and value.is_initializer() else None


def add_weight(
    graph: Any, name: str, like: Any, dtype: Any, shape: Sequence[int], make: Callable[[Array], Array]
) -> Any:
    """An initializer `name` of this shape: `make` of the numbers of `like`, which runs when the model is written."""
    import onnx_ir

    name = f"{name}:{'x'.join(map(str, shape))}"
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = like.const_value
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))
    value.const_value = onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(map_tensor(tensor, lambda array: np.array(make(array), order="C")), name=name),
        dtype=dtype,
        shape=onnx_ir.Shape(shape),
        name=name,
    )
    graph.register_initializer(value)
    return value


def add_sizes(graph: Any, *numbers: int) -> Any:
    """An initializer of whole numbers, such as a shape: one for each content."""
    import onnx_ir

    name = "sizes:" + "_".join(map(str, numbers))
    if name not in graph.initializers:
        tensor = onnx_ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(onnx_ir.val(name, const_value=tensor))
    return graph.initializers[name]


def numbers_of(value: Any, size: int) -> Array | None:
    """The numbers of an initializer of `size` numbers; None for any other value."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size != size else map_tensor(tensor, lambda array: np.array(array).ravel())


def reader(value: Any, kind: str) -> Any:
    """The only reader of a value, if it is of this kind; None where the graph gives the value, too."""
    readers = [node for node, _ in value.uses()]
    one = len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output()
    return readers[0] if one else None


def maker(value: Any, kind: str) -> Any:
    """The node that makes a value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def sides(node: Any, kind: str) -> list[tuple[Any, Any]]:
    """Of a node with two inputs: each input that a node of this kind makes, as that node, and the other input."""
    first, second = node.inputs
    return [(maker(a, kind), b) for a, b in ((first, second), (second, first)) if maker(a, kind) is not None]


def dims(value: Any) -> tuple[Any, ...] | None:
    """The axes of a value: whole numbers, names, or None where nothing is known; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)


def rank(value: Any) -> int:
    """How many axes a value has; -1 where it is not known."""
    known = dims(value)
    return -1 if known is None else len(known)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two values are known to have one shape."""
    known = dims(a)
    return known is not None and None not in known and known == dims(b)


def dtype_of(value: Any) -> str:
    """The name of a value's type in ONNX, "" where it is not known."""
    return "" if value is None or value.dtype is None else str(value.dtype.name)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def make_node(kind: str, inputs: Sequence[Any], attributes: dict[str, Any], likes: Sequence[Any]) -> Any:
    """A node of `DOMAIN` whose outputs have the types, shapes and names of `likes`."""
    import onnx_ir

    outputs = [onnx_ir.Value(name=each.name, type=each.type, shape=each.shape) for each in likes]
    return onnx_ir.node(kind, inputs, attributes, domain=DOMAIN, outputs=outputs)


def replace(graph: Any, last: Any, new: Any) -> None:
    """Put node `new` in the place of `last`, with which goes whatever nobody reads any more."""
    import onnx_ir

    graph.insert_after(last, new)
    onnx_ir.convenience.replace_all_uses_with(last.outputs, new.outputs, replace_graph_outputs=True)
    drop(graph, last)


def drop(graph: Any, node: Any) -> None:
    """Remove `node` if nobody reads it, and then what made its inputs."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    makers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for each in makers:
        if each is not None and each.graph is graph:
            drop(graph, each)
