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
    clips = value["clip"] is not None
    found = {key: _array(each) for key, each in {**value, "clip": value["clip"] if clips else 1.0}.items()}
    steps, registers = (*found["weights"].shape, 0, 0)[:2]
    entries = {"weights": (registers, registers + 3), "timesteps": (), "input_scale": (), "x0": (2,), "levels": (2,)}
    shapes = {key: (steps, *shape) for key, shape in (entries | {"draws": ()}).items()}
    for key, shape in {**shapes, "init_scale": (), "clip": ()}.items():
        array, kinds = found[key], "b" if key == "draws" else "if"
        fits = array.shape == shape and array.size and array.dtype.kind in kinds
        with np.errstate(over="ignore"):
            if not fits or not np.isfinite(array.astype(np.float32)).all() or (key == "clip" and array <= 0):
                raise BundleError(
                    f"{where} is damaged: {key} is not what a scheduler table holds; compile the bundle again"
                )
    arrays = {name: found[key] if key == "draws" else found[key].astype(np.float64) for name, key in _KEYS.items()}
    return Table(**arrays, init_scale=float(found["init_scale"]), clip=float(found["clip"]) if clips else np.inf)


def _array(value: Any) -> Array:
    """`value` as an array, one of no type that a table has where its lists are of different lengths."""
    try:
        return np.array(value)
    except (ValueError, OverflowError):
        return np.array(None)
