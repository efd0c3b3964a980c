"""What turns ONNX into something that runs."""

import os

# ONNX Runtime 1.32 sends usage figures unless it is told not to before it is loaded; a process that was forked
# afterwards waits for the sending thread for ever when it exits.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from .cache import EngineStore
from .engine import DeviceArray, DeviceBinding, Engine, HostBinding

__all__ = ["DeviceArray", "DeviceBinding", "Engine", "EngineStore", "HostBinding"]
