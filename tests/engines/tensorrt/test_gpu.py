"""Plans on the GPU that is here, against ONNX Runtime on the CPU; skipped where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import EngineError
from diffoundry.engines import EngineStore
from diffoundry.engines.gpu.gpu import Gpu, shared
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine
from diffoundry.engines.tensorrt.backend import BACKENDS, Backend
from diffoundry.engines.tensorrt.build import build
from diffoundry.engines.tensorrt.engine import TensorRTEngine
from diffoundry.engines.tensorrt.plan import CACHE_NAME, Plan, Profile, Recipe
from diffoundry.runtime.pipeline import load

pytestmark = pytest.mark.gpu

PROMPT = "a large red star at the left on a navy background"
PRECISIONS = ("fp32", "fp16")
TOLERANCE = {"fp32": 2e-4, "fp16": 2e-2}
"""Largest error of an output, as a part of the largest value in it."""
LATENTS = {"fp32": 5e-3, "fp16": 0.5}
AXES = {
    "batch_size": (1, 2, 4),
    "height": (8, 8, 16),
    "width": (8, 8, 16),
    "latent_height": (8, 8, 16),
    "latent_width": (8, 8, 16),
    "sample_height": (64, 64, 128),
    "sample_width": (64, 64, 128),
    "sequence_length": (77, 77, 77),
    "batch": (1, 1, 2),
    "calls": (1, 2, 4),
    "channels": (4, 4, 4),
    "registers": (1, 2, 4),
    "terms": (4, 5, 7),
    "steps": (1, 20, 64),
    "steps_and_end": (2, 21, 65),
}
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class Site:
    """The GPU that is here, and the TensorRT that builds for it."""

    gpu: Gpu
    backend: Backend
    version: str


@pytest.fixture(scope="module")
def site():
    try:
        gpu = shared()
    except EngineError as error:
        pytest.skip(str(error))
    reasons = []
    for backend in BACKENDS.values():
        try:
            version = str(backend.load().__version__)
        except EngineError as error:
            reasons.append(str(error))
            continue
        if not backend.ahead_of_time or gpu.device.arch in backend.architectures():
            return Site(gpu, backend, version)
        reasons.append(f"{backend.name} does not build for {gpu.device.arch}")
    pytest.skip("; ".join(reasons))


@pytest.fixture(scope="module")
def bundle(site, checkpoint_of, tmp_path_factory):
    """pico in both precisions; its plans are built by the tests."""
    import diffoundry

    path = tmp_path_factory.mktemp("gpu") / "pico.bundle"
    diffoundry.compile(checkpoint_of("pico"), path, precision="fp16")
    return Bundle.open(path)


@pytest.fixture(scope="module")
def plan_of(site, bundle, tmp_path_factory):
    """Build a plan of a component for the GPU: (component, precision, flags, axes)."""
    store = EngineStore(tmp_path_factory.mktemp("plans") / "engines")
    made: dict[str, Plan] = {}

    def get(name, precision="fp32", flags=(), **axes):
        component = bundle.component(name)
        variant = component.variant(precision)
        sizes = {**AXES, **axes}
        shapes = {
            tensor.name: tuple(
                tuple(axis if isinstance(axis, int) else sizes[axis][k] for axis in tensor.shape) for k in range(3)
            )
            for tensor in component.inputs
        }
        recipe = Recipe(
            component=name,
            source=variant.files,
            backend=site.backend.name,
            version=site.version,
            archs=(site.gpu.device.arch,),
            device=site.gpu.device.name,
            precision=precision,
            profile=Profile(f"test {axes}", shapes),
            flags=flags,
        )
        key = store.key(recipe.built_from())
        if key not in made:
            made[key] = build(store, recipe, bundle.path(variant.model))
        return made[key]

    return get


@pytest.fixture(scope="module")
def engine_of(site, bundle, plan_of):
    def get(name, *plans, **options):
        component = bundle.component(name)
        return TensorRTEngine(name, component.inputs, component.outputs, plans or [plan_of(name)], site.gpu, **options)

    return get


@pytest.fixture(scope="module")
def reference(bundle):
    """ONNX Runtime's engine of a component in fp32, on the CPU."""
    return lambda name: OnnxRuntimeEngine.load(bundle.path(f"{name}/model.onnx"), component=name)


