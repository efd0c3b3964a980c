"""The module `onnxruntime`, from whichever wheel it was installed: `onnxruntime` or `onnxruntime-gpu`."""

from __future__ import annotations

import re

from ..common.errors import EngineError, reason

_FLOOR = (1, 22)


def install(wheel: str) -> str:
    """How to get `wheel`, whatever is there: both are one folder, and one that is uninstalled breaks the other."""
    return f"`pip uninstall onnxruntime onnxruntime-gpu`, then `pip install {wheel}`"


_REMEDY = f"run {install('onnxruntime')} (for GPUs onnxruntime-gpu)"

try:
    import onnxruntime as ort
except ImportError as error:
    raise EngineError(f"ONNX Runtime does not load ({reason(error)}): {_REMEDY}") from None
if not hasattr(ort, "InferenceSession"):
    raise EngineError(f"ONNX Runtime is there in part only: {_REMEDY}")


def is_at_least(floor: tuple[int, int]) -> bool:
    """Whether the ONNX Runtime that is loaded is of this version or a newer one."""
    found = re.match(r"(\d+)\.(\d+)", str(ort.__version__))
    return found is not None and (int(found[1]), int(found[2])) >= floor


if not is_at_least(_FLOOR):
    least = ".".join(map(str, _FLOOR))
    raise EngineError(f"ONNX Runtime {ort.__version__} is too old, {least} is the least: {_REMEDY}")

__all__ = ["install", "is_at_least", "ort"]
