"""What every engine offers, and the checks that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..bundle import Tensor
from ..bundle.wiring import PICTURE_SIDES
from ..common.arrays import Array
from ..common.errors import EngineError

ONE_ENGINE = "load all parts for one engine"
"""What helps where the tensors of one backend were given to another."""


class HostBinding(Protocol):
    """An engine bound to arrays on the host: write new values into them, then call."""

    def __call__(self, *changed: str) -> dict[str, Array]:
        """Run; `changed` names the inputs whose arrays were written since the last call.

        Returns the output arrays, which the next call overwrites.
        """


class DeviceBinding(Protocol):
    """An engine bound to tensors that stay on its device."""

    def __call__(self) -> None:
        """Run: read the input tensors, write the output tensors. On a GPU this is only enqueued."""

    def refresh(self, *changed: str) -> None:
        """Call it when the tensors of the inputs `changed` were overwritten by `update_inplace`.

        An engine that computes a part of its work when it is bound computes it anew; a call does not.
        """


class DeviceArray(Protocol):
    """A tensor on an engine's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[np.generic]: ...

    def numpy(self) -> Array:
        """A copy on the host."""

    def update_inplace(self, array: Array) -> None:
        """Overwrite it with `array`, of its own shape and dtype."""


class Engine(ABC):
    """A component that runs. `inputs` and `outputs` carry names, dtypes and shapes with named axes.

    What all engines check is checked here; a backend has `to_device`, `_run`, `_bind_host` and `_bind_device`.
    """

    binds_device = True
    """Whether it can be bound to tensors on its device."""

    def __init__(self, component: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.component = component
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises `EngineError` naming the input that is wrong and what was allowed."""
        check_feeds(self.component, self.inputs, feeds)
        return self._run(feeds)

    def bind_host(self, feeds: Mapping[str, Array], twice: Collection[str] = ()) -> HostBinding:
        """Bind the contiguous arrays `feeds` for many runs of the same shapes; on the CPU nothing is copied.

        twice: inputs whose second half of rows will repeat the first in each call, or that have one row for all. What
        hangs on them alone may then be computed once.
        Raises `EngineError` as a call does, and for an array that is not contiguous.
        """
        check_feeds(self.component, self.inputs, feeds)
        if not all(array.flags.c_contiguous for array in feeds.values()):
            raise EngineError(f"{self.component}: arrays must be contiguous to be bound")
        return self._bind_host(feeds, twice)

    def bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        """Bind every input and output to a tensor that `to_device` made: nothing crosses the bus in a call.

        Names that the engine does not have are left alone. Raises `EngineError` when a name is missing or an input is
        not of the shape and dtype allowed.
        """
        missing = {tensor.name for tensor in (*self.inputs, *self.outputs)} - set(tensors)
        if missing:
            raise EngineError(f"{self.component}: nothing was bound to {', '.join(sorted(missing))}")
        own = {tensor.name: tensors[tensor.name] for tensor in self.inputs}
        check_feeds(
            self.component, self.inputs, {n: np.broadcast_to(np.zeros((), t.dtype), t.shape) for n, t in own.items()}
        )
        return self._bind_device(tensors)

    def padded_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The batch size to allocate for inputs of these shapes: their own, or the next larger one that it takes.

        The batch is the first axis of the first input. An engine built for two rows alone runs one with another
        beside it.
        """
        shape = shapes[self.inputs[0].name]
        return shape[0] if shape else 1

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """`launches`, which calls device bindings of one device and nothing else, as something to be called many times.

        what: what they are, to be told. On a GPU that is one CUDA graph, elsewhere `launches` itself.
        """
        return launches

    @abstractmethod
    def to_device(self, array: Array) -> DeviceArray:
        """A copy of `array` on this engine's device."""

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on feeds that were checked."""

    @abstractmethod
    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        """Bind feeds that were checked. An engine that cannot share a part of a call leaves `twice` alone."""

    @abstractmethod
    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        """Bind tensors that were checked."""


def check_feeds(component: str, inputs: tuple[Tensor, ...], feeds: Mapping[str, Array]) -> None:
    """Hold `feeds` against `inputs`: names, dtypes, ranks, fixed sizes and axes of one name of one size.

    An axis of size 1 may stand for a named axis of any size where the graph broadcasts it (the timestep). None is
    empty but what is made of the height of a picture that is not there.
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
            if (size == 0 and PICTURE_SIDES[0] not in str(axis)) or (isinstance(axis, int) and axis != size):
                raise EngineError(f"{wanted}, found shape {_show(array.shape)}")
            if isinstance(axis, str) and not (array.ndim == 1 and size == 1):
                first, owner = sizes.setdefault(axis, (size, tensor.name))
                if first != size:
                    raise EngineError(f"{wanted}, found shape {_show(array.shape)}: {axis} is {first} in {owner!r}")


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(axis) for axis in shape) + ")"
