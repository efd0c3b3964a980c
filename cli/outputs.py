"""Files that a command is to write: whether it can is known before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..bundle import MANIFEST_NAME, Bundle
from ..common.errors import RequestError

_LONGEST_NAME = 200


def check_output(path: Path, option: str) -> None:
    """Raise `RequestError` where the file `path` that `option` names could not be written."""
    folder = path.absolute().parent
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give {option} another name")
    if not folder.is_dir():
        raise RequestError(f"the folder {path.parent} does not exist: make it, or choose another {option}")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is a device or a pipe: give {option} another name")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"no permission to write in {path.parent}: choose another {option}")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise RequestError(f"the name {path.name[:20]}… of {option} is too long: at most {_LONGEST_NAME} bytes")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".diffoundry-"):
            pass
    except OSError as error:
        raise RequestError(f"no file can be made in {folder} ({error.strerror}): choose another {option}") from None


def check_beside(bundle: Bundle, outputs: Iterable[tuple[Path, str]]) -> None:
    """Raise `RequestError` where a file, with its option, would take the place of one of the bundle's own."""
    root = bundle.root.resolve()
    own = {root / name for name in (MANIFEST_NAME, *bundle.manifest.all_files())}
    for path, option in outputs:
        if path.resolve() in own:
            raise RequestError(f"{path} is a file of the bundle {bundle.root}: choose another {option}")
