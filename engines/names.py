"""The names of engines, as the command line and the manifest spell them."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import EngineError

ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
ENGINES = (
    ONNXRUNTIME,
    f"{ONNXRUNTIME}:cuda",
    f"{ONNXRUNTIME}:tensorrt",
    "tensorrt",
    "tensorrt-rtx",
    OPENVINO,
    f"{OPENVINO}:gpu",
    f"{OPENVINO}:npu",
)
PLANNED = ("tensorrt", "tensorrt-rtx")
"""Backends that run plans."""
FUSED_ENGINES = (f"{ONNXRUNTIME}:cuda",)
"""Engines that run graphs with operators of their own, which are made ahead of time."""
_CPU = "cpu"
_WITH_PROVIDERS = (ONNXRUNTIME, OPENVINO)


@dataclass(frozen=True, slots=True)
class EngineName:
    """backend: onnxruntime, openvino, tensorrt or tensorrt-rtx.

    provider: of ONNX Runtime (cpu, cuda, tensorrt), device of OpenVINO (cpu, gpu, npu), else "".
    """

    backend: str
    provider: str = ""

    @classmethod
    def parse(cls, name: object) -> EngineName:
        """Read one of `ENGINES`; `onnxruntime:cpu` is `onnxruntime`, and `openvino:cpu` is `openvino`.

        Raises `EngineError` for another name.
        """
        backend, _, provider = name.partition(":") if isinstance(name, str) else ("", "", "")
        if name in ENGINES or name in [f"{each}:{_CPU}" for each in _WITH_PROVIDERS]:
            return cls(backend, (provider or _CPU) if backend in _WITH_PROVIDERS else "")
        raise EngineError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the processor."""
        return self.provider == _CPU

    @property
    def fused(self) -> bool:
        """Whether it is one of `FUSED_ENGINES`."""
        return str(self) in FUSED_ENGINES

    def __str__(self) -> str:
        return self.backend if self.provider in ("", _CPU) else f"{self.backend}:{self.provider}"
