"""The stage that stores the weights of T5 in int8, in the place of those in float32 or half precision.

T5 is the largest text encoder by far, and runs once for each prompt. Its values stay in floats, so that it takes no
calibration: what the rounded weights change is measured, on the recorded outputs and on pictures, and refused where it
is too much. Neither torch nor the checkpoint is needed, and one weight at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ..bundle import FULL, STANDARD, Bundle, Component, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import is_quality, with_report
from ..common.arrays import Array
from ..common.errors import DiffoundryError
from ..common.files import read_json, sha256_file, sha256_json
from ..common.progress import Meter
from ..engines.fusion.cpu import fuse_for_cpu
from ..engines.fusion.graph import open_model, save
from ..engines.fusion.weight_only import BLOCK, store_in_int8
from ..engines.names import ONNXRUNTIME
from ..engines.onnxruntime import load_variant
from ..engines.verify import compare_outputs, recorded_case
from .hinted import HINTED_ENGINES
from .quality import QualityError
from .scan import Scan, run_loop
from .stage import decides

RECORD = REPORT = "text_storage"
INT8: Literal["int8"] = "int8"
DTYPES = (INT8,)
_REVISION = 1
"""Raise it when the same models would give other files or figures."""
_MODEL, _FUSED = "int8.onnx", "int8.fused.onnx"
_PLAIN, _ON_CPU = f"{FULL}/{STANDARD}", f"{FULL}/{ONNXRUNTIME}:cpu"


@dataclass(frozen=True, slots=True)
class Stored:
    """models: what was made of each encoder, by variant. quality: of the pictures, and of each encoder by its name."""

    models: dict[str, dict[str, Variant]]
    quality: dict[str, Any]

    def __post_init__(self) -> None:
        whole = all(
            _PLAIN in each and {v.model for v in each.values()} <= set(_files(each)) for each in self.models.values()
        )
        if not self.models or not whole or not is_quality(self.quality):
            raise ValueError("it is not whole")

    def all_files(self) -> Files:
        """The files of all encoders."""
        return {path: sha for each in self.models.values() for path, sha in _files(each).items()}


STORED = Kind(Stored, Stored.all_files)


def _files(variants: Mapping[str, Variant]) -> Files:
    return {path: sha for each in variants.values() for path, sha in each.files.items()}


def check_dtype(dtype: str | None) -> None:
    """Raise `DiffoundryError` for an unknown type."""
    if dtype not in (None, *DTYPES):
        raise DiffoundryError(f"unknown text storage dtype {dtype!r:.80}: choose {', '.join(DTYPES)}, or leave it out")


def encoders(bundle: Bundle) -> list[str]:
    """The components that are T5."""
    found = []
    for name in bundle.manifest.with_role("text"):
        path = f"{name}/config.json"
        known = path in bundle.component(name).files
        if known and read_json(bundle.path(path), "a configuration").get("model_type") == "t5":
            found.append(name)
    return found


def check_storable(bundle: Bundle) -> None:
    """Raise `DiffoundryError` for a bundle without T5, or with T5 in precisions that the processor does not run."""
    names = encoders(bundle)
    if not names:
        raise DiffoundryError(
            f"{bundle.root} has no T5 whose weights could be in int8: leave the text storage dtype out"
        )
    for name in names:
        others = sorted({key for key in bundle.component(name).variants if not _is_of_processor(key)})
        if others:
            raise DiffoundryError(
                f"{bundle.root} has {name} for {', '.join(others)} too, which int8 storage does not go with: compile "
                "the checkpoint into another folder with --text-storage-dtype int8"
            )


def is_stored(bundle: Bundle) -> bool:
    """Whether an encoder of the bundle has int8 weights."""
    return any(part.storage for part in bundle.manifest.components.values())


def _is_of_processor(key: str) -> bool:
    return key in (_PLAIN, _ON_CPU) or key.partition("/")[2] in HINTED_ENGINES


def store(bundle: Bundle, ledger: Ledger, scan: Scan, meter: Meter) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with the weights of T5 in int8.

    What is in int8 already stays as it is. Raises `QualityError` when the pictures are too far from those before.
    """
    names = [name for name in encoders(bundle) if not bundle.component(name).storage]
    if not names:
        meter.step()
        return bundle

    def progress(text: str, done: float, total: int) -> None:
        meter.show(f"text encoder in int8, {text} {done}/{total}")

    key = sha256_json(
        {
            "revision": _REVISION,
            "block": BLOCK,
            "models": {name: _files(bundle.component(name).variants) for name in names},
            "scan": {**asdict(scan), **scan.record(bundle)},
            **decides(bundle),
        }
    )
    made = ledger.once(RECORD, key, STORED, partial(_stored, bundle, names, scan, progress))
    meter.step()
    return with_report(_with(bundle, made.models), REPORT, {INT8: made.quality})


