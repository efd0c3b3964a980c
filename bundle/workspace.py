"""The working folder of a compile: `.NAME.part` beside the target, renamed over it at the end.

The old bundle waits as `.NAME.old` between the two renames.
A target that cannot be renamed (a mount point, the working directory, a folder whose parent is not ours to write to)
is made in a folder inside of it, and the contents change places one by one. Both ways go on after a stop.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..common.errors import BundleError, DiffoundryError
from ..common.files import (
    MARK_NAME,
    check_tree,
    disk_error,
    exclusive,
    is_marked,
    mark,
    read_json,
    remove,
    unmark,
    write_json,
)
from .manifest import MANIFEST_NAME, Files, from_json

T = TypeVar("T")
STAGES = ".stages"
"""The records of finished stages, in the folder that a bundle is made in."""
HEAD = "head.json"
"""In a folder there, what the parts of an unfinished stage are of; alone it is nothing to keep."""
UNPACKED = ".checkpoint"
"""What a single file was unpacked to, there."""
_INSIDE = ".diffoundry.part"
"""The folder that a bundle is made in where that has to lie in the target."""
_JOURNAL = ".swap.json"
"""In that folder: the names that leave the target and those that come into it, from when it begins until it ends."""
_REPLACED = ".old"
"""In that folder: what left the target."""
_ASIDE = (_JOURNAL, _REPLACED, STAGES, UNPACKED, MARK_NAME)
"""In that folder: what does not come into the target."""
_OWN = (MANIFEST_NAME, "model_index.json", "engines/timing.cache")
_OWN_FOLDERS = re.compile(r"reports/stages/[^/]+\.json|engines/\.?[0-9a-f]{32}(-[0-9a-f]{8})?/.*")
"""What a bundle holds that its manifest does not list."""


def resolved(out: object) -> Path:
    """The absolute path of the output. Raises `DiffoundryError` for one that no bundle can be written to."""
    if not isinstance(out, (str, Path)) or not str(out):
        raise DiffoundryError(f"the output must be a path, found {out!r}")
    try:
        path = Path(out).resolve()
    except (RuntimeError, ValueError):  # a loop of links, a null character
        raise DiffoundryError(f"the output {str(out)!r} is no path to a folder: choose another --output") from None
    if not path.name:
        raise DiffoundryError(f"{path} is a root folder: choose an --output below it, such as {path / 'new.bundle'}")
    return path


@contextmanager
def working(target: Path, check: Callable[[], T]) -> Iterator[tuple[Path, T]]:
    """The folder that the bundle `target` is made in, for this process alone, and what `check` returns.

    check: raises for what stands in the way, before anything is made. The folder is kept when a finished stage is
    in it, or parts of one, for the next run, and an error says so. Errors of the disk become `DiffoundryError`.
    """
    try:
        with exclusive(target):
            recover(target)
            checked = check()
            try:
                prepare(target)
                with _saying_what_is_kept(target):
                    yield work_folder(target), checked
            finally:
                tidy(target)
    except OSError as error:
        raise disk_error(error) from error


class _KeptError(DiffoundryError):
    """One that says already that the work folder is kept."""


@contextmanager
def _saying_what_is_kept(target: Path) -> Iterator[None]:
    """Add to the message of an error where finished stages are, and what for."""
    try:
        yield
    except _KeptError:
        raise
    except (DiffoundryError, OSError) as error:
        tidy(target)
        work = work_folder(target)
        if not is_marked(work):
            raise
        known = error if isinstance(error, DiffoundryError) else disk_error(error)
        known.args = (f"{known}; what was finished is kept in {work} for the next run, and may be removed",)
        raise known from error.__cause__


def work_folder(target: Path) -> Path:
    """Where the bundle `target` is made."""
    inside = target / _INSIDE
    return inside if os.path.lexists(inside) else target.parent / f".{target.name}.part"


def old_folder(target: Path) -> Path:
    """Where the bundle `target` lies while the new one takes its place."""
    return target.parent / f".{target.name}.old"


def tidy(target: Path) -> None:
    """After a failure: leave the work folder only if a finished stage is in it, or parts of one."""
    work = work_folder(target)
    kept = (path for path in (work / STAGES).rglob("*") if path.is_file() and path.name != HEAD)
    if is_marked(work) and not any(kept):
        _remove_work(work)


def check_target(target: Path, checkpoint: str | Path) -> None:
    """Raise `DiffoundryError` when a bundle cannot be written to `target`, or something would be lost there."""
    if not target.parent.is_dir():
        raise DiffoundryError(f"the folder {target.parent} does not exist: make it, or choose another --output")
    local = isinstance(checkpoint, (str, Path)) and Path(checkpoint).exists()
    if local and Path(checkpoint).resolve().is_relative_to(target):
        raise DiffoundryError(f"the bundle would overwrite the checkpoint {checkpoint}: choose another --output")
    check_replaceable(target)


def check_replaceable(target: Path) -> None:
    """Raise `DiffoundryError` when what stands at `target` is not a bundle alone, or leads out of itself."""
    if target.is_dir() and not os.path.lexists(target / MANIFEST_NAME):
        if any(path.name != _INSIDE for path in target.iterdir()):
            raise DiffoundryError(
                f"{target} exists and is no bundle: choose another --output, such as {target / 'new.bundle'}, or "
                "remove it first"
            )
    elif target.is_dir():
        check_tree(target)
        manifest = target / MANIFEST_NAME
        try:
            listed = from_json(read_json(manifest, "the manifest"), str(manifest)).all_files()
        except BundleError as error:
            raise DiffoundryError(
                f"{target} exists, and what belongs to it is not known ({error}): choose another --output, or remove "
                "it first"
            ) from None
        strangers = sorted(name for name in _unlisted(target, listed) if not name.startswith(f"{_INSIDE}/"))
        if strangers:
            raise DiffoundryError(
                f"{target} holds {', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''}, which the bundle "
                "there does not list and which would be lost: move it away, or choose another --output"
            )
    elif os.path.lexists(target):
        raise DiffoundryError(f"{target} exists and is no bundle: choose another --output, or remove it first")


def sweep(work: Path, listed: Files) -> None:
    """Remove what interrupted runs left in the folder that a bundle is made in: files that it does not list."""
    for name in list(_unlisted(work, listed)):
        if name.partition("/")[0] not in _ASIDE:
            remove(work / name)


def _unlisted(root: Path, listed: Files) -> Iterator[str]:
    """The files below `root` that are neither listed nor among those that a bundle holds beside."""
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        known = name in listed or name in _OWN or _OWN_FOLDERS.fullmatch(name)
        if not known and (path.is_symlink() or not path.is_dir()):
            yield name


def prepare(target: Path) -> None:
    """Make the folder that the bundle `target` is made in, or take up the one that an earlier run left.

    Raises `DiffoundryError` when something else is in its place, and `OSError` when it cannot be made.
    """
    work = work_folder(target)
    inside = target / _INSIDE
    if target.is_dir() and work != inside and not _can_be_renamed(target):
        if is_marked(work):
            check_tree(work)
            try:
                work.rename(inside)  # made before the target was what it is now
            except OSError:  # on another file system: a copy that is stopped would be taken for the whole
                _remove_work(work)
        work = inside
    if not os.path.lexists(work):
        work.mkdir()
        try:
            mark(work)
        except OSError:  # a folder without its mark would be taken for another's
            remove(work)
            raise
    if not is_marked(work):
        raise DiffoundryError(
            f"{work} is there and is not what diffoundry works in: move it away, or choose another --output"
        )
    check_tree(work)


def _can_be_renamed(target: Path) -> bool:
    """Whether the folder `target` can be put aside, found by doing so and undoing it; `recover` mends a stop there."""
    try:
        if Path.cwd().is_relative_to(target):  # it could, but whoever stands in it would stand in the old one
            return False
    except OSError:  # the working directory is gone
        pass
    try:
        target.rename(old_folder(target))
    except OSError:
        return False
    old_folder(target).rename(target)
    return True


def recover(target: Path) -> None:
    """Undo or finish a change of places that was interrupted. Raises `DiffoundryError` when something is in its way."""
    if is_marked(target / _INSIDE) and os.path.lexists(target / _INSIDE / _JOURNAL):
        check_tree(target)
        _change_places(target)
    old = old_folder(target)
    if os.path.lexists(old):
        folder = old.is_dir() and not old.is_symlink()
        if not folder or not (os.path.lexists(old / MANIFEST_NAME) or not any(old.iterdir())):
            raise DiffoundryError(f"{old} is there and is no bundle: move it away, or choose another --output")
        if os.path.lexists(target):
            check_replaceable(old)
            remove(old)
        else:
            old.rename(target)
    if is_marked(target) and os.path.lexists(target / MANIFEST_NAME):
        _finish(target)


def swap(target: Path) -> None:
    """Put the finished folder in the place of the bundle `target`; `recover` mends a stop on the way.

    Raises `DiffoundryError` when that fails: then the finished folder is kept, and the same command goes on with it.
    """
    work = work_folder(target)
    try:
        check_replaceable(target)  # something may have come in the meantime
        if work.parent == target:
            leaving = [path.name for path in target.iterdir() if path != work]
            coming = [path.name for path in work.iterdir() if path.name not in _ASIDE]
            write_json(work / _JOURNAL, {"leaving": leaving, "coming": coming})
            _change_places(target)
            return
        old = old_folder(target)
        if os.path.lexists(target):
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if os.path.lexists(old):
                old.rename(target)
            raise
    except (OSError, DiffoundryError) as error:
        why = disk_error(error) if isinstance(error, OSError) else error
        raise _KeptError(
            f"{why}; the finished bundle is kept in {work}, and the same command goes on with it"
        ) from error
    _finish(target)
    remove(old)


def _finish(target: Path) -> None:
    """Remove from the new bundle what only its making needed."""
    remove(target / STAGES)
    remove(target / UNPACKED)
    unmark(target)


def _change_places(target: Path) -> None:
    """Move the old contents of `target` aside and the new ones in, as the journal says, from wherever that stopped.

    The manifest goes first and comes last: whatever stands there in between is not taken for a bundle.
    """
    work = target / _INSIDE
    journal = read_json(work / _JOURNAL, "the journal of the compile that was stopped")
    leaving, coming = (_names(journal.get(part), work) for part in ("leaving", "coming"))
    (work / _REPLACED).mkdir(exist_ok=True)
    for name in sorted(leaving, key=lambda name: name != MANIFEST_NAME):
        if os.path.lexists(target / name) and not os.path.lexists(work / _REPLACED / name):
            (target / name).rename(work / _REPLACED / name)
    for name in sorted(coming, key=lambda name: name == MANIFEST_NAME):
        if os.path.lexists(work / name):
            (work / name).rename(target / name)
    (work / _JOURNAL).unlink()  # before the old contents: without them it would be followed wrongly
    _remove_work(work)


def _names(value: object, work: Path) -> list[str]:
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    if names != value or not all(Path(name).name == name and name not in ("..", _INSIDE) for name in names):
        raise DiffoundryError(f"{work / _JOURNAL} is damaged: remove {work} and run the same command again")
    return names


def _remove_work(work: Path) -> None:
    """Remove a work folder if it is ours, its mark last, so that it stays known when this is stopped."""
    if is_marked(work):
        for path in list(work.iterdir()):
            if path.name != MARK_NAME:
                remove(path)
        shutil.rmtree(work, ignore_errors=True)
