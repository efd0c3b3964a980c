"""The stage that gives a bundle its denoiser in eight bits, done once for all that decides it. It needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...bundle import EIGHT_BIT, FULL, STANDARD, Bundle, Variant
from ...bundle.ledger import Kind, Ledger
from ...bundle.manifest import Files
from ...bundle.reports import is_quality, is_report, with_report
from ...bundle.workspace import STAGES
from ...common.files import remove, sha256_file, sha256_json
from ...common.progress import Meter
from ...engines.names import ONNXRUNTIME
from ..scan import Scan
from ..stage import decides, full_models, record_name
from .conversion import RULE, Conversion, EightBit, Graphs
from .formats import FORMATS
from .statistics import REVISION as STATISTICS_REVISION

REPORT = "calibration"
_FUSED = f"{ONNXRUNTIME}:cpu"


@dataclass(frozen=True, slots=True)
class Quantized:
    """models: the fp32 files of each component that the denoiser was measured with."""

    models: dict[str, Files]
    made: EightBit

    def __post_init__(self) -> None:
        made = self.made
        named = {made.model, *made.documents, *filter(None, (made.fused, made.per_prompt))}
        told = made.controlled
        if told is not None:
            own = {told.model, *filter(None, (told.fused, told.per_prompt))}
            if not own <= told.files.keys():
                raise ValueError("it has no model of the denoiser under controls")
        if not named <= made.files.keys() or not is_quality(made.quality) or not is_report(made.report):
            raise ValueError("it has no model, or was not measured")

    def all_files(self) -> Files:
        """The files of the model."""
        told = self.made.controlled
        return self.made.files | ({} if told is None else told.files)


QUANTIZED = Kind(Quantized, Quantized.all_files)


def convert(
    bundle: Bundle, ledger: Ledger, precision: str, scan: Scan, calibration: Path | None, meter: Meter
) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with its denoiser in `precision` too.

    calibration: a file of statistics to take. Raises `calibration.QualityError` when the images are too far off.
    """
    plain = replace(bundle, manifest=replace(bundle.manifest, engine=ONNXRUNTIME, precision=FULL))
    unfinished = ledger.work / STAGES / "eightbit"

    def progress(text: str, done: float, total: float) -> None:
        meter.show(f"{precision}, {text} {done:g}/{total:g}")

    def make() -> Quantized:
        work = Conversion(plain, FORMATS[precision], scan, unfinished, calibration, progress)
        return Quantized(full_models(bundle), work.run())

    key = sha256_json(
        {
            "rule": [RULE, STATISTICS_REVISION],
            "precision": precision,
            "scan": {**asdict(scan), **scan.record(bundle)},
            "calibration": None if calibration is None else sha256_file(calibration),
            **decides(plain),
        }
    )
    made = ledger.once(record_name(precision), key, QUANTIZED, make)
    remove(unfinished)
    meter.step()
    return _with(bundle, precision, made)


def carry_over(bundle: Bundle, ledger: Ledger, but: str) -> Bundle:
    """`bundle` with the precisions of eight bits, `but` one, that the old bundle has of the very same fp32 models."""
    models = full_models(bundle)
    for precision in EIGHT_BIT:
        if precision != but:
            ledger.forget(record_name(precision))
            found = ledger.take(record_name(precision), QUANTIZED, fits=lambda found: found.models == models)
            if found is not None:
                bundle = _with(bundle, precision, found)
    return bundle


def _with(bundle: Bundle, precision: str, quantized: Quantized) -> Bundle:
    made, name = quantized.made, bundle.manifest.named("denoiser")
    documents = {path: made.files[path] for path in made.documents}
    models = {path: sha for path, sha in made.files.items() if path not in documents}
    written = [Graphs(name, made.model, made.fused, made.per_prompt, models)]
    written += [made.controlled] if made.controlled is not None else []
    components = dict(bundle.manifest.components)
    for each in written:
        part = components[each.component]
        components[each.component] = replace(part, variants=part.variants | _variants(precision, each))
    files = bundle.manifest.files | documents
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=components, files=files))
    bundle = with_report(bundle, "precision", {precision: {name: made.report}})
    return with_report(bundle, "quality", {precision: made.quality})


def _variants(precision: str, made: Graphs) -> dict[str, Variant]:
    shared = {path: sha for path, sha in made.files.items() if path not in (made.model, made.fused, made.per_prompt)}
    variants = {f"{precision}/{STANDARD}": Variant(made.model, {made.model: made.files[made.model], **shared})}
    if made.fused:
        own = {path: made.files[path] for path in (made.fused, made.per_prompt) if path}
        variants[f"{precision}/{_FUSED}"] = Variant(made.fused, {**own, **shared}, made.per_prompt)
    return variants
