"""Other ways to put a denoiser into eight bits, on the same prompts: what ours is held against.

python -m diffoundry.calibration.eightbit.recipes build/pico.bundle
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from ...bundle import EIGHT_BIT, FULL, Bundle
from ...bundle.reports import read_report
from ...common.arrays import Array
from ...common.errors import DiffoundryError, EngineError
from ...common.files import read_json
from ...common.machine import require_modules
from ...engines import Engine
from ...engines.fusion.graph import map_tensor, weight_of
from ...engines.names import ONNXRUNTIME
from ...runtime.pipeline import Pipeline
from ..graph import key, read
from ..losses import decibels
from ..quality import psnr
from ..scan import Scan, requests
from ..sessions import as_it_stands, emulation
from .attention import attentions_of
from .conversion import STATISTICS
from .formats import FORMATS, Format, Scale
from .layers import Group, groups_of
from .reference import Call, observe
from .smoothing import outputs_last, smoothed
from .statistics import OTHERS, Statistics
from .write import copied, write

OURS, STATIC, PUBLISHED = "diffoundry", "onnxruntime quantize_static", "NVIDIA's recipe"
_KEPT = re.compile(
    r"time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|pos_embed|time_text_embed"
    r"|context_embedder|norm_out|proj_out"
)
"""Modules that NVIDIA's recipe for Stable Diffusion XL leaves in higher precision (Model Optimizer, diffusers)."""
_ALPHA = 0.8
_HEAD = 16
"""It takes attentions whose heads are a multiple of this."""
_FAIL = {"Gather", "InstanceNormalization", "Pad", "Split"}
"""Operators that ONNX Runtime's tool is not asked to quantize, see `static`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A denoiser in eight bits. layers: of all how many are. share: of the arithmetic. load: what gives its engine."""

    name: str
    layers: tuple[int, int]
    share: float
    load: Callable[[], Engine]


def recipes(bundle: Bundle, precision: str, folder: Path) -> Iterator[Recipe]:
    """Ours, ONNX Runtime's static quantization of everything by the least and largest value (int8), and NVIDIA's.

    bundle: which has its denoiser in `precision`. All are calibrated with the prompts that it was built with. folder:
    empty, for models. NVIDIA's, of int8: SmoothQuant with α 0.8 on products with matrices, on convolutions the least of
    the largest magnitudes of the stretches of timesteps; of fp8: the largest magnitude, and attentions; in both, some
    modules stay.
    Raises `EngineError` when the bundle has no such precision.
    """
    load = emulation(bundle, precision)
    name, form = bundle.manifest.named("denoiser"), FORMATS[precision]
    report = read_report(bundle, "precision")[precision][name]
    layers = report["nodes"]["low"] + report["nodes"]["kept"]
    yield Recipe(OURS, (report["nodes"]["low"], layers), report["share"], load[name])

    path = bundle.path(f"{name}/model.onnx")
    graph = read(path)
    groups, attentions = groups_of(graph), attentions_of(graph)
    kept = f"{name}/{STATISTICS.format(precision)}"
    bundle.check([kept])
    try:
        statistics = Statistics.load(bundle.path(kept))
    except DiffoundryError:
        raise EngineError(
            f"{bundle.root} was calibrated by another version: run `diffoundry build {bundle.root} --precision "
            f"{precision}` again, with --scan-steps"
        ) from None
    model = statistics.model
    scan = scan_of(report)
    told = lambda text, done, total: None  # noqa: E731
    if form.name == "int8":
        run = observe(bundle, name, groups, attentions, scan, folder, model, statistics, told)
        calls = [call for of_prompt in run.calls for call in of_prompt]
        written = static(path, calls, folder / "static.onnx")
        low, products = rounded(written, path, groups)
        yield Recipe(
            STATIC,
            (len(low), layers),
            share(groups, low, statistics, statistics.sizes[OTHERS] * products),
            partial(as_it_stands, written, name),
        )
    scales, out = published(path, bundle.path(f"{name}/weights.json"), form, groups, statistics)
    low = {layer.name for group in groups if group.value not in out for layer in group.layers}
    heads = []
    for each in attentions:
        found = each.scales(statistics.amax, form)
        if found is not None and form.has_attention and each.size % _HEAD == 0:
            scales |= found
            heads.append(each)
    link = folder / "model"
    link.mkdir()
    for file in path.parent.iterdir():
        if file.is_file():
            (link / file.name).symlink_to(file.resolve())
    values = {*(set(scales) - out), *(each.value for each in heads)}
    written = write(link / path.name, name, form, scales, values, "published.onnx")[0]
    yield Recipe(
        PUBLISHED,
        (len(low) + sum(len(each.products) for each in heads), layers),
        share(groups, low, statistics, sum(statistics.sizes[each.value] for each in heads)),
        partial(as_it_stands, written, name),
    )


