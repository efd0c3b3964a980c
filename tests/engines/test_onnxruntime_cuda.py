"""The engine of ONNX Runtime's CUDA provider: one stream, what is captured, what is refused.

The GPU is played in host memory (`simulated_session.py` says what that proves).
"""

from __future__ import annotations

import re
import shutil
import warnings

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.calibration.build import build
from diffoundry.common.errors import EngineError
from diffoundry.engines import onnxruntime, onnxruntime_cuda
from diffoundry.engines.gpu.gpu import Gpu
from diffoundry.engines.loader import EngineLoader
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine, load_variant
from diffoundry.engines.onnxruntime_cuda import load_fused
from diffoundry.engines.verify import verify
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pipeline import load

ENGINE = "onnxruntime:cuda"
OWN = f"fp32/{ENGINE}"
PROMPT = "a large red star at the left on a navy background"
TOLERANCE = 5e-3
"""Few steps of a sampler of high order magnify each rounding up to a thousand times; a wrong step shows in tenths."""


@pytest.fixture(scope="module")
def built(bundle_of, tmp_path_factory):
    """pico's bundle with its graphs for CUDA in fp32, made on this machine."""
    folder = tmp_path_factory.mktemp("built")
    build(shutil.copytree(bundle_of("pico"), folder / "pico.bundle"), engine=ENGINE)
    return Bundle.open(folder / "pico.bundle")


@pytest.fixture(autouse=True)
def sessions(simulated_sessions):
    """Every session is on the simulated GPU."""
    return simulated_sessions


def unet(bundle, gpu, **options):
    variant = bundle.component("unet").variants[OWN]
    return load_fused(bundle.root, "unet", variant, gpu, **{"exact": True, "captured": True, **options})


def feeds(seed, rows=2, side=8):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": rng.uniform(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def plain(built):
    return load_variant(built.root, "unet", built.component("unet").variants["fp32/onnx"], threads=1)


def test_calls_of_several_shapes_in_turn_give_what_the_cpu_gives_and_are_captured(built, plain, simulated_cuda):
    gpu = Gpu()
    engine = unet(built, gpu)
    for seed in range(5):
        for side in (8, 16):
            given = feeds(seed, side=side)
            np.testing.assert_allclose(engine(given)["out_sample"], plain(given)["out_sample"], atol=5e-5)
    assert set(gpu.captured) == {f"unet {shape}" for shape in ("2x4x8x8", "2x4x16x16", "2x77x64")}
    allocated, launched = simulated_cuda.calls["cudaMalloc"], simulated_cuda.calls["cudaGraphLaunch"]
    engine(feeds(9))
    assert simulated_cuda.calls["cudaMalloc"] == allocated
    assert simulated_cuda.calls["cudaGraphLaunch"] == launched + 2  # the prompt's part, and the step's


def test_what_is_kept_ready_is_bounded_and_given_back(built, monkeypatch, simulated_cuda):
    monkeypatch.setattr(onnxruntime_cuda, "_MOST_CALLS", 2)
    engine = unet(built, Gpu())
    for side in (16, 8):
        engine(feeds(0, side=side))
    used = simulated_cuda.used
    for side in (24, 32, 40):
        engine(feeds(0, side=side))
    assert simulated_cuda.used > used  # the two largest are kept
    for side in (16, 8):
        engine(feeds(0, side=side))
    assert simulated_cuda.used == used


def test_a_bound_engine_sends_what_changed_and_nothing_else(built, plain, simulated_cuda):
    given = feeds(1)
    bound = unet(built, Gpu()).bind_host(given)
    for seed in (1, 2, 3, 4):
        for name in ("sample", "timestep"):
            given[name][...] = feeds(seed)[name]
        before = simulated_cuda.copied["cudaMemcpyHostToDevice"]
        found = bound("sample", "timestep")["out_sample"]
        np.testing.assert_allclose(found, plain(given)["out_sample"], atol=5e-5)
    sent = simulated_cuda.copied["cudaMemcpyHostToDevice"] - before
    assert sent == given["sample"].nbytes + given["timestep"].nbytes
    given["encoder_hidden_states"][...] = feeds(7)["encoder_hidden_states"]
    np.testing.assert_allclose(bound("encoder_hidden_states")["out_sample"], plain(given)["out_sample"], atol=5e-5)


