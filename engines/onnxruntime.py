"""ONNX Runtime: the CPU, CUDA and TensorRT providers. The provider asked for is the provider used, or it fails."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Tensor, Variant
from ..common.arrays import Array
from ..common.errors import EngineError, reason
from .changed import NewValue
from .engine import ONE_ENGINE, DeviceArray, Engine
from .initializers import with_values
from .split import SplitEngine
from .wheel import install, ort

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})  # on by default: float32 products rounded to 10 bits
_Providers = list[tuple[str, dict[str, str]]]
_CHOSEN: dict[str, _Providers] = {
    "cpu": [("CPUExecutionProvider", {})],
    "cuda": [_CUDA],
    # The variables of its environment would decide where nothing is said. What it does not take goes to CUDA.
    "tensorrt": [("TensorrtExecutionProvider", {"trt_fp16_enable": "0", "trt_int8_enable": "0"}), _CUDA],
}
"""The providers of a session and their options: float32 is float32."""
_GPU = {name: install(f"onnxruntime-gpu{' cuda-python' * (name == 'cuda')}") for name in ("cuda", "tensorrt")}
_LIBRARIES = {"cuda": "install CUDA's and cuDNN's libraries", "tensorrt": "install TensorRT's libraries"}
_NO_NODES = bytes.fromhex(
    "08083a25120167"  # IR version 8, a graph `g`
    "5a0f0a0178120a0a08080112040a020801620f0a0178120a0a08080112040a020801"  # its input x, which is its output too
    "42040a001014"  # opset 20
)
"""An ONNX model of nothing, to start a provider with."""
_FATAL = 4
"""A level that ONNX Runtime's log never reaches."""
# fmt: off
_SHAPES = {
    "Shape", "Size", "Constant", "ConstantOfShape", "Gather", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze",
    "Reshape", "Cast", "Range", "Expand", "Where", "Equal", "Not", "Add", "Sub", "Mul", "Div", "Mod", "Floor", "Ceil",
    "Min", "Max", "ReduceProd",
}
# fmt: on
"""What shapes are computed with: a GPU's provider leaves it to the CPU, for a GPU takes longer."""
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_OUT_OF_MEMORY = re.compile(
    r"Failed to allocate memory for requested buffer|smaller than requested bytes|bad_alloc|bad allocation"
    r"|CUDA failure 2: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|CUDNN_BACKEND_API_FAILED.*ALLOC"
)
"""What ONNX Runtime's arena, C++ and CUDA say when memory is wanting; a type for it there is none."""
NO_MEMORY_TO_LOAD = (
    "out of memory while it is loaded: end other programs that hold memory, or use a machine that has more"
)
_SESSIONS: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()


def _keep_sessions() -> None:
    """Keep every session of a forked process for ever: to end one waits for its threads, which are not there."""
    for session in list(_SESSIONS):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._sess))


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_keep_sessions)