def scan_of(report: Mapping[str, Any]) -> Scan:
    """What a bundle's denoiser was calibrated with."""
    told = report["scan"]
    return Scan(tuple(told["prompts"]), told["steps"], tuple(told["size"]), told["seed"])


def share(groups: Sequence[Group], low: set[str], statistics: Statistics, products: int) -> float:
    """The part of the arithmetic in eight bits. low: names of layers. products: operations of those of two values."""
    sizes = statistics.sizes
    flops = {layer.name: layer.flops(sizes[layer.name]) for group in groups for layer in group.layers}
    others = sizes[OTHERS]
    done = sum(each for name, each in flops.items() if name in low) + products
    return round(done / (sum(flops.values()) + others), 4)


def static(path: Path, calls: Sequence[Call], target: Path) -> Path:
    """The model of `onnxruntime.quantization.quantize_static`: all operators that it knows and that compute.

    Left out are those that move elements alone, as it fails where they move constants, and instance norms, whose
    models do not run.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.operators.direct_q8 import QDQDirect8BitOp
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    moving = {name for name, each in QDQRegistry.items() if issubclass(each, QDQDirect8BitOp)}

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(calls)

        def get_next(self) -> dict[str, Array] | None:
            call = next(self._left, None)
            return None if call is None else call[0]

    quantization.quantize_static(
        path,
        target,
        Reader(),
        calibrate_method=quantization.CalibrationMethod.MinMax,
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - moving - _FAIL),
        use_external_data_format=True,
    )
    return target


def rounded(path: Path, source: Path, groups: Sequence[Group]) -> tuple[set[str], bool]:
    """The layers of a model, made of `source`, that read a rounded value, and whether a product of two values does."""
    import onnx_ir

    layers = {layer.name for group in groups for layer in group.layers}
    names = {str(node.name): key(node) for node in read(source).graph if key(node) in layers}
    low, products = set(), False
    for node in onnx_ir.load(path).graph:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            before = [None if each is None else each.producer() for each in node.inputs[:2]]
            if all(each is not None and each.op_type == "DequantizeLinear" for each in before):
                if node.name in names:
                    low.add(names[str(node.name)])
                else:
                    products = True
    return low, products


def published(
    path: Path, weights: Path, form: Format, groups: Sequence[Group], statistics: Statistics
) -> tuple[dict[str, Scale], set[str]]:
    """The scales of NVIDIA's recipe, and the values of groups that it leaves alone. weights: the bundle's table."""
    table = read_json(weights, "the table of weights")
    graph = {key(node): node for node in read(path).graph}
    scales, kept = {}, set()
    for group in groups:
        modules = [" ".join(table.get(layer.weight, {}).get("weights", [])) for layer in group.layers]
        if any(map(_KEPT.search, modules)) or not statistics.largest()[group.value]:
            kept.add(group.value)
            continue
        i = statistics.values.index(group.value)
        by_stretch = np.maximum(np.abs(statistics.high[i]), np.abs(statistics.low[i]))
        largest = by_stretch.max()
        if form.name == "int8" and not group.is_linear:
            largest = by_stretch[by_stretch > 0].min()
        found = Scale(group.value, float(np.float32(largest / form.largest)), "published", 0.0)
        if form.name == "int8" and group.is_linear:
            tensors = [weight_of(graph[layer.name].inputs[1]).const_value for layer in group.layers]
            matrices = [
                outputs_last(map_tensor(tensor, copied), layer)
                for tensor, layer in zip(tensors, group.layers, strict=True)
            ]
            found = smoothed(found, form, _ALPHA, statistics.peaks[group.value], matrices)
        scales[group.value] = found
    return scales, kept


@dataclass(frozen=True, slots=True)
class Row:
    """What a recipe gives on some prompts. psnr_db, latents_db: of each picture and its latents, to fp32."""

    recipe: str
    layers: tuple[int, int]
    share: float
    psnr_db: list[float]
    latents_db: list[float]


def compare(bundle: Bundle, precision: str, scan: Scan | None = None) -> list[Row]:
    """A row for each of `recipes`, on the prompts of `scan`, or those that the bundle was calibrated with."""
    name = bundle.manifest.named("denoiser")
    report = read_report(bundle, "precision").get(precision, {}).get(name)
    if report is None:
        raise EngineError(
            f"{bundle.root} has no {precision} models: run `diffoundry build {bundle.root} --precision {precision}`, "
            f"for {'the engine openvino or onnxruntime' if precision == 'int8' else 'plans, with --engine and --arch'}"
        )
    bundle = replace(bundle, manifest=replace(bundle.manifest, engine=ONNXRUNTIME, precision=FULL))
    asked = requests(bundle, scan or scan_of(report))

    def draw(engines: Mapping[str, Callable[[], Engine]]) -> list[tuple[Array, Array]]:
        pipeline = Pipeline(bundle, engine="onnxruntime", precision="fp32", threads=1, loop="host", engines=engines)
        results = pipeline.generate_many(asked, batch=1)
        pipeline.release_all()
        return [(np.asarray(result.images[0]), np.asarray(result.latents)) for result in results]

    exact, found = draw({}), []
    with tempfile.TemporaryDirectory(prefix="diffoundry-", dir=bundle.root.parent) as folder:
        for recipe in recipes(bundle, precision, Path(folder)):
            made = draw({name: recipe.load})
            pairs = list(zip(made, exact, strict=True))
            images = [round(psnr(a[0], b[0]), 2) for a, b in pairs]
            latents = [round(decibels(_power(b[1]), _power(a[1] - b[1])), 2) for a, b in pairs]
            found.append(Row(recipe.name, recipe.layers, recipe.share, images, latents))
    return found


def _power(array: Array) -> float:
    return float(np.sum(np.square(array, dtype=np.float64)))


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--precision", type=click.Choice(list(EIGHT_BIT)), default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures of each prompt as JSON.")
def main(bundle: str, precision: str, as_json: bool) -> None:
    """Hold BUNDLE in eight bits against other recipes, on the prompts that it was calibrated with."""
    try:
        require_modules("recipes", ("onnx", "onnx_ir", "ml_dtypes"), "build")
        rows = compare(Bundle.open(Path(bundle)), precision)
    except DiffoundryError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'recipe':<29}{'layers':>9}{'arithmetic':>12}{'PSNR':>9}{'worst':>9}{'latents':>9}")
    for row in rows:
        print(
            f"{row.recipe:<29}{f'{row.layers[0]}/{row.layers[1]}':>9}{100 * row.share:>10.1f} %"
            f"{median(row.psnr_db):>6.1f} dB{min(row.psnr_db):>6.1f} dB{median(row.latents_db):>6.1f} dB"
        )


if __name__ == "__main__":
    main()
