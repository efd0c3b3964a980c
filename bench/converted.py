"""Where peers keep the models that they convert, from one run to the next, and when those go."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from ..common.errors import DiffoundryError
from ..common.files import read_json, remove, sha256_json, user_cache, write_json

UNUSED_DAYS = 30
"""What was not used for so long goes: it is as large as its checkpoint."""

_OF = "of.json"


def folder_of(name: str, precision: str, checkpoint: str | None, source: Any) -> Path:
    """The folder of a peer, made if it is new, for a checkpoint whose bundle has the record `source`.

    Others go first: those of a checkpoint that is no longer there or has changed, and those that are out of use.
    """
    models = user_cache() / "bench" / "models"
    kept = models / f"{name}-{precision}-{sha256_json([checkpoint, source])[:16]}"
    of = {"peer": name, "precision": precision, "checkpoint": checkpoint}
    for each in models.iterdir() if models.is_dir() else ():
        if each != kept and _is_over(each, of):
            remove(each)
    kept.mkdir(parents=True, exist_ok=True)
    if not (kept / _OF).is_file():
        write_json(kept / _OF, of)
    os.utime(kept / _OF)
    return kept


def _is_over(folder: Path, new: dict[str, Any]) -> bool:
    """Whether no run will read what is in `folder`; `new`: what another folder is made for."""
    of: Any = {}
    with contextlib.suppress(DiffoundryError, OSError):
        of = read_json(folder / _OF, "the record of a converted model")
    checkpoint = of.get("checkpoint") if isinstance(of, dict) else None
    if isinstance(checkpoint, str) and (of == new or not Path(checkpoint).exists()):
        return True
    try:
        used = (folder / _OF if (folder / _OF).exists() else folder).stat().st_mtime
    except OSError:
        return False
    return time.time() - used > UNUSED_DAYS * 86400
