"""Hashes of large files, which are not read again while they are as they were when they were read.

Reading the weights of a model takes as long as half of its load. A file is taken to be the same while its place, size,
inode and both of its times are: the time of the last change of an inode is the kernel's, and no program can set it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from .errors import DiffoundryError
from .files import read_json, sha256_file, sha256_json, user_cache, write_json

LARGE_BYTES = 64 << 20
"""Smaller files are read each time."""
_SETTLED_S = 2.0
"""A file that was changed this short a time ago may be changed again without its times showing it."""


def sha256_known(path: Path) -> str:
    """Hex SHA-256 of the contents of `path`, remembered in the user's cache for a large file that was not touched.

    Windows has no such time, and reads. Raises `OSError` when the file cannot be read.
    """
    found = path.stat()
    if found.st_size < LARGE_BYTES or os.name == "nt":
        return sha256_file(path)
    state = _state(found)
    with contextlib.suppress(DiffoundryError, OSError):
        seen = read_json(_record(path), "the hash of a file")
        if seen.get("state") == state and isinstance(seen.get("sha256"), str):
            return str(seen["sha256"])
    made = sha256_file(path)
    now = path.stat()
    if _state(now) == state and time.time() - max(now.st_mtime, now.st_ctime) > _SETTLED_S:
        with contextlib.suppress(DiffoundryError, OSError):  # it is read again the next time
            record = _record(path)
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"path": str(path.resolve()), "state": state, "sha256": made})
    return made


def _state(found: os.stat_result) -> list[Any]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _record(path: Path) -> Path:
    return user_cache() / "hashes" / f"{sha256_json(str(path.resolve()))[:32]}.json"
