"""What turns ONNX into something that runs."""

from .cache import EngineStore
from .engine import Array, Bound, Engine, Linked, Placed

__all__ = ["Array", "Bound", "Engine", "EngineStore", "Linked", "Placed"]
