"""What eight bits are worth on this machine: time against the other precisions of the engine, and what really runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from ...bundle import FULL, Bundle
from ...bundle.reports import read_report, with_report
from ...common.errors import DiffoundryError
from ...common.machine import processor
from ...common.progress import Meter
from ...engines.loader import precisions_of
from ...engines.names import ONNXRUNTIME, OPENVINO, EngineName
from ...engines.onnxruntime import default_threads
from ...engines.openvino import device
from ...engines.wheel import ort
from ..choice import times
from ..hinted import lowered
from .stage import REPORT

_LAYERS = ("Convolution", "FullyConnected", "MatMul")
_WHOLE = ("i8", "u8")
_INTEGER = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "QGemm")
_FLOAT = ("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")


def check_time(bundle: Bundle, engine: EngineName, precision: str, force: bool, meter: Meter) -> Bundle:
    """`bundle` with the report of what a step takes here in `precision` and in the others that the engine can.

    Raises `DiffoundryError` when another is faster, unless `force` says that it is to be taken all the same.
    """
    found: dict[str, float] = {}
    able = {FULL, *(device.precisions() if engine.backend == OPENVINO else ())}
    # fp16 is slower than bf16 wherever a processor has both
    others = [each for each in (FULL, "bf16") if each in able]
    for each in (*others, precision):
        meter.show(f"time of {engine} {each}")
        found[each] = float(f"{median(times(_in(bundle, engine, each), str(engine), each)):.6g}")
    name = bundle.manifest.named("denoiser")
    layers = count(bundle, name, engine, precision)
    asked = read_report(bundle, "precision")[precision][name]["nodes"]["low"]
    report = {
        "engine": str(engine),
        "processor": processor(),
        "threads": default_threads(),
        "step_s": found,
        "layers": layers,
        "asked": asked,
        "warnings": _warnings(engine, precision, layers, asked),
    }
    meter.step()
    bundle = with_report(bundle, REPORT, {f"{precision}/{engine.backend}": report})
    fastest = min(others, key=lambda each: found[each])
    if found[precision] >= found[fastest] and not force:
        told = ", ".join(f"{each} {1000 * seconds:.4g} ms" for each, seconds in found.items())
        raise DiffoundryError(
            f"{precision} is not faster than {fastest} on this processor with {engine} (a step of the loop: {told}): "
            f"use --precision {fastest}, another engine or machine, or take it all the same with --force"
        )
    return bundle


def describe(key: str, report: dict[str, Any]) -> str:
    """The report on `precision/engine` in words, as the command line prints it."""
    try:
        precision, layers = key.partition("/")[0], report["layers"]
        steps = ", ".join(f"{name} {1000 * seconds:.4g} ms" for name, seconds in report["step_s"].items())
        return (
            f"{report['engine']} runs {layers[precision]} layers in {precision} and {layers['float']} in floats; "
            f"a step of the loop on {report['processor']}: {steps}"
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return "the report on calibration is damaged"


def warnings(report: dict[str, Any]) -> list[str]:
    """What the report on an engine warns of: fewer layers in eight bits than were asked."""
    found = report.get("warnings") if isinstance(report, dict) else None
    return [str(line) for line in found] if isinstance(found, list) else []


def count(bundle: Bundle, name: str, engine: EngineName, precision: str) -> dict[str, int]:
    """How many convolutions and products of the denoiser `engine` runs in eight bits, and how many in floats."""
    part = bundle.component(name)
    variant = part.variant(precision, f"{ONNXRUNTIME}:cpu")
    assert variant is not None  # it was just made
    hint = "bf16" if f"{precision}/{OPENVINO}" in part.variants else FULL
    graphs = [bundle.path(graph) for graph in (variant.model, variant.per_prompt) if graph]
    whole = floats = 0
    for graph in graphs:
        found = _openvino(graph, hint) if engine.backend == OPENVINO else _onnxruntime(graph)
        whole, floats = whole + found[0], floats + found[1]
    return {precision: whole, "float": floats}


def _openvino(graph: Path, precision: str) -> tuple[int, int]:
    opened = device.Device.open("cpu", precision)
    hint = {"INFERENCE_PRECISION_HINT": device.HINTS[precision][0], "EXECUTION_MODE_HINT": "PERFORMANCE"}
    model = opened.core.compile_model(opened.core.read_model(str(graph)), opened.name, hint).get_runtime_model()
    kinds: Counter[bool] = Counter()
    for node in model.get_ops():
        told: Any = node.get_rt_info()
        kind, runs_in = (str(told[key].astype(str)) if key in told else "" for key in ("layerType", "runtimePrecision"))
        if kind in _LAYERS:
            kinds[runs_in in _WHOLE] += 1
    return kinds[True], kinds[False]


def _onnxruntime(graph: Path) -> tuple[int, int]:
    """As the graph is after ONNX Runtime's own passes."""
    import onnx

    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="diffoundry-", dir=graph.parent.parent) as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(written, load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    return sum(kinds[kind] for kind in _INTEGER), sum(kinds[kind] for kind in _FLOAT)


def _warnings(engine: EngineName, precision: str, layers: dict[str, int], asked: int) -> list[str]:
    if layers[precision] >= asked:
        return []
    return [f"{engine} runs {layers[precision]} of the {asked} layers in {precision} that were asked, the rest in fp32"]


def _in(bundle: Bundle, engine: EngineName, precision: str) -> Bundle:
    """`bundle` as one that has this precision, for its time alone."""
    if precision in precisions_of(bundle, engine):
        return bundle
    names = [bundle.manifest.named("denoiser")]
    return lowered(bundle, engine, precision, names)
