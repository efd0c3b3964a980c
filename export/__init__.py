"""The torch half: load a checkpoint, trace it to ONNX, validate it, write the bundle."""

from .compile import compile

__all__ = ["compile"]
