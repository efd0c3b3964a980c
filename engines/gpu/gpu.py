"""A GPU as all engines of a process share it: one stream, one block for activations, tensors, captured launches."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError
from ..engine import ONE_ENGINE, DeviceArray
from .device import Device, Graph, Memory

_LEAST = 256
"""An engine without activations is still given an address."""


class Arena:
    """One block, as large as the largest need so far. Growing moves it, and `generation` counts how often.

    address, size: where it lies and its bytes, 0 while nothing was asked for.

    What runs one after another in one stream may share it; a captured graph holds its address, and is captured anew
    when the generation has changed.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self.address = self.size = self.generation = 0

    def grow(self, size: int, component: str) -> None:
        """Hold at least `size` bytes. Raises `EngineError` when the GPU has not as much; it is then empty."""
        size = max(size, _LEAST)
        if size <= self.size:
            return
        if self._device.capturing:
            raise EngineError(f"{component}: its activations have outgrown their memory while launches are captured")
        if self._memory is not None:
            self._memory.close()  # first, so that both need not fit; it waits for what runs in it
        self.address = self.size = 0
        self.generation += 1
        self._memory = self._device.allocate(size, f"the activations of {component}")
        self.address, self.size = self._memory.address, size


class Gpu:
    """The GPU of this machine; see `shared` for the one that all engines of a process use.

    kept: what a backend has once in a process, by its name. captured: what was captured as CUDA graphs, in order.
    """

    def __init__(self) -> None:
        """Raises `EngineError` when there is none or it cannot be used."""
        self.device = Device()
        self.arena = Arena(self.device)
        self._lock = threading.RLock()
        self._invalidations = 0
        self.kept: dict[str, Any] = {}
        self.captured: list[str] = []

    @property
    def generation(self) -> int:
        """Grows whenever a captured CUDA graph becomes invalid: the arena moved, or weights were refitted.

        `CapturedLaunches` compares it with the value at its capture.
        """
        return self._invalidations + self.arena.generation

    def invalidate_graphs(self) -> None:
        """Invalidate every captured CUDA graph; call it after changing the weights of a loaded engine."""
        self._invalidations += 1

    @contextmanager
    def work(self) -> Iterator[Device]:
        """The device for this thread alone: what is enqueued in the block is in one piece."""
        with self._lock:
            self.device.use()
            yield self.device

    def own(
        self, component: str, specs: Iterable[Tensor], tensors: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceTensor]:
        """Those of `tensors` that `specs` name. Raises `EngineError` for one that does not lie on this GPU."""
        found: dict[str, DeviceTensor] = {}
        for spec in specs:
            array = tensors[spec.name]
            if not isinstance(array, DeviceTensor) or array.gpu is not self:
                raise EngineError(f"{component}: what is bound to it must lie on its GPU: {ONE_ENGINE}")
            found[spec.name] = array
        return found

    def to_device(self, array: Array) -> DeviceTensor:
        """A copy of `array`; see `engine.Engine`."""
        tensor = DeviceTensor(self, array.shape, array.dtype, "a tensor")
        tensor.update_inplace(array)
        return tensor


class DeviceTensor:
    """A tensor in the memory of a GPU; see `engine.DeviceArray`. address: where it lies there."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[np.generic], purpose: str) -> None:
        """Its content is not set yet. Raises `EngineError` when the GPU has no memory for it."""
        self.gpu, self.shape, self.dtype = gpu, shape, dtype
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with gpu.work() as device:
            self._memory = device.allocate(size, purpose)
        self.address = self._memory.address

    def numpy(self) -> Array:
        """See `engine.DeviceArray`."""
        array = np.empty(self.shape, self.dtype)
        with self.gpu.work() as device:
            device.download(array, self.address)
            device.synchronize()
        return array

    def update_inplace(self, array: Array) -> None:
        """See `engine.DeviceArray`. Raises `EngineError` when `array` is of another shape or dtype."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise EngineError(
                f"a tensor of {self.dtype} {self.shape} on the GPU cannot hold {array.dtype} {array.shape}"
            )
        with self.gpu.work() as device:
            device.upload(self.address, np.asarray(array, order="C"))
            device.synchronize()  # the caller may write to the array from here on


class CapturedLaunches:
    """Launches that run as they are at first, are captured then, and are launched as one from then on.

    The first runs are real ones: what an engine does at its first run with new shapes, or in a new thread, cannot be
    captured, and what runs only once gains nothing. The same after memory was moved.
    """

    def __init__(self, gpu: Gpu, launches: Callable[[], None], what: str = "", warm: int = 1) -> None:
        """what: what is captured, to be told. warm: real runs that come first."""
        self._gpu, self._launches, self._what, self._warm = gpu, launches, what, warm
        self._graph: Graph | None = None
        self._seen: tuple[int, int] | None = None  # the generation and the thread of the runs so far
        self._runs = 0
        self._capturable = True

    def __call__(self) -> None:
        """Enqueue them all. Raises `EngineError` when an engine fails."""
        gpu = self._gpu
        with gpu.work() as device:
            now = gpu.generation, threading.get_ident()
            if self._graph is not None and self._seen is not None and self._seen[0] == now[0]:
                device.launch(self._graph)
                return
            if self._seen != now:
                self._graph, self._seen, self._runs = None, now, 0
            if self._runs >= self._warm and self._capturable:
                self._capture(device)
            if self._graph is not None:
                device.launch(self._graph)
                return
            self._launches()
            self._runs += 1
            if gpu.generation != now[0]:
                self._seen = None

    def _capture(self, device: Device) -> None:
        try:
            self._graph = device.capture(self._launches)
            self._gpu.captured.append(self._what)
        except EngineError as error:
            self._capturable = False
            warnings.warn(
                f"the steps cannot be captured as a CUDA graph and are launched one by one: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


_OPEN: weakref.WeakSet[Gpu] = weakref.WeakSet()
_OPENING = threading.Lock()


def shared() -> Gpu:
    """The GPU as all of this process share it; it is closed when nothing refers to it.

    Raises `EngineError` when there is none or it cannot be used.
    """
    with _OPENING:
        gpu = next(iter(_OPEN), None) or Gpu()
        _OPEN.add(gpu)
        return gpu
