"""The builder, in a process of its own: a job as JSON on standard input, events as JSON lines on standard output.

A job is `build.job`'s; an event is {"fraction": …, "phase": …}, and at the end {"done": …} or {"error": …}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ...common.errors import EngineError
from ...common.files import disk_error, replacing
from ...common.machine import die_with_parent
from .backend import BACKENDS
from .layers import WEIGHTS_LINE, from_inspector, from_log, layer_line, memory_of

_EVERY_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_PLAN_CHUNK = 64 << 20


def main() -> None:
    """Run the job on standard input."""
    die_with_parent()
    # the library may print: its words must not come among the events
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        done = _build(json.load(sys.stdin), _sender(events))
    except EngineError as error:
        _send(events, {"error": str(error)})
        sys.exit(1)
    except MemoryError:
        _send(events, {"error": "out of memory"})
        sys.exit(1)
    except OSError as error:
        _send(events, {"error": str(disk_error(error))})
        sys.exit(1)
    _send(events, {"done": done})


def _send(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _sender(events: TextIO) -> Callable[[str, float], bool]:
    """Sends progress, not too often; False once nobody listens any more."""
    last = [0.0]

    def send(phase: str, fraction: float) -> bool:
        now = time.monotonic()
        if now - last[0] >= _EVERY_SECONDS:
            last[0] = now
            try:
                _send(events, {"phase": phase, "fraction": round(fraction, 4)})
            except (BrokenPipeError, OSError):
                return False
        return True

    return send


def _build(job: dict[str, Any], report: Callable[[str, float], bool]) -> dict[str, Any]:
    trt = BACKENDS[job["backend"]].load()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(_why(logger, "the builder does not start"))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        first = parser.get_error(0) if parser.num_errors else None
        reason = "no reason given" if first is None else f"{first.desc()} (node {first.node_name()})"
        raise EngineError(f"the parser refuses {Path(job['onnx']).name}: {reason[:300]}")
    config = _config(trt, builder, network, job)
    config.progress_monitor = _monitor(trt, report)
    timing = _load_timing(config, job["timing"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(_why(logger, "no plan was made"))
    with Path(job["plan"]).open("wb") as file:
        view = memoryview(plan)
        for at in range(0, len(view), _PLAN_CHUNK):
            file.write(view[at : at + _PLAN_CHUNK])
    if timing is not None:
        with contextlib.suppress(OSError):  # the plan is made; the next one only takes longer
            _save_timing(timing.serialize(), Path(job["timing"]))
    softmaxes = sum(network.get_layer(i).type == trt.LayerType.SOFTMAX for i in range(network.num_layers))
    layers = from_log(logger.layers)
    if job["at_gpu"]:  # the plan loads here and can be asked
        layers = from_inspector(_inspect(trt, logger, plan)) or layers
    Path(job["layers"]).write_text(json.dumps([layer.to_json() for layer in layers], indent=1), encoding="utf-8")
    return {"attentions": softmaxes, "memory": memory_of(logger.memory), "warnings": logger.warnings[:20]}


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if job["archs"]:
        config.num_compute_capabilities = len(job["archs"])  # before the capabilities themselves
        for i, arch in enumerate(job["archs"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, arch.upper()), i)
    for flag in job["flags"]:
        _set_flag(trt, config, flag, job["backend"])
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what was asked for, not 10 bits of it
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    shapes = job["profile"]["shapes"]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if {tensor.name for tensor in inputs} != set(shapes):
        names = ", ".join(tensor.name for tensor in inputs)
        raise EngineError(f"the model's inputs are {names}, the profile has {', '.join(shapes)}")
    for tensor in inputs:
        least, usual, largest = shapes[tensor.name]
        if least == largest:  # known sizes are folded into the plan
            tensor.shape = least
        profile.set_shape(tensor.name, least, usual, largest)
    config.add_optimization_profile(profile)
    return config


_FLAGS = {
    "refit": ("REFIT",),
    "strip": ("STRIP_PLAN", "REFIT_IDENTICAL"),
    "weight-streaming": ("WEIGHT_STREAMING",),
    "version-compatible": ("VERSION_COMPATIBLE",),
}


def _set_flag(trt: Any, config: Any, flag: str, backend: str) -> None:
    if flag == "hardware-compatible":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    for name in _FLAGS[flag]:
        if not hasattr(trt.BuilderFlag, name):
            raise EngineError(f"{backend} {trt.__version__} cannot build with {flag}: leave it out")
        config.set_flag(getattr(trt.BuilderFlag, name))


def _load_timing(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    known = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # of another version or GPU
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing(cache: Any, path: Path) -> None:
    with replacing(path) as beside:
        beside.write_bytes(memoryview(cache))


def _inspect(trt: Any, logger: Any, plan: Any) -> str:
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _why(logger: Any, otherwise: str) -> str:
    return (logger.errors[-1] if logger.errors else otherwise)[:400]


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps what is asked for later: errors, warnings, the layers of the finished engine and its memory."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers: list[str] = []
            self.memory: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)
            elif layer_line(message):
                self.layers.append(message)
            elif WEIGHTS_LINE.search(message):
                self.memory.append(message)

    return Logger()


def _monitor(trt: Any, report: Callable[[str, float], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Phases lie within phases: the fraction done is that of the outermost, with its children's in its step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][2] = step + 1
            return report(phase_name, self._fraction(phase_name))

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _fraction(self, name: str) -> float:
            parent, steps, done = self._phases.get(name, (None, 1, 0))
            fraction = min(done / steps, 1.0)
            while parent in self._phases:
                parent, steps, done = self._phases[parent]
                fraction = min((done + fraction) / steps, 1.0)
            return fraction

    return Monitor()


if __name__ == "__main__":
    main()
