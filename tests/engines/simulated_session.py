"""A session of ONNX Runtime's CUDA provider, played on the simulated GPU of `tests/engines/tensorrt/simulated.py`.

It proves what the code that drives it does: order, addresses, lifetimes, capture. It proves nothing of CUDA: the model
runs on the CPU, its operators for GPUs written out in the standard's. It is strict where that shows mistakes:
- a run does nothing before the stream gets there, and then reads and writes the addresses that were bound;
- a run that waits for the stream, or one of the first two with new shapes, spoils a capture.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime as ort

from diffoundry.engines.fusion.graph import open_model
from diffoundry.engines.fusion.standard import in_standard_operators
from diffoundry.tests.engines.tensorrt.simulated import SimulatedCuda

_ENQUEUE_ONLY = "disable_synchronize_execution_providers"
_RUNS_THAT_ALLOCATE = 2


@functools.cache
def _on_the_cpu(path: str, changed: int) -> ort.InferenceSession:
    model = open_model(Path(path))
    in_standard_operators(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent))
    graph = onnx_ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class _Binding:
    """What a session is bound to: addresses, and outputs that the session finds memory for."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        self.outputs: dict[str, tuple[int, tuple[int, ...], Any] | None] = {}
        self.found: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.inputs[name] = address, tuple(shape), dtype

    def bind_output(
        self, name: str, device: str, index: int, dtype: Any = None, shape: Any = None, address: int | None = None
    ) -> None:
        assert (device, index) == ("cuda", 0)
        self.outputs[name] = None if address is None else (address, tuple(shape), dtype)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [self.found[name] for name in self.outputs]


class SimulatedSession:
    """The part of `onnxruntime.InferenceSession` that `CudaEngine` uses."""

    def __init__(self, path: Path, cuda: SimulatedCuda, options: dict[str, str]) -> None:
        self._session = _on_the_cpu(str(path), path.stat().st_mtime_ns)
        self._cuda, self.options = cuda, options
        self.runs: Counter[Any] = Counter()
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: ort.RunOptions | None = None) -> None:
        waits = options is None or options.get_run_config_entry(_ENQUEUE_ONLY) != "1"
        shapes = tuple(shape for _, shape, _ in binding.inputs.values())
        if self._cuda.capturing and (waits or self.runs[shapes] < _RUNS_THAT_ALLOCATE):
            self._cuda.spoil_capture()
        self.runs[shapes] += 1
        self._cuda.enqueue(lambda: self._run(binding))
        if waits and not self._cuda.capturing:
            self._cuda.cudaStreamSynchronize(int(self.options["user_compute_stream"]))

    def _run(self, binding: _Binding) -> None:
        feeds = {name: self._array(*bound).copy() for name, bound in binding.inputs.items()}
        made = dict(zip(binding.outputs, self._session.run(list(binding.outputs), feeds), strict=True))
        for name, bound in binding.outputs.items():
            if bound is None:
                binding.found[name] = made[name]
            else:
                self._array(*bound)[...] = made[name]

    def _array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._cuda.view(address, size).view(dtype).reshape(shape)
