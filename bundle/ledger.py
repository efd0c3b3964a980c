"""Work that is done once, found by the hash of all that decides it: in the working folder, else in the old bundle.

A record holds the key, what was made, and the hash of every file of it. It is believed only where it reads as its type
and each file is inside its folder and unchanged; a damaged or hostile record means that the work was not done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..common.errors import BundleError
from ..common.files import holds, link_or_copy, read_json, remove, write_json
from .manifest import Files
from .reader import FieldError, read
from .workspace import STAGES

T = TypeVar("T")
RECORDS = "reports/stages"
"""The records in a finished bundle."""


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a stage makes: a dataclass, which checks itself as it is read, and the files that go with one."""

    type: type[T]
    files: Callable[[T], Files]


@dataclass(frozen=True, slots=True)
class Ledger:
    """work: the folder that a bundle is made in. old: where the bundle stands that it is to replace, if any."""

    work: Path
    old: Path

    def once(self, name: str, key: str, kind: Kind[T], make: Callable[[], T]) -> T:
        """What was made under this name and key: found, or made now and recorded."""
        found = self.find(name, key, kind)
        return self.keep(name, key, make()) if found is None else found

    def keep(self, name: str, key: str, result: T) -> T:
        """Record what was made; its files are in place."""
        (self.work / STAGES).mkdir(exist_ok=True)
        write_json(self._new(name), {"key": key, **asdict(result)})  # type: ignore[call-overload]
        return result

    def find(self, name: str, key: str, kind: Kind[T]) -> T | None:
        """What was made, from the working folder, else linked into it from the old bundle."""
        found = _read(self.work, self._new(name), key, kind)
        return self.take(name, kind, key) if found is None else found

    def take(
        self, name: str, kind: Kind[T], key: str | None = None, fits: Callable[[T], bool] = lambda found: True
    ) -> T | None:
        """What the old bundle has under this name, and under `key` where one is given, linked into the working folder.

        fits: what it must be beside that.
        """
        found = _read(self.old, self._old(name), key, kind)
        if found is None or not fits(found):
            return None
        for path in kind.files(found):
            link_or_copy(self.old / path, self.work / path)
        link_or_copy(self._old(name), self._new(name))
        return found

    def adopt(self, but: Collection[str]) -> None:
        """Take over the records of the old bundle, all `but` some, and believe nothing else of an earlier run."""
        for path in (self.work / STAGES).glob("*.json"):
            if path.stem not in but:
                path.unlink()
        for path in (self.old / RECORDS).glob("*.json"):
            if path.stem not in but:
                link_or_copy(path, self._new(path.stem))

    def forget(self, name: str) -> None:
        """Believe nothing that an earlier run left under this name."""
        self._new(name).unlink(missing_ok=True)

    def knows(self, name: str) -> bool:
        """Whether there is a record of this name, whatever its key."""
        return self._new(name).is_file() or self._old(name).is_file()

    def publish(self) -> None:
        """Put the records into the bundle that is made."""
        remove(self.work / RECORDS)
        (self.work / RECORDS).mkdir(parents=True)
        for path in sorted((self.work / STAGES).glob("*.json")):
            shutil.copyfile(path, self.work / RECORDS / path.name)

    def _new(self, name: str) -> Path:
        return self.work / STAGES / f"{name}.json"

    def _old(self, name: str) -> Path:
        return self.old / RECORDS / f"{name}.json"


def _read(root: Path, record: Path, key: str | None, kind: Kind[T]) -> T | None:
    try:
        value: dict[str, Any] = read_json(record, "the stage record")
        found = read(kind.type, value)
    except (BundleError, FieldError):
        return None
    same = isinstance(value.get("key"), str) and (key is None or value["key"] == key)
    files = kind.files(found)
    return found if same and (not files or holds(root, files)) else None
