"""`convert_models` on pico: images, islands and files of the converted components, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from diffoundry.bundle import Bundle
from diffoundry.calibration import PRECISIONS, QualityError, Scan, convert_models, rewrite
from diffoundry.calibration.fp32_nodes import Fp32Nodes
from diffoundry.calibration.graph import read
from diffoundry.calibration.quality import psnr
from diffoundry.calibration.rewrite import emulated
from diffoundry.calibration.sessions import start
from diffoundry.common.errors import DiffoundryError
from diffoundry.common.files import sha256_file
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine
from diffoundry.examples.pico.scorer import score
from diffoundry.examples.pico.world import split_scenes
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pipeline import Pipeline
from diffoundry.runtime.request import Request

CAPTIONS = (
    "a large red star at the left on a navy background",
    "a small green circle at the top on a white background",
)
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
_SCENES = split_scenes()[1][:24]


@pytest.fixture(scope="module")
def made(bundle_of, tmp_path_factory):
    """A bundle with both precisions in it: converted components and report by precision."""
    root = shutil.copytree(bundle_of("pico"), tmp_path_factory.mktemp("converted") / "pico.bundle")
    bundle = Bundle.open(root)
    return bundle, {name: convert_models(bundle, name, scan=Scan(CAPTIONS)) for name in PRECISIONS}


@pytest.fixture
def work(made, tmp_path):
    """A copy of that bundle that a test may change."""
    root = shutil.copytree(made[0].root, tmp_path / "pico.bundle")
    return Bundle(root, made[0].manifest)


def draw(bundle, engines, requests):
    pipeline = Pipeline(bundle, engines=engines)
    return [np.asarray(result.images[0]) for result in pipeline.generate_many(requests, batch=4)]


def as_on_a_gpu(bundle, parts, precision):
    """Loaders of the converted components, rounded where a GPU rounds."""

    def loader(name):
        path = bundle.path(parts[name].model)
        return lambda: start(emulated(read(path), PRECISIONS[precision]), path.parent, name)

    return {name: loader(name) for name in parts}


def natively(bundle, parts):
    return {
        name: lambda name=name: OnnxRuntimeEngine.load(bundle.path(parts[name].model), component=name) for name in parts
    }


@pytest.fixture(scope="module")
def scenes(made):
    """Requests for held-out captions, and their images in fp32."""
    requests = [
        Request(str(scene), seed=i, steps=10, scheduler="dpm++2m", guidance=Guidance(4.0))
        for i, scene in enumerate(_SCENES)
    ]
    return requests, draw(made[0], {}, requests)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_report_holds_figures_within_the_budget(made, precision):
    parts, report = made[1][precision]
    assert set(parts) == set(COMPONENTS)
    assert [prompt["prompt"] for prompt in report["prompts"]] == list(CAPTIONS)
    assert report["psnr_db"] == round(float(np.median([prompt["psnr_db"] for prompt in report["prompts"]])), 2)
    assert report["worst_db"] == min(prompt["psnr_db"] for prompt in report["prompts"])
    assert 35 <= report["psnr_db"] < 90
    assert set(report["components"]) == set(COMPONENTS)
    floor, ceiling = {"fp16": (50, 80), "bf16": (30, 62)}[precision]
    assert all(floor < ratio < ceiling for each in report["components"].values() for ratio in each.values())
    assert report["tries"][-1]["threshold_db"] == report["threshold_db"]
    assert report["scan"]["steps"] == 20 and report["scan"]["size"] == [64, 64]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_steps_agree_with_fp32(made, precision):
    bundle, results = made
    # at the guidance that pico is scored with: at 7.5 its loop itself turns any small noise into another picture
    requests = [
        Request(str(scene), seed=100 + i, steps=20, guidance=Guidance(4.0)) for i, scene in enumerate(_SCENES[:4])
    ]
    exact = draw(bundle, {}, requests)
    converted = draw(bundle, as_on_a_gpu(bundle, results[precision][0], precision), requests)
    found = [psnr(*pair) for pair in zip(converted, exact, strict=True)]
    assert min(found) >= 35
    assert max(found) < 90, "nothing was rounded"


def test_onnx_runtime_runs_the_fp16_files(made):
    bundle, results = made
    requests = [Request(caption, seed=i, steps=20, guidance=Guidance(4.0)) for i, caption in enumerate(CAPTIONS)]
    exact = draw(bundle, {}, requests)
    converted = draw(bundle, natively(bundle, results["fp16"][0]), requests)
    found = [psnr(*pair) for pair in zip(converted, exact, strict=True)]
    assert min(found) >= 35
    assert max(found) < 110, "nothing was rounded"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_attributes_are_those_of_fp32(made, scenes, precision):
    bundle, results = made
    requests, exact = scenes
    converted = draw(bundle, as_on_a_gpu(bundle, results[precision][0], precision), requests)
    before, after = (score(images, _SCENES)["all"] for images in (exact, converted))
    assert before > 0.9
    assert abs(after - before) <= 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_the_files_are_valid_and_keep_their_boundary(made, precision, name):
    bundle, results = made
    part = results[precision][0][name]
    assert part.model == f"{name}/{precision}.onnx"
    assert part.files == {path: sha256_file(bundle.root / path) for path in part.files}
    path = bundle.root / part.model
    onnx.checker.check_model(str(path), full_check=True)
    before, after = (onnx.load(each) for each in (bundle.path(f"{name}/model.onnx"), path))
    for side in ("input", "output"):
        told = [[(value.name, value.type) for value in getattr(each.graph, side)] for each in (before, after)]
        assert told[0] == told[1]
    assert {each.domain: each.version for each in after.opset_import} == {"": 22 if precision == "bf16" else 20}
    kind = getattr(onnx.TensorProto, PRECISIONS[precision].dtype)
    weights = [tensor for tensor in after.graph.initializer if tensor.data_type in (kind, onnx.TensorProto.FLOAT)]
    low = sum(np.prod(tensor.dims) for tensor in weights if tensor.data_type == kind)
    assert low > 0.99 * sum(np.prod(tensor.dims) for tensor in weights)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_embedding_of_timesteps_stays_in_fp32(made, precision):
    bundle, results = made
    part = results[precision][0]["unet"]
    kept = {island["node"]: island for island in part.report["islands"]}
    graph = onnx.load(bundle.path(part.model)).graph
    makers = {output: node for node in graph.node for output in node.output}
    for node in [node for node in graph.node if node.op_type in ("Sin", "Cos")]:
        assert kept[node.output[0]]["reason"] == "loss"
        assert kept[node.output[0]]["measured"] < PRECISIONS[precision].threshold
        while node.input[0] != "timestep":
            node = makers[node.input[0]]
            assert node.op_type != "Cast" and node.output[0] in kept
    assert len(kept) < 20
    assert part.report["nodes"]["kept"] == len(kept) < 0.05 * part.report["nodes"]["low"]


def test_attention_stays_in_fp16(made):
    bundle, results = made
    graph = onnx.load(bundle.path(results["fp16"][0]["unet"].model)).graph
    readers = {name: node for node in graph.node for name in node.input}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes and all(readers[node.output[0]].op_type == "MatMul" for node in softmaxes)


def planted(path, bits):
    """Scale the values of one attention by 2^bits and undo it in the projection after it; the nodes in between."""
    model = onnx.load(path)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}

    def reader(name):
        (node,) = [node for node in graph.node if name in node.input]
        return node

    def scale(name, factor):
        array = numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(numpy_helper.from_array(array * np.float32(factor), name))

    softmax = [node for node in graph.node if node.op_type == "Softmax"][-1]
    product = next(n for n in graph.node if n.op_type == "MatMul" and _leads_to(makers, n.input[0], softmax.output[0]))
    region, node = {product.output[0]}, product
    name = product.input[1]
    while name not in weights:
        node = makers[name]
        region.add(node.output[0])
        if node.op_type == "Add":
            scale(node.input[1], 2.0**bits)
        name = node.input[1] if node.op_type == "MatMul" else node.input[0]
    scale(name, 2.0**bits)
    node = product
    while node.op_type != "MatMul" or node is product:
        node = reader(node.output[0])
        region.add(node.output[0])
    scale(node.input[1], 2.0**-bits)
    onnx.save(model, path)
    return region


def _leads_to(makers, name, wanted):
    while name != wanted:
        node = makers.get(name)
        if node is None or node.op_type != "Where":
            return False
        name = node.input[2]
    return True


@pytest.mark.parametrize("name", [pytest.param("text_encoder", marks=pytest.mark.slow), "unet"])
def test_a_planted_overflow_is_found_and_kept_in_fp32(made, work, name):
    parts, report = made[1]["fp16"]
    region = planted(work.path(f"{name}/model.onnx"), 20)
    before = {island["node"] for island in parts[name].report["islands"]}
    found, quality = convert_models(work, "fp16", scan=Scan(CAPTIONS[:1], steps=4))
    islands = {island["node"]: island for island in found[name].report["islands"]}
    assert set(islands) == region | before
    assert {islands[node]["reason"] for node in region} == {"range"}
    assert all(islands[node]["measured"] > 32752 for node in region)
    assert quality["psnr_db"] > 45
    assert min(quality["components"][name].values()) > 50
    # without the islands it overflows
    path = work.path(f"{name}/model.onnx")
    low = {node.output[0]: node.output[0] not in before for node in onnx.load(path).graph.node}
    (bare,) = rewrite.write(path, name, PRECISIONS["fp16"], low)
    engine = start(emulated(read(bare), PRECISIONS["fp16"]), bare.parent, name)
    feeds = {tensor.name: _feed(tensor) for tensor in engine.inputs}
    exact = OnnxRuntimeEngine.load(path)(feeds)
    assert all(np.isfinite(value).all() for value in exact.values())
    assert not all(np.isfinite(value).all() for value in engine(feeds).values())


def _feed(tensor):
    sizes = {"batch_size": 2, "sequence_length": 77, "height": 8, "width": 8}
    shape = [sizes.get(axis, axis) for axis in tensor.shape]
    rng = np.random.default_rng(0)
    return rng.integers(0, 600, shape) if tensor.dtype == "int64" else rng.standard_normal(shape).astype(tensor.dtype)


@pytest.mark.slow
def test_a_budget_that_is_not_met_tightens_and_then_fails_with_figures(made, work, monkeypatch):
    tried = []
    find = Fp32Nodes.find

    def spy(self, threshold, limit):
        found = find(self, threshold, limit)
        tried.append((threshold, limit, len(found)))
        return found

    monkeypatch.setattr(Fp32Nodes, "find", spy)
    with pytest.raises(
        QualityError,
        match=r"fp16 images differ from fp32 by \d+\.\d dB PSNR, 119 are asked.*bf16.* lower --min-psnr",
    ):
        convert_models(work, "fp16", scan=Scan(CAPTIONS[:1], steps=2, budget_db=119))
    thresholds = sorted({threshold for threshold, _, _ in tried})
    limits = sorted({limit for _, limit, _ in tried}, reverse=True)
    assert thresholds == [50, 55, 60, 65] and limits == [32752 / 2**i for i in range(4)]
    count = {t: sum(n for threshold, _, n in tried if threshold == t) for t in thresholds}
    assert count[50] < count[65]
    left = {path.parent.name for path in work.root.rglob("fp16.onnx")}
    assert not left, "what failed is not left for anyone to load"


@pytest.mark.parametrize("name", ["text_encoder", pytest.param("vae_encoder", marks=pytest.mark.slow)])
def test_infinity_has_its_own_words(made, work, name, monkeypatch):
    """No image comes of the one; no image shows the other."""
    planted(work.path(f"{name}/model.onnx"), 20)
    monkeypatch.setattr(Fp32Nodes, "find", lambda self, threshold, limit: [])
    with pytest.raises(QualityError, match=r"fp16 is not finite: .*use --precision fp32 or bf16"):
        convert_models(work, "fp16", scan=Scan(CAPTIONS[:1], steps=2))


def test_the_same_input_gives_the_same_bytes(made, work):
    parts, _ = made[1]["bf16"]
    for name in COMPONENTS:
        low = {node.output[0]: True for node in onnx.load(work.path(f"{name}/model.onnx")).graph.node}
        low.update({island["node"]: False for island in parts[name].report["islands"]})
        (path,) = rewrite.write(work.path(f"{name}/model.onnx"), name, PRECISIONS["bf16"], low)
        assert {f"{name}/bf16.onnx": sha256_file(path)} == parts[name].files


@pytest.mark.parametrize("precision", ["int8", "fp32", "", None])
def test_an_unknown_precision_is_refused(made, precision):
    with pytest.raises(DiffoundryError, match=r"unknown precision .*choose one of fp16, bf16"):
        convert_models(made[0], precision, scan=Scan())


def test_a_size_that_the_bundle_cannot_draw_is_refused(made):
    bundle = made[0]
    coarse = replace(bundle.manifest, latents=replace(bundle.manifest.latents, downscale=16))
    with pytest.raises(DiffoundryError, match="multiple"):
        convert_models(Bundle(bundle.root, coarse), "fp16", scan=Scan(size=(72, 64)))


def test_a_model_that_is_no_model_is_refused(made, work):
    work.path("unet/model.onnx").write_bytes(b"not a model")
    with pytest.raises(DiffoundryError, match=r"unet/model.onnx is not an ONNX model"):
        convert_models(work, "fp16", scan=Scan(CAPTIONS[:1], steps=2))
    work.path("unet/model.onnx").unlink()
    with pytest.raises(DiffoundryError, match=r"unet/model.onnx is missing"):
        convert_models(work, "fp16", scan=Scan(CAPTIONS[:1], steps=2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_tensorrt_for_rtx_builds_it_strongly_typed(made, precision, name):
    trt = pytest.importorskip("tensorrt_rtx")
    bundle, results = made
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.path(results[precision][0][name].model)))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    sizes = {"batch_size": 2, "sequence_length": 77, "sample_height": 64, "sample_width": 64}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        axes = [tensor.get_dimension_name(k) for k in range(len(tensor.shape))]
        tensor.shape = [
            side if side >= 0 else sizes.get(axis, 8) for side, axis in zip(tensor.shape, axes, strict=True)
        ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
