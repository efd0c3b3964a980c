"""The stage that writes lower precisions: done once for all that decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, PRECISIONS, STANDARD, Bundle, Variant
from ..bundle.reports import is_quality, is_report
from ..calibration import RULE, Scan, Typed, lower
from ..common.errors import BundleError
from ..common.files import holds, link_or_copy, read_json, sha256_json, write_json
from .place import STAGES

_DECIDE = ("scheduler/", "tokenizer/", "tokenizer_2/")
"""Small files that decide what the loop is run with."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """The components of a bundle in a lower precision, and how far its images are from fp32.

    key: hash of all that decided them. models: the fp32 files of each component that they were made of.
    """

    key: str
    models: dict[str, dict[str, str]]
    typed: dict[str, Typed]
    quality: dict[str, Any]

    def kept(self, root: Path) -> dict[str, frozenset[str]]:
        """The names of the ONNX nodes of each component that stayed in fp32. root: the bundle's folder."""
        return {name: _node_names(root / part.model, part.report["islands"]) for name, part in self.typed.items()}

    def reports(self) -> dict[str, Any]:
        """What was kept in fp32 and why, by component."""
        return {name: part.report for name, part in self.typed.items()}


def lower_bundle(
    bundle: Bundle, old: Path, precision: str, scan: Scan, progress: Callable[[str, int, int], None]
) -> Lowered:
    """Lower the components of `bundle`, or take over what an earlier run or the bundle at `old` has of the same.

    What a component computes depends on all of them, so that all are measured again when one has changed; where that
    gives the same types, it gives the same files. Raises `calibration.QualityError` when the images are too far off.
    """
    root = bundle.root
    key = _key(bundle, precision, scan)
    found = _read(root, root / STAGES, precision)
    if found is None or found.key != key:
        found = _from_old(root, old, precision)
    if found is None or found.key != key:
        typed, quality = lower(bundle, precision, done={}, scan=scan, progress=progress)
        found = Lowered(key, _models(bundle), typed, quality)
    _keep(root, precision, found)
    return found


def others(bundle: Bundle, old: Path, precision: str) -> dict[str, Lowered]:
    """The other precisions than `precision` that the bundle at `old` has of the very models of `bundle`.

    What an interrupted run left of them is forgotten.
    """
    kept: dict[str, Lowered] = {}
    for other in PRECISIONS:
        if other in (FULL, precision):
            continue
        _record(bundle.root / STAGES, other).unlink(missing_ok=True)
        found = _from_old(bundle.root, old, other)
        if found is not None and found.models == _models(bundle):
            _keep(bundle.root, other, found)
            kept[other] = found
    return kept


def variants(lowered: dict[str, Lowered]) -> dict[str, dict[str, Variant]]:
    """The models of each component by precision, as the manifest has them."""
    found: dict[str, dict[str, Variant]] = {}
    for precision, each in lowered.items():
        for name, part in each.typed.items():
            found.setdefault(name, {})[f"{precision}/{STANDARD}"] = Variant(part.model, part.files)
    return found


def _node_names(model: Path, islands: list[dict[str, Any]]) -> frozenset[str]:
    import onnx

    outputs = {island["node"] for island in islands}
    graph = onnx.load(model, load_external_data=False).graph
    return frozenset(node.name for node in graph.node if outputs.intersection(node.output))


def _models(bundle: Bundle) -> dict[str, dict[str, str]]:
    """The fp32 files of each component that has lower precisions."""
    found = {
        name: component.variant(FULL)
        for name, component in bundle.manifest.components.items()
        if component.role != "step"
    }
    return {name: variant.files for name, variant in found.items() if variant is not None}


def _key(bundle: Bundle, precision: str, scan: Scan) -> str:
    return sha256_json(
        {
            "rule": RULE,
            "models": _models(bundle),
            "precision": precision,
            "scan": {**asdict(scan), **scan.record(bundle)},
            "tasks": list(bundle.manifest.tasks),
            "wiring": asdict(bundle.manifest.wiring),
            "files": {path: sha for path, sha in bundle.manifest.files.items() if path.startswith(_DECIDE)},
        }
    )


def _record(folder: Path, precision: str) -> Path:
    return folder / f"precision.{precision}.json"


def _keep(root: Path, precision: str, lowered: Lowered) -> None:
    (root / STAGES).mkdir(exist_ok=True)
    write_json(_record(root / STAGES, precision), asdict(lowered))


def _read(root: Path, records: Path, precision: str) -> Lowered | None:
    """What a record tells of the bundle at `root`, if it is whole and so are its files."""
    try:
        record = read_json(_record(records, precision), "the stage record")
        typed = {name: Typed(part["model"], part["files"], part["report"]) for name, part in record["typed"].items()}
        lowered = Lowered(record["key"], record["models"], typed, record["quality"])
    except (BundleError, LookupError, TypeError, AttributeError):
        return None
    whole = is_quality(lowered.quality) and all(
        isinstance(part.files, dict) and part.model in part.files and is_report(part.report) and holds(root, part.files)
        for part in typed.values()
    )
    return lowered if whole and typed else None


def _from_old(root: Path, old: Path, precision: str) -> Lowered | None:
    """What the bundle that stands at the target has, linked into the work folder."""
    found = _read(old, old / "reports" / "stages", precision)
    if found is not None:
        for part in found.typed.values():
            for path in part.files:
                link_or_copy(old / path, root / path)
    return found
