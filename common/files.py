"""Hashes, atomic writes and safe paths: nothing here knows what a bundle holds."""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, DiffoundryError

LARGEST_JSON = 64 << 20
"""Bytes. The largest that belongs in a bundle is a tokenizer: Gemma's, of 262,144 tokens, has 35 MB."""
_DEEPEST_JSON = 64
"""Objects in one another; nothing that is written here has more than ten."""
MARK_NAME = ".diffoundry-work"
"""The file that makes a folder known as one that is worked in, and that may be removed."""
_MARK_TEXT = "diffoundry made this folder to work in, and removes it.\n"
_CHUNK = 1 << 20
_GIT = ".git"
_HUB_SNAPSHOTS, _HUB_BLOBS, _HUB_SHARED = "snapshots", "blobs", ".huggingface-shared-blobs"
_HUB_SHARED_NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
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


def user_cache() -> Path:
    """The folder in the user's cache that is ours, made or not. Raises `DiffoundryError` where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "diffoundry"
    except RuntimeError:
        raise DiffoundryError("this user has no home folder: set XDG_CACHE_HOME to a folder for caches") from None


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
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file beside `path` to write to; it takes the place of `path` when the block ends well, else it goes.

    Nothing is written through a link: one that stands beside `path` is removed, and one at `path` is replaced.
    Raises `DiffoundryError` for a device or a pipe, which would be gone.
    """
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file() and not path.is_dir():
        raise DiffoundryError(f"{path} is a device or a pipe: choose a file in a folder")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        beside.touch(exist_ok=False)
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises `BundleError` when it is missing, no regular file, larger than `LARGEST_JSON`, or no JSON object.
    """
    try:
        check_regular(path, what)
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and _is_deep(value):
            raise RecursionError
    except FileNotFoundError:
        raise BundleError(f"{what} is missing: {path}") from None
    except RecursionError:
        deep = f"{path} is nested more than {_DEEPEST_JSON} levels deep"
        raise BundleError(f"{what} cannot be read as JSON: {deep}") from None
    except (ValueError, OSError) as error:
        raise BundleError(f"{what} cannot be read as JSON: {path} ({error})") from None
    if not isinstance(value, dict):
        raise BundleError(f"{what} must hold a JSON object: {path}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether more than `_DEEPEST_JSON` objects and lists lie in one another: what is read is written again."""
    level = [value]
    for _ in range(_DEEPEST_JSON):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
    return bool(level)


def check_regular(path: Path, what: str, most: int = LARGEST_JSON) -> None:
    """Raise `BundleError` when `path` is no regular file (a pipe would be waited for) or has more than `most` bytes.

    Raises `OSError` when it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{what} is no regular file: {path}; replace it by the file that belongs there")
    if status.st_size > most:
        raise BundleError(
            f"{what} has {status.st_size / 1e6:,.0f} MB, at most {most / 1e6:,.0f} MB are read: {path} is not what "
            "belongs there"
        )


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused with `BundleError` when it is absolute or leads out of `root`.

    A link may lead to another place in `root`, and in the cache of the Hugging Face hub to the file that the cache
    keeps for it.
    """
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not _PLAIN_PATH.fullmatch(relative):
        raise BundleError(f"path {relative!r} leaves the bundle; the bundle is damaged or hostile: do not use it")
    path = root / relative
    if not _stays(path, root):
        raise BundleError(
            f"{root}: {relative} leads out of the bundle through a link: remove the link, or, if you trust what it "
            "leads to, use a copy that holds the files themselves (cp -rL)"
        )
    return path


def check_tree(root: Path, *, held: bool = True) -> None:
    """Raise `BundleError` when below `root` something is neither a file nor a folder, or a link leads out of it.

    So what is read by its usual name, without standing in a manifest, is no more dangerous than what does.
    held: whether links must not lead out.
    """
    for folder, folders, files in os.walk(root):
        if _GIT in folders:  # which nobody reads here, and which may hold a socket
            folders.remove(_GIT)
        for name in (*folders, *files):
            path = Path(folder, name)
            try:
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    if held and not _stays(path, root):
                        inside(root, path.relative_to(root).as_posix())
                    mode = path.stat().st_mode
            except OSError:  # removed meanwhile, or a link to nothing, which is missing to whoever needs it
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise BundleError(
                    f"{path} is neither a file nor a folder (a pipe, a socket or a device): remove it, or get what "
                    "belongs there again"
                )


def _stays(path: Path, root: Path) -> bool:
    """Whether `path` lies in `root` when its links are followed, or is a file of the hub's cache that `root` is in."""
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return real.is_relative_to(home) or _is_blob(real, home)


def _is_blob(real: Path, home: Path) -> bool:
    """Whether `real` is a file that the hub's cache keeps for a snapshot that `home` is or lies in.

    The cache has `<repository>/snapshots/<revision>/<path>`, a link to `<repository>/blobs/<name>`, which may be a
    link in turn to `blobs/<two digits>/<hash>` beside the repositories.
    """
    for snapshot in (home, *home.parents):
        if snapshot.parent.name == _HUB_SNAPSHOTS:
            repository = snapshot.parent.parent
            shared = repository.parent / _HUB_BLOBS
            return real.parent == repository / _HUB_BLOBS or (
                real.is_relative_to(shared)
                and _HUB_SHARED_NAME.fullmatch(real.relative_to(shared).as_posix()) is not None
                and (shared / _HUB_SHARED).is_file()
            )
    return False


def mark(folder: Path) -> None:
    """Make the folder `folder` known as one that is worked in, and that may be removed."""
    (folder / MARK_NAME).write_text(_MARK_TEXT, encoding="utf-8")


def unmark(folder: Path) -> None:
    """Take the mark away: the work in `folder` is done."""
    (folder / MARK_NAME).unlink(missing_ok=True)


def is_marked(folder: Path) -> bool:
    """Whether `folder` is a folder, no link to one, with the mark that `mark` leaves."""
    path = folder / MARK_NAME
    try:
        real = stat.S_ISDIR(folder.lstat().st_mode) and stat.S_ISREG(path.lstat().st_mode)
        return real and path.stat().st_size == len(_MARK_TEXT) and path.read_text(encoding="utf-8") == _MARK_TEXT
    except (OSError, ValueError):
        return False


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
    source = source.resolve()  # a link that is linked to would lead elsewhere from there
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path):  # what is in a folder without permission to write stays there
            if not os.access(folder, os.W_OK):
                with contextlib.suppress(OSError):
                    Path(folder).chmod(0o700)
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
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # in a container the number may have no name
    lock = Path(tempfile.gettempdir()) / f"diffoundry-{sha256_json([user, str(path)])[:24]}.lock"
    if os.path.lexists(lock) and not stat.S_ISREG(lock.lstat().st_mode):  # anybody may have put it there
        raise DiffoundryError(f"{lock} is in the way of a lock: remove it")
    how = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with os.fdopen(os.open(lock, how, 0o600), "r+b") as file:
            try:
                _lock(file.fileno())
            except OSError:
                raise DiffoundryError(f"another process is working on {path}: wait for it to end") from None
            if not _is_at(file.fileno(), lock):  # who held it before removed it in between
                continue
            try:
                yield
            finally:
                if os.name != "nt":  # where a file that is open cannot be removed
                    lock.unlink(missing_ok=True)
            return


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _lock(file: int) -> None:
    """Lock an open file. Raises `OSError` when another process has locked it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
