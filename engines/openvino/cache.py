"""Compiled models on disk, for the next process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import EngineStore
from .device import BACKEND

_MOST_KEPT = 16
"""Compiled models of a component that are kept on the disk."""
_BLOB = "model.blob"


@dataclass(frozen=True, slots=True)
class Cache:
    """Where a component's compiled models are kept, in the `engines/` folder of a bundle.

    source: the files of the model and their hashes. part: which of its graphs is compiled.
    """

    store: EngineStore
    component: str
    source: Mapping[str, str]
    part: str = ""

    def find(self, made_of: Mapping[str, Any]) -> Path | None:
        """A compiled model made of the same, None where there is none; a damaged one is removed."""
        folder = self.store.find(self._key(made_of))
        return None if folder is None else folder / _BLOB

    def keep(self, made_of: Mapping[str, Any], compiled: Any) -> None:
        """Keep what was compiled; a folder that cannot be written, or a full disk, is no error."""
        with contextlib.suppress(OSError, RuntimeError):
            made = compiled.export_model()
            self._drop_old(made_of)
            with self.store.building(self._key(made_of), self._record(made_of)) as folder:
                (folder / _BLOB).write_bytes(made if isinstance(made, bytes) else made.read())

    def _record(self, made_of: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "backend": BACKEND,
            "component": self.component,
            "part": self.part,
            "source": dict(self.source),
            **made_of,
        }

    def _key(self, made_of: Mapping[str, Any]) -> str:
        return self.store.key(self._record(made_of))

    def _drop_old(self, made_of: Mapping[str, Any]) -> None:
        """Remove what another version of OpenVINO made of this component, and the oldest of what is left."""
        own = [r for r in self.store.records() if (r.get("backend"), r.get("component")) == (BACKEND, self.component)]
        other = [each for each in own if each.get("version") != made_of["version"]]
        kept = [each for each in own if each not in other]
        kept.sort(key=lambda each: (self.store.root / str(each["key"])).stat().st_mtime)
        for each in (*other, *kept[: max(0, len(kept) - _MOST_KEPT + 1)]):
            self.store.drop(str(each["key"]))
