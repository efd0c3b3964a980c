"""OpenVINO: Intel's CPUs, GPUs and NPUs, and any x86-64 processor. The device and the precision asked for are used.

What a device computes in is the precision hint of its compiled model: all models are read from their float32 graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import FULL, Tensor
from ..common.arrays import Array
from ..common.errors import EngineError, reason
from ..common.machine import evicting
from .cache import EngineStore
from .engine import ONE_ENGINE, DeviceArray, DeviceBinding, Engine, HostBinding
from .onnxruntime import NO_MEMORY_TO_LOAD

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
HINTS = {FULL: ("f32", "FP32"), "fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
"""Of each precision the hint, and the capability that a device says when it computes in it."""
INSTALL = "run `pip install 'diffoundry[openvino]'`"
_FLOOR = (2026, 3)
"""Older ones do not read MultiHeadAttention, which the graphs in two parts have."""
_OTHERWISE = "or use the engine onnxruntime"
_MOST_STATIC = 8
"""Shapes of a small model that are kept compiled; a large one has one, which takes any shape from the second on."""
_OUT_OF_MEMORY = re.compile(r"bad_alloc|bad allocation|std::length_error|[Cc]annot allocate|out of memory|OUT_OF")
_MOST_KEPT = 16
"""Compiled models of a component that are kept on the disk."""
_BLOB = "model.blob"
BACKEND = "openvino"
_ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep() -> None:
    """Keep what a forked process inherits for ever: to end it waits for threads that are not there."""
    for each in list(_ALIVE):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_keep)


@functools.cache
def module() -> Any:
    """The module `openvino`. Raises `EngineError` when it is not there, does not load or is too old."""
    try:
        import openvino
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise EngineError(
            f"the engine openvino is not installed: {INSTALL}, {_OTHERWISE}"
            if missing
            else f"OpenVINO does not load ({reason(error)}): {INSTALL}, {_OTHERWISE}"
        ) from None
    found = re.match(r"(\d+)\.(\d+)", str(getattr(openvino, "__version__", "")))
    if found is None or (int(found[1]), int(found[2])) < _FLOOR:
        least = ".".join(map(str, _FLOOR))
        raise EngineError(f"OpenVINO {version(openvino)} is too old, {least} is the least: {INSTALL} --upgrade")
    return openvino


def version(openvino: Any) -> str:
    """The release of the module, without the commit that it was built of."""
    return str(getattr(openvino, "__version__", "(without a version)")).partition("-")[0]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that models are compiled for. name: what OpenVINO calls it. full_name: of the hardware."""

    core: Any
    name: str
    full_name: str
    version: str

    @classmethod
    def open(cls, provider: str, precision: str) -> Device:
        """The device of a key of `DEVICES`.

        Raises `EngineError` when OpenVINO is not installed or finds no such device, or it does not compute in
        `precision`.
        """
        openvino, name = module(), DEVICES[provider]
        core = _core(os.getpid())
        found = [str(each) for each in core.available_devices]
        if not any(each.partition(".")[0] == name for each in found):
            raise EngineError(
                f"OpenVINO {version(openvino)} finds no {name} on this machine, only {', '.join(found) or 'nothing'}: "
                "install its driver, or use the engine openvino, on the CPU"
            )
        try:
            capabilities = {str(each) for each in core.get_property(name, "OPTIMIZATION_CAPABILITIES")}
            full_name = str(core.get_property(name, "FULL_DEVICE_NAME"))
        except Exception as error:  # OpenVINO raises RuntimeError for most of what goes wrong
            raise EngineError(f"OpenVINO cannot use {name}: {reason(error)}; {_OTHERWISE[3:]}") from None
        if precision != FULL and HINTS[precision][1] not in capabilities:
            raise EngineError(
                f"{full_name.strip()} does not compute in {precision}: choose --precision fp32, or another machine"
            )
        return cls(core, name, full_name.strip(), version(openvino))

    @property
    def on_cpu(self) -> bool:
        return self.name == DEVICES["cpu"]


def precisions(provider: str = "cpu") -> list[str]:
    """The precisions that the device computes in. Raises `EngineError` as `Device.open`."""
    device = Device.open(provider, FULL)
    capabilities = {str(each) for each in device.core.get_property(device.name, "OPTIMIZATION_CAPABILITIES")}
    return [name for name, (_, capability) in HINTS.items() if name == FULL or capability in capabilities]


