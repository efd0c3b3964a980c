"""Hashes, atomic writes and safe paths: nothing here knows what a bundle holds."""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, DiffoundryError

_CHUNK = 1 << 20
_PLAIN_PATH = re.compile(r"[^\\:\0\ud800-\udfff]{1,1024}")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the contents of `path`."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_tree(folder: Path) -> str:
    """Hex SHA-256 over the relative paths and contents of all files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})


def write_json(path: Path, value: Any) -> None:
    """Write `value` beside `path` and rename it into place."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises `BundleError` when it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{what} is missing: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{what} cannot be read as JSON: {path} ({error})") from None
    if not isinstance(value, dict):
        raise BundleError(f"{what} must hold a JSON object: {path}")
    return value


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused with `BundleError` when it is absolute or leads out of `root`."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not _PLAIN_PATH.fullmatch(relative):
        raise BundleError(f"path {relative!r} leaves the bundle; the bundle is damaged or hostile: do not use it")
    path = root / relative
    try:
        within = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        within = False
    if not within:
        raise BundleError(f"path {relative!r} leads out of the bundle through a link; the bundle is damaged or hostile")
    return path


def holds(root: Path, files: Any) -> bool:
    """Whether `files` maps paths inside `root` to the SHA-256 that each has; False for anything else, and for {}."""
    if not isinstance(files, dict) or not files:
        return False
    try:
        return all(isinstance(name, str) and sha256_file(inside(root, name)) == sha for name, sha in files.items())
    except (BundleError, OSError):
        return False


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` hold what `source` holds, without copying where the file system can link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def disk_error(error: OSError) -> DiffoundryError:
    """What to show for an error of the operating system: one line that names the file and the remedy."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiffoundryError(f"no space left to write{where}: free some disk space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiffoundryError(f"no permission to write{where}: choose a folder that you can write to")
    return DiffoundryError(f"{error.strerror or error}{where}: check the path")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep other processes of this machine from working on `path`, until the block or this process ends.

    The lock lies in the folder for temporary files, so that nothing is left beside `path`.
    Raises `DiffoundryError` at once when another process holds it.
    """
    what = str(path)
    lock_path = Path(tempfile.gettempdir()) / f"diffoundry-{sha256_json([getpass.getuser(), what])[:24]}.lock"
    with lock_path.open("a+b") as file:
        try:
            import fcntl
        except ImportError:  # Windows has no flock
            import msvcrt

            lock = getattr(msvcrt, "locking")  # noqa: B009 (mypy checks on Linux, where msvcrt is empty)
            try:
                lock(file.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
            except OSError:
                raise DiffoundryError(f"another process is working on {what}: wait for it to end") from None
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DiffoundryError(f"another process is working on {what}: wait for it to end") from None
        yield
