"""The reports of a bundle: how they are read and written, and what a reader expects in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..common.files import read_json, sha256_file, write_json
from .bundle import Bundle
from .reader import fits

REPORTS = ("precision", "quality", "calibration", "engines", "fusion", "plans", "text_storage")
"""Those that `build` writes."""


@dataclass(frozen=True, slots=True)
class _Node:
    node: str


@dataclass(frozen=True, slots=True)
class _Counts:
    low: int
    kept: int


@dataclass(frozen=True, slots=True)
class _Report:
    islands: tuple[_Node, ...]
    nodes: _Counts


@dataclass(frozen=True, slots=True)
class _Quality:
    psnr_db: float


@dataclass(frozen=True, slots=True)
class _Operators:
    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Fusion:
    operators: _Operators
    max_abs_error: float


def is_fusion(report: Any) -> bool:
    """Whether this counts the operators of a graph that was fused, and holds it against torch."""
    return fits(_Fusion, report)


def is_report(report: Any) -> bool:
    """Whether this names the nodes that stay in fp32, and counts them."""
    return fits(_Report, report)


def is_quality(quality: Any) -> bool:
    """Whether this gives the distance of images from fp32."""
    return fits(_Quality, quality)


def read_report(bundle: Bundle, name: str) -> dict[str, Any]:
    """The report `name` of a bundle, {} where it has none. Raises `BundleError` when it cannot be read."""
    path = f"reports/{name}.json"
    return read_json(bundle.path(path), f"the {name} report") if path in bundle.manifest.files else {}


def with_report(bundle: Bundle, name: str, entries: dict[str, Any]) -> Bundle:
    """`bundle` with these entries in its report `name`, beside those that it has; without those that are None."""
    path = bundle.root / "reports" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    found = read_report(bundle, name) | entries
    write_json(path, {key: entry for key, entry in found.items() if entry is not None})
    files = bundle.manifest.files | {f"reports/{name}.json": sha256_file(path)}
    return replace(bundle, manifest=replace(bundle.manifest, files=files))
