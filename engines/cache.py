"""Built engines on disk, under a key that is the hash of everything that decides them."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import BundleError
from ..common.files import holds, is_marked, link_or_copy, mark, read_json, sha256_file, sha256_json, unmark, write_json

RECORD_NAME = "engine.json"
_ABANDONED_SECONDS = 6 * 3600
_KEY = re.compile(r"[0-9a-f]{32}")
_WORK = re.compile(r"\.[0-9a-f]{32}-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class EngineStore:
    """The `engines/` folder of a bundle.

    Only folders in it that are named by a key, or that are marked as worked in, are ever removed, and no link is
    followed to remove what it leads to.
    """

    root: Path

    def key(self, built_from: dict[str, Any]) -> str:
        """The key of an engine that `built_from` decides: sources, backend, versions, hardware, options."""
        return sha256_json(built_from)[:32]

    def find(self, key: str) -> Path | None:
        """The folder of a whole engine with this key, or None; a damaged one is removed."""
        folder = self.root / key
        if not _is_folder(folder):
            return None
        try:
            record = read_json(folder / RECORD_NAME, "the engine record")
            if record.get("key") == key and holds(folder, record.get("files")):
                return folder
        except BundleError:
            pass
        self.drop(key)
        return None

    def drop(self, key: str) -> None:
        """Remove the engine `key`."""
        if _KEY.fullmatch(key) and _is_folder(self.root):
            shutil.rmtree(self.root / key, ignore_errors=True)

    def take(self, other: EngineStore) -> None:
        """Take over the engines of `other` that are not here, without copying where files can be linked."""
        for record in other.records():
            for path in sorted((other.root / record["key"]).iterdir()):
                copy = self.root / record["key"] / path.name
                if path.is_file() and not copy.exists():
                    link_or_copy(path, copy)

    def problems(self) -> list[str]:
        """The engines whose files are not those of their record, a line each."""
        return [
            f"engines/{record['key']} was changed after it was built (remove that folder)"
            for record in self.records()
            if not holds(self.root / record["key"], record.get("files"))
        ]

    @contextmanager
    def building(self, key: str, record: dict[str, Any]) -> Iterator[Path]:
        """A folder to build in; when the block ends well it becomes the engine `key`, else it is removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        work = self.root / f".{key}-{secrets.token_hex(4)}"
        work.mkdir()
        try:
            mark(work)
            yield work
            unmark(work)
            files = {path.name: sha256_file(path) for path in sorted(work.iterdir()) if path.is_file()}
            write_json(work / RECORD_NAME, {"key": key, **record, "files": files})
            with contextlib.suppress(OSError):  # another process was first: its engine is as good
                work.rename(self.root / key)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def records(self) -> list[dict[str, Any]]:
        """What each built engine was built from and for, with its size in bytes."""
        found = []
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if _is_folder(folder) and _KEY.fullmatch(folder.name):
                    with contextlib.suppress(BundleError):
                        record = read_json(folder / RECORD_NAME, "the engine record")
                        if record.get("key") == folder.name:
                            record["bytes"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
                            found.append(record)
        return found

    def _sweep(self) -> None:
        """Remove what builds that were killed left behind; a build of another process is younger than this."""
        for folder in self._unfinished():
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _unfinished(self) -> Iterator[Path]:
        """The folders of builds that have not ended."""
        for folder in sorted(self.root.glob(".*")) if _is_folder(self.root) else ():
            if _WORK.fullmatch(folder.name) and is_marked(folder):
                yield folder

    def prune(self, sources: Collection[Mapping[str, str]]) -> None:
        """Remove half-built engines, and those made of another model than one of `sources` (path → SHA-256)."""
        for folder in self._unfinished():
            shutil.rmtree(folder, ignore_errors=True)
        for folder in sorted(self.root.iterdir()) if _is_folder(self.root) else ():
            if _KEY.fullmatch(folder.name) and _is_folder(folder):
                try:
                    source = read_json(folder / RECORD_NAME, "the engine record").get("source")
                except BundleError:
                    source = None
                if source not in sources:
                    self.drop(folder.name)


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder and no link to one."""
    return path.is_dir() and not path.is_symlink()
