"""How a model is compiled, and a model that is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...bundle import FULL
from .device import ALIVE, HINTS


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is compiled. threads: all processors that it uses. streams: calls that run at once, sharing them.

    small: whether the model is compiled for each shape on its own and kept on the disk; a large one is as fast with
    shapes left open, and holds its weights once then.
    """

    precision: str
    threads: int
    streams: int = 1
    small: bool = False

    def properties(self) -> dict[str, Any]:
        """What OpenVINO is told."""
        hint, _ = HINTS[self.precision]
        return {
            "INFERENCE_PRECISION_HINT": hint,
            "EXECUTION_MODE_HINT": "ACCURACY" if self.precision == FULL else "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
        }

    def processor_properties(self) -> dict[str, Any]:
        """What only a processor is told.

        Streams that have the whole machine are bound to a processor each: else two of them are now and then on one.
        Where others run beside them, or have their own processors, the system decides.
        """
        pinned = self.streams > 1 and self.threads >= (os.cpu_count() or 1)
        return {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": self.streams,
            "ENABLE_CPU_PINNING": pinned,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # values stay floats where weights alone are in eight bits
        }


class Compiled:
    """A compiled model and its idle requests. warm: whether it has run."""

    def __init__(self, model: Any) -> None:
        self.model, self.warm = model, False
        self._idle: list[Any] = []
        ALIVE.add(model)

    @contextlib.contextmanager
    def request(self) -> Iterator[Any]:
        """A request, for the caller alone."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.new_request()
        yield request
        self._idle.append(request)

    def new_request(self) -> Any:
        """A request of the caller's own."""
        request = self.model.create_infer_request()
        ALIVE.add(request)
        return request