def test_all_sessions_share_the_stream_and_attention_in_float32_is_exact(built, sessions):
    gpu = Gpu()
    unet(built, gpu)
    assert {each.options["user_compute_stream"] for each in sessions} == {str(gpu.device.stream)}
    assert {(each.options["use_tf32"], each.options["sdpa_kernel"]) for each in sessions} == {("0", "16")}
    unet(built, gpu, exact=False)
    assert "sdpa_kernel" not in sessions[-1].options


def test_tensors_of_another_gpu_are_refused(built):
    gpu, other = Gpu(), Gpu()
    engine = unet(built, gpu)._per_step
    tensors = {t.name: other.to_device(np.zeros((2, 4, 8, 8), np.float32)) for t in (*engine.inputs, *engine.outputs)}
    with pytest.raises(
        EngineError, match="unet: what is bound to it must lie on its GPU: load all parts for one engine"
    ):
        engine._bind_device(tensors)


def drawn(pipe, **options):
    return pipe(**{"prompt": PROMPT, "seed": 7, "steps": 6, **options})


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "euler_a"])
def test_the_picture_is_that_of_the_cpu_each_time_and_the_loop_is_captured(built, bundle_of, simulated_cuda, sampler):
    pipe = load(built.root, engine=ENGINE)
    wanted = drawn(load(bundle_of("pico")), scheduler=sampler)
    for _ in range(4):
        found = drawn(pipe, scheduler=sampler)
        np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)
    told = pipe.info()
    assert (told["engine"], told["precision"]) == (ENGINE, "fp32")
    assert "6 steps of 2x4x8x8" in told["captured"]
    assert not any(each.startswith("text_encoder") for each in told["captured"])
    allocated = simulated_cuda.calls["cudaMalloc"]
    drawn(pipe, scheduler=sampler)
    assert simulated_cuda.calls["cudaMalloc"] == allocated


def test_tasks_that_run_on_the_host_do_so_on_this_engine_too(built, bundle_of):
    pipe, host = load(built.root, engine=ENGINE), load(bundle_of("pico"))
    image = drawn(host).images[0]
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48] = 255
    for options in (
        {"image": image, "strength": 0.5},
        {"image": image, "strength": 0.5, "mask": mask},
        {"guidance": Guidance(5, mode="split")},
        {"guidance": Guidance(5, interval=(0.2, 0.6)), "steps": 11},
    ):
        found, wanted = drawn(pipe, **options), drawn(host, **options)
        np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)


def test_verify_takes_the_graphs(built):
    checks = list(verify(built, engine=ENGINE, precision="fp32"))
    assert {check.component for check in checks} == set(built.manifest.components)
    assert all(check.passed for check in checks)


def test_without_graphs_of_its_own_the_plain_ones_run_and_a_warning_says_what_to_do(bundle_of, monkeypatch):
    bundle, loaded = Bundle.open(bundle_of("pico")), []
    monkeypatch.setattr(
        onnxruntime, "load_variant", lambda root, name, variant, **options: loaded.append((variant.model, options))
    )
    remedy = f"run `diffoundry build {bundle.root} --engine onnxruntime:cuda --precision fp32`"
    with pytest.warns(RuntimeWarning, match=re.escape(remedy)):
        EngineLoader(bundle, ENGINE).load("unet")
    assert loaded == [("unet/model.onnx", {"provider": "cuda", "threads": None, "changed": {}})]


def test_with_graphs_of_its_own_there_is_no_warning(built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EngineLoader(built, ENGINE)


def test_a_node_that_the_gpu_does_not_run_is_an_error(built, monkeypatch):
    monkeypatch.setattr(
        onnxruntime_cuda, "nodes_elsewhere", lambda session, provider: "3 Resize (CPUExecutionProvider)"
    )
    with pytest.raises(
        EngineError, match=r"^unet: ONNX Runtime .* leaves nodes of fp32\.cuda\.onnx to others than CUDA"
    ):
        unet(built, Gpu())


@pytest.mark.parametrize(("version", "taken"), [("1.30.2", False), ("1.31.0", True), ("2.0.0", True), ("odd", False)])
def test_an_old_onnxruntime_is_refused(monkeypatch, version, taken):
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime_cuda.ort, "__version__", version)
    if taken:
        onnxruntime_cuda.require_version()
        return
    with pytest.raises(EngineError, match=rf"needs onnxruntime-gpu 1\.31, this is {version}: .*pip install"):
        onnxruntime_cuda.require_version()


def test_the_engine_of_the_cpu_is_another(built):
    engine = load_variant(built.root, "unet", built.component("unet").variants["fp32/onnxruntime:cpu"])
    assert isinstance(engine._per_step, OnnxRuntimeEngine)
