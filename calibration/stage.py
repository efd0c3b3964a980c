"""The stage that converts a bundle to a lower precision, done once for all that decides it. It needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..bundle import FULL, STANDARD, Bundle, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import is_quality, is_report, with_report
from ..common.files import sha256_json
from ..common.progress import Meter
from ..engines.names import ONNXRUNTIME
from .conversion import RULE, convert_models
from .precision import PRECISIONS
from .rewrite import ConvertedModel
from .scan import Scan

_DECIDE = ("scheduler/", "tokenizer/", "tokenizer_2/")
"""Small files that decide what the loop is run with."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The components of a bundle in a lower precision, and how far its images are from fp32.

    models: the fp32 files of each component that they were made of.
    """

    models: dict[str, Files]
    converted: dict[str, ConvertedModel]
    quality: dict[str, Any]

    def __post_init__(self) -> None:
        parts = self.converted.values()
        if not parts or not is_quality(self.quality):
            raise ValueError("it was not measured")
        if not all(part.model in part.files and is_report(part.report) for part in parts):
            raise ValueError("a component has no model, or no report")

    def all_files(self) -> Files:
        """The files of all components."""
        return {path: sha for part in self.converted.values() for path, sha in part.files.items()}


CONVERTED = Kind(Converted, Converted.all_files)


def convert(bundle: Bundle, ledger: Ledger, precision: str, scan: Scan, meter: Meter) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with all components in `precision` too.

    What a component computes depends on all of them, so that all are measured again when one has changed; where that
    gives the same types, it gives the same files. Raises `calibration.QualityError` when the images are too far off.
    """
    plain = replace(bundle, manifest=replace(bundle.manifest, engine=ONNXRUNTIME, precision=FULL))

    def progress(text: str, done: float, total: int) -> None:
        meter.show(f"{precision}, {text} {done}/{total}")

    def make() -> Converted:
        converted, quality = convert_models(plain, precision, scan=scan, progress=progress)
        return Converted(full_models(bundle), converted, quality)

    made = ledger.once(record_name(precision), _key(plain, precision, scan), CONVERTED, make)
    meter.step()
    return _with_precision(bundle, precision, made)


def carry_over(bundle: Bundle, ledger: Ledger, precision: str) -> Bundle:
    """`bundle` with the other precisions than `precision` that the old bundle has of the very same fp32 models.

    What an interrupted run left of them is forgotten.
    """
    models = full_models(bundle)
    for other in PRECISIONS:
        if other != precision:
            ledger.forget(record_name(other))
            found = ledger.take(record_name(other), CONVERTED, fits=lambda found: found.models == models)
            if found is not None:
                bundle = _with_precision(bundle, other, found)
    return bundle


def _with_precision(bundle: Bundle, precision: str, made: Converted) -> Bundle:
    """The bundle with the models made, and with the reports on them."""
    components = dict(bundle.manifest.components)
    for name, part in made.converted.items():
        variants = components[name].variants | {f"{precision}/{STANDARD}": Variant(part.model, part.files)}
        components[name] = replace(components[name], variants=variants)
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=components))
    reports = {name: part.report for name, part in made.converted.items()}
    return with_report(with_report(bundle, "precision", {precision: reports}), "quality", {precision: made.quality})


def full_models(bundle: Bundle) -> dict[str, Files]:
    """The fp32 files of each component that has lower precisions."""
    components = bundle.manifest.components.items()
    found = {name: component.variant(FULL) for name, component in components if component.role != "step"}
    return {name: variant.files for name, variant in found.items() if variant is not None}


def record_name(precision: str) -> str:
    """Of the stage's record."""
    return f"precision.{precision}"


def _key(bundle: Bundle, precision: str, scan: Scan) -> str:
    made_of = {"rule": RULE, "precision": precision, "scan": {**asdict(scan), **scan.record(bundle)}}
    return sha256_json({**made_of, **decides(bundle)})


def decides(bundle: Bundle) -> dict[str, Any]:
    """What of a bundle decides its images in any precision, beside the settings of the run."""
    manifest = bundle.manifest
    return {
        "models": full_models(bundle),
        "tasks": list(manifest.tasks),
        "wiring": asdict(manifest.wiring),
        "files": {path: sha for path, sha in manifest.files.items() if path.startswith(_DECIDE)},
    }
