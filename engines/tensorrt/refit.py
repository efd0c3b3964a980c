"""Other weights for an engine that is loaded: those of an ONNX model with the same graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...common.errors import EngineError
from .log import Log

_MOST_NAMED = 8


def refit(trt: Any, engine: Any, log: Log, onnx: Path, component: str) -> None:
    """Give `engine` the weights of `onnx`. Nothing may be running in it; its contexts stay as they are.

    Raises `EngineError` naming what does not fit. Part of the weights may be changed then: load the engine anew.
    """
    if not onnx.is_file():
        raise EngineError(
            f"{component}: {onnx}, whose weights its plan is to have, is missing; compile the bundle again"
        )
    log.clear()
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    fits = parser.refit_from_file(str(onnx))
    missing = sorted(name for name in refitter.get_missing_weights() if name)
    if missing:
        named = ", ".join(missing[:_MOST_NAMED]) + (
            f" and {len(missing) - _MOST_NAMED} more" * (len(missing) > _MOST_NAMED)
        )
        raise EngineError(f"{component}: {onnx} lacks weights that its plan has: {named}; is it another model?")
    if not fits:
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineError(f"{component}: the weights of {onnx} do not fit its plan: {log.why(*reasons)}")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{component}: TensorRT did not take the weights of {onnx}: {log.why()}")
