"""What turns ONNX into something that runs."""

from .cache import EngineStore
from .engine import Array, Bound, Engine

__all__ = ["Array", "Bound", "Engine", "EngineStore"]