@functools.lru_cache(1)
def _core(process: int) -> Any:
    """OpenVINO's core, one in a process: one that was inherited by a fork has lost its threads."""
    core = module().Core()
    _ALIVE.add(core)
    return core


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is compiled. threads: all processors that it uses. streams: calls that run at once, sharing them.

    small: whether the model is compiled for each shape on its own and kept on the disk; a large one is as fast with
    shapes left open, and holds its weights once then.
    """

    precision: str
    threads: int
    streams: int = 1
    small: bool = False

    def properties(self) -> dict[str, Any]:
        """What OpenVINO is told."""
        hint, _ = HINTS[self.precision]
        return {
            "INFERENCE_PRECISION_HINT": hint,
            "EXECUTION_MODE_HINT": "ACCURACY" if self.precision == FULL else "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
        }

    def processor_properties(self) -> dict[str, Any]:
        """What only a processor is told."""
        return {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": self.streams, "ENABLE_CPU_PINNING": False}


class OpenVinoEngine(Engine):
    """One ONNX model, compiled for the shapes that it is called with; see `engine.Engine` for the contract.

    With several streams the rows of a bound call are shared among them.
    """

    def __init__(
        self,
        model: Path,
        component: str,
        device: Device,
        recipe: Recipe,
        inputs: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
        cache: Cache | None = None,
    ) -> None:
        """inputs, outputs: as the manifest has them, with named axes; what it does not name is read off the model.

        cache: where compiled models are kept. Raises `EngineError` when the model cannot be read.
        """
        self._path, self._device, self._recipe, self._cache = model, device, recipe, cache
        self._read: Any = None
        with self._failing(component, "cannot load"):
            self._read = self._open()
        super().__init__(component, _tensors(self._read.inputs, inputs), _tensors(self._read.outputs, outputs))
        self._lock = threading.RLock()
        self._compiled: OrderedDict[Any, _Compiled] = OrderedDict()

    @property
    def splits_rows(self) -> bool:
        """Whether a bound call shares its rows among the processors."""
        return self._recipe.streams > 1

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        with self._failing(self.component, "failed"):
            return OvArray(self._device, np.array(array, order="C"))

    def compiled(self, shapes: Mapping[str, tuple[int, ...]]) -> _Compiled:
        """The model compiled for inputs of these shapes. Raises `EngineError`."""
        key = tuple(tuple(shapes[tensor.name]) for tensor in self.inputs)
        with self._lock:
            found = self._compiled.get(key) or self._compiled.get(None)
            if found is None:
                any_shape = not self._recipe.small and bool(self._compiled) and self._device.on_cpu
                with self._failing(self.component, "cannot compile"):
                    found = self._compile(None if any_shape else key)
                if any_shape:
                    self._compiled.clear()  # it holds the weights; the new one takes the old shape, too
                self._compiled[None if any_shape else key] = found
            else:
                self._compiled.move_to_end(key if key in self._compiled else None)
            while len(self._compiled) > (_MOST_STATIC if self._recipe.small else 1):
                self._compiled.popitem(last=False)
            return found

    def _open(self) -> Any:
        return self._device.core.read_model(str(self._path))

    def _compile(self, key: tuple[tuple[int, ...], ...] | None) -> _Compiled:
        """The model for the shapes `key` of its inputs, None for any."""
        device, recipe = self._device, self._recipe
        properties = recipe.properties() | (recipe.processor_properties() if device.on_cpu else {})
        cache = self._cache if key is not None and (recipe.small or not device.on_cpu) else None
        made_of = {
            "precision": recipe.precision,
            "shapes": key,
            "properties": properties,
            "device": device.full_name,
            "version": device.version,
        }
        if cache is not None and (blob := cache.find(made_of)) is not None:
            with contextlib.suppress(Exception):  # one that does not load is made again
                return _Compiled(device.core.import_model(blob.read_bytes(), device.name, properties))
        model = self._read or self._open()
        self._read = None
        if key is not None:
            model.reshape({tensor.name: list(shape) for tensor, shape in zip(self.inputs, key, strict=True)})
        with evicting(self._path.parent) if not recipe.small else contextlib.nullcontext():
            compiled = device.core.compile_model(model, device.name, properties)
        if cache is not None:
            cache.keep(made_of, compiled)
        return _Compiled(compiled)

    @contextlib.contextmanager
    def _failing(self, component: str, what: str) -> Iterator[None]:
        """Raise `EngineError` for what OpenVINO raises."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
                raise EngineError(f"{component}: {NO_MEMORY_TO_LOAD}") from None
            if not self._path.is_file():
                raise EngineError(f"{component}: {self._path} is missing; compile the bundle again") from None
            raise EngineError(
                f"{component}: OpenVINO {self._device.version} {what} {self._path.name}: {_reason(error)}; "
                f"upgrade OpenVINO, {_OTHERWISE}"
            ) from None

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        compiled = self.compiled({name: array.shape for name, array in arrays.items()})
        with self._failing(self.component, "failed to run"), compiled.request() as request:
            self._infer(request, arrays)
            return {tensor.name: np.array(request.get_tensor(tensor.name).data) for tensor in self.outputs}

    def _infer(self, request: Any, arrays: Mapping[str, Array]) -> None:
        tensor = module().Tensor
        for name, array in arrays.items():
            request.set_tensor(name, tensor(array, shared_memory=True))
        with evicting(self._path.parent) if not self._recipe.small else contextlib.nullcontext():
            request.infer()

    def _bind_host(self, feeds: Mapping[str, Array]) -> HostBinding:
        rows = min(self._recipe.streams, len(next(iter(feeds.values()))) if feeds else 1)
        return _HostBinding(self, feeds) if rows <= 1 else _RowsBinding(self, feeds, rows)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        return _DeviceBinding(self, tensors)


