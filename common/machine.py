"""What the operating system says of this machine and its processes; where it does not say, a neutral answer."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import signal
from collections.abc import Iterable
from pathlib import Path

from .errors import DiffoundryError

_PR_SET_PDEATHSIG = 1


def require_modules(verb: str, modules: Iterable[str], extra: str) -> None:
    """Raise `DiffoundryError` that names the extra to install when a module that `verb` needs is missing."""
    for name in modules:
        found = None
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(name)
        if found is None:
            raise DiffoundryError(f"{verb} needs {name}: run `pip install 'diffoundry[{extra}]'`")


def available_memory() -> int | None:
    """Bytes of memory that programs can still have, None where the system does not say."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def peak_memory(process: int) -> int | None:
    """The most bytes of memory that a process, given by its number, has had; None when it has ended."""
    return _kibibytes(Path(f"/proc/{process}/status"), "VmHWM")


def resident_memory() -> int | None:
    """The bytes of memory that this process has now, None where the system does not say."""
    return _kibibytes(Path("/proc/self/status"), "VmRSS")


def _kibibytes(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends. Linux alone can; elsewhere nothing happens."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def trim_memory() -> None:
    """Return freed memory to the system, for other processes to have: glibc keeps what was freed."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).malloc_trim(0)
