"""A table as JSON, so that one read off a scheduler at compile time runs where that scheduler is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import BundleError
from ...common.files import read_json, write_json
from .table import ARRAYS, Table

TRACED = "traced"
"""The folder of such tables, beside the scheduler configuration of a bundle."""
_KEYS = {name: "levels" if name == "alpha_sigma" else name for name in ARRAYS}
"""What each array is called in JSON."""


def traced_path(name: str, count: int) -> Path:
    """Where the table of `count` steps of the scheduler class `name` lies, beside the scheduler configuration."""
    return Path(TRACED, name, f"{count}.json")


def save_table(path: Path, table: Table) -> None:
    """Write `table` to `path`; `load_table` gives it back bit for bit."""
    write_json(path, to_json(table))


def load_table(path: Path) -> Table:
    """The table in `path`. Raises `BundleError` naming the file when it is missing or damaged."""
    return from_json(read_json(path, "the scheduler table"), str(path))


def to_json(table: Table) -> dict[str, Any]:
    """The fields of `table` as nested lists; `clip` is null where nothing is clamped."""
    arrays = {key: getattr(table, name).tolist() for name, key in _KEYS.items()}
    return {**arrays, "init_scale": table.init_scale, "clip": table.clip if np.isfinite(table.clip) else None}


def from_json(value: dict[str, Any], where: str) -> Table:
    """The table that `to_json` wrote. Raises `BundleError` naming `where` when a field is not what a table holds."""
    if set(value) != {*_KEYS.values(), "init_scale", "clip"}:
        raise BundleError(f"{where} is no scheduler table: compile the bundle again")
    weights = _numbers(value, "weights", where, 3)
    steps, registers = weights.shape[:2]
    shapes = {"timesteps": (), "input_scale": (), "weights": (registers, registers + 3), "x0": (2,), "levels": (2,)}
    arrays = {name: _numbers(value, name, where, 1 + len(shape)) for name, shape in shapes.items()}
    arrays["draws"] = _array(value, "draws", where)
    for name, array in arrays.items():
        if array.shape != (steps, *shapes.get(name, ())) or not array.size:
            raise _damaged(where, name)
    if arrays["draws"].dtype != bool:
        raise _damaged(where, "draws")
    clip = np.inf if value["clip"] is None else float(_numbers(value, "clip", where, 0))
    if clip <= 0:
        raise _damaged(where, "clip")
    fields = {name: arrays[key] for name, key in _KEYS.items()}
    return Table(**fields, init_scale=float(_numbers(value, "init_scale", where, 0)), clip=clip)


def _numbers(value: dict[str, Any], name: str, where: str, axes: int) -> Array:
    array = _array(value, name, where)
    with np.errstate(over="ignore"):
        finite = array.dtype.kind in "if" and bool(np.isfinite(array.astype(np.float32)).all())
    if array.ndim != axes or not finite:
        raise _damaged(where, name)
    return array.astype(np.float64)


def _array(value: dict[str, Any], name: str, where: str) -> Array:
    try:
        return np.array(value[name])
    except (ValueError, OverflowError):
        raise _damaged(where, name) from None


def _damaged(where: str, name: str) -> BundleError:
    return BundleError(f"{where} is damaged: {name} is not what a scheduler table holds; compile the bundle again")
