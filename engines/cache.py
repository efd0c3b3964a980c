"""Built engines on disk, under a key that is the hash of everything that decides them."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import BundleError
from ..bundle.files import holds, read_json, sha256_file, sha256_json, write_json

RECORD_NAME = "engine.json"
_ABANDONED_SECONDS = 6 * 3600


@dataclass(frozen=True, slots=True)
class EngineStore:
    """The `engines/` folder of a bundle."""

    root: Path

    def key(self, built_from: dict[str, Any]) -> str:
        """The key of an engine that `built_from` decides: sources, backend, versions, hardware, options."""
        return sha256_json(built_from)[:32]

    def find(self, key: str) -> Path | None:
        """The folder of a whole engine with this key, or None; a damaged one is removed."""
        folder = self.root / key
        if not folder.is_dir():
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
        shutil.rmtree(self.root / key, ignore_errors=True)

    def problems(self) -> list[str]:
        """The engines whose files are not those of their record, a line each."""
        return [
            f"engines/{record['key']} was changed after it was built"
            for record in self.records()
            if not holds(self.root / record["key"], record.get("files"))
        ]

    @contextmanager
    def building(self, key: str, record: dict[str, Any]) -> Iterator[Path]:
        """A folder to build in; when the block ends well it becomes the engine `key`, else it is removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.root))
        try:
            yield work
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
                if (folder / RECORD_NAME).is_file():
                    with contextlib.suppress(BundleError):
                        record = read_json(folder / RECORD_NAME, "the engine record")
                        if record.get("key") == folder.name:
                            record["bytes"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
                            found.append(record)
        return found

    def _sweep(self) -> None:
        """Remove what builds that were killed left behind; a build of another process is younger than this."""
        for folder in self.root.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def prune(self, sources: Collection[Mapping[str, str]]) -> None:
        """Remove half-built engines, and those made of another model than one of `sources` (path → SHA-256)."""
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            try:
                source = read_json(folder / RECORD_NAME, "the engine record").get("source")
            except BundleError:
                source = None
            if folder.name.startswith(".") or source not in sources:
                shutil.rmtree(folder, ignore_errors=True)

    def writable(self) -> bool:
        """Whether an engine can be kept here (a bundle may lie on a read-only disk)."""
        parent = self.root if os.path.lexists(self.root) else self.root.parent
        return parent.is_dir() and os.access(parent, os.W_OK)


def cpu_identity() -> str:
    """What an engine optimized for this processor depends on: architecture and instruction sets."""
    flags = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.partition(":")[2]
                break
    return sha256_json([platform.system(), platform.machine(), platform.processor(), sorted(flags.split())])[:16]