def _stored(bundle: Bundle, names: list[str], scan: Scan, progress: Any) -> Stored:
    models = {}
    for i, name in enumerate(names):
        progress(name, i, len(names))
        models[name] = _written(bundle, name)
    trial = _with(bundle, models)
    hidden = {name: _distance(trial, name) for name in names}
    exact, found = (_images(each, scan, text, progress) for each, text in ((bundle, "before"), (trial, "quality")))
    figures = scan.figures(found, exact, INT8)
    if not scan.is_within(figures, INT8):
        reached, option = scan.missed([figures], INT8)
        raise QualityError(
            f"with int8 weights of {', '.join(names)} images {reached}, {scan.budget_of(INT8).least:g} are asked: "
            f"leave the text storage dtype out, or take what is left with a lower {option}"
        )
    return Stored(models, {**scan.asked(INT8), "scan": scan.record(bundle), **figures, "encoders": hidden})


def _written(bundle: Bundle, name: str) -> dict[str, Variant]:
    """The graph of an encoder with int8 weights, and what ONNX Runtime's CPU runs fastest."""
    folder = bundle.root / name
    model = open_model(bundle.path(bundle.component(name).variants[_PLAIN].model))
    if not store_in_int8(model):
        raise DiffoundryError(f"{name} has no weights that int8 could hold: leave the text storage dtype out")
    paths = save(model, folder, _MODEL)
    files = {path.relative_to(bundle.root).as_posix(): sha256_file(path) for path in paths}
    made = {_PLAIN: Variant(f"{name}/{_MODEL}", files)}
    if fuse_for_cpu(folder / _MODEL, (), (_FUSED, "")) is not None:
        shared = {path: sha for path, sha in files.items() if path != f"{name}/{_MODEL}"}
        made[_ON_CPU] = Variant(f"{name}/{_FUSED}", {**shared, f"{name}/{_FUSED}": sha256_file(folder / _FUSED)})
    return made


def _with(bundle: Bundle, models: Mapping[str, dict[str, Variant]]) -> Bundle:
    """`bundle` with these encoders in the place of its own, in all that the processor computes them in."""
    components = dict(bundle.manifest.components)
    for name, made in models.items():
        part, fastest = components[name], made.get(_ON_CPU, made[_PLAIN])
        hinted = [key for key in part.variants if key.partition("/")[2] in HINTED_ENGINES]
        components[name] = replace(part, variants={**made, **dict.fromkeys(hinted, fastest)}, storage=INT8)
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


def _distance(bundle: Bundle, name: str) -> dict[str, float]:
    """How far an encoder is from what torch recorded. Raises `QualityError` where it is not near."""
    feeds, expected = recorded_case(bundle, name)
    found = _engine(bundle, bundle.component(name), name)(feeds)
    check = compare_outputs(name, INT8, found, expected)
    if not check.passed:
        raise QualityError(
            f"{name} with int8 weights is off by {check.max_abs_error:.1e}, {check.allowed:.1e} is allowed: leave the "
            "text storage out"
        )
    lost = sum(float(np.sum(np.square(found[key] - each, dtype=np.float64))) for key, each in expected.items())
    all_of_it = sum(float(np.sum(np.square(each, dtype=np.float64))) for each in expected.values())
    ratio = 10 * np.log10(all_of_it / lost) if lost else float(np.finfo(np.float32).max)
    return {"snr_db": round(float(ratio), 2), "max_abs_error": check.max_abs_error}


def _images(bundle: Bundle, scan: Scan, text: str, progress: Any) -> list[Array]:
    """The pictures of the scan in float32, with weights of T5 read from the disk as they are needed."""
    plain = replace(bundle, manifest=replace(bundle.manifest, engine=ONNXRUNTIME, precision=FULL))
    engines = {name: partial(_engine, plain, plain.component(name), name) for name in encoders(plain)}
    return run_loop(plain, engines, scan, text, progress, threads=None)


def _engine(bundle: Bundle, part: Component, name: str) -> Any:
    variant = part.variant(FULL, f"{ONNXRUNTIME}:cpu")
    assert variant is not None  # every component has one
    return load_variant(bundle.root, name, variant, low_memory=not part.storage)


def describe(report: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    parts = ", ".join(f"{name} {each['snr_db']:.1f} dB" for name, each in report.get("encoders", {}).items())
    return f"text encoders in int8: images {report['psnr_db']:.1f} dB from before; hidden states: {parts}"
