"""The stage that measures what a lower precision loses on an engine that computes the float32 models in it.

OpenVINO rounds by a hint, so that no model is written: what is made is the measurement, and the list of the components
that are within the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..bundle import EIGHT_BIT, FULL, PRECISIONS, Bundle, Variant
from ..bundle.ledger import Kind, Ledger
from ..bundle.manifest import Files
from ..bundle.reports import is_quality, with_report
from ..common.arrays import Array
from ..common.errors import OverflowedError
from ..common.files import sha256_json
from ..common.progress import Meter
from ..engines.loader import EngineLoader
from ..engines.names import ONNXRUNTIME, OPENVINO, EngineName
from ..engines.openvino.device import Device, precisions
from ..engines.verify import compare_outputs, recorded_case
from .quality import QualityError
from .scan import Scan, run_loop
from .stage import decides, full_models

_REVISION = 1
"""Raise it when the same models would give other figures."""
HINTED_ENGINES = (OPENVINO,)
"""The backends that compute float32 models in a lower precision."""


@dataclass(frozen=True, slots=True)
class Hinted:
    """What was measured. models: the files of each component. lower: the components in the lower precision."""

    models: dict[str, Files]
    lower: tuple[str, ...]
    quality: dict[str, Any]

    def __post_init__(self) -> None:
        if not is_quality(self.quality) or not self.lower or not set(self.lower) <= set(self.models):
            raise ValueError("it was not measured")

    def all_files(self) -> Files:
        """None of its own."""
        return {}


HINTED = Kind(Hinted, Hinted.all_files)


def measure(
    bundle: Bundle, ledger: Ledger, engine: EngineName, precision: str, scan: Scan, meter: Meter, parts: int = 1
) -> Bundle:
    """`bundle`, which lies in the ledger's working folder, with `precision` on `engine`, measured on this machine.

    Raises `QualityError` when the images are too far from fp32, however much stays in it, `EngineError` when the
    device does not compute in this precision.
    """

    def progress(text: str, done: float, total: int) -> None:
        meter.show(f"{engine} {precision}, {text} {done}/{total}")

    key = _key(bundle, engine, precision, scan)
    make = partial(_measured, bundle, engine, precision, scan, progress)
    made = ledger.once(record_name(engine, precision), key, HINTED, make)
    for _ in range(parts):
        meter.step()
    return _with(bundle, engine, precision, made)


def carry_over(bundle: Bundle, ledger: Ledger, but: tuple[str, str] | None) -> Bundle:
    """`bundle` with what the old bundle has measured of the very same models, but for this engine and precision."""
    models = full_models(bundle)
    for backend in HINTED_ENGINES:
        for precision in PRECISIONS:
            engine = EngineName.parse(backend)
            name = record_name(engine, precision)
            if precision == FULL or (str(engine), precision) == but:
                continue
            if precision in EIGHT_BIT and not any(
                part.variant(precision) for part in bundle.manifest.components.values()
            ):
                continue
            ledger.forget(name)
            found = ledger.take(name, HINTED, fits=lambda found: found.models == models)
            if found is not None:
                bundle = _with(bundle, engine, precision, found)
    return bundle


def record_name(engine: EngineName, precision: str) -> str:
    """Of the stage's record."""
    return f"hinted.{engine.backend}.{engine.provider}.{precision}"


def measure_beside(
    bundle: Bundle, ledger: Ledger, engine: EngineName, precision: str, scan: Scan, meter: Meter
) -> Bundle:
    """`bundle`, whose denoiser is in eight bits, with all else in bf16 where the device has it, as far as it is near.

    The images are those of the engine itself, against its own in fp32, within the budget of eight bits.
    """
    if "bf16" not in precisions(engine.provider):
        meter.step()
        return bundle
    try:
        return measure(bundle, ledger, engine, precision, scan, meter)
    except QualityError:
        meter.step()
        return bundle


def _device(engine: EngineName, precision: str) -> Device:
    return Device.open(engine.provider, FULL if precision in EIGHT_BIT else precision)


def _with(bundle: Bundle, engine: EngineName, precision: str, made: Hinted) -> Bundle:
    return with_report(
        lowered(bundle, engine, precision, list(made.lower)), "quality", {f"{precision}/{engine.backend}": made.quality}
    )


def lowered(bundle: Bundle, engine: EngineName, precision: str, names: list[str] | None = None) -> Bundle:
    """`bundle` whose components `names` (default: all) run in `precision` on `engine`, and the others in fp32."""
    if precision == FULL:
        return bundle
    names = _choices(bundle)[0] if names is None else names
    components, key = {}, f"{precision}/{engine.backend}"
    for name, part in bundle.manifest.components.items():
        variants = {each: variant for each, variant in part.variants.items() if each != key}
        if name in names:
            variants[key] = _read_by(bundle, name, precision)
        components[name] = replace(part, variants=variants)
    manifest = replace(bundle.manifest, components=components)
    return replace(bundle, manifest=manifest)


