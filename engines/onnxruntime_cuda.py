"""ONNX Runtime's CUDA provider with graphs made for it: one stream for all sessions, and launches captured from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Variant
from ..common.arrays import Array
from ..common.errors import EngineError
from .changed import NewValue
from .engine import DeviceArray, Engine, HostBinding
from .gpu.gpu import CapturedLaunches, DeviceTensor, Gpu
from .onnxruntime import new_options, nodes_elsewhere, open_session, running, tensors_of
from .split import SplitEngine
from .wheel import install, is_at_least, ort

FLOOR = (1, 31)
"""The ONNX Runtime whose kernels were looked through for what a captured graph must not do: copy from the host."""
_WARM_RUNS = 2
"""Runs after which a session asks for no memory any more."""
_MOST_CALLS = 8
"""Sets of shapes of a component that are kept ready."""
_DEVICE = "cuda", 0
_EXACT = {"sdpa_kernel": "16"}
"""Of attention in float32 the kernel that computes in it: the others round to TF32."""
_Shapes = tuple[tuple[int, ...], ...]


def require_version() -> None:
    """Raise `EngineError` where this ONNX Runtime is too old for captured graphs."""
    if not is_at_least(FLOOR):
        least = ".".join(map(str, FLOOR))
        raise EngineError(
            f"the engine onnxruntime:cuda needs onnxruntime-gpu {least}, this is {ort.__version__}: "
            f"{install('onnxruntime-gpu cuda-python')}"
        )


def load_fused(
    root: Path,
    name: str,
    variant: Variant,
    gpu: Gpu,
    *,
    exact: bool,
    captured: bool,
    changed: Mapping[Path, Sequence[NewValue]] | None = None,
) -> Engine:
    """The engine of a variant made for CUDA, of component `name`.

    root: the bundle's folder. exact: whether float32 is to be float32 in attention, too.
    captured: whether calls with arrays of the host are captured. changed: initializers that are others than in the
    files, by graph. Errors are those of `CudaEngine.load`.
    """

    def load(graph: str) -> CudaEngine:
        own = (changed or {}).get(root / graph, ())
        return CudaEngine.load(root / graph, component=name, gpu=gpu, exact=exact, captured=captured, changed=own)

    per_step = load(variant.model)
    return SplitEngine(name, load(variant.per_prompt), per_step) if variant.per_prompt else per_step


class CudaEngine(Engine):
    """One ONNX model in one session, whose runs are enqueued in the stream of `gpu`; see `engine.Engine`.

    All memory that outlives a run is the GPU's own; what a run needs comes from the session's arena, which grows in the
    first runs only and is free again after each, so that captured runs of different shapes share it.
    """

    def __init__(self, session: Any, component: str, gpu: Gpu, *, captured: bool = True) -> None:
        super().__init__(
            component, tensors_of(component, session.get_inputs()), tensors_of(component, session.get_outputs())
        )
        self.gpu, self.session, self.captured = gpu, session, captured
        self.enqueue_only = ort.RunOptions()
        self.enqueue_only.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._calls: OrderedDict[_Shapes, _Call] = OrderedDict()

    @classmethod
    def load(
        cls,
        model: Path,
        *,
        component: str,
        gpu: Gpu,
        exact: bool = False,
        captured: bool = True,
        changed: Sequence[NewValue] = (),
    ) -> CudaEngine:
        """Load `model`, which has no node that the GPU cannot run. changed: initializers that are others in it.

        Raises `EngineError` when the model cannot be read, or nodes that are more than the arithmetic of shapes do not
        run on the GPU.
        """
        options = new_options(1)
        options.enable_mem_pattern = False  # its second run would ask for memory once more
        given = {
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # as fast as the default, and ready in a seventh of the time
            "arena_extend_strategy": "kSameAsRequested",
            "user_compute_stream": str(gpu.device.stream),
            **(_EXACT if exact else {}),
        }
        session = open_session(model, options, "cuda", component, [("CUDAExecutionProvider", given)], changed)
        elsewhere = nodes_elsewhere(session, "cuda")
        if elsewhere:
            raise EngineError(
                f"{component}: ONNX Runtime {ort.__version__} leaves nodes of {model.name} to others than CUDA: "
                f"{elsewhere}; upgrade onnxruntime-gpu, or build the bundle again"
            )
        return cls(session, component, gpu, captured=captured)

    def to_device(self, array: Array) -> DeviceTensor:
        """See `engine.Engine`."""
        return self.gpu.to_device(array)

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """See `engine.Engine`: a CUDA graph, from the third call on."""
        return CapturedLaunches(self.gpu, launches, what, _WARM_RUNS)

    def bound(self, tensors: Mapping[str, DeviceTensor]) -> Any:
        """A binding of the session to all of `tensors` that it knows."""
        binding = self.session.io_binding()
        for tensor in self.inputs:
            own = tensors[tensor.name]
            binding.bind_input(tensor.name, *_DEVICE, own.dtype.type, list(own.shape), own.address)
        for tensor in self.outputs:
            if tensor.name in tensors:
                own = tensors[tensor.name]
                binding.bind_output(tensor.name, *_DEVICE, own.dtype.type, list(own.shape), own.address)
        return binding

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with self.gpu.work():
            shapes = tuple(feeds[tensor.name].shape for tensor in self.inputs)
            call = self._calls.pop(shapes, None) or _Call(self, feeds)
            self._calls[shapes] = call
            while len(self._calls) > _MOST_CALLS:
                self._calls.popitem(last=False)
            return call(feeds)

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        """What changed is uploaded, what did not is left on the GPU."""
        with self.gpu.work():
            call = _Call(self, feeds)
        arrays, fresh = dict(feeds), set(feeds)

        def run(*changed: str) -> dict[str, Array]:
            with self.gpu.work():
                made = call({name: arrays[name] for name in fresh.union(changed) if name in arrays})
            fresh.clear()
            return made

        return run

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> CudaDeviceBinding:
        own = self.gpu.own(self.component, (*self.inputs, *self.outputs), tensors)
        return CudaDeviceBinding(self, own)


class CudaDeviceBinding:
    """A session that reads and writes tensors on its GPU; see `engine.DeviceBinding`."""

    def __init__(self, engine: CudaEngine, tensors: Mapping[str, DeviceTensor]) -> None:
        self._engine, self._tensors = engine, dict(tensors)  # which hold their memory
        with engine.gpu.work(), running(engine.component):
            self._binding = engine.bound(tensors)

    def __call__(self) -> None:
        """Enqueue a run."""
        engine = self._engine
        with engine.gpu.work(), running(engine.component):
            engine.session.run_with_iobinding(self._binding, engine.enqueue_only)

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`: nothing is computed ahead."""


