"""The builder, in a process of its own: a job as JSON on standard input, events as JSON lines on standard output.

A job is `build.build`'s; an event is {"fraction": …, "phase": …}, and at the end {"done": …} or {"error": …}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ...common.errors import EngineError
from ...common.files import disk_error, replacing
from ...common.machine import die_with_parent
from .backend import BACKENDS, Log
from .layers import from_inspector, from_log, is_described, memory_of, summary
from .plan import PLAN_NAME

_EVERY_SECONDS = 0.1
_MOST_WARNINGS = 20
_FLAGS = {
    "refit": ("REFIT",),
    "strip": ("STRIP_PLAN", "REFIT_IDENTICAL"),
    "weight-streaming": ("WEIGHT_STREAMING",),
    "version-compatible": ("VERSION_COMPATIBLE",),
}


def main() -> None:
    """Run the job on standard input."""
    die_with_parent()
    # the library may print: its words must not come among the events
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    event: dict[str, Any]
    try:
        event = {"done": _build(json.load(sys.stdin), _sender(events))}
    except EngineError as error:
        event = {"error": str(error)}
    except MemoryError:
        event = {"error": "out of memory"}
    except OSError as error:
        event = {"error": str(disk_error(error))}
    _send(events, event)
    sys.exit("error" in event)


def _send(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _sender(events: TextIO) -> Callable[[str, float], bool]:
    """Sends progress, not too often; False once nobody listens any more."""
    last = 0.0

    def send(phase: str, fraction: float) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY_SECONDS:
            last = now
            try:
                _send(events, {"phase": phase, "fraction": round(fraction, 4)})
            except OSError:
                return False
        return True

    return send


def _build(job: dict[str, Any], report: Callable[[str, float], bool]) -> dict[str, Any]:
    """Build the plan, and say what it is made of."""
    trt = BACKENDS[job["backend"]].load()
    warnings: list[str] = []
    described: list[str] = []

    def hear(severity: Any, message: str) -> None:
        if severity == trt.ILogger.Severity.WARNING:
            warnings.append(message)
        elif is_described(message):
            described.append(message)

    log, folder = Log(trt, hear), Path(job["folder"])
    builder = trt.Builder(log.logger)
    if builder is None:
        raise EngineError(_why(log, "the builder does not start"))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(job["onnx"]):
        first = parser.get_error(0) if parser.num_errors else None
        reason = "no reason given" if first is None else f"{first.desc()} (node {first.node_name()})"
        raise EngineError(f"the parser refuses {Path(job['onnx']).name}: {reason[:300]}")
    config = _config(trt, builder, network, job)
    config.progress_monitor = _monitor(trt, report)
    with _timings(config, job["timing"]):
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(_why(log, "no plan was made"))
        (folder / PLAN_NAME).write_bytes(memoryview(plan))
    attentions = sum(network.get_layer(i).type == trt.LayerType.SOFTMAX for i in range(network.num_layers))
    layers = from_log(described)
    if job["device"]:  # the plan loads here and can be asked
        layers = from_inspector(_inspect(trt, log, plan)) or layers
    (folder / "layers.json").write_text(json.dumps([asdict(layer) for layer in layers], indent=1), encoding="utf-8")
    return {
        "memory": memory_of(described),
        "warnings": warnings[:_MOST_WARNINGS],
        "made_of": summary(layers, job["precision"], attentions, job["fp32_nodes"]),
    }


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if BACKENDS[job["backend"]].ahead_of_time:  # the other knows no GPU but the one that is here
        archs = ["current"] if job["device"] else job["archs"]
        config.num_compute_capabilities = len(archs)  # before the capabilities themselves
        for i, arch in enumerate(archs):
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


def _set_flag(trt: Any, config: Any, flag: str, backend: str) -> None:
    if flag == "hardware-compatible":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return
    for name in _FLAGS[flag]:
        if not hasattr(trt.BuilderFlag, name):
            raise EngineError(f"{backend} {trt.__version__} cannot build with {flag}: leave it out")
        config.set_flag(getattr(trt.BuilderFlag, name))


@contextlib.contextmanager
def _timings(config: Any, path: str | None) -> Iterator[None]:
    """Let a build take the timings of kernels in the file `path`, and keep those that it makes there."""
    if path is None:
        yield
        return
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # of another version or GPU
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    with contextlib.suppress(OSError), replacing(file) as beside:  # the plan is made; the next one only takes longer
        beside.write_bytes(memoryview(cache.serialize()))


def _inspect(trt: Any, log: Log, plan: Any) -> str:
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _why(log: Log, otherwise: str) -> str:
    return (log.errors[-1] if log.errors else otherwise)[:400]


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