def _read_by(bundle: Bundle, name: str, precision: str) -> Variant:
    """The graphs that the engine reads in `precision`, those of float32 where it has none of its own."""
    part, backend = bundle.component(name), f"{ONNXRUNTIME}:cpu"
    found = part.variant(precision, backend) if precision in EIGHT_BIT else None
    found = found or part.variant(FULL, backend)
    assert found is not None  # every component has one
    return found


def _measured(
    bundle: Bundle, engine: EngineName, precision: str, scan: Scan, progress: Callable[[str, float, int], None]
) -> Hinted:
    exact = run_loop(_set(bundle, engine, FULL), {}, scan, "fp32", progress, threads=None, controlled=True)
    tries: list[dict[str, Any]] = []
    for names in _choices(bundle):
        trial = lowered(bundle, engine, precision, names)
        off = [line for line in (_off(trial, engine, precision, name) for name in names) if line]
        figures: dict[str, Any] = {"psnr_db": None, "problem": "; ".join(off)}
        if not off:
            figures = _quality(trial, engine, precision, scan, exact, progress)
        tries.append({"lower": names, **figures})
        if scan.is_within(figures, precision):
            device = _device(engine, precision)
            head = {"precision": precision, "engine": str(engine), **scan.asked(precision)}
            where = {"device": device.full_name, "version": device.version}
            report = {**head, **where, "scan": scan.record(bundle), "lower": names, **figures, "tries": tries}
            return Hinted(full_models(bundle), tuple(names), report)
    raise _error(engine, precision, scan, tries)


def _choices(bundle: Bundle) -> list[list[str]]:
    """Which components to compute in the lower precision: all, all but the text encoders, the denoiser alone."""
    manifest = bundle.manifest
    every = [name for name, part in manifest.components.items() if part.role != "step"]
    without_text = [name for name in every if manifest.components[name].role != "text"]
    stepping = [name for name in every if manifest.components[name].role in ("denoiser", "control", "controlled")]
    return [every, without_text, stepping]


def _set(bundle: Bundle, engine: EngineName, precision: str) -> Bundle:
    """`bundle` as one that was made for this engine and precision."""
    return replace(bundle, manifest=replace(bundle.manifest, engine=str(engine), precision=precision))


def _off(bundle: Bundle, engine: EngineName, precision: str, name: str) -> str:
    """Why component `name` is not what torch recorded, "" where it is."""
    feeds, expected = recorded_case(bundle, name)
    found = EngineLoader(bundle, str(engine), precision).load(name)(feeds)
    check = compare_outputs(name, precision, found, expected, bundle.component(name).storage)
    return "" if check.passed else f"{name} is off by {check.max_abs_error:.1e}, {check.allowed:.1e} is allowed"


def _quality(
    bundle: Bundle,
    engine: EngineName,
    precision: str,
    scan: Scan,
    exact: list[Array],
    progress: Callable[[str, float, int], None],
) -> dict[str, Any]:
    """How far the images are from those in fp32, the median; `psnr_db` is None where they are not finite."""
    try:
        made = _set(bundle, engine, precision)
        images = run_loop(made, {}, scan, "quality", progress, threads=None, controlled=True)
    except OverflowedError as error:
        return {"psnr_db": None, "prompts": [], "problem": str(error)}
    return scan.figures(images, exact, precision)


def _error(engine: EngineName, precision: str, scan: Scan, tries: list[dict[str, Any]]) -> QualityError:
    finite = [each["psnr_db"] for each in tries if each["psnr_db"] is not None]
    if not finite:
        return QualityError(f"{precision} on {engine} fails: {tries[-1]['problem']}; use --precision fp32")
    reached, option = scan.missed(tries, precision)
    return QualityError(
        f"{precision} images of {engine} {reached}, {scan.budget_of(precision).least:g} are asked, "
        "even with the text encoders and the autoencoder in fp32: use --precision fp32, take what is left with a "
        f"lower {option}, or scan other prompts and more steps"
    )


def _key(bundle: Bundle, engine: EngineName, precision: str, scan: Scan) -> str:
    device = _device(engine, precision)
    low = {name: asdict(_read_by(bundle, name, precision)) for name in bundle.manifest.components}
    return sha256_json(
        {
            "revision": _REVISION,
            "device": [device.name, device.full_name, device.version],
            "precision": precision,
            "low": low if precision in EIGHT_BIT else None,
            "scan": {**asdict(scan), **scan.record(bundle)},
            **decides(bundle),
        }
    )
