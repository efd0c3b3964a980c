"""OpenVINO's module and its devices. The device and the precision asked for are used, or it is said why not."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import weakref
from dataclasses import dataclass
from typing import Any

from ...bundle import FULL
from ...common.errors import EngineError, reason

BACKEND = "openvino"
DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
HINTS = {FULL: ("f32", "FP32"), "fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
"""Of each precision the hint, and the capability that a device says when it computes in it."""
INSTALL = "run `pip install 'diffoundry[openvino]'`"
_FLOOR = (2026, 3)
"""Older ones do not read MultiHeadAttention, which the graphs in two parts have."""
OTHERWISE = "or use the engine onnxruntime"
ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep() -> None:
    """Keep what a forked process inherits for ever: to end it waits for threads that are not there."""
    for each in list(ALIVE):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_keep)


@functools.cache
def module() -> Any:
    """The module `openvino`. Raises `EngineError` when it is not there, does not load or is too old."""
    try:
        import openvino
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise EngineError(
            f"the engine openvino is not installed: {INSTALL}, {OTHERWISE}"
            if missing
            else f"OpenVINO does not load ({reason(error)}): {INSTALL}, {OTHERWISE}"
        ) from None
    found = re.match(r"(\d+)\.(\d+)", str(getattr(openvino, "__version__", "")))
    if found is None or (int(found[1]), int(found[2])) < _FLOOR:
        least = ".".join(map(str, _FLOOR))
        raise EngineError(f"OpenVINO {version(openvino)} is too old, {least} is the least: {INSTALL} --upgrade")
    return openvino


def version(openvino: Any) -> str:
    """The release of the module, without the commit that it was built of."""
    return str(getattr(openvino, "__version__", "(without a version)")).partition("-")[0]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that models are compiled for. name: what OpenVINO calls it. full_name: of the hardware."""

    core: Any
    name: str
    full_name: str
    version: str

    @classmethod
    def open(cls, provider: str, precision: str) -> Device:
        """The device of a key of `DEVICES`.

        Raises `EngineError` when OpenVINO is not installed or finds no such device, or it does not compute in
        `precision`.
        """
        openvino, name = module(), DEVICES[provider]
        core = _core(os.getpid())
        found = [str(each) for each in core.available_devices]
        if not any(each.partition(".")[0] == name for each in found):
            raise EngineError(
                f"OpenVINO {version(openvino)} finds no {name} on this machine, only {', '.join(found) or 'nothing'}: "
                "install its driver, or use the engine openvino, on the CPU"
            )
        try:
            capabilities = {str(each) for each in core.get_property(name, "OPTIMIZATION_CAPABILITIES")}
            full_name = str(core.get_property(name, "FULL_DEVICE_NAME"))
        except Exception as error:  # OpenVINO raises RuntimeError for most of what goes wrong
            raise EngineError(f"OpenVINO cannot use {name}: {reason(error)}; {OTHERWISE[3:]}") from None
        if precision != FULL and HINTS[precision][1] not in capabilities:
            raise EngineError(
                f"{full_name.strip()} does not compute in {precision}: choose --precision fp32, or another machine"
            )
        return cls(core, name, full_name.strip(), version(openvino))

    @property
    def on_cpu(self) -> bool:
        return self.name == DEVICES["cpu"]


def precisions(provider: str = "cpu") -> list[str]:
    """The precisions that the device computes in. Raises `EngineError` as `Device.open`."""
    device = Device.open(provider, FULL)
    capabilities = {str(each) for each in device.core.get_property(device.name, "OPTIMIZATION_CAPABILITIES")}
    return [name for name, (_, capability) in HINTS.items() if name == FULL or capability in capabilities]


@functools.lru_cache(1)
def _core(process: int) -> Any:
    """OpenVINO's core, one in a process: one that was inherited by a fork has lost its threads."""
    core = module().Core()
    ALIVE.add(core)
    return core