class _Compiled:
    """A compiled model and its idle requests."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._idle: list[Any] = []
        _ALIVE.add(model)

    @contextlib.contextmanager
    def request(self) -> Iterator[Any]:
        """A request, for the caller alone."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.new_request()
        yield request
        self._idle.append(request)

    def new_request(self) -> Any:
        """A request of the caller's own."""
        request = self.model.create_infer_request()
        _ALIVE.add(request)
        return request


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

    def __init__(
        self, engine: OpenVinoEngine, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]
    ) -> None:
        self._engine, self._shapes, self._tensors = engine, shapes, tensors
        self._compiled: _Compiled | None = None
        self.request: Any = None
        self.ready()

    def ready(self) -> Any:
        """The request."""
        compiled = self._engine.compiled(self._shapes)
        if compiled is not self._compiled:
            self.request = None  # before the other is made: it holds the memory of its model
            self._compiled, self.request = compiled, compiled.new_request()
            for name, tensor in self._tensors.items():
                self.request.set_tensor(name, tensor)
        return self.request


class _HostBinding:
    """See `engine.HostBinding`: the arrays are the tensors."""

    def __init__(self, engine: OpenVinoEngine, feeds: Mapping[str, Array]) -> None:
        self._engine, self._feeds = engine, dict(feeds)
        shapes = {name: array.shape for name, array in feeds.items()}
        with engine._failing(engine.component, "cannot bind"):
            self._bound = _Bound(engine, shapes, _shared(feeds))

    def __call__(self, *changed: str) -> dict[str, Array]:
        with self._engine._failing(self._engine.component, "failed to run"):
            request = self._bound.ready()
            request.infer(share_outputs=True)
            return {tensor.name: request.get_tensor(tensor.name).data for tensor in self._engine.outputs}


