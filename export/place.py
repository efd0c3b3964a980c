"""Where a bundle is made, and how it takes its place: beside the old one, then in its stead."""

from __future__ import annotations

from pathlib import Path

from ..bundle import MANIFEST_NAME, BundleError, DiffoundryError
from ..bundle.files import read_json, remove

STAGES = ".stages"
"""The records of finished stages, in the folder that a bundle is made in."""
UNPACKED = ".checkpoint"
"""What a single file was unpacked to, there."""
_FOLDERS = ("engines", "reports", "tokenizer", "tokenizer_2", "scheduler")


def work_folder(target: Path) -> Path:
    """Where the bundle `target` is made."""
    return target.parent / f".{target.name}.part"


def tidy(work: Path) -> None:
    """After a failure: leave the work folder only if a finished stage is in it."""
    if not any((work / STAGES).glob("*.json")):
        remove(work)


def check_target(target: Path, checkpoint: str | Path) -> None:
    """Raise `DiffoundryError` when a bundle cannot be written to `target`, or something would be lost there."""
    if not target.parent.is_dir():
        raise DiffoundryError(f"the folder {target.parent} does not exist: make it, or choose another --output")
    local = isinstance(checkpoint, (str, Path)) and Path(checkpoint).exists()
    if local and Path(checkpoint).resolve().is_relative_to(target):
        raise DiffoundryError(f"the bundle would overwrite the checkpoint {checkpoint}: choose another --output")
    if target.exists() and not (target / MANIFEST_NAME).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise DiffoundryError(f"{target} exists and is no bundle: choose another --output, or remove it first")
    strangers = _strangers(target)
    if strangers:
        raise DiffoundryError(
            f"{target} holds {', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''}, which the bundle there "
            "does not list and which would be lost: move it away, or choose another --output"
        )


def _strangers(target: Path) -> list[str]:
    """Files in the bundle folder `target` that are not the bundle's: its folders hold nothing else."""
    if not (target / MANIFEST_NAME).is_file():
        return []
    try:
        manifest = read_json(target / MANIFEST_NAME, "the manifest")
        folders = {*_FOLDERS, *manifest["components"]}
    except (BundleError, LookupError, TypeError):
        folders = set(_FOLDERS)
    names = (path.relative_to(target) for path in target.rglob("*") if not path.is_dir())
    own = (MANIFEST_NAME, "model_index.json")
    return sorted(name.as_posix() for name in names if name.parts[0] not in folders and name.as_posix() not in own)


def old_folder(target: Path) -> Path:
    """Where the bundle `target` lies while the new one takes its place."""
    return target.parent / f".{target.name}.old"


def recover(target: Path) -> None:
    """Undo or finish a swap of bundles that was interrupted between its two renames."""
    if old_folder(target).exists():
        if target.exists():
            remove(old_folder(target))
        else:
            old_folder(target).rename(target)


def swap(target: Path) -> None:
    """Put the finished folder in the place of the bundle `target`; `recover` mends a stop between the renames."""
    work = work_folder(target)
    remove(work / STAGES)
    remove(work / UNPACKED)
    if target.exists():
        target.rename(old_folder(target))
    work.rename(target)
    remove(old_folder(target))
