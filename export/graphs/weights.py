"""Which weight of the checkpoint each initializer of a traced graph came from, and how: `weights.json`.

    {"val_34": {"weights": ["layers.0.mlp.fc1.weight"], "axes": [1, 0], "dtype": "float16"}, …}

The value of an initializer is the weight in the initializer's type (float32, or the weight's own where it is kept),
with its axes in the order of `axes` (left out where that is its own), in the shape that the initializer has. dtype: of
the weight in the checkpoint. Where several weights are named, such as biases that are all zero, their values are equal,
and the exporter may have let one initializer stand for all. Initializers that no weight gives, such as constants of the
code, are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...engines.changed import WEIGHTS_NAME

__all__ = ["WEIGHTS_NAME", "WIDENED", "weight_sources"]

_NAMED = re.compile(r"model\.(.*?)((?:_axes(?:_\d+)+)*)")
"""An initializer that kept the name of its parameter, and in which orders its axes were put one after another."""
WIDENED = re.compile(r"\.parametrizations\.(\w+)\.original\b")


def weight_sources(module: Any, model: Any, stored: Collection[str]) -> dict[str, dict[str, Any]]:
    """What `weights.json` holds. module: its `model` has the checkpoint's weights. model: its graph in `onnx_ir`.

    stored: the names of the weights in the checkpoint, which may have one part more in front than the model's own.
    """
    weights = {WIDENED.sub(r".\1", name): tensor for name, tensor in module.model.state_dict().items()}
    found: dict[str, dict[str, Any]] = {}
    unnamed = []
    for name, value in model.graph.initializers.items():
        named = _by_name(str(name), list(value.shape), weights)
        if named is not None:
            found[name] = _entry([named[0]], named[1], weights)
        elif value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point():
            unnamed.append((name, value.const_value.numpy()))
    sizes = {array.size for _, array in unnamed}
    by_content: dict[str, list[tuple[str, list[int]]]] = {}
    for name, tensor in weights.items():
        if tensor.numel() in sizes and tensor.is_floating_point():
            for axes, array in _orders(tensor.float().numpy()):
                by_content.setdefault(_digest(array), []).append((name, axes))
    for name, array in unnamed:
        same = by_content.get(_digest(array.astype(np.float32)), [])
        if same:
            axes = same[0][1]
            found[name] = _entry([weight for weight, order in same if order == axes], axes, weights)
    behind = {name.partition(".")[2]: name for name in stored}
    for entry in found.values():
        entry["weights"] = [name if name in stored else behind.get(name, name) for name in entry["weights"]]
    return found


def _by_name(name: str, shape: list[int], weights: dict[str, Any]) -> tuple[str, list[int]] | None:
    """The weight that an initializer is named after, and the order of its axes; None where there is none."""
    match = _NAMED.fullmatch(name)
    weight = WIDENED.sub(r".\1", match[1]) if match else ""
    if match is None or weight not in weights:
        return None
    axes = list(range(weights[weight].dim()))
    for order in filter(None, match[2].split("_axes_")):
        axes = [axes[int(i)] for i in order.split("_")]
    return (weight, axes) if [weights[weight].shape[axis] for axis in axes] == shape else None


def _orders(array: Array) -> Iterator[tuple[list[int], Array]]:
    """A weight as it is, and transposed where the exporter may have done that."""
    axes = list(range(array.ndim))
    yield axes, array
    if array.ndim == 2 and min(array.shape) > 1:
        yield axes[::-1], array.T


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _entry(names: list[str], axes: list[int], weights: dict[str, Any]) -> dict[str, Any]:
    entry = {"weights": names, "dtype": str(weights[names[0]].dtype).removeprefix("torch.")}
    return entry if axes == sorted(axes) else {**entry, "axes": axes}
