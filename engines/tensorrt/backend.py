"""The two TensorRT modules, which have one API: `tensorrt` and `tensorrt_rtx`."""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...common.errors import EngineError, reason

_MOST_ERRORS = 8
_LONGEST = 400
_VERSION = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Backend:
    """One of the two: its name on the command line, the module, the least version, and the extra that installs it."""

    name: str
    module: str
    floor: tuple[int, int]
    extra: str

    def load(self) -> Any:
        """The module. Raises `EngineError` when it is missing, broken or too old."""
        install = f"run `pip install 'diffoundry[{self.extra}]'`"
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise EngineError(f"the engine {self.name} needs {self.module} ({reason(error)}): {install}") from None
        except (OSError, RuntimeError) as error:
            raise EngineError(f"{self.module} does not load ({reason(error)}): {install}") from None
        found = _VERSION.match(str(module.__version__))
        if found is None or (int(found[1]), int(found[2])) < self.floor:
            least = ".".join(map(str, self.floor))
            raise EngineError(f"{self.module} {module.__version__} is too old, {least} is the least: {install}")
        return module

    @property
    def ahead_of_time(self) -> bool:
        """Whether plans are built on the CPU for GPUs that are elsewhere."""
        return self.name == RTX

    def architectures(self) -> tuple[str, ...]:
        """The GPU architectures that a plan can be built for ahead of time, as `sm89`. Loads the module."""
        if not self.ahead_of_time:
            return ()
        names = (str(name).lower() for name in self.load().ComputeCapability.__members__)
        return tuple(sorted((name for name in names if name.startswith("sm")), key=lambda name: int(name[2:])))

    def check_gpu(self, name: str, arch: str) -> None:
        """Raise `EngineError` when plans of this backend do not run on the GPU `name` of architecture `arch`."""
        if self.ahead_of_time and arch not in self.architectures():
            raise EngineError(
                f"{self.name} does not run on {name} ({arch}), only on {', '.join(self.architectures())}: "
                f"use --engine {ELSEWHERE}"
            )


ELSEWHERE = "onnxruntime:cuda, or tensorrt"
"""The engines of GPUs that TensorRT for RTX does not run on, such as Hopper's."""
TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
BACKENDS = {
    TENSORRT: Backend(TENSORRT, "tensorrt", (10, 13), "tensorrt"),
    RTX: Backend(RTX, "tensorrt_rtx", (1, 5), "rtx"),
}


class Log:
    """What a TensorRT module says: its functions return None or False and log the reason.

    errors: the last ones, until they are cleared. logger: what the module's objects are made with.
    """

    def __init__(self, trt: Any, on_other: Callable[[Any, str], None] = lambda severity, message: None) -> None:
        """on_other: called with what is no error, and how serious it is."""
        self.errors: deque[str] = deque(maxlen=_MOST_ERRORS)
        errors, severities = self.errors, trt.ILogger.Severity

        class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                    errors.append(message)
                else:
                    on_other(severity, message)

        self.logger = Logger()

    def why(self, *reasons: str) -> str:
        """`reasons` and the errors in one line; they are cleared."""
        said = "; ".join(dict.fromkeys(" ".join(text.split()) for text in (*reasons, *self.errors) if text.strip()))
        self.errors.clear()
        return said[:_LONGEST] or "it gave no reason"