def default_threads() -> int:
    """The processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        return os.cpu_count() or 1


class OnnxRuntimeEngine(Engine):
    """One ONNX model in one session; see `engine.Engine` for the contract."""

    def __init__(self, session: ort.InferenceSession, component: str, provider: str) -> None:
        super().__init__(
            component, tensors_of(component, session.get_inputs()), tensors_of(component, session.get_outputs())
        )
        self.provider = provider
        self._session = session

    @classmethod
    def load(
        cls,
        model: Path,
        *,
        component: str = "",
        provider: str = "cpu",
        threads: int | None = None,
        low_memory: bool = False,
        changed: Sequence[NewValue] = (),
        content: bytes | None = None,
    ) -> OnnxRuntimeEngine:
        """Load `model`.

        provider: a key of `PROVIDERS`. threads: of one operator, default all processors. changed: initializers that
        are others than in the file. content: a graph in memory in place of that in the file, beside which its weights
        lie.
        low_memory: for a few calls: nothing is computed or packed ahead, weights are read from the file as they are
        needed, and those in half precision are cast in each call.
        Raises `EngineError` when the model cannot be read or the provider is not there.
        """
        component = component or model.parent.name
        require_provider(provider)
        options = new_options(threads or default_threads(), low_memory)
        session = open_session(model, options, provider, component, changed=changed, content=content)
        if provider != "cpu" and (elsewhere := nodes_elsewhere(session, provider)):
            warnings.warn(
                f"{component}: the provider {provider!r} leaves nodes to others: {elsewhere}",
                RuntimeWarning,
                stacklevel=2,
            )
        return cls(session, component, provider)

    def to_device(self, array: Array) -> OrtArray:
        """See `engine.Engine`."""
        with running(self.component):
            return OrtArray(ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self._device, 0), array.dtype)

    @property
    def _device(self) -> str:
        return "cpu" if self.provider == "cpu" else "cuda"

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with running(self.component):
            values = self._session.run(None, dict(feeds))
        return {tensor.name: value for tensor, value in zip(self.outputs, values, strict=True)}

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> OrtHostBinding:
        return OrtHostBinding(self, feeds)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> OrtDeviceBinding:
        """On a GPU the calls of several engines follow one another on the device's streams."""
        return OrtDeviceBinding(self, tensors)


class OrtArray:
    """A tensor that ONNX Runtime holds; see `engine.DeviceArray`."""

    def __init__(self, value: ort.OrtValue, dtype: np.dtype[np.generic]) -> None:
        self.value, self.dtype = value, dtype
        self.shape: tuple[int, ...] = tuple(value.shape())

    def numpy(self) -> Array:
        """See `engine.DeviceArray`."""
        return np.array(self.value.numpy())  # on the CPU that is a view, which does not keep what it shows

    def update_inplace(self, array: Array) -> None:
        """See `engine.DeviceArray`."""
        self.value.update_inplace(array)


