"""Engines bound to arrays and tensors, which a request reads and writes in place."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import EngineError
from ..engine import ONE_ENGINE, DeviceArray
from .device import DEVICES, Device, module

if TYPE_CHECKING:
    from .engine import OpenVinoEngine, Shapes


class OvArray:
    """A tensor on a device of OpenVINO; see `engine.DeviceArray`. All but a GPU take those of the host."""

    def __init__(self, device: Device, array: Array) -> None:
        self.dtype, self.shape = array.dtype, array.shape
        openvino = module()
        self._host = array
        self.tensor = openvino.Tensor(array, shared_memory=True)
        self._on_device = device.name == DEVICES["gpu"]
        if self._on_device:
            context = device.core.get_default_context(device.name)
            own = context.create_tensor(self.tensor.element_type, self.tensor.shape, {})
            own.copy_from(self.tensor)
            self.tensor = own

    def numpy(self) -> Array:
        """See `engine.DeviceArray`."""
        if not self._on_device:
            return np.array(self._host)
        host = np.empty(self.shape, self.dtype)
        self.tensor.copy_to(module().Tensor(host, shared_memory=True))
        return host

    def update_inplace(self, array: Array) -> None:
        """See `engine.DeviceArray`."""
        self._host[...] = array
        if self._on_device:
            self.tensor.copy_from(module().Tensor(self._host, shared_memory=True))


class _Bound:
    """A request with its tensors set, made anew when the engine compiled its model anew."""

    def __init__(self, engine: OpenVinoEngine, shapes: Shapes, tensors: Mapping[str, Any]) -> None:
        self._engine, self._shapes, self._tensors = engine, shapes, tensors
        self._compiled: Any = None
        self.request: Any = None
        self.ready()

    def ready(self) -> Any:
        """The request, with its tensors."""
        compiled = self._engine.compiled(self._shapes)
        if compiled is not self._compiled:
            self.request = None  # before the other is made: it holds the memory of its model
            self._compiled, self.request = compiled, compiled.new_request()
            for name, tensor in self._tensors.items():
                self.request.set_tensor(name, tensor)
        return self.request

    def run(self) -> None:
        """Run, and wait for the end."""
        request = self.ready()
        self._engine.infer(self._compiled, request)


class OvHostBinding:
    """See `engine.HostBinding`: the arrays are the tensors."""

    def __init__(self, engine: OpenVinoEngine, feeds: Mapping[str, Array], twice: Collection[str]) -> None:
        self._engine, self._feeds = engine, dict(feeds)
        with engine.failing("cannot bind"):
            self._bound = _Bound(engine, engine.shapes(feeds, twice), shared(feeds))

    def __call__(self, *changed: str) -> dict[str, Array]:
        with self._engine.failing("failed to run"):
            self._bound.run()
            request = self._bound.request
            return {tensor.name: request.get_tensor(tensor.name).data for tensor in self._engine.outputs}


class OvRowsBinding:
    """A call whose rows are shared among streams; a row is all that the first axis of a tensor counts."""

    def __init__(self, engine: OpenVinoEngine, feeds: Mapping[str, Array], parts: int) -> None:
        self._engine, self._feeds = engine, dict(feeds)
        rows = len(next(iter(feeds.values())))
        edges = [rows * i // parts for i in range(parts + 1)]
        self._outputs: dict[str, Array] = {}
        self._bound = []
        with engine.failing("cannot bind"):
            for start, end in itertools.pairwise(edges):
                own = {n: a[start:end] if a.ndim and len(a) == rows else a for n, a in feeds.items()}
                shapes = engine.shapes(own)
                made = self._made(shapes, rows)
                outputs = {name: array[start:end] for name, array in made.items()}
                self._bound.append(_Bound(engine, shapes, shared({**own, **outputs})))

    def _made(self, shapes: Shapes, rows: int) -> dict[str, Array]:
        """The arrays that all parts write their outputs into."""
        if not self._outputs:
            model = self._engine.compiled(shapes).model
            for tensor in self._engine.outputs:
                _, *shape = model.output(tensor.name).shape
                self._outputs[tensor.name] = np.zeros((rows, *shape), tensor.dtype)
        return self._outputs

    def __call__(self, *changed: str) -> dict[str, Array]:
        with self._engine.failing("failed to run"):
            *others, own = [bound.ready() for bound in self._bound]
            for request in others:
                request.start_async()
            # by this thread: were all left to others, the system would now and then wake two of them on one processor
            try:
                own.infer(share_outputs=True)
            finally:
                for request in others:
                    request.wait()
        return self._outputs


class OvDeviceBinding:
    """See `engine.DeviceBinding`."""

    def __init__(self, engine: OpenVinoEngine, tensors: Mapping[str, DeviceArray]) -> None:
        """Raises `EngineError` for a tensor that another backend holds."""
        self._engine = engine
        own = {name: array for name, array in tensors.items() if isinstance(array, OvArray)}
        names = [tensor.name for tensor in (*engine.inputs, *engine.outputs)]
        if not set(names) <= set(own):
            raise EngineError(f"{engine.component}: what is bound to it must be OpenVINO's: {ONE_ENGINE}")
        with engine.failing("cannot bind"):
            self._bound = _Bound(engine, engine.shapes(own), {name: own[name].tensor for name in names})

    def __call__(self) -> None:
        """Run."""
        with self._engine.failing("failed to run"):
            self._bound.run()

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`: nothing is computed ahead."""


def shared(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Tensors that are these arrays."""
    tensor = module().Tensor
    return {name: tensor(array, shared_memory=True) for name, array in arrays.items()}
