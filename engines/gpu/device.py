"""A thin typed layer over `cuda.bindings.runtime`: one GPU with its memory, a stream, and what was captured from it."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ...common.arrays import Array
from ...common.errors import EngineError, reason

REMEDY = "ask for a smaller size or batch, split guidance or a tiled autoencoder"
"""What helps against a lack of GPU memory."""
_INDEX = 0
_OTHERWISE = "run with `--engine onnxruntime`"
_INSTALL = "run `pip install cuda-python`"


def bindings() -> Any:
    """The module `cuda.bindings.runtime`. Raises `EngineError` when cuda-python is missing or does not load."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            f"engines on a GPU are run with cuda-python, which is missing ({error}): {_INSTALL}"
        ) from None
    except (OSError, RuntimeError) as error:  # its libraries are loaded with it
        raise EngineError(f"cuda-python does not load ({reason(error)}): {_INSTALL}") from None
    return runtime


class Device:
    """The first GPU that CUDA sees: its memory and one stream, in which all that is asked of it happens in order.

    name: of the GPU. arch: its compute capability as `sm89`. driver, runtime: CUDA versions as `13.0`. stream: its
    handle.
    """

    def __init__(self) -> None:
        """Raises `EngineError` without a GPU, with a driver that is too old, or when cuda-python is missing."""
        self._cuda = bindings()
        self.name = f"GPU {_INDEX}"
        self.capturing = False
        self._later: deque[Callable[[], object]] = deque()
        self._check_driver()
        self.use()
        attributes = self._cuda.cudaDeviceAttr
        capability = attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor
        major, minor = (self.call("cudaDeviceGetAttribute", part, _INDEX) for part in capability)
        self.arch = f"sm{major}{minor}"
        name = self.call("cudaGetDeviceProperties", _INDEX).name
        self.name = (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).rstrip("\0")
        self._stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self.close = weakref.finalize(self, _quietly, self._cuda.cudaStreamDestroy, self._stream)

    def use(self) -> None:
        """Make this the GPU of the calling thread."""
        self.call("cudaSetDevice", _INDEX)

    def allocate(self, size: int, purpose: str) -> Memory:
        """`size` bytes, aligned to 256. Raises `EngineError` when they are not there, naming `purpose`."""
        if self.capturing:
            raise EngineError(f"{purpose}: memory cannot be asked for while launches are captured")
        error, address = self._cuda.cudaMalloc(max(size, 1))
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # else the next launch reports it
            free, total = self.call("cudaMemGetInfo")
            raise EngineError(
                f"out of GPU memory: {purpose} needs {_gib(size)}, {_gib(free)} of {_gib(total)} are free "
                f"on {self.name}: {REMEDY}"
            )
        self._check("cudaMalloc", error)
        return Memory(self, int(address), size)

    def upload(self, address: int, array: Array) -> None:
        """Enqueue a copy of contiguous `array` to `address`; it must stay as it is until `synchronize`."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: Array, address: int) -> None:
        """Enqueue a copy from `address` into contiguous `array`, which holds it after `synchronize`."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        self.call("cudaStreamSynchronize", self._stream)

    def capture(self, launches: Callable[[], None]) -> Graph:
        """What `launches` enqueues, as one thing to be launched; nothing of it runs now.

        Raises `EngineError` when something in it cannot be captured.
        """
        self.call(
            "cudaStreamBeginCapture", self._stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        self.capturing = True
        try:
            launches()
        except BaseException:
            error, graph = self._end_capture()
            if error == self._cuda.cudaError_t.cudaSuccess:
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()
            raise
        error, graph = self._end_capture()
        self._check("cudaStreamEndCapture", error)
        try:
            return Graph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def launch(self, graph: Graph) -> None:
        """Enqueue all that was captured."""
        self.call("cudaGraphLaunch", graph.handle, self._stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of the CUDA function `name`. Raises `EngineError` with what CUDA says when it fails."""
        error, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, error)
        return values[0] if len(values) == 1 else tuple(values)

    def release(self, function: str, handle: Any) -> None:
        """Give back what `function` frees; during a capture, where that would end it, once the capture is done."""
        if self.capturing:
            self._later.append(lambda: _quietly(getattr(self._cuda, function), handle))
        else:
            _quietly(getattr(self._cuda, function), handle)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self.call("cudaMemcpyAsync", target, source, size, getattr(self._cuda.cudaMemcpyKind, kind), self._stream)

    def _end_capture(self) -> tuple[Any, Any]:
        error, graph = self._cuda.cudaStreamEndCapture(self._stream)
        self.capturing = False
        while self._later:
            self._later.popleft()()
        return error, graph

    def _check(self, name: str, error: Any) -> None:
        if error == self._cuda.cudaError_t.cudaSuccess:
            return
        self._cuda.cudaGetLastError()  # cleared, or TensorRT reports it again
        raise EngineError(f"{name} failed on {self.name}: {self._says(error)}")

    def _says(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        return f"{said} ({getattr(error, 'name', error)})"

    def _check_driver(self) -> None:
        """Raise `EngineError` where there is no GPU to be used, with the reason."""
        errors = self._cuda.cudaError_t
        error, count = self._cuda.cudaGetDeviceCount()
        driver, runtime = (self._version(name) for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"))
        if driver == "0.0" or error == errors.cudaErrorNoDevice or (error == errors.cudaSuccess and not count):
            raise EngineError(f"no NVIDIA GPU or driver on this machine: {_OTHERWISE}")
        self.driver, self.runtime = driver, runtime
        if error == errors.cudaErrorInsufficientDriver:
            raise EngineError(
                f"the NVIDIA driver takes CUDA up to {driver}, cuda-python is for {runtime}: update the driver, "
                f"install an older cuda-python, or {_OTHERWISE}"
            )
        if error != errors.cudaSuccess:
            raise EngineError(f"the GPU cannot be used: {self._says(error)}: {_OTHERWISE}")

    def _version(self, function: str) -> str:
        error, number = getattr(self._cuda, function)()
        number = number if error == self._cuda.cudaError_t.cudaSuccess else 0
        return f"{number // 1000}.{number % 1000 // 10}"


class Memory:
    """A block of memory of a GPU; freed by `close`, or when nothing refers to it."""

    __slots__ = ("__weakref__", "address", "close", "size")

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.close = weakref.finalize(self, device.release, "cudaFree", address)


class Graph:
    """Captured launches; destroyed by `close`, or when nothing refers to them."""

    __slots__ = ("__weakref__", "close", "handle")

    def __init__(self, device: Device, handle: Any) -> None:
        self.handle = handle
        self.close = weakref.finalize(self, device.release, "cudaGraphExecDestroy", handle)


def _quietly(function: Callable[[Any], object], handle: Any) -> None:
    """Freeing has nobody to report to, and at the end of the process the driver may be gone."""
    with contextlib.suppress(Exception):
        function(handle)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
