"""The ONNX Runtime engine: checked inputs, bound buffers, the cache of optimized graphs."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from diffoundry.common.errors import EngineError
from diffoundry.common.files import mark
from diffoundry.engines import EngineStore, onnxruntime
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def unet_path(bundle_of):
    return bundle_of("pico") / "unet" / "model.onnx"


@pytest.fixture(scope="module")
def unet(unet_path):
    return OnnxRuntimeEngine.load(unet_path)


def feeds(rows=2, height=8, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": rng.random(rows).astype(np.float32) * 999,
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64)).astype(np.float32),
    }


def test_specs_name_the_axes(unet):
    assert [(t.name, t.dtype, t.shape) for t in unet.inputs] == [
        ("sample", "float32", ("batch_size", 4, "height", "width")),
        ("timestep", "float32", ("batch_size",)),
        ("encoder_hidden_states", "float32", ("batch_size", "sequence_length", 64)),
    ]
    assert [t.name for t in unet.outputs] == ["out_sample"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("timestep"), "missing timestep"),
        (lambda f: f.update(extra=f["sample"]), "unknown extra"),
        (lambda f: f.update(sample=f["sample"].astype(np.float64)), "'sample' must be float32.*found float64"),
        (lambda f: f.update(sample=f["sample"][0]), r"found shape \(4, 8, 8\)"),
        (lambda f: f.update(sample=f["sample"][:, :3]), r"batch_size, 4, height, width.*found shape \(2, 3, 8, 8\)"),
        (lambda f: f.update(sample=f["sample"][:, :, :0]), r"found shape \(2, 4, 0, 8\)"),
        (lambda f: f.update(timestep=np.zeros(3, np.float32)), "batch_size is 2 in 'sample'"),
        (
            lambda f: f.update(encoder_hidden_states=f["encoder_hidden_states"][..., :63]),
            r"found shape \(2, 77, 63\)",
        ),
    ],
)
def test_a_wrong_input_is_named_with_what_was_allowed(unet, change, message):
    wrong = feeds()
    change(wrong)
    with pytest.raises(EngineError, match=message):
        unet(wrong)
    with pytest.raises(EngineError, match=message):
        unet.bind_host(wrong)


def test_one_timestep_may_stand_for_all_rows(unet):
    given = feeds(rows=3)
    given["timestep"][:] = 321
    single = {**given, "timestep": given["timestep"][:1]}
    np.testing.assert_allclose(unet(given)["out_sample"], unet(single)["out_sample"], atol=1e-6)


def test_rows_may_stand_at_different_timesteps(unet):
    together = feeds(rows=3)
    outputs = unet(together)["out_sample"]
    for i in range(3):
        alone = unet({name: array[i : i + 1] for name, array in together.items()})["out_sample"]
        np.testing.assert_allclose(outputs[i], alone[0], atol=2e-5)
    assert not np.allclose(outputs, unet({**together, "timestep": together["timestep"][::-1].copy()})["out_sample"])


def test_a_bound_engine_reads_the_arrays_in_place(unet):
    arrays = feeds()
    bound = unet.bind_host(arrays)
    first = bound("sample", "timestep")["out_sample"].copy()
    np.testing.assert_array_equal(first, unet(arrays)["out_sample"])
    for seed in (1, 2):
        arrays["sample"][...] = feeds(seed=seed)["sample"]
        arrays["timestep"][...] = 10 * seed
        np.testing.assert_array_equal(bound("sample", "timestep")["out_sample"], unet(arrays)["out_sample"])


def test_arrays_that_cannot_be_bound_are_refused(unet):
    strided = feeds(rows=4)
    strided = {**strided, "sample": strided["sample"].transpose(0, 1, 3, 2)}
    with pytest.raises(EngineError, match="contiguous"):
        unet.bind_host(strided)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_refused(unet_path, provider):
    with pytest.raises(EngineError, match="or use the engine onnxruntime"):
        OnnxRuntimeEngine.load(unet_path, provider=provider)


def test_a_damaged_model_is_one_clear_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot load"):
        OnnxRuntimeEngine.load(tmp_path / "model.onnx")
    with pytest.raises(EngineError, match="is missing"):
        OnnxRuntimeEngine.load(tmp_path / "other.onnx")


def test_a_model_that_is_a_link_and_does_not_load_has_its_own_remedy(tmp_path):
    (tmp_path / "blob").write_bytes(b"not a model")
    (tmp_path / "model.onnx").symlink_to("blob")
    with pytest.raises(EngineError, match=r"upgrade ONNX Runtime, or use a copy .* \(cp -rL\)"):
        OnnxRuntimeEngine.load(tmp_path / "model.onnx")


def keep(store, source):
    """An engine of `source` in `store`."""
    built_from = {"source": source}
    key = store.key(built_from)
    with store.building(key, built_from) as work:
        (work / "plan").write_bytes(b"plan")
    return key


def test_an_engine_of_another_source_is_another_and_a_damaged_one_is_removed(tmp_path):
    store = EngineStore(tmp_path / "engines")
    keys = [keep(store, {"a": each}) for each in "12"]
    assert {record["key"] for record in store.records()} == set(keys)
    assert store.find(keys[0]) == store.root / keys[0]
    (store.root / keys[0] / "plan").write_bytes(b"x")
    assert store.find(keys[0]) is None
    assert not (store.root / keys[0]).exists()


def test_a_build_that_fails_leaves_nothing(tmp_path):
    store = EngineStore(tmp_path / "engines")

    def fail():
        with store.building("0" * 32, {}) as work:
            (work / "plan").write_bytes(b"half")
            raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        fail()
    assert list(store.root.iterdir()) == []


def test_a_model_cannot_read_files_outside_its_folder(tmp_path):
    from onnx import TensorProto, helper

    (tmp_path / "secret").write_bytes(b"\0" * 64)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "../secret", "offset": "0", "length": "64"}.items():
        weight.external_data.add(key=key, value=value)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", tensors[:1], tensors[1:], [weight])
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/inside").write_bytes(b"\0" * 64)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "bundle/model.onnx").write_bytes(model.SerializeToString())
    weight.external_data[0].value = "inside"
    graph.initializer[0].CopyFrom(weight)
    allowed = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "bundle/allowed.onnx").write_bytes(allowed.SerializeToString())
    OnnxRuntimeEngine.load(tmp_path / "bundle/allowed.onnx")
    with pytest.raises(EngineError, match="cannot load"):
        OnnxRuntimeEngine.load(tmp_path / "bundle/model.onnx")


def test_engines_of_other_models_are_pruned(tmp_path):
    store = EngineStore(tmp_path / "engines")
    for each in "12":
        keep(store, {"a": each})
    (store.root / f".{'0' * 32}-01234567").mkdir()
    mark(store.root / f".{'0' * 32}-01234567")
    store.prune([{"a": "2"}])
    assert [record["source"] for record in store.records()] == [{"a": "2"}]
    assert len(list(store.root.iterdir())) == 1


def small(nodes, inputs, outputs):
    """A session of a graph of a few nodes, as an engine."""
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(session, "small", "cpu")


def test_a_value_without_axes_stays_one_where_it_is_bound():
    scalar = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy"]
    engine = small([helper.make_node("Add", ["x", "x"], ["y"])], scalar[:1], scalar[1:])
    x = np.asarray(2.0, np.float32)
    bound = engine.bind_host({"x": x})
    for value in (2.0, 3.0):
        x[...] = value
        found = bound("x")["y"]
        assert (found.shape, float(found)) == ((), 2 * value)


def test_memory_that_is_wanting_is_told_from_other_failures():
    """Both provoked in ONNX Runtime itself: a value of 64 TiB, and a bound output of another shape."""
    ends = helper.make_tensor_value_info("s", TensorProto.INT64, ["n"]), helper.make_tensor_value_info("y", 1, None)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    nodes = [helper.make_node("Expand", ["x", "s"], ["b"]), helper.make_node("Add", ["b", "b"], ["y"])]
    feeds = {"x": np.ones(1, np.float32), "s": np.array([1 << 44], np.int64)}
    engine = small(nodes, [x, ends[0]], [ends[1]])
    with pytest.raises(EngineError, match="small: out of memory: ask for a smaller size"):
        engine(feeds)
    feeds["s"][0] = 4
    bound = engine.bind_host(feeds)
    bound()
    feeds["s"][0] = 5  # the output was bound with 4
    with pytest.raises(EngineError, match="small: ONNX Runtime failed"):
        bound("s")


def test_memory_that_is_wanting_while_a_model_is_loaded_is_named(unet_path):
    """In 6 MiB more than the process has: too few for the weights."""
    program = f"""