class _Call:
    """A session with tensors of its own on the GPU, for inputs of one set of shapes.

    The first run tells the shapes of the outputs.
    """

    def __init__(self, engine: CudaEngine, feeds: Mapping[str, Array]) -> None:
        self._engine = engine
        self._inputs = {name: _tensor(engine, array.shape, array.dtype) for name, array in feeds.items()}
        self._outputs: dict[str, DeviceTensor] = {}
        self._launch: Callable[[], None] | None = None

    def __call__(self, changed: Mapping[str, Array]) -> dict[str, Array]:
        """Upload what changed, run, and return the outputs, which are the caller's."""
        device = self._engine.gpu.device
        held = {name: np.asarray(array, order="C") for name, array in changed.items()}
        for name, array in held.items():
            device.upload(self._inputs[name].address, array)
        if self._launch is None:
            return self._first()
        self._launch()
        made = {name: np.empty(tensor.shape, tensor.dtype) for name, tensor in self._outputs.items()}
        for name, array in made.items():
            device.download(array, self._outputs[name].address)
        device.synchronize()
        return made

    def _first(self) -> dict[str, Array]:
        engine = self._engine
        with running(engine.component):
            binding = engine.bound(self._inputs)
            for tensor in engine.outputs:
                binding.bind_output(tensor.name, *_DEVICE)
            engine.session.run_with_iobinding(binding)
            made = dict(zip((tensor.name for tensor in engine.outputs), binding.copy_outputs_to_cpu(), strict=True))
        self._outputs = {name: _tensor(engine, array.shape, array.dtype) for name, array in made.items()}
        launch = CudaDeviceBinding(engine, {**self._inputs, **self._outputs})
        shape = "x".join(map(str, next(iter(self._inputs.values())).shape))
        self._launch = engine.capture(launch, f"{engine.component} {shape}") if engine.captured else launch
        return {name: np.asarray(array, order="C") for name, array in made.items()}


def _tensor(engine: CudaEngine, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceTensor:
    return DeviceTensor(engine.gpu, shape, dtype, f"a tensor of {engine.component}")
