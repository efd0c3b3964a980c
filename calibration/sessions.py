"""Graphs made in memory, run by ONNX Runtime, and engines that report what they were called with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import EIGHT_BIT, STANDARD, Bundle
from ..common.arrays import Array
from ..common.errors import EngineError, reason
from ..engines import DeviceArray, DeviceBinding, Engine, HostBinding
from ..engines.onnxruntime import NO_MEMORY_TO_LOAD, OnnxRuntimeEngine, default_threads, lacks_memory
from ..engines.wheel import ort
from .graph import read, read_blocked
from .precision import Precision, precision_of
from .rewrite import emulated

OnCall = Callable[[Mapping[str, Array], Mapping[str, Array]], None]
"""`on_call(feeds, outputs)` after each call; both are overwritten by the next."""


def start(model: Any, folder: Path, component: str, *, fast: bool = True) -> OnnxRuntimeEngine:
    """An engine of an `onnx_ir.Model` whose external weights lie in `folder`, on the CPU.

    fast: fold constants and pack weights, which takes memory and pays over many calls.
    Raises `EngineError` when ONNX Runtime cannot load it.
    """
    import onnx_ir

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = default_threads(), 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # A value is measured as soon as it is there and freed: the default order does that after all the rest, with
    # every value of the model in memory.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if not fast:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        graph = onnx_ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own family of exceptions
        if lacks_memory(error):
            raise EngineError(f"{component}: {NO_MEMORY_TO_LOAD}") from None
        raise EngineError(f"{component}: ONNX Runtime cannot load what measures it: {reason(error)}") from None
    return OnnxRuntimeEngine(session, component, "cpu")


class RecordedEngine(Engine):
    """An engine that reports to `on_call` of each call. It shows the first `shown` outputs of the engine within."""

    def __init__(self, engine: Engine, on_call: OnCall, shown: int | None = None) -> None:
        super().__init__(engine.component, engine.inputs, engine.outputs[:shown])
        self._engine, self._on_call = engine, on_call
        self._lock = threading.Lock()

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        return self._engine.to_device(array)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        """Raises `EngineError`: what stays on the device cannot be recorded."""
        raise EngineError("a recorded engine runs on host arrays: use the loop 'host'")

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._report(feeds, self._engine(feeds))

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        binding = self._engine.bind_host(feeds, twice)
        return lambda *changed: self._report(feeds, binding(*changed))

    def _report(self, feeds: Mapping[str, Array], made: dict[str, Array]) -> dict[str, Array]:
        with self._lock:
            self._on_call(feeds, made)
        return {tensor.name: made[tensor.name] for tensor in self.outputs}


class Recorder:
    """The calls of one component, to be made again: feeds and outputs, those that did not change kept once."""

    def __init__(self, most: int) -> None:
        """most: calls to keep, the first ones."""
        self._most = most
        self._last: dict[str, Array] = {}
        self.kept: list[tuple[dict[str, Array], dict[str, Array]]] = []

    def add(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Keep a call."""
        if len(self.kept) < self._most:
            copied = {name: self._copy(name, array) for name, array in feeds.items()}
            self.kept.append((copied, {name: np.array(array) for name, array in outputs.items()}))

    def sample(self, loops: int) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """The first call, one from the middle of the first of `loops` loops, and the last; each once."""
        last = len(self.kept) - 1
        return [self.kept[place] for place in sorted({0, len(self.kept) // loops // 2, last})]

    def _copy(self, name: str, array: Array) -> Array:
        last = self._last.get(name)
        if last is None or last.shape != array.shape or not np.array_equal(last, array):
            self._last[name] = np.array(array)
        return self._last[name]


def emulated_engine(path: Path, component: str, precision: Precision) -> Engine:
    """An engine of the converted model in `path` that rounds where a GPU rounds, see `emulated`."""
    return start(emulated(read(path), precision), path.parent, component)


def emulation(bundle: Bundle, precision: str) -> dict[str, Callable[[], Engine]]:
    """What loads each component that `bundle` has in `precision`, for the `engines` of a `Pipeline`.

    A model in eight bits is run as it stands: its roundings are nodes, and its products those of rounded values.
    Raises `DiffoundryError` for an unknown precision, `EngineError` when the bundle was not compiled for it.
    """
    rule = None if precision in EIGHT_BIT else precision_of(precision)
    components = bundle.manifest.components.items()
    found = {name: found.model for name, part in components if (found := part.variants.get(f"{precision}/{STANDARD}"))}
    if not found:
        raise EngineError(
            f"{bundle.root} has no {precision} models: run `diffoundry build {bundle.root} --precision {precision}`"
        )
    if rule is None:
        return {name: partial(as_it_stands, bundle.path(model), name) for name, model in found.items()}
    return {name: partial(emulated_engine, bundle.path(model), name, rule) for name, model in found.items()}


def as_it_stands(path: Path, component: str) -> Engine:
    """The model in `path` with every node of it: no integer operator takes the place of two."""
    return start(read_blocked(path), path.parent, component, fast=False)