class _RowsBinding:
    """A call whose rows are shared among streams; a row is all that the first axis of a tensor counts."""

    def __init__(self, engine: OpenVinoEngine, feeds: Mapping[str, Array], parts: int) -> None:
        self._engine, self._feeds = engine, dict(feeds)
        rows = len(next(iter(feeds.values())))
        edges = [rows * i // parts for i in range(parts + 1)]
        self._outputs: dict[str, Array] = {}
        self._bound = []
        with engine._failing(engine.component, "cannot bind"):
            for start, end in itertools.pairwise(edges):
                own = {n: a[start:end] if a.ndim and len(a) == rows else a for n, a in feeds.items()}
                shapes = {name: array.shape for name, array in own.items()}
                made = self._made(shapes, rows)
                outputs = {name: array[start:end] for name, array in made.items()}
                self._bound.append(_Bound(engine, shapes, _shared({**own, **outputs})))

    def _made(self, shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, Array]:
        """The arrays that all parts write their outputs into."""
        if not self._outputs:
            model = self._engine.compiled(shapes).model
            for tensor in self._engine.outputs:
                _, *shape = model.output(tensor.name).shape
                self._outputs[tensor.name] = np.zeros((rows, *shape), tensor.dtype)
        return self._outputs

    def __call__(self, *changed: str) -> dict[str, Array]:
        with self._engine._failing(self._engine.component, "failed to run"):
            requests = [bound.ready() for bound in self._bound]
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()
        return self._outputs


class _DeviceBinding:
    """See `engine.DeviceBinding`."""

    def __init__(self, engine: OpenVinoEngine, tensors: Mapping[str, DeviceArray]) -> None:
        """Raises `EngineError` for a tensor that another backend holds."""
        self._engine = engine
        own = {name: array for name, array in tensors.items() if isinstance(array, OvArray)}
        names = [tensor.name for tensor in (*engine.inputs, *engine.outputs)]
        if not set(names) <= set(own):
            raise EngineError(f"{engine.component}: what is bound to it must be OpenVINO's: {ONE_ENGINE}")
        with engine._failing(engine.component, "cannot bind"):
            shapes = {tensor.name: own[tensor.name].shape for tensor in engine.inputs}
            self._bound = _Bound(engine, shapes, {name: own[name].tensor for name in names})

    def __call__(self) -> None:
        """Run."""
        with self._engine._failing(self._engine.component, "failed to run"):
            self._bound.ready().infer(share_outputs=True)

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`: nothing is computed ahead."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Where a component's compiled models are kept, in the `engines/` folder of a bundle.

    source: the files of the model and their hashes. part: which of its graphs is compiled.
    """

    store: EngineStore
    component: str
    source: Mapping[str, str]
    part: str = ""

    def find(self, made_of: Mapping[str, Any]) -> Path | None:
        """A compiled model made of the same, None where there is none; a damaged one is removed."""
        folder = self.store.find(self._key(made_of))
        return None if folder is None else folder / _BLOB

    def keep(self, made_of: Mapping[str, Any], compiled: Any) -> None:
        """Keep what was compiled; a folder that cannot be written, or a full disk, is no error."""
        with contextlib.suppress(OSError, RuntimeError):
            made = compiled.export_model()
            self._drop_old(made_of)
            with self.store.building(self._key(made_of), self._record(made_of)) as folder:
                (folder / _BLOB).write_bytes(made if isinstance(made, bytes) else made.read())

    def _record(self, made_of: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "backend": BACKEND,
            "component": self.component,
            "part": self.part,
            "source": dict(self.source),
            **made_of,
        }

    def _key(self, made_of: Mapping[str, Any]) -> str:
        return self.store.key(self._record(made_of))

    def _drop_old(self, made_of: Mapping[str, Any]) -> None:
        """Remove what another version of OpenVINO made of this component, and the oldest of what is left."""
        own = [r for r in self.store.records() if (r.get("backend"), r.get("component")) == (BACKEND, self.component)]
        other = [each for each in own if each.get("version") != made_of["version"]]
        kept = [each for each in own if each not in other]
        kept.sort(key=lambda each: (self.store.root / str(each["key"])).stat().st_mtime)
        for each in (*other, *kept[: max(0, len(kept) - _MOST_KEPT + 1)]):
            self.store.drop(str(each["key"]))


def _shared(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Tensors that are these arrays."""
    tensor = module().Tensor
    return {name: tensor(array, shared_memory=True) for name, array in arrays.items()}


def _tensors(ports: Sequence[Any], known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs or outputs of a model; of those that are known, with the names of their axes."""
    named = {tensor.name: tensor for tensor in known}
    result = []
    for port in ports:
        name = port.get_any_name()
        sizes = [axis.get_length() if axis.is_static else f"{name}_{i}" for i, axis in enumerate(port.partial_shape)]
        found = Tensor(name, np.dtype(port.element_type.to_dtype()).name, tuple(sizes))
        given = named.get(name)
        fits = given is not None and given.dtype == found.dtype and len(given.shape) == len(found.shape)
        result.append(given if given is not None and fits else found)
    return tuple(result)


def _reason(error: Exception) -> str:
    """What OpenVINO says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return reason(RuntimeError(" ".join(said))) if said else reason(error)
