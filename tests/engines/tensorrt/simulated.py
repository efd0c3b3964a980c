"""A GPU and TensorRT played in host memory: stand-ins for `cuda.bindings.runtime` and for the TensorRT modules.

It proves what the code that drives them does: order, addresses, lifetimes, reuse, errors. It proves nothing of CUDA or
TensorRT themselves: no kernel is compiled, no plan is real, and a model is run by ONNX Runtime on the CPU.

It is stricter than most GPUs where that shows mistakes:
- a stream does nothing before it is waited for, so host arrays that change too early, or are read too early, are wrong;
- new memory holds NaN, freed memory can no longer be touched, not even by a captured graph that knows its address;
- nothing may be allocated, freed or waited for while a stream is captured, and a context must have run once with its
  shapes and its memory before it is captured;
- a context runs only with all addresses set and with memory for activations of its own need, which it overwrites;
- a runtime cache that Python let go of ends the process in truth, and raises here.
"""

from __future__ import annotations

import ctypes
import functools
import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from diffoundry.bundle.reader import read
from diffoundry.common.files import sha256_file
from diffoundry.engines.tensorrt.plan import PLAN_NAME, Plan, Profile, Recipe

ALIGNMENT = 256
VERSION = "1.7.0"


class _Illegal(Exception):
    """A kernel or copy touched memory that is not there."""


class _Properties:
    name = b"Simulated GPU"


