"""Pictures that are kept for a while, so that they can be asked for."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

KEPT_SECONDS = 3600.0
_MOST_BYTES = 256 << 20
_MOST_FILES = 1000


@dataclass(frozen=True, slots=True)
class File:
    """A picture as a file. until: when it is forgotten, by the clock of `Kept`."""

    data: bytes
    media_type: str
    until: float


class Kept:
    """Files under names that cannot be guessed. The oldest go when they are an hour old, or too many."""

    def __init__(
        self,
        *,
        most_bytes: int = _MOST_BYTES,
        most_files: int = _MOST_FILES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_bytes, self._most_files, self._clock = most_bytes, most_files, clock
        self._files: OrderedDict[str, File] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a file. Returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{media_type.rpartition('/')[2]}"
        self._files[name] = File(data, media_type, self._clock() + KEPT_SECONDS)
        self._bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> File | None:
        """A file that was not forgotten yet."""
        self._forget()
        return self._files.get(name)

    def drop(self, name: str) -> None:
        """Forget a file, where it is still there."""
        file = self._files.pop(name, None)
        self._bytes -= 0 if file is None else len(file.data)

    def _forget(self) -> None:
        while self._files:
            name, oldest = next(iter(self._files.items()))
            is_full = self._bytes > self._most_bytes or len(self._files) > self._most_files
            if oldest.until > self._clock() and not is_full:
                return
            self.drop(name)
