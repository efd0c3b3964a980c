"""What TensorRT says while it works: its functions return None or False, and the reason is in its log."""

from __future__ import annotations

from collections import deque
from typing import Any

_MOST_KEPT = 8
_LONGEST = 400


class Log:
    """Keeps the last errors of a TensorRT module. `logger` is what the module's objects are made with."""

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=_MOST_KEPT)
        self.logger = _logger(trt, self._errors)

    def clear(self) -> None:
        """Forget what was said before."""
        self._errors.clear()

    @property
    def said_errors(self) -> bool:
        """Whether there was an error since `clear`."""
        return bool(self._errors)

    def why(self, *reasons: str) -> str:
        """The errors since `clear`, `reasons` first, in one line; they are forgotten."""
        said = "; ".join(dict.fromkeys(" ".join(text.split()) for text in (*reasons, *self._errors) if text.strip()))
        self._errors.clear()
        return said[:_LONGEST] or "it gave no reason"


def _logger(trt: Any, errors: deque[str]) -> Any:
    serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                errors.append(message)

    return Logger()