class OrtDeviceBinding:
    """A session bound to tensors on its device; see `engine.DeviceBinding`."""

    def __init__(self, engine: OnnxRuntimeEngine, tensors: Mapping[str, DeviceArray]) -> None:
        """Raises `EngineError` for a tensor that another backend holds."""
        self._component = engine.component
        self._session = engine._session
        self._binding = self._session.io_binding()
        values = {name: tensor.value for name, tensor in tensors.items() if isinstance(tensor, OrtArray)}
        if not {tensor.name for tensor in (*engine.inputs, *engine.outputs)} <= set(values):
            raise EngineError(f"{engine.component}: what is bound to it must be ONNX Runtime's: {ONE_ENGINE}")
        for tensor in engine.inputs:
            self._binding.bind_ortvalue_input(tensor.name, values[tensor.name])
        for tensor in engine.outputs:
            self._binding.bind_ortvalue_output(tensor.name, values[tensor.name])

    def __call__(self) -> None:
        """Run."""
        with running(self._component):
            self._session.run_with_iobinding(self._binding)

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`: nothing is computed ahead."""


class OrtHostBinding:
    """A session with its buffers bound once; on a GPU only what changed is uploaded."""

    def __init__(self, engine: OnnxRuntimeEngine, feeds: Mapping[str, Array]) -> None:
        self._component = engine.component
        self._session = engine._session
        self._host = engine.provider == "cpu"
        self._binding = self._session.io_binding()
        self._feeds = dict(feeds)
        with running(self._component):
            self._inputs = {n: ort.OrtValue.ortvalue_from_numpy(a, engine._device, 0) for n, a in self._feeds.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        # On the CPU most values share the memory of their array; scalars, and all on a GPU, are copies.
        self._copies = {n for n, v in self._inputs.items() if v.data_ptr() != self._feeds[n].ctypes.data}
        self._outputs: dict[str, Array] = {}
        self._names = [tensor.name for tensor in engine.outputs]
        for name in self._names:
            self._binding.bind_output(name, "cpu")

    def __call__(self, *changed: str) -> dict[str, Array]:
        """Run; see `engine.HostBinding`."""
        for name in self._copies.intersection(changed):
            self._inputs[name].update_inplace(self._feeds[name])
        with running(self._component):
            self._session.run_with_iobinding(self._binding)
        if not self._outputs and self._host:
            # The first run says the shapes: from now on the session writes into these arrays.
            for name, array in zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True):
                self._outputs[name] = np.asarray(array, order="C")
                self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(self._outputs[name]))
        elif not self._host:
            self._outputs = dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))
        return self._outputs


def load_variant(
    root: Path,
    name: str,
    variant: Variant,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    low_memory: bool = False,
    changed: Mapping[Path, Sequence[NewValue]] | None = None,
) -> Engine:
    """The engine of a variant of component `name`.

    root: the bundle's folder. changed: by graph. Options and errors are those of `OnnxRuntimeEngine.load`.
    """

    def load(graph: str) -> OnnxRuntimeEngine:
        path = root / graph
        return OnnxRuntimeEngine.load(
            path,
            component=name,
            provider=provider,
            threads=threads,
            low_memory=low_memory,
            changed=(changed or {}).get(path, ()),
        )

    per_step = load(variant.model)
    return SplitEngine(name, load(variant.per_prompt), per_step) if variant.per_prompt else per_step


def require_provider(provider: str) -> str:
    """ONNX Runtime's name of `provider`, which starts here.

    Raises `EngineError` when this build of ONNX Runtime lacks it, or when it does not start on this machine.
    """
    try:
        name = PROVIDERS[provider]
    except (KeyError, TypeError):
        raise EngineError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}") from None
    if name not in ort.get_available_providers():
        raise EngineError(f"provider {provider!r} is not in this ONNX Runtime ({ort.__version__}): {_remedy(provider)}")
    if provider != "cpu":
        _start(provider)
    return name


@functools.cache
def _start(provider: str) -> None:
    """Start `provider` once. Raises `EngineError`."""
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise EngineError(
            f"provider {provider!r} needs onnxruntime-gpu 1.24, this is {ort.__version__}: {_remedy(provider)}"
        )
    # What goes wrong is an error that we raise. The log of the process, which no session has a say in, would show each
    # way that a provider tries and passes over, in hundreds of lines.
    ort.set_default_logger_severity(_FATAL)
    if provider == "tensorrt":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # the provider has no option for it
    try:
        used = _new_session(_NO_NODES, new_options(1), provider).get_providers()
    except Exception:  # ONNX Runtime raises its own family of exceptions, and says nothing of use here
        used = []
    if not used or used[0] != PROVIDERS[provider]:
        raise EngineError(f"provider {provider!r} did not start on this machine: {_remedy(provider, wheel=False)}")


def _remedy(provider: str, *, wheel: bool = True) -> str:
    """What makes `provider` start; wheel: the one that has it is wanted, too."""
    steps = [*([_GPU[provider]] * (wheel and provider in _GPU)), *([_LIBRARIES[provider]] * (provider in _LIBRARIES))]
    return ", ".join([*steps, "or use the engine onnxruntime, on the CPU"])


def new_options(threads: int, low_memory: bool = False) -> ort.SessionOptions:
    """The options of a session. low_memory: see `OnnxRuntimeEngine.load`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Threads that spin after a run would take the processors from the next component's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Where weights alone are in eight bits, values stay floats; the usual level rounds them, too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if low_memory:
        # in the default order all casts of weights come first
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def open_session(
    path: Path,
    options: ort.SessionOptions,
    provider: str,
    component: str,
    chosen: _Providers | None = None,
    changed: Sequence[NewValue] = (),
    content: bytes | None = None,
) -> ort.InferenceSession:
    """A session of the model in `path` on `provider`. chosen: providers and options other than its usual ones.

    changed, content: see `OnnxRuntimeEngine.load`.

    Raises `EngineError` when the model cannot be read.
    """
    if not path.is_file():
        raise EngineError(f"{component}: {path} is missing; compile the bundle again")
    try:
        model = _with(path, options, changed, content) if changed or content is not None else str(path)
        session = _new_session(model, options, provider, chosen)
    except Exception as error:
        if lacks_memory(error):
            raise EngineError(f"{component}: {NO_MEMORY_TO_LOAD}") from None
        # some versions (1.24) do not read weights through the links of the hub's cache
        otherwise = (
            "use a copy that holds the files instead of links (cp -rL)" if path.is_symlink() else "compile again"
        )
        raise EngineError(
            f"{component}: ONNX Runtime {ort.__version__} cannot load {path}: {reason(error)}; "
            f"upgrade ONNX Runtime, or {otherwise}"
        ) from None
    _SESSIONS.add(session)
    return session


def _with(path: Path, options: ort.SessionOptions, changed: Sequence[NewValue], content: bytes | None) -> str | bytes:
    """The model in `path` with other values of initializers: those beside the graph are given to the session."""
    whole = [each for each in changed if each.value.shape == each.initializer.shape]
    apart = [each for each in whole if not each.initializer.embedded]
    if apart:
        options.add_external_initializers([each.initializer.name for each in apart], [_value(each) for each in apart])
    within = [each for each in changed if each.initializer.embedded or each.value.shape != each.initializer.shape]
    if content is None and not within:
        return str(path)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if not within:
        return content or b""
    values = {each.initializer.name: (each.initializer.dtype, each.value) for each in within}
    return with_values(path, values, content)


def _value(changed: NewValue) -> ort.OrtValue:
    """A value for ONNX Runtime, which knows bfloat16 where NumPy does not."""
    if changed.value.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(changed.value, changed.initializer.dtype)
    return ort.OrtValue.ortvalue_from_numpy(changed.value)


def _new_session(
    model: str | bytes, options: ort.SessionOptions, provider: str, chosen: _Providers | None = None
) -> ort.InferenceSession:
    """A session that does not go on with other providers than those of `provider` when they fail."""
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a provider did not start is an error of ours
        session = ort.InferenceSession(model, options, providers=chosen or _CHOSEN[provider], enable_fallback=0)
    session.disable_fallback()  # 1.22 does not know the argument
    return session


def nodes_elsewhere(session: ort.InferenceSession, provider: str) -> str:
    """The nodes that another provider runs than the one asked for, in words; "" where there are none."""
    elsewhere = Counter(
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name != PROVIDERS[provider] and (part.ep_name != PROVIDERS["cpu"] or node.op_type not in _SHAPES)
    )
    return ", ".join(f"{count} {kind} ({other})" for (other, kind), count in sorted(elsewhere.items()))[:300]


@contextlib.contextmanager
def running(component: str) -> Iterator[None]:
    """Raise `EngineError` for what ONNX Runtime and NumPy raise: each has exceptions of its own."""
    try:
        yield
    except Exception as error:
        if lacks_memory(error):
            raise EngineError(
                f"{component}: out of memory: ask for a smaller size or batch, split guidance or a tiled autoencoder"
            ) from None
        raise EngineError(f"{component}: ONNX Runtime failed: {reason(error)}") from None


def lacks_memory(error: Exception) -> bool:
    """Whether ONNX Runtime or NumPy raised `error` for want of memory."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def tensors_of(component: str, nodes: list[Any]) -> tuple[Tensor, ...]:
    """The inputs or outputs of a session. Raises `EngineError` for a type that NumPy has not."""
    result = []
    for node in nodes:
        if node.type not in _DTYPES:
            raise EngineError(f"{component}: tensor {node.name!r} has type {node.type}, which is not supported")
        axes = tuple(a if isinstance(a, (int, str)) else f"{node.name}_{i}" for i, a in enumerate(node.shape))
        result.append(Tensor(node.name, _DTYPES[node.type], axes))
    return tuple(result)
