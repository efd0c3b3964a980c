"""Compile: validation that can fail, stages that are done once, sizes of every kind, external data."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import diffoundry
from diffoundry.bundle import Bundle
from diffoundry.common.errors import CheckpointError, DiffoundryError, EngineError
from diffoundry.common.files import exclusive
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.graphs import trace as trace_module
from diffoundry.export.graphs import validate
from diffoundry.export.graphs.trace import trace
from diffoundry.export.modules import component_specs
from diffoundry.export.reading import described
from diffoundry.families import family_of


def plan_of(checkpoint, name):
    source = Checkpoint.open(checkpoint)
    pipeline = described(source, family_of(source.class_name))
    return next(plan for plan in component_specs(source, pipeline) if plan.name == name)


@pytest.fixture(scope="module")
def traced(checkpoint_of, tmp_path_factory):
    """The pico text encoder's plan, torch's cases and a folder with its trace."""
    plan = plan_of(checkpoint_of("pico"), "text_encoder")
    module = plan.load()
    cases = validate.torch_cases(plan, module)
    folder = tmp_path_factory.mktemp("traced")
    trace(plan, module, folder)
    return plan, cases, folder


def test_the_cases_have_three_different_shapes(traced):
    _, cases, _ = traced
    assert len({feeds["input_ids"].shape for feeds, _ in cases}) == 3


def test_validation_passes_a_right_trace_and_reports_it(traced):
    plan, cases, folder = traced
    report = validate.compare(plan.name, OnnxRuntimeEngine.load(folder / "model.onnx"), cases)
    outputs = [case["output"] for case in report["cases"]]
    assert outputs == ["last_hidden_state", *(f"clip_skip.{i}" for i in range(1, len(outputs) // 3))] * 3
    assert all(0 < case["max_abs_error"] < 1e-4 for case in report["cases"])


def test_validation_refuses_a_wrong_trace(traced, tmp_path):
    plan, cases, folder = traced
    model = onnx.load(folder / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    weights = onnx.numpy_helper.to_array(largest).copy()
    weights[:, 0] += 0.5
    largest.CopyFrom(onnx.numpy_helper.from_array(weights, largest.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="differs from the reference"):
        validate.compare(plan.name, OnnxRuntimeEngine.load(tmp_path / "model.onnx"), cases)


def test_a_trace_with_a_fixed_axis_is_refused(traced, tmp_path):
    plan, _, _ = traced
    module = plan.load()
    forward = module.forward
    module.forward = lambda input_ids: forward(input_ids.reshape(2, -1))
    with pytest.raises(CheckpointError, match=r"fixed|traced"):
        trace(plan, module, tmp_path)


@pytest.mark.parametrize("name", ["pico", "sd15-small"])
def test_the_weights_are_let_go_when_they_are_written(name, checkpoint_of, tmp_path):
    """In half precision (pico) and in float32, where the exporter keeps views of them."""
    checkpoint = shutil.copytree(checkpoint_of(name), tmp_path / "checkpoint")
    plan = plan_of(checkpoint, "text_encoder")
    module = plan.load()
    assert str(checkpoint) in Path("/proc/self/maps").read_text()
    trace(plan, module, tmp_path)
    del module
    gc.collect()
    assert str(checkpoint) not in Path("/proc/self/maps").read_text()


def test_the_graphs_tell_nothing_of_the_machine(bundle_of):
    graphs = [path.read_bytes() for path in bundle_of("pico").glob("*/*.onnx")]
    assert len(graphs) > 5
    for told in (str(Path(__file__).parents[2]), sys.prefix, "site-packages", ".py"):
        assert not any(told.encode() in graph for graph in graphs)


def test_what_does_nothing_is_not_in_the_graphs(bundle_of):
    """Casts to the same type, transpositions to and fro, and shapes that are known."""
    graph = onnx.load(bundle_of("pico") / "unet" / "model.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    kinds = [node.op_type for node in graph.node]
    assert not {"Identity", "Dropout", "Constant"} & set(kinds)
    for node in graph.node:
        before = makers.get(node.input[0])
        assert (
            before is None or before.op_type != node.op_type or node.op_type not in ("Transpose", "Unsqueeze", "Cast")
        )


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("pico", "text_encoder"),
        pytest.param("pico", "vae_decoder", marks=pytest.mark.slow),
        pytest.param("sd15-small", "unet", marks=pytest.mark.slow),
    ],
)
def test_each_initializer_names_the_weights_that_it_came_from(name, component, checkpoint_of, tmp_path):
    from safetensors.torch import load_file

    plan = plan_of(checkpoint_of(name), component)
    (path,) = (checkpoint_of(name) / plan.source).glob("*.safetensors")
    weights = load_file(path)
    trace(plan, plan.load(), tmp_path, weights)
    sources = json.loads((tmp_path / "weights.json").read_text())
    graph = onnx.load(tmp_path / "model.onnx").graph
    initializers = {each.name: onnx.numpy_helper.to_array(each, tmp_path) for each in graph.initializer}
    for initializer, source in sources.items():
        for weight in source["weights"]:
            stored = weights[weight]
            array = stored.float().numpy().transpose(source.get("axes", range(stored.dim())))
            assert np.array_equal(array.reshape(initializers[initializer].shape), initializers[initializer])
            assert source["dtype"] == str(stored.dtype).removeprefix("torch.")
    named = {weight for source in sources.values() for weight in source["weights"]}
    assert named >= {weight for weight in weights if component != "vae_decoder" or weight.startswith("decoder.")}
    floats = {key: array for key, array in initializers.items() if array.dtype == np.float32}
    assert all(key in sources for key, array in floats.items() if array.ndim > 1 and min(array.shape) > 4)


def test_large_weights_lie_beside_the_graph(traced, tmp_path, monkeypatch):
    plan, cases, _ = traced
    monkeypatch.setattr(trace_module, "_EXTERNAL_FROM_BYTES", 1000)
    trace(plan, plan.load(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    validate.compare(plan.name, OnnxRuntimeEngine.load(tmp_path / "model.onnx"), cases)
    data = tmp_path / "model.onnx_data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(EngineError, match="cannot load"):
        OnnxRuntimeEngine.load(tmp_path / "model.onnx")


def test_half_precision_weights_may_stay_as_they_are(checkpoint_of, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    checkpoint = shutil.copytree(checkpoint_of("pico"), tmp_path / "checkpoint")
    path = checkpoint / "text_encoder/model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    plan = plan_of(checkpoint, "text_encoder")
    cases = validate.torch_cases(plan, plan.load())
    monkeypatch.setattr(trace_module, "_EXTERNAL_FROM_BYTES", 1000)
    sizes, sources = {}, {}
    for keep in (False, True):
        folder = tmp_path / str(keep)
        folder.mkdir()
        trace(plan, plan.load(), folder, load_file(path), keep_half=keep)
        sizes[keep] = (folder / "model.onnx_data").stat().st_size
        sources[keep] = json.loads((folder / "weights.json").read_text())
    assert sources[True] == sources[False]
    assert sizes[True] < 0.7 * sizes[False]
    model = tmp_path / "True/model.onnx"
    onnx.checker.check_model(str(model), full_check=True)
    large = [each for each in onnx.load(model).graph.initializer if np.prod(each.dims) > 8192]
    assert {each.data_type for each in large} == {onnx.TensorProto.FLOAT16}  # smaller ones the exporter folds
    wide = OnnxRuntimeEngine.load(tmp_path / "False/model.onnx")
    for low_memory in (False, True):
        engine = OnnxRuntimeEngine.load(model, low_memory=low_memory)
        validate.compare(plan.name, engine, cases)
        for name, array in engine(cases[0][0]).items():
            np.testing.assert_allclose(array, wide(cases[0][0])[name], atol=1e-5)


def test_a_storage_dtype_without_effect_is_refused(tmp_path, checkpoint_of):
    with pytest.raises(diffoundry.DiffoundryError, match=r"auto has no effect: sd15-small stores no component in fp16"):
        diffoundry.compile(checkpoint_of("sd15-small"), tmp_path / "bundle", storage_dtype="auto")
    assert not (tmp_path / "bundle").exists()


def test_an_unknown_storage_dtype_is_refused_first(tmp_path):
    with pytest.raises(DiffoundryError, match=r"'fp8'.*fp32, auto"):
        diffoundry.compile(tmp_path / "nowhere", tmp_path / "bundle", storage_dtype="fp8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bundle_of_half_precision_weights_makes_the_same_picture(checkpoint_of, bundle_of, tmp_path, monkeypatch):
    """Its fp16 models hold no large weights of their own."""
    monkeypatch.setattr(trace_module, "_EXTERNAL_FROM_BYTES", 1000)
    path = tmp_path / "bundle"
    bundle = diffoundry.compile(checkpoint_of("pico"), path, storage_dtype="auto", precision="fp16")
    for name in ("text_encoder", "unet", "vae_decoder"):
        files = bundle.component(name).variants["fp16/onnx"].files
        assert set(files) == {f"{name}/fp16.onnx", f"{name}/model.onnx_data"}
    asked = {"seed": 3, "steps": 6, "output": "latent"}
    found, wanted = (
        diffoundry.load(each)("a small blue circle", **asked).latents for each in (path, bundle_of("pico"))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    half = (path / "unet/model.onnx_data").stat().st_size
    diffoundry.compile(checkpoint_of("pico"), path).check()
    assert (path / "unet/model.onnx_data").stat().st_size > 1.8 * half


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 7)])
def test_the_unet_runs_at_sizes_that_do_not_halve(size, checkpoint_of, bundle_of):
    import torch

    module = plan_of(checkpoint_of("sd15-small"), "unet").load()
    engine = OnnxRuntimeEngine.load(bundle_of("sd15-small") / "unet" / "model.onnx")
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((1, 4, *size)).astype(np.float32),
        "timestep": np.array([7.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 77, 32)).astype(np.float32),
    }
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    np.testing.assert_allclose(engine(feeds)["out_sample"], expected, atol=1e-4)


def test_a_second_compile_builds_nothing_and_one_changed_weight_rebuilds_one_component(
    tmp_path, checkpoint_of, bundle_of, monkeypatch
):
    from safetensors.numpy import load_file, save_file

    checkpoint = shutil.copytree(checkpoint_of("pico"), tmp_path / "checkpoint")
    bundle = shutil.copytree(bundle_of("pico"), tmp_path / "bundle")
    traced = []
    real = trace_module.trace
    monkeypatch.setattr(
        trace_module, "trace", lambda plan, *rest, **options: (traced.append(plan.name), real(plan, *rest, **options))
    )
    before = (bundle / "unet/model.onnx").read_bytes()
    diffoundry.compile(checkpoint, bundle)
    assert traced == []
    path = checkpoint / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file({**tensors, name: tensors[name] + 1}, path)
    rebuilt = diffoundry.compile(checkpoint, bundle)
    assert traced == ["text_encoder"]
    assert (bundle / "unet/model.onnx").read_bytes() == before
    rebuilt.check()
    assert not (bundle / "engines").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle"}


def test_every_file_of_a_bundle_is_vouched_for(bundle_of):
    root = bundle_of("pico")
    bundle = Bundle.open(root)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    unknown = {name for name in found - set(bundle.manifest.all_files()) if not name.startswith("engines/")}
    assert unknown == {
        "bundle.json",
        *(f"reports/stages/{name}.json" for name in bundle.manifest.components if name != "step"),
    }
    bundle.check()


def test_two_compiles_of_one_bundle_do_not_mix(tmp_path, checkpoint_of):
    with (
        exclusive(tmp_path / "b"),
        pytest.raises(DiffoundryError, match="another process is working on"),
    ):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "b")


def test_a_swap_that_was_cut_short_is_mended(tmp_path, checkpoint_of, bundle_of):
    shutil.copytree(bundle_of("pico"), tmp_path / ".b.old")
    diffoundry.compile(checkpoint_of("pico"), tmp_path / "b").check()
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class embeddings"),
        ({"addition_embed_type": "text_time"}, "'text_time', which this family does not"),
        ({"in_channels": 8}, "8 channels"),
    ],
)
def test_a_unet_of_another_family_is_refused(tmp_path, checkpoint_of, change, message):
    checkpoint = shutil.copytree(checkpoint_of("pico"), tmp_path / "c")
    path = checkpoint / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        diffoundry.compile(checkpoint, tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize("options", [{"engine": "openvino:tpu"}, {"precision": "fp4"}, {"family": "dit"}])
def test_unknown_choices_are_refused(tmp_path, checkpoint_of, options):
    with pytest.raises(DiffoundryError, match="unknown"):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "b", **options)
