"""What the operating system says of this machine and its processes; where it does not say, a neutral answer."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import platform
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import DiffoundryError

_PR_SET_PDEATHSIG = 1
_MADV_DONTNEED = 4


def require_modules(verb: str, modules: Iterable[str], extra: str) -> None:
    """Raise `DiffoundryError` that names the extra to install when a module that `verb` needs is missing."""
    for name in modules:
        found = None
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(name)
        if found is None:
            raise DiffoundryError(f"{verb} needs {name}: run `pip install 'diffoundry[{extra}]'`")


def processor() -> str:
    """The name of the processor, as it calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown"


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


@contextlib.contextmanager
def evicting(folder: Path, every: float = 0.15) -> Iterator[None]:
    """Give back, again and again, the memory of what this process has mapped of files in `folder`.

    A library that maps weights and packs copies of them would hold both. What is mapped can be read again: only
    mappings that cannot be written are touched. Linux alone can; elsewhere nothing happens.
    """
    done = threading.Event()

    def evict() -> None:
        while not done.wait(every):
            _drop_mapped(folder)

    thread = threading.Thread(target=evict, name="diffoundry-evict", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _drop_mapped(folder)


def _drop_mapped(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        libc, root = ctypes.CDLL(None), f"{folder.resolve()}/"
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights, *_, path = line.split(maxsplit=5) if line.count(" ") >= 5 else ("", "w", "")
            if "w" not in rights and path.startswith(root):
                start, end = (int(each, 16) for each in span.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