class SimulatedCuda:
    """The part of `cuda.bindings.runtime` that is used, on one host. `calls` counts the calls of each function."""

    class cudaError_t(IntEnum):
        cudaSuccess = 0
        cudaErrorInvalidValue = 1
        cudaErrorMemoryAllocation = 2
        cudaErrorInsufficientDriver = 35
        cudaErrorNoDevice = 100
        cudaErrorIllegalAddress = 700
        cudaErrorStreamCaptureUnsupported = 900
        cudaErrorStreamCaptureInvalidated = 901

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaDeviceAttr(IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    cudaStreamNonBlocking = 1
    capability = (8, 9)

    def __init__(self, memory: int = 1 << 30, devices: int = 1, driver: int = 13000, runtime: int = 13000) -> None:
        self.memory, self.devices, self.driver, self.runtime = memory, devices, driver, runtime
        self.calls: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.illegal = ""
        self.blocks: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._queue: list[Callable[[], None]] = []
        self._capture: list[Callable[[], None]] | None = None
        self._capture_ok = True
        self._handles = 1000

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            self.calls[name] += 1
        return value

    # what tests ask

    @property
    def used(self) -> int:
        """Bytes allocated."""
        return sum(len(block) - ALIGNMENT for block in self.blocks.values())

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes at `address`. Raises `_Illegal` when they are not all in one block."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block) - ALIGNMENT:
                offset = address - block.ctypes.data
                return block[offset : offset + size]
        raise _Illegal(f"{size} bytes at {address:#x}")

    @property
    def capturing(self) -> bool:
        """Whether the stream is captured."""
        return self._capture is not None

    def spoil_capture(self) -> None:
        """What a forbidden call does to a capture."""
        self._capture_ok = False

    def enqueue(self, work: Callable[[], None]) -> Any:
        """Work for the stream."""
        if self.illegal:
            return self.cudaError_t.cudaErrorIllegalAddress
        (self._queue if self._capture is None else self._capture).append(work)
        return self.cudaError_t.cudaSuccess

    # the device

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.driver < self.runtime // 1000 * 1000:
            return self.cudaError_t.cudaErrorInsufficientDriver, None
        return (self.cudaError_t.cudaSuccess, self.devices) if self.devices else (self.cudaError_t.cudaErrorNoDevice, 0)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, self.runtime

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        return (self.cudaError_t.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute: Any, index: int) -> tuple[Any, ...]:
        major = attribute == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return self.cudaError_t.cudaSuccess, self.capability[0 if major else 1]

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, _Properties

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, self.memory - self.used, self.memory

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, f"simulated: {error.name} {self.illegal}".strip().encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self.cudaError_t.cudaSuccess,)

    # memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self._capture is not None:
            self._capture_ok = False
            return self.cudaError_t.cudaErrorStreamCaptureUnsupported, 0
        if self.used + size > self.memory:
            return self.cudaError_t.cudaErrorMemoryAllocation, 0
        block = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = block
        return self.cudaError_t.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        if self._capture is not None:
            self._capture_ok = False
            return (self.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._drain()
        if self.blocks.pop(address, None) is None:
            return (self.cudaError_t.cudaErrorInvalidValue,)
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any, ...]:
        self._know(stream)
        self.copied[kind.name] += size
        kinds = self.cudaMemcpyKind

        def copy() -> None:
            to = _host(target, size) if kind == kinds.cudaMemcpyDeviceToHost else self.view(target, size)
            to[:] = _host(source, size) if kind == kinds.cudaMemcpyHostToDevice else self.view(source, size)

        return (self.enqueue(copy),)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        self._know(stream)

        def fill() -> None:
            self.view(address, size)[:] = value

        return (self.enqueue(fill),)

    # streams and graphs

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self.streams.add(self._handle())
        return self.cudaError_t.cudaSuccess, self._handles

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.discard(stream)
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._know(stream)
        if self._capture is not None:
            self._capture_ok = False
            return (self.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        return (self._drain(),)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        self._know(stream)
        assert self._capture is None
        self._capture, self._capture_ok = [], True
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self._know(stream)
        recorded, self._capture = self._capture, None
        if not self._capture_ok or recorded is None:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, 0
        self.graphs[self._handle()] = recorded
        return self.cudaError_t.cudaSuccess, self._handles

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        self.graphs[self._handle()] = list(self.graphs[graph])
        return self.cudaError_t.cudaSuccess, self._handles

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        self._drain()
        del self.graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self._know(stream)
        for work in self.graphs[graph]:
            self.enqueue(work)
        return (self.cudaError_t.cudaErrorIllegalAddress if self.illegal else self.cudaError_t.cudaSuccess,)

    def _drain(self) -> Any:
        queue, self._queue = self._queue, []
        for work in queue:
            try:
                work()
            except _Illegal as error:
                self.illegal = str(error)
                break
        return self.cudaError_t.cudaErrorIllegalAddress if self.illegal else self.cudaError_t.cudaSuccess

    def _know(self, stream: int) -> None:
        assert stream in self.streams, "the stream was destroyed"

    def _handle(self) -> int:
        self._handles += 1
        return self._handles


def _host(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Memory(bytes):
    """What `serialize` returns."""


@functools.cache
def _session(path: str, changed: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open(path: str) -> ort.InferenceSession:
    return _session(path, Path(path).stat().st_mtime_ns)


_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}


@functools.cache
def _weights(path: str) -> dict[str, tuple[int, ...]]:
    import onnx

    return {weight.name: tuple(weight.dims) for weight in onnx.load(path).graph.initializer}


class SimulatedTensorRT:
    """The part of `tensorrt` and `tensorrt_rtx` that is used to run plans. `rtx`: whether it has what only RTX has."""

    class ILogger:
        class Severity(Enum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3

        def __init__(self) -> None:
            self.made = True

    class ComputeCapability(Enum):
        CURRENT = 1
        SM75 = 75
        SM89 = 89
        SM120 = 120

    class ExecutionContextAllocationStrategy(Enum):
        STATIC = 0
        USER_MANAGED = 2

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY = 0
        EAGER = 1

    class CudaGraphStrategy(Enum):
        DISABLED = 0
        WHOLE_GRAPH_CAPTURE = 1

    def __init__(self, cuda: SimulatedCuda, *, rtx: bool = True, whole_profile: bool = False) -> None:
        """whole_profile: a context asks for the memory of its largest shapes, whatever its shapes are."""
        self.__version__ = VERSION
        self.cuda, self.rtx, self.whole_profile = cuda, rtx, whole_profile
        self.engines: list[_Engine] = []
        self.contexts: list[_Context] = []
        self.runs: list[tuple[str, dict[str, tuple[int, ...]]]] = []
        self.compiled = 0
        self.capturable = True
        if not rtx:
            self.CudaGraphStrategy = self.DynamicShapesKernelSpecializationStrategy = None  # type: ignore[assignment,misc]

    def Runtime(self, logger: Any) -> _Runtime:
        assert logger.made
        return _Runtime(self, logger)

    def Refitter(self, engine: _Engine, logger: Any) -> _Refitter:
        return _Refitter(engine, logger)

    def OnnxParserRefitter(self, refitter: _Refitter, logger: Any) -> _OnnxParserRefitter:
        return _OnnxParserRefitter(refitter)

    def nptype(self, dtype: str) -> Any:
        if dtype == "bfloat16":
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return np.dtype(dtype).type

    def error(self, logger: Any, text: str) -> None:
        """Say something as an error."""
        logger.log(self.ILogger.Severity.INFO, "this is no error")
        logger.log(self.ILogger.Severity.ERROR, text)


class _Runtime:
    def __init__(self, trt: SimulatedTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: Any) -> _Engine | None:
        try:
            plan = json.loads(bytes(memoryview(data)))
        except ValueError:
            self.trt.error(self.logger, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            return None
        if plan["arch"] != "sm89":
            self.trt.error(self.logger, f"The engine plan file is for {plan['arch']}")
            return None
        if "version-compatible" in plan["flags"] and not self.engine_host_code_allowed:
            self.trt.error(self.logger, "host code is not allowed")
            return None
        engine = _Engine(self.trt, self.logger, plan)
        self.trt.engines.append(engine)
        return engine


class _Engine:
    def __init__(self, trt: SimulatedTensorRT, logger: Any, plan: Mapping[str, Any]) -> None:
        self.trt, self.logger, self.plan = trt, logger, plan
        self.profile = read(Profile, plan["profile"])
        self.onnx: str | None = None if "strip" in plan["flags"] else plan["onnx"]
        session = _open(plan["onnx"])
        self.tensors = {node.name: _DTYPES[node.type] for node in (*session.get_inputs(), *session.get_outputs())}
        self.tensors.update(plan.get("dtypes", {}))
        self.outputs = [node.name for node in session.get_outputs()]
        self.streamable_weights_size = 1 << 20 if "weight-streaming" in plan["flags"] else 0
        self._budget = 0
        self.contexts = 0
        if trt.rtx:
            self.create_runtime_config = lambda: _RuntimeConfig(trt)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.contexts or not 0 <= budget <= self.streamable_weights_size:
            self.trt.error(self.logger, f"the budget {budget} is not possible now")
        else:
            self._budget = budget

    def need(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The activations of these shapes."""
        return 1024 + 16 * sum(int(np.prod(shape)) for shape in shapes.values())

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        assert index == 0
        return self.need({name: part[2] for name, part in self.profile.shapes.items()})

    def create_execution_context(self, how: Any) -> _Context:
        config = None
        if isinstance(how, _RuntimeConfig):
            config, how = how, how.strategy
        assert how == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts += 1
        context = _Context(self, config)
        self.trt.contexts.append(context)
        return context


class _RuntimeConfig:
    def __init__(self, trt: SimulatedTensorRT) -> None:
        self.strategy = trt.ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache: Callable[[], _RuntimeCache | None] | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self._cache = weakref.ref(cache)  # it does not keep it, as the real one does not
        return True

    @property
    def cache(self) -> _RuntimeCache | None:
        if self._cache is None:
            return None
        cache = self._cache()
        assert cache is not None, "the runtime cache was let go of: this ends the process"
        return cache


class _RuntimeCache:
    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> Memory:
        return Memory(json.dumps(self.kernels).encode())

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.kernels = json.loads(blob)
        except ValueError:
            return False
        return True


class _Context:
    def __init__(self, engine: _Engine, config: _RuntimeConfig | None) -> None:
        self.engine, self.config, self.trt = engine, config, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory, self.size, self.needed = 0, 0, -1
        self.warm = False
        self._made: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        part = self.engine.profile.shapes.get(name)
        if (
            part is None
            or len(part[0]) != len(shape)
            or not all(low <= size <= high for low, size, high in zip(part[0], shape, part[2], strict=True))
        ):
            self.trt.error(self.engine.logger, f"{name}: {shape} is not in the profile")
            return False
        self.shapes[name] = tuple(shape)
        self.needed, self.warm, self._made = -1, False, {}
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(set(self.engine.profile.shapes) - set(self.shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        if not self._made:
            zeros = {key: np.zeros(shape, self.engine.tensors[key]) for key, shape in self.shapes.items()}
            made = _open(self.engine.plan["onnx"]).run(self.engine.outputs, zeros)
            self._made = {key: array.shape for key, array in zip(self.engine.outputs, made, strict=True)}
        return self._made[name]

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            return 0
        self.needed = self._largest if self.trt.whole_profile else self.engine.need(self.shapes)
        return self.engine.need(self.shapes)

    @property
    def _largest(self) -> int:
        return self.engine.get_device_memory_size_for_profile_v2(0)

    def set_device_memory(self, address: int, size: int) -> None:
        needed = self._largest if self.needed < 0 else self.needed
        if size < needed or address % ALIGNMENT:
            self.trt.error(self.engine.logger, f"{size} bytes are less than {needed}")
            return
        self.memory, self.size, self.needed, self.warm = address, size, needed, False

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, engine = self.trt.cuda, self.engine
        unset = set(engine.tensors) - set(self.addresses)
        problems = [
            f"no address for {', '.join(sorted(unset))}" * bool(unset),
            "no weights" * (engine.onnx is None),
            f"no shape for {', '.join(self.infer_shapes())}" * bool(self.infer_shapes()),
            "no memory for activations" * (not self.memory),
            "a foreign stream" * (stream not in cuda.streams),
            "captured before its first run" * (cuda.capturing and not self.warm),
            "it cannot be captured" * (cuda.capturing and not self.trt.capturable),
        ]
        if any(problems):
            self.trt.error(engine.logger, "; ".join(filter(None, problems)))
            cuda.spoil_capture()
            return False
        if self.config is not None and self.config.cache is not None:
            kernel = str(sorted(self.shapes.items()))
            if kernel not in self.config.cache.kernels:
                self.config.cache.kernels.append(kernel)
                self.trt.compiled += 1
        self.warm = True
        cuda.enqueue(functools.partial(self._run, dict(self.shapes), dict(self.addresses), self.memory, self.needed))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], memory: int, needed: int) -> None:
        engine, cuda = self.engine, self.trt.cuda
        cuda.view(memory, needed)[:] = 0xAB
        feeds = {name: self._array(addresses[name], shape, name).copy() for name, shape in shapes.items()}
        assert engine.onnx is not None
        made = _open(engine.onnx).run(engine.outputs, feeds)
        for name, array in zip(engine.outputs, made, strict=True):
            self._array(addresses[name], array.shape, name)[...] = array
        self.trt.runs.append((Path(engine.onnx).parent.name, shapes))

    def _array(self, address: int, shape: tuple[int, ...], name: str) -> np.ndarray:
        dtype = np.dtype(self.engine.tensors[name])
        return self.trt.cuda.view(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


class _Refitter:
    def __init__(self, engine: _Engine, logger: Any) -> None:
        self.engine, self.logger = engine, logger
        self.given: str | None = None
        self.missing = sorted(_weights(engine.plan["onnx"]))

    def get_missing_weights(self) -> list[str]:
        return self.missing

    def refit_cuda_engine(self) -> bool:
        if self.missing or self.given is None:
            return False
        self.engine.onnx = self.given
        return True


class _Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class _OnnxParserRefitter:
    def __init__(self, refitter: _Refitter) -> None:
        self._refitter = refitter
        self._errors: list[_Error] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _Error:
        return self._errors[index]

    def refit_from_file(self, path: str) -> bool:
        given, own = _weights(path), _weights(self._refitter.engine.plan["onnx"])
        self._refitter.missing = sorted(set(own) - set(given))
        self._errors = [
            _Error(f"{name} is of another shape") for name in own if given.get(name, own[name]) != own[name]
        ]
        self._refitter.given = path
        return not self._refitter.missing and not self._errors


def write_plan(
    folder: Path,
    component: str,
    onnx: Path,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    *,
    name: str = "",
    flags: tuple[str, ...] = (),
    arch: str = "sm89",
    backend: str = "tensorrt-rtx",
    dtypes: Mapping[str, str] | None = None,
    content: bytes | None = None,
) -> Plan:
    """A plan that `SimulatedTensorRT` loads: of the model at `onnx`, for `shapes`, the least, usual and largest."""
    profile = Profile(name or component, {k: tuple(tuple(s) for s in part) for k, part in shapes.items()})  # type: ignore[misc]
    key = f"{component}-{profile.name}-{len(list(folder.iterdir())) if folder.exists() else 0}"
    recipe = Recipe(component, {}, backend, VERSION, (arch,), "", "fp32", profile, flags)
    (folder / key).mkdir(parents=True)
    told = {"onnx": str(onnx), "profile": asdict(profile), "arch": arch, "flags": list(flags), "dtypes": dtypes or {}}
    path = folder / key / PLAN_NAME
    path.write_bytes(json.dumps(told).encode() if content is None else content)
    return Plan(recipe, folder / key, key, {PLAN_NAME: sha256_file(path)})
