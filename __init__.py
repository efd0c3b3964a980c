"""diffoundry compiles diffusers checkpoints into engines and runs them without PyTorch.

`compile(checkpoint, out)` makes a bundle; `load(bundle)` opens it; `load(bundle)(prompt)` draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Budget, Scan
    from .calibration.build import build
    from .common.errors import BundleError, CheckpointError, DiffoundryError, EngineError, RequestError, StoppedError
    from .engines.tensorrt.target import Target
    from .export import compile
    from .runtime.conditioning import Conditioning
    from .runtime.control import Control
    from .runtime.image_prompt import ImagePrompt
    from .runtime.loop.guidance import Guidance
    from .runtime.pipeline import Pipeline, load
    from .runtime.request import Request
    from .runtime.run import Result

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BundleError",
    "CheckpointError",
    "Conditioning",
    "Control",
    "DiffoundryError",
    "EngineError",
    "Guidance",
    "ImagePrompt",
    "Lora",
    "LoraError",
    "Pipeline",
    "Request",
    "RequestError",
    "Result",
    "Scan",
    "StoppedError",
    "Target",
    "TextualInversion",
    "__version__",
    "build",
    "compile",
    "load",
]

_ERRORS = (
    "BundleError",
    "CheckpointError",
    "DiffoundryError",
    "EngineError",
    "LoraError",
    "RequestError",
    "StoppedError",
)
_HOMES = {
    **dict.fromkeys(_ERRORS, ".common.errors"),
    "Conditioning": ".runtime.conditioning",
    "Control": ".runtime.control",
    "ImagePrompt": ".runtime.image_prompt",
    "Lora": ".runtime.lora",
    "TextualInversion": ".runtime.lora",
    "Budget": ".calibration",
    "build": ".calibration.build",
    "compile": ".export",
    "Guidance": ".runtime.loop.guidance",
    "load": ".runtime.pipeline",
    "Pipeline": ".runtime.pipeline",
    "Request": ".runtime.request",
    "Result": ".runtime.run",
    "Scan": ".calibration",
    "Target": ".engines.tensorrt.target",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import diffoundry` stays fast and torch-free.
    if name not in _HOMES:
        raise AttributeError(f"module 'diffoundry' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
