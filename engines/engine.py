"""What every engine offers, and the check of its inputs that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from ..bundle import Tensor
from ..common.arrays import Array
from ..common.errors import EngineError


class Bound(Protocol):
    """An engine with its buffers bound: write new values into the arrays that were bound, then call."""

    def __call__(self, *changed: str) -> dict[str, Array]:
        """Run; `changed` names the inputs whose arrays were written since the last call.

        Returns the output arrays, which the next call overwrites.
        """


class Linked(Protocol):
    """An engine whose inputs and outputs are tensors that stay on its device."""

    def __call__(self) -> None:
        """Run: read the input tensors, write the output tensors. On a GPU this is only enqueued."""

    def prepare(self, *changed: str) -> None:
        """Call it when tensors linked to the inputs `changed` were overwritten by `update_inplace`.

        An engine that computes something of its inputs ahead, at `link`, computes it anew; it is no part of a call.
        """


class Placed(Protocol):
    """A tensor on an engine's device."""

    def numpy(self) -> Array:
        """A copy on the host."""

    def update_inplace(self, array: Array) -> None:
        """Overwrite it with `array`, of its own shape and dtype."""


class Engine(Protocol):
    """A component that runs. `inputs` and `outputs` carry names, dtypes and shapes with named axes."""

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def outputs(self) -> tuple[Tensor, ...]: ...

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises `EngineError` naming the input that is wrong and what was allowed."""

    def bind(self, feeds: Mapping[str, Array]) -> Bound:
        """Bind the arrays in `feeds` for many runs of the same shapes; nothing is copied on the CPU."""

    def place(self, array: Array) -> Placed:
        """A copy of `array` on this engine's device."""

    def link(self, tensors: Mapping[str, Placed]) -> Linked:
        """Bind every input and output to a tensor that `place` made: nothing crosses the bus in a call.

        Raises `EngineError` when a name is missing or an input is not of the shape and dtype allowed.
        """

    def rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The rows that inputs of `shapes` are to be linked with: as many as they have, or the next more that it takes.

        Rows are the first axis of the first input. An engine built for two rows alone runs one with another beside it.
        """

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """`launches`, which calls linked engines of one device and nothing else, as something to be called many times.

        On a GPU that is one CUDA graph, elsewhere `launches` itself.
        """


def check_feeds(component: str, inputs: tuple[Tensor, ...], feeds: Mapping[str, Array]) -> None:
    """Hold `feeds` against `inputs`: names, dtypes, ranks, fixed sizes and axes of one name of one size.

    An axis of size 1 may stand for a named axis of any size where the graph broadcasts it (the timestep).
    Raises `EngineError`.
    """
    expected = {tensor.name for tensor in inputs}
    if expected != set(feeds):
        missing, extra = sorted(expected - set(feeds)), sorted(set(feeds) - expected)
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(extra)}"] * bool(extra)
        raise EngineError(f"{component}: inputs are {', '.join(sorted(expected))}; {'; '.join(parts)}")
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in inputs:
        array = feeds[tensor.name]
        wanted = f"{component}: input {tensor.name!r} must be {tensor.dtype} of shape {_show(tensor.shape)}"
        if array.dtype != np.dtype(tensor.dtype):
            raise EngineError(f"{wanted}, found {array.dtype}")
        if array.ndim != len(tensor.shape):
            raise EngineError(f"{wanted}, found shape {_show(array.shape)}")
        for axis, size in zip(tensor.shape, array.shape, strict=True):
            if size == 0 or (isinstance(axis, int) and axis != size):
                raise EngineError(f"{wanted}, found shape {_show(array.shape)}")
            if isinstance(axis, str) and not (array.ndim == 1 and size == 1):
                first, owner = sizes.setdefault(axis, (size, tensor.name))
                if first != size:
                    raise EngineError(f"{wanted}, found shape {_show(array.shape)}: {axis} is {first} in {owner!r}")


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(axis) for axis in shape) + ")"
