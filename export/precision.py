"""The stage that writes lower precisions: done once for each component, scan and rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, Bundle, BundleError, Variant
from ..bundle.files import link_or_copy, read_json, sha256_file, sha256_json, write_json
from ..calibration import RULE, Scan, Typed, lower
from . import step_graph
from .place import STAGES

PRECISIONS = (FULL, "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Lowered:
    """The components of a bundle in a lower precision, and how far its images are from fp32."""

    typed: dict[str, Typed]
    quality: dict[str, Any]

    def kept(self, root: Path) -> dict[str, frozenset[str]]:
        """The names of the ONNX nodes of each component that stayed in fp32. root: the bundle's folder."""
        return {name: _node_names(root / part.model, part.report["islands"]) for name, part in self.typed.items()}


def _node_names(model: Path, islands: list[dict[str, Any]]) -> frozenset[str]:
    import onnx

    outputs = {island["node"] for island in islands}
    graph = onnx.load(model, load_external_data=False).graph
    return frozenset(node.name for node in graph.node if outputs.intersection(node.output))


def lower_bundle(
    bundle: Bundle, old: Path, precision: str, scan: Scan, progress: Callable[[str, int, int], None]
) -> Lowered:
    """Lower the components of `bundle`, taking over what an earlier run or the bundle at `old` has of them.

    Raises `calibration.QualityError` when the images are too far from fp32.
    """
    root = bundle.root
    keys = {name: _key(bundle, name, precision, scan) for name in _lowered(bundle)}
    done = {}
    for name, key in keys.items():
        found = _finished(root, root / STAGES, name, precision, key)
        found = found or _from_old(root, old, name, precision, key)
        if found is not None:
            done[name] = found
    if len(done) == len(keys):
        quality = _record(root / STAGES, "quality", precision) or _record(_records(old), "quality", precision)
        if quality is not None and quality.get("key") == _quality_key(bundle, done, scan):
            write_json(root / STAGES / f"quality.{precision}.json", quality)
            return Lowered(done, quality["quality"])
    typed, measured = lower(bundle, precision, done=done, scan=scan, progress=progress)
    (root / STAGES).mkdir(exist_ok=True)
    for name, part in typed.items():
        value = {"key": keys[name], "models": _models(bundle, name), **asdict(part)}
        write_json(root / STAGES / f"{name}.{precision}.json", value)
    value = {"key": _quality_key(bundle, typed, scan), "quality": measured}
    write_json(root / STAGES / f"quality.{precision}.json", value)
    return Lowered(typed, measured)


def others(bundle: Bundle, old: Path, precision: str) -> dict[str, dict[str, Variant]]:
    """For each component, its models in other precisions than `precision` that the bundle at `old` has of it.

    Their measured quality is taken over where all of them are.
    """
    kept: dict[str, dict[str, Variant]] = {}
    for other in PRECISIONS[1:]:
        if other == precision:
            continue
        for name in bundle.manifest.components:
            record = _record(_records(old), name, other)
            if record is not None and record.get("models") == _models(bundle, name):
                found = _from_old(bundle.root, old, name, other, record["key"])
                if found is not None:
                    kept.setdefault(name, {})[other] = Variant(found.model, found.files)
        quality = _record(_records(old), "quality", other)
        if quality is not None and all(other in kept.get(name, {}) for name in _lowered(bundle)):
            write_json(bundle.root / STAGES / f"quality.{other}.json", quality)
    return kept


def _lowered(bundle: Bundle) -> list[str]:
    """The components that have lower precisions."""
    return [name for name in bundle.manifest.components if name != step_graph.NAME]


def _models(bundle: Bundle, name: str) -> dict[str, str]:
    variant = bundle.component(name).variant(FULL)
    return {} if variant is None else variant.files


def _key(bundle: Bundle, name: str, precision: str, scan: Scan) -> str:
    return sha256_json({"rule": RULE, "models": _models(bundle, name), "precision": precision, "scan": asdict(scan)})


def _quality_key(bundle: Bundle, typed: dict[str, Typed], scan: Scan) -> str:
    models = {name: _models(bundle, name) for name in typed}
    files = {name: part.files for name, part in typed.items()}
    return sha256_json({"rule": RULE, "typed": files, "models": models, "scan": asdict(scan)})


def _records(bundle: Path) -> Path:
    return bundle / "reports" / "stages"


def _record(folder: Path, name: str, precision: str) -> dict[str, Any] | None:
    try:
        return read_json(folder / f"{name}.{precision}.json", "the stage record")
    except BundleError:
        return None


def _finished(root: Path, records: Path, name: str, precision: str, key: str) -> Typed | None:
    record = _record(records, name, precision)
    if record is None or record.get("key") != key:
        return None
    try:
        typed = Typed(record["model"], record["files"], record["report"])
        if typed.files and all(sha256_file(root / path) == sha for path, sha in typed.files.items()):
            return typed
    except (KeyError, TypeError, AttributeError, OSError):
        pass
    return None


def _from_old(root: Path, old: Path, name: str, precision: str, key: str) -> Typed | None:
    """The component of the bundle that stands at the target, linked into the work folder."""
    found = _finished(old, _records(old), name, precision, key)
    if found is not None:
        for path in found.files:
            link_or_copy(old / path, root / path)
        (root / STAGES).mkdir(exist_ok=True)
        write_json(root / STAGES / f"{name}.{precision}.json", _record(_records(old), name, precision))
    return found
