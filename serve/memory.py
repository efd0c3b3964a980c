"""The memory of the process, where its allocator is glibc's: what is freed goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

_M_ARENA_MAX = -8
_ARENAS = 2


def few_arenas() -> None:
    """Let all threads share two arenas. Each thread else fills one of its own, whose free parts no other can use."""
    if (library := _library()) is not None:
        library.mallopt(_M_ARENA_MAX, _ARENAS)


def trim() -> None:
    """Give back what is free. It takes some milliseconds."""
    if (library := _library()) is not None:
        library.malloc_trim(0)


@functools.cache
def _library() -> Any:
    """The C library, None where it is another one."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if library.malloc_trim and library.mallopt:
            return library
    return None
