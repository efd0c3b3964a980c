"""The denoiser in eight bits as GPUs run it: what is not in eight bits is in fp16, where the scan of fp16 allows it.

TensorRT fuses the roundings where their scales are in the type of the data, so that both are in one graph.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ...bundle import Bundle, Manifest, Variant
from ...bundle.ledger import Kind, Ledger
from ...bundle.manifest import Files
from ...bundle.reports import read_report
from ...common.files import sha256_file, sha256_json
from ...common.progress import Meter
from ...engines.fusion.graph import save
from ...engines.tensorrt.variants import BACKEND, BESIDE
from ..graph import key, raise_opset, read
from ..precision import PRECISIONS
from ..rewrite import convert

_REVISION = 1
"""Raise it when the same models would give another graph."""


@dataclass(frozen=True, slots=True)
class Half:
    """The graph in both types."""

    variant: Variant

    def __post_init__(self) -> None:
        if self.variant.model not in self.variant.files or self.variant.per_prompt:
            raise ValueError("it has no graph")

    def all_files(self) -> Files:
        """The files of the graph."""
        return self.variant.files


HALF = Kind(Half, Half.all_files)


def record_names(manifest: Manifest, precision: str) -> list[str]:
    """Of the stage's records."""
    return [_record_name(name, precision) for name in _parts(manifest)]


def write_half(bundle: Bundle, ledger: Ledger, precision: str, meter: Meter) -> Bundle:
    """`bundle`, which has its denoiser in `precision` and all in fp16, with the graph that GPUs run.

    So is the denoiser that controls act in, where it is in `precision`, too.
    """
    for name in _parts(bundle.manifest):
        low = bundle.component(name).variants.get(f"{precision}/onnx")
        if low is not None:
            bundle = _write(bundle, ledger, precision, name, low, meter)
    meter.step()
    return bundle


def _parts(manifest: Manifest) -> list[str]:
    return [*manifest.with_role("denoiser"), *manifest.with_role("controlled")]


def _record_name(name: str, precision: str) -> str:
    return f"eightbit.{BESIDE}.{precision}.{name}"


def _write(bundle: Bundle, ledger: Ledger, precision: str, name: str, low: Variant, meter: Meter) -> Bundle:
    part = bundle.component(name)
    report = read_report(bundle, "precision")[BESIDE][name]
    exact = sorted(str(each["node"]) for each in report["islands"])
    meter.show(f"{precision} and {BESIDE} of {name}")

    def make() -> Half:
        model, rule = read(bundle.path(low.model)), PRECISIONS[BESIDE]
        raise_opset(model, rule.opset, name)
        convert(model, rule, {key(node): key(node) not in exact for node in model.graph})
        paths = save(model, bundle.path(name), f"{precision}.{BESIDE}.onnx")
        files = {path.relative_to(bundle.root).as_posix(): sha256_file(path) for path in paths}
        return Half(Variant(next(iter(files)), files))

    made = ledger.once(
        _record_name(name, precision),
        sha256_json({"revision": _REVISION, "of": asdict(low), "exact": exact}),
        HALF,
        make,
    )
    variants = part.variants | {f"{precision}/{BACKEND}": made.variant}
    components = bundle.manifest.components | {name: replace(part, variants=variants)}
    return replace(bundle, manifest=replace(bundle.manifest, components=components))
