"""The OpenVINO engine on the processor: outputs, shapes, rows, precisions, what is kept on disk, bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import diffoundry
from diffoundry.bundle import Bundle
from diffoundry.common.errors import EngineError
from diffoundry.engines import EngineStore
from diffoundry.engines.loader import EngineLoader
from diffoundry.engines.openvino import device as devices
from diffoundry.engines.openvino.compiled import Recipe
from diffoundry.engines.openvino.engine import OpenVinoEngine
from diffoundry.engines.openvino.exact import waves, without_waves
from diffoundry.engines.openvino.halves import with_one_half
from diffoundry.engines.openvino.load import load_variant
from diffoundry.engines.verify import verify

pytest.importorskip("openvino")
BF16 = "bf16" in devices.precisions()
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16")


def feeds(rows=2, height=8, width=8, timestep=None, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": np.full(rows, timestep, np.float32) if timestep else rng.random(rows).astype(np.float32) * 999,
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64)).astype(np.float32),
    }


@pytest.fixture
def bundle(bundle_of, tmp_path):
    """A copy of pico's bundle without compiled models."""
    shutil.copytree(bundle_of("pico"), tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(tmp_path / "b")


def unet(bundle, precision="fp32", small=True, streams=1):
    variant = bundle.component("unet").variants["fp32/onnxruntime:cpu"]
    return load_variant(
        bundle, "unet", variant, provider="cpu", precision=precision, threads=2, streams=streams, small=small
    )


def decibels(exact, made):
    return 10 * np.log10(np.mean(exact**2) / np.mean((exact - made) ** 2))


@pytest.mark.parametrize(("small", "streams"), [(True, 2), (False, 1)])
def test_every_shape_gives_what_onnx_runtime_gives(bundle, small, streams):
    exact = EngineLoader(bundle, "onnxruntime").load("unet")
    engine = unet(bundle, small=small, streams=streams)
    bound = {}
    for rows, height, width in [(2, 8, 8), (3, 8, 12), (2, 8, 8)]:
        given = feeds(rows, height, width, seed=rows)
        wanted = exact(given)["out_sample"]
        assert np.abs(engine(given)["out_sample"] - wanted).max() < 1e-5
        binding, arrays = bound.setdefault((rows, height, width), (None, None))
        if binding is None:
            arrays = {name: array.copy() for name, array in given.items()}
            binding = engine.bind_host(arrays)
            bound[rows, height, width] = binding, arrays
        arrays["sample"][...] = given["sample"][::-1]
        wanted = exact({**given, "sample": np.ascontiguousarray(given["sample"][::-1])})["out_sample"]
        assert np.abs(binding("sample")["out_sample"] - wanted).max() < 1e-5


TWICE = ("sample", "timestep")


def twice(rows=2, seed=0):
    """Feeds whose second half of rows is the first, but for the prompt."""
    given = feeds(rows, seed=seed)
    return given | {name: np.concatenate([given[name][: rows // 2]] * 2) for name in TWICE}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("rows", [2, 4])
def test_what_both_halves_share_is_computed_once(bundle, rows, precision):
    engine, given = unet(bundle, precision), twice(rows)
    plain = {name: array.copy() for name, array in engine.bind_host(given)().items()}
    shared = engine.bind_host(given, TWICE)
    for _ in range(2):
        wanted = plain["out_sample"]
        assert np.abs(shared("sample")["out_sample"] - wanted).max() <= (1e-5 if precision == "fp32" else 2e-2)
        given["sample"][...] = given["sample"][:, :, ::-1]
        plain = engine.bind_host(given)()
    kept = [each["twice"] for each in EngineStore(bundle.root / "engines").records() if "twice" in each]
    assert any("sample" in each for each in kept)


def static_unet(bundle, rows=2):
    model = devices.Device.open("cpu", "fp32").core.read_model(str(bundle.path("unet/model.onnx")))
    model.reshape({name: list(array.shape) for name, array in feeds(rows).items()})
    return model


def rows_of(model, kind):
    """The first axes of what the nodes of a kind make."""
    return [node.output(0).shape[0] for node in model.get_ordered_ops() if node.get_type_name() == kind]


def test_the_shared_part_has_half_of_the_rows(bundle):
    model = static_unet(bundle, rows=4)
    made = with_one_half(model, TWICE)
    assert set(rows_of(model, "Convolution")) == {4}
    once = rows_of(made, "Convolution")
    # the first one, the two of a residual block, and the one before the self-attention
    assert set(once) == {2, 4} and once.count(2) == 4
    assert [each.shape for each in made.inputs] == [each.shape for each in model.inputs]
    assert [each.shape for each in made.outputs] == [each.shape for each in model.outputs]


def test_nothing_is_shared_where_nothing_can_be(bundle):
    for rows, names in [(2, ()), (1, TWICE), (3, TWICE), (2, ("timestep_of_another_model",))]:
        model = static_unet(bundle, rows)
        assert with_one_half(model, names) is model


def test_axes_have_the_names_of_the_manifest(bundle):
    engine = unet(bundle)
    assert [(t.name, t.shape) for t in sorted(engine.inputs, key=lambda t: t.name)] == [
        ("encoder_hidden_states", ("batch_size", "sequence_length", 64)),
        ("sample", ("batch_size", 4, "height", "width")),
        ("timestep", ("batch_size",)),
    ]
    with pytest.raises(EngineError, match="batch_size is 2 in 'sample'"):
        engine({**feeds(), "timestep": np.zeros(3, np.float32)})


def test_threads_share_an_engine(bundle):
    engine, wanted, wrong = unet(bundle), {}, []
    for seed in range(4):
        wanted[seed] = engine(feeds(seed=seed))["out_sample"]

    def work(seed):
        for _ in range(20):
            if not np.array_equal(engine(feeds(seed=seed))["out_sample"], wanted[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("timestep", [1, 333, 999])
def test_the_timestep_is_an_angle_in_float32(bundle, timestep):
    core = devices.Device.open("cpu", "fp32").core
    model = core.read_model(str(bundle.path("unet/fused.onnx")))
    compiled = core.compile_model(waves(model, "timestep"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = [compiled({key: feeds(timestep=timestep)[key] for key in ("sample", "timestep")})[i] for i in (0, 1)]
    half = made[0].shape[1]
    angles = timestep * np.exp(-np.log(10000) * np.arange(half) / half)
    for found, wanted in zip(made, (np.sin(angles), np.cos(angles)), strict=True):
        assert np.abs(found - wanted).max() < 1e-4
    rest = without_waves(core.read_model(str(bundle.path("unet/fused.onnx"))), "timestep")
    names = {port.get_any_name() for port in rest.inputs}
    assert "timestep" not in names
    assert {port.get_any_name() for port in compiled.outputs} <= names


@needs_bf16
def test_bf16_loses_what_rounding_loses_and_no_more(bundle_of):
    bundle = Bundle.open(bundle_of("sd15-small"))
    given = {
        tensor.name: np.random.default_rng(0)
        .standard_normal(
            [
                {"batch_size": 2, "sequence_length": 77}.get(axis, 16) if isinstance(axis, str) else axis
                for axis in tensor.shape
            ]
        )
        .astype(np.float32)
        for tensor in bundle.component("unet").inputs
    }
    given["timestep"] = np.full(2, 907.3, np.float32)
    exact = EngineLoader(bundle, "onnxruntime").load("unet")(given)["out_sample"]
    low = unet(bundle, "bf16")(given)["out_sample"]
    opened = devices.Device.open("cpu", "bf16")
    plain = OpenVinoEngine(bundle.path("unet/model.onnx"), "unet", opened, Recipe("bf16", 2, small=True))
    print(decibels(exact, low), decibels(exact, plain(given)["out_sample"]))
    assert 30 < decibels(exact, low) < 60
    assert decibels(exact, low) > 3 + decibels(exact, plain(given)["out_sample"])


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), pytest.param("bf16", 0.1, marks=needs_bf16)])
def test_the_loop_on_its_tensors_gives_the_picture_of_the_loop_on_the_host(bundle, precision, most):
    asked = {"steps": 4, "seed": 3, "guidance": 4.0, "scheduler": "dpm++2m", "output": "latent"}
    if precision != "fp32":
        diffoundry.build(
            bundle.root, engine="openvino", precision=precision, scan=diffoundry.Scan(steps=2, budget_db=5)
        )
    host, device = (
        diffoundry.load(bundle.root, engine="openvino", precision=precision, loop=loop)("a star", **asked).latents
        for loop in ("host", "device")
    )
    exact = diffoundry.load(bundle.root, engine="onnxruntime")("a star", **asked).latents
    assert np.abs(host - device).max() < most
    assert np.abs(host - exact).max() < 10 * most


def test_what_was_compiled_is_kept_for_the_same_shapes_alone(bundle, monkeypatch):
    store = EngineStore(bundle.root / "engines")
    wanted = unet(bundle)(feeds())["out_sample"]
    kept = {record["key"] for record in store.records()}
    assert {record["component"] for record in store.records()} == {"unet"}
    compiled = []
    core = devices._core(os.getpid())
    monkeypatch.setattr(devices, "_core", lambda process: _Counting(core, compiled))
    assert np.array_equal(unet(bundle)(feeds())["out_sample"], wanted)
    assert not compiled
    assert {record["key"] for record in store.records()} == kept
    unet(bundle)(feeds(1))
    assert len(compiled) == 2  # both graphs
    assert kept < {record["key"] for record in store.records()}


class _Counting:
    def __init__(self, core, compiled):
        self._core, self._compiled = core, compiled

    def __getattr__(self, name):
        return getattr(self._core, name)

    def compile_model(self, *arguments):
        self._compiled.append(arguments)
        return self._core.compile_model(*arguments)


def test_what_another_version_compiled_is_not_loaded_but_replaced(bundle, monkeypatch):
    store = EngineStore(bundle.root / "engines")
    opened = devices.Device.open("cpu", "fp32")
    monkeypatch.setattr(devices.Device, "open", classmethod(lambda cls, *asked: replace(opened, version="2026.3.0")))
    unet(bundle)(feeds())
    old = {record["key"] for record in store.records()}
    assert {record["version"] for record in store.records()} == {"2026.3.0"}
    monkeypatch.undo()
    unet(bundle)(feeds())
    assert {record["version"] for record in store.records()} == {opened.version}
    assert old.isdisjoint(record["key"] for record in store.records())


@pytest.mark.parametrize("damage", ["cut", "garbage", "claimed"])
def test_a_damaged_compiled_model_is_made_again(bundle, damage):
    wanted = unet(bundle)(feeds())["out_sample"]
    for blob in (bundle.root / "engines").glob("*/model.blob"):
        blob.write_bytes(blob.read_bytes()[:1000] if damage == "cut" else b"\0" * 5000)
        if damage == "claimed":  # with the hash of what is there now
            from diffoundry.common.files import sha256_file

            record = blob.with_name("engine.json")
            found = json.loads(record.read_text())
            record.write_text(json.dumps({**found, "files": {"model.blob": sha256_file(blob)}}))
    assert np.array_equal(unet(bundle)(feeds())["out_sample"], wanted)


def test_a_folder_that_cannot_be_written_is_no_error(bundle):
    (bundle.root / "engines").write_text("not a folder")
    assert unet(bundle)(feeds())["out_sample"].shape == (2, 4, 8, 8)


def test_at_most_so_many_shapes_are_kept(bundle):
    engine = EngineLoader(bundle, "openvino").load("text_encoder")
    for rows in range(1, 19):
        engine({"input_ids": np.ones((rows, 8), np.int64)})
    kept = [record["shapes"][0][0] for record in EngineStore(bundle.root / "engines").records()]
    assert sorted(kept) == list(range(3, 19))


def test_verify_takes_it(bundle):
    checks = list(verify(bundle, engine="openvino"))
    assert {check.component for check in checks} == set(bundle.manifest.components)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "openvino:npu"}, "finds no NPU on this machine, only CPU: install its driver"),
        ({"engine": "openvino:gpu"}, "finds no GPU on this machine, only CPU: install its driver"),
        ({"engine": "openvino:tpu"}, "unknown engine 'openvino:tpu'"),
        ({"engine": "openvino", "precision": "bf16"}, "build .*/b --engine openvino --precision bf16"),
        ({"engine": "openvino", "weight_budget": 1 << 30}, "goes with TensorRT plans"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(bundle, options, message):
    with pytest.raises(EngineError, match=message):
        diffoundry.load(bundle.root, **options)


def test_a_processor_without_the_precision_is_refused(monkeypatch):
    with pytest.raises(EngineError, match="does not compute in fp16: choose --precision fp32"):
        _without(monkeypatch, {"FP32"}).open("cpu", "fp16")


def _without(monkeypatch, capabilities):
    core = devices._core(os.getpid())

    class Core:
        available_devices = ("CPU",)

        def get_property(self, name, key):
            return capabilities if key == "OPTIMIZATION_CAPABILITIES" else core.get_property(name, key)

    monkeypatch.setattr(devices, "_core", lambda process: Core())
    return devices.Device


@pytest.mark.parametrize(("found", "message"), [(None, "is not installed: run `pip install"), ("2025.1", "too old")])
def test_a_module_that_is_not_there_or_too_old(monkeypatch, found, message):
    class Old:
        __version__ = f"{found}.0-1-abc"

    monkeypatch.setitem(sys.modules, "openvino", found and Old)
    devices.module.cache_clear()
    try:
        with pytest.raises(EngineError, match=message):
            devices.module()
    finally:
        devices.module.cache_clear()


def test_a_model_that_cannot_be_read(bundle):
    path = bundle.path("unet/fused.onnx")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(EngineError, match=r"unet: OpenVINO \S+ cannot load fused.onnx: .*; upgrade OpenVINO, or use"):
        unet(bundle)