@pytest.fixture
def other(bundle, tmp_path):
    """The U-Net with other weights."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle.path("unet/model.onnx"))
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim == 4:
            weight.CopyFrom(numpy_helper.from_array(array * np.float32(0.5), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def feeds_of(bundle, name, rows=2, side=8, seed=0):
    """Inputs of a component such as the loop gives it. side: of the latents."""
    rng = np.random.default_rng(seed)
    sizes = {"batch_size": rows, "sequence_length": 77, "sample_height": 8 * side, "sample_width": 8 * side}
    feeds = {}
    for tensor in bundle.component(name).inputs:
        shape = tuple(axis if isinstance(axis, int) else sizes.get(axis, side) for axis in tensor.shape)
        if tensor.dtype == "int64":
            feeds[tensor.name] = rng.integers(0, 500, shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = rng.uniform(0, 999, shape).astype(np.float32)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def assert_close(found, wanted, tolerance=TOLERANCE["fp32"]):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert abs(found[name] - array).max() <= tolerance * abs(array).max(), name


def link(engine, feeds):
    tensors = {name: engine.to_device(array) for name, array in feeds.items()}
    tensors["out_sample"] = engine.to_device(np.full_like(feeds["sample"], np.nan))
    return tensors, engine.bind_device(tensors)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_plan_gives_what_onnx_runtime_gives(bundle, plan_of, engine_of, reference, name, precision):
    engine = engine_of(name, plan_of(name, precision))
    for rows, side, seed in ((2, 8, 0), (1, 8, 1), (2, 16, 2), (2, 8, 3)):
        feeds = feeds_of(bundle, name, rows, side, seed)
        assert_close(engine(feeds), reference(name)(feeds), TOLERANCE[precision])
    bound = engine.bind_host(feeds)
    assert_close(bound(), reference(name)(feeds), TOLERANCE[precision])


def test_a_static_plan_serves_fewer_rows(bundle, plan_of, engine_of, reference):
    static = plan_of("unet", batch_size=(2, 2, 2), height=(8, 8, 8), width=(8, 8, 8))
    engine = engine_of("unet", plan_of("unet"), static)
    feeds = feeds_of(bundle, "unet", 2)
    assert_close(engine(feeds), reference("unet")(feeds))
    assert engine.chosen is static
    alone = engine_of("unet", static)
    feeds = feeds_of(bundle, "unet", 1)
    assert_close(alone(feeds), reference("unet")(feeds))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_gives_what_launches_one_by_one_give(bundle, plan_of, engine_of, precision, recwarn):
    engine = engine_of("unet", plan_of("unet", precision))
    tensors, linked = link(engine, feeds_of(bundle, "unet"))
    recorded = engine.capture(linked)
    for seed in range(4):
        feeds = feeds_of(bundle, "unet", seed=seed)
        for name, array in feeds.items():
            tensors[name].update_inplace(array)
        linked()
        plain = tensors["out_sample"].numpy()
        tensors["out_sample"].update_inplace(np.full_like(plain, np.nan))
        recorded()
        assert_close({"out_sample": tensors["out_sample"].numpy()}, {"out_sample": plain}, 1e-5)
    assert [str(warning.message) for warning in recwarn if "captured" in str(warning.message)] == []


def test_two_shapes_in_turn(bundle, engine_of, reference):
    engine = engine_of("unet")
    links = {side: link(engine, feeds_of(bundle, "unet", side=side)) for side in (8, 16)}
    recorded = {side: engine.capture(linked) for side, (_, linked) in links.items()}
    for turn in range(4):
        for side, (tensors, _) in links.items():
            feeds = feeds_of(bundle, "unet", side=side, seed=turn)
            for name, array in feeds.items():
                tensors[name].update_inplace(array)
            recorded[side]()
            assert_close({"out_sample": tensors["out_sample"].numpy()}, reference("unet")(feeds))


def test_other_weights_are_taken_over(bundle, plan_of, engine_of, reference, other):
    engine = engine_of("unet", plan_of("unet", flags=("refit",)))
    feeds = feeds_of(bundle, "unet")
    tensors, linked = link(engine, feeds)
    recorded = engine.capture(linked)
    for _ in range(2):
        recorded()
    assert_close({"out_sample": tensors["out_sample"].numpy()}, reference("unet")(feeds))
    engine.refit(other)
    wanted = OnnxRuntimeEngine.load(other)(feeds)
    for _ in range(3):
        recorded()
        assert_close({"out_sample": tensors["out_sample"].numpy()}, wanted)
    assert_close(engine(feeds), wanted)
    with pytest.raises(EngineError, match="vae_decoder"):
        engine.refit(bundle.path("vae_decoder/model.onnx"))
    assert_close(engine(feeds), wanted)


def test_a_plan_without_weights_takes_them_of_the_model(bundle, plan_of, engine_of, reference):
    stripped, whole = plan_of("unet", flags=("strip",)), plan_of("unet")
    assert stripped.path.stat().st_size < whole.path.stat().st_size / 2
    engine = engine_of("unet", stripped, onnx=bundle.path("unet/model.onnx"))
    feeds = feeds_of(bundle, "unet")
    assert_close(engine(feeds), reference("unet")(feeds))


@pytest.mark.parametrize("budget", [None, 0, 1 << 20])
def test_weights_may_be_streamed(bundle, plan_of, engine_of, reference, budget):
    engine = engine_of("unet", plan_of("unet", flags=("weight-streaming",)), weight_budget=budget)
    for seed in range(2):
        feeds = feeds_of(bundle, "unet", seed=seed)
        assert_close(engine(feeds), reference("unet")(feeds))


def test_what_was_compiled_for_the_gpu_is_kept_and_used(bundle, site, plan_of, engine_of, reference):
    if not site.backend.ahead_of_time:
        pytest.skip(f"{site.backend.name} compiles nothing when it runs")
    plan = plan_of("unet", batch_size=(1, 2, 3))
    feeds = feeds_of(bundle, "unet")
    engine_of("unet", plan)(feeds)
    kept = (plan.folder / CACHE_NAME).read_bytes()
    assert kept
    again = engine_of("unet", plan)
    assert_close(again(feeds), reference("unet")(feeds))
    assert again._loaded[plan.key].cache_taken
    (plan.folder / CACHE_NAME).write_bytes(b"damaged")
    assert_close(engine_of("unet", plan)(feeds), reference("unet")(feeds))
    assert (plan.folder / CACHE_NAME).read_bytes() != b"damaged"


def test_polygraphy_runs_the_plan_to_the_same(bundle, site, plan_of, engine_of, monkeypatch):
    """A second opinion: another runner of the same plan, and another of the same model."""
    if site.backend.ahead_of_time:
        monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")  # read when it is imported
    pytest.importorskip("polygraphy")
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.comparator import Comparator, CompareFunc
    from polygraphy.exception import PolygraphyException

    plan, feeds = plan_of("unet"), feeds_of(bundle, "unet")
    runners = [
        OnnxrtRunner(SessionFromOnnx(os.fspath(bundle.path("unet/model.onnx")))),
        TrtRunner(EngineFromBytes(BytesFromPath(os.fspath(plan.path)))),
    ]
    try:
        results = Comparator.run(runners, data_loader=[feeds])
    except (PolygraphyException, OSError) as error:  # it looks for a libcudart of its own
        pytest.skip(f"polygraphy does not run here: {error}")
    largest = float(abs(results[0][1][0]["out_sample"]).max())
    close = CompareFunc.simple(atol=TOLERANCE["fp32"] * largest, rtol=0)
    assert bool(Comparator.compare_accuracy(results, compare_func=close))
    assert_close(engine_of("unet", plan)(feeds), {"out_sample": np.asarray(results[1][1][0]["out_sample"])}, 1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pipeline_makes_the_image_that_onnx_runtime_makes(site, checkpoint_of, tmp_path, precision):
    import diffoundry

    path = tmp_path / "pico.bundle"
    diffoundry.compile(checkpoint_of("pico"), path, engine=site.backend.name, precision=precision)
    pipe, host = load(path), load(path, engine="onnxruntime", precision="fp32")
    assert pipe._loop == "device"
    for options in (
        {"scheduler": "euler"},
        {"scheduler": "ddpm"},
        {"guidance": 1.0},
        {"guidance_interval": (0.2, 0.6)},
    ):
        wanted = host(PROMPT, seed=7, steps=8, **options)
        runs = [pipe(PROMPT, seed=7, steps=8, **options) for _ in range(3)]  # one by one, captured, launched again
        runs.append(pipe(PROMPT, seed=7, steps=8, callback=lambda *step: None, **options))
        for found in runs:
            assert abs(found.latents - wanted.latents).max() < LATENTS[precision]
            pixels = [np.asarray(result.images[0], np.float32) for result in (found, wanted)]
            assert abs(pixels[0] - pixels[1]).mean() < (1 if precision == "fp32" else 8)
    first, second = (pipe(prompt, seed=7, steps=8, scheduler="euler").latents for prompt in (PROMPT, "a small ring"))
    assert abs(first - second).max() > 0.5  # a graph that is launched again takes the new prompt