import resource
from pathlib import Path
from diffoundry.engines.onnxruntime import EngineError, OnnxRuntimeEngine
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 20),) * 2)
try:
    OnnxRuntimeEngine.load(Path({str(unet_path)!r}), threads=1)
except EngineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("unet: out of memory while it is loaded: "), done.stderr


def test_memory_that_is_wanting_for_a_tensor_is_named(unet):
    with pytest.raises(EngineError, match="unet: out of memory: ask for a smaller size"):
        unet.to_device(np.broadcast_to(np.zeros(1, np.float32), (1 << 44,)))


def test_nodes_that_another_provider_runs_are_named(unet_path):
    """All are on the CPU here, as if a GPU's provider had taken none; what shapes are computed with belongs there."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(unet_path), options, providers=["CPUExecutionProvider"])
    text = onnxruntime.nodes_elsewhere(session, "cuda")
    assert "33 Conv (CPUExecutionProvider)" in text
    assert "Shape" not in text
    assert onnxruntime.nodes_elsewhere(session, "cpu") == ""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "raise ImportError('no GLIBC_2.34')",
            "ONNX Runtime does not load (no GLIBC_2.34): run `pip uninstall onnx",
        ),
        ("", "ONNX Runtime is there in part only: run `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install"),
        (
            "__version__ = '1.9.0'\nclass InferenceSession: pass",
            "ONNX Runtime 1.9.0 is too old, 1.22 is the least",
        ),
    ],
)
def test_an_onnxruntime_that_cannot_be_used_is_one_line(module, message, bundle_of, tmp_path):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(module)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "diffoundry", "verify", bundle_of("pico")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {message}")
    assert done.stderr.count("\n") == 1


def test_float32_on_a_gpu_is_float32():
    chosen = {provider: dict(options) for provider, options in onnxruntime._CHOSEN.items()}
    assert list(chosen) == list(onnxruntime.PROVIDERS)
    assert all(next(iter(chosen[key])) == name for key, name in onnxruntime.PROVIDERS.items())
    assert [chosen[key]["CUDAExecutionProvider"]["use_tf32"] for key in ("cuda", "tensorrt")] == ["0", "0"]
    assert set(chosen["tensorrt"]["TensorrtExecutionProvider"].values()) == {"0"}


@pytest.fixture
def _cuda():
    """The provider, where it starts."""
    try:
        onnxruntime.require_provider("cuda")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_the_session_on_cuda_has_no_tf32(unet_path):
    engine = OnnxRuntimeEngine.load(unet_path, provider="cuda")
    assert engine._session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "0"


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_a_convolution_in_float16_on_cuda_prints_nothing(tmp_path, capfd):
    """The provider tries plans that there are not, and its log would say so."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 64, "h", 32]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT16, [64, 64, 3, 3]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    engine = OnnxRuntimeEngine.load(tmp_path / "model.onnx", provider="cuda")
    feeds = {"x": np.ones((1, 64, 32, 32), np.float16), "w": np.ones((64, 64, 3, 3), np.float16)}
    assert engine(feeds)["y"][0, 0, 1, 1] == 576
    assert capfd.readouterr() == ("", "")
