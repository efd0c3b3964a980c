"""The engine that runs plans, on a simulated GPU: what is proved here is said in `simulated.py`."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import EngineError
from diffoundry.engines.gpu.gpu import Gpu
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine
from diffoundry.engines.tensorrt import engine as engine_module
from diffoundry.engines.tensorrt.engine import TensorRTEngine
from diffoundry.engines.tensorrt.plan import CACHE_NAME, PLAN_NAME
from diffoundry.tests.engines.tensorrt.simulated import SimulatedTensorRT, write_plan


def shapes(rows, side=(8, 8, 8)):
    """Least, usual and largest for `rows`, each a number or three."""
    rows = (rows,) * 3 if isinstance(rows, int) else rows
    side = (side,) * 3 if isinstance(side, int) else side
    return {
        "sample": tuple((n, 4, s, s) for n, s in zip(rows, side, strict=True)),
        "timestep": tuple((n,) for n in rows),
        "encoder_hidden_states": tuple((n, 77, 64) for n in rows),
    }


def feeds(rows=2, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": rng.random(rows).astype(np.float32) * 999,
        "encoder_hidden_states": rng.standard_normal((rows, 77, 64)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return Bundle.open(bundle_of("pico"))


@pytest.fixture(scope="module")
def reference(bundle):
    return OnnxRuntimeEngine.load(bundle.root / "unet" / "model.onnx", threads=1)


@pytest.fixture
def unet(bundle, tmp_path, gpu):
    """Make an engine of the U-Net from plans: (shapes, options of `write_plan`)."""

    def make(*plans, **options):
        component = bundle.component("unet")
        model = bundle.root / "unet" / "model.onnx"
        made = [
            write_plan(tmp_path / "engines", "unet", model, part, name=f"p{i}", **others)
            for i, (part, others) in enumerate((plan if isinstance(plan, tuple) else (plan, {})) for plan in plans)
        ]
        return TensorRTEngine("unet", component.inputs, component.outputs, made, gpu, **options)

    return make


@pytest.fixture
def other(bundle, tmp_path):
    """The U-Net with other weights."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle.root / "unet" / "model.onnx")
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim == 4:
            weight.CopyFrom(numpy_helper.from_array(array * np.float32(0.5), weight.name))
    (tmp_path / "other").mkdir()
    onnx.save(model, tmp_path / "other" / "model.onnx")
    return tmp_path / "other" / "model.onnx"


def same(found, wanted):
    np.testing.assert_allclose(found["out_sample"], wanted["out_sample"], rtol=1e-5, atol=1e-5)


def test_an_engine_gives_what_onnx_runtime_gives(unet, reference, trt):
    engine = unet(shapes((1, 2, 4), (8, 8, 16)))
    assert [tensor.name for tensor in engine.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert engine.chosen is None and not trt.engines
    for given in (feeds(), feeds(3, 16, 1), feeds(seed=2)):
        same(engine(given), reference(given))
    assert len(trt.engines) == 1
    assert len(trt.contexts) == 2  # one for each set of shapes
    single = {**feeds(), "timestep": np.array([321], np.float32)}
    same(engine(single), reference(single))


@pytest.mark.parametrize("rtx", [True, False])
def test_contexts_are_made_as_each_module_has_them(unet, trt, monkeypatch, rtx, tmp_path, reference):
    trt.rtx = rtx
    if not rtx:
        monkeypatch.delattr(SimulatedTensorRT, "CudaGraphStrategy")
        monkeypatch.delattr(SimulatedTensorRT, "DynamicShapesKernelSpecializationStrategy")
    engine = unet((shapes(2), {"backend": "tensorrt-rtx" if rtx else "tensorrt"}))
    same(engine(feeds()), reference(feeds()))
    (context,) = trt.contexts
    if rtx:
        assert context.config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        assert context.config.dynamic_shapes_kernel_specialization_strategy == eager
    else:
        assert context.config is None
    assert bool(list(tmp_path.glob(f"engines/*/{CACHE_NAME}"))) == rtx


def test_wrong_inputs_are_named_before_a_plan_is_loaded(unet, trt):
    engine = unet(shapes(2))
    wrong = feeds()
    del wrong["timestep"]
    for call in (engine, engine.bind_host):
        with pytest.raises(EngineError, match=r"unet: inputs are .*; missing timestep"):
            call(wrong)
        with pytest.raises(EngineError, match="'sample' must be float32"):
            call({**feeds(), "sample": feeds()["sample"].astype(np.float64)})
        with pytest.raises(EngineError, match=r"unet: no plan takes sample 2x4x16x16.*built are: p0"):
            call(feeds(side=16))
    assert not trt.engines


def test_the_closest_plan_serves_a_static_one_first(unet, reference):
    engine = unet(shapes((1, 2, 4), (8, 16, 16)), shapes((1, 1, 4), (8, 8, 16)), shapes(2))
    for given, name in ((feeds(1), "p1"), (feeds(2), "p2"), (feeds(2, 16), "p0"), (feeds(4, 16), "p0")):
        same(engine(given), reference(given))
        assert engine.chosen.profile.name == name


def test_a_plan_for_more_rows_serves_fewer(unet, reference, trt):
    engine = unet(shapes(2), shapes(4))
    asked = {name: array.shape for name, array in feeds(1).items()}
    assert engine.padded_rows(asked) == 2
    assert engine.padded_rows({name: (3, *shape[1:]) for name, shape in asked.items()}) == 4
    assert engine.padded_rows({name: (5, *shape[1:]) for name, shape in asked.items()}) == 5  # none does
    for rows, name in ((1, "p0"), (3, "p1")):
        given = feeds(rows)
        found = engine(given)
        assert len(found["out_sample"]) == rows
        same(found, reference(given))
        bound = engine.bind_host(given)
        same(bound(), reference(given))
        given["sample"][...] = feeds(rows, seed=5)["sample"]
        same(bound("sample"), reference(given))
        assert engine.chosen.profile.name == name
    assert {run[1]["sample"][0] for run in trt.runs} == {2, 4}
    trt.runs.clear()
    same(engine(feeds(5)), reference(feeds(5)))  # more than any plan takes: in parts
    assert [run[1]["sample"][0] for run in trt.runs] == [4, 2]
    with pytest.raises(EngineError, match="no plan takes sample 5x4x8x8"):
        engine.bind_host(feeds(5))


def test_bound_arrays_are_sent_only_when_they_change(unet, reference, simulated_cuda):
    engine, given = unet(shapes(2)), feeds()
    bound = engine.bind_host(given)
    first = bound()
    same(first, reference(given))
    mallocs = simulated_cuda.calls["cudaMalloc"]
    simulated_cuda.copied.clear()
    given["sample"][...] = feeds(seed=3)["sample"]
    given["timestep"][...] = 17
    again = bound("sample", "timestep")
    assert again["out_sample"] is first["out_sample"]
    same(again, reference(given))
    assert simulated_cuda.copied["cudaMemcpyHostToDevice"] == given["sample"].nbytes + given["timestep"].nbytes
    given["encoder_hidden_states"][...] = 0
    wrong = bound("sample")["out_sample"].copy()  # it was not told of the change
    assert not np.allclose(wrong, reference(given)["out_sample"], atol=1e-3)
    assert simulated_cuda.calls["cudaMalloc"] == mallocs
    with pytest.raises(EngineError, match="contiguous"):
        engine.bind_host({**given, "sample": given["sample"].transpose(0, 1, 3, 2)})


def linked(engine, given):
    tensors = {name: engine.to_device(array) for name, array in given.items()}
    tensors["out_sample"] = engine.to_device(np.zeros_like(given["sample"]))
    return tensors, engine.bind_device(tensors)


def test_a_graph_gives_what_launches_one_by_one_give(unet, reference, simulated_cuda):
    engine, given = unet(shapes(2)), feeds()
    tensors, link = linked(engine, given)
    recorded = engine.capture(link)
    for seed in range(4):
        given = feeds(seed=seed)
        for name, array in given.items():
            tensors[name].update_inplace(array)
        recorded()
        same({"out_sample": tensors["out_sample"].numpy()}, reference(given))
    assert simulated_cuda.calls["cudaGraphLaunch"] == 3
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 1


def test_engines_share_one_arena_and_graphs_follow_when_it_moves(unet, reference, simulated_cuda, gpu):
    small, large = unet(shapes(2)), unet(shapes(2, 16))
    given = feeds()
    tensors, link = linked(small, given)
    recorded = small.capture(link)
    recorded()
    recorded()
    before = gpu.arena.generation, gpu.arena.size, simulated_cuda.used
    same(large(feeds(side=16)), reference(feeds(side=16)))
    assert gpu.arena.generation == before[0] + 1
    assert gpu.arena.size > before[1]
    for seed in range(3):
        tensors["sample"].update_inplace(feeds(seed=seed)["sample"])
        recorded()
        same({"out_sample": tensors["out_sample"].numpy()}, reference({**given, "sample": feeds(seed=seed)["sample"]}))
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2
    assert gpu.arena.generation == before[0] + 1


def test_a_module_that_counts_the_whole_profile_gets_its_memory(unet, reference, trt, gpu):
    trt.whole_profile = True
    engine = unet(shapes((1, 2, 8), (8, 8, 32)))
    same(engine(feeds()), reference(feeds()))
    (context,) = trt.contexts
    assert gpu.arena.size == context.engine.get_device_memory_size_for_profile_v2(0)


def test_two_shapes_in_turn(unet, reference, simulated_cuda, trt):
    engine = unet(shapes((1, 2, 4), (8, 8, 16)))
    links = {side: linked(engine, feeds(side=side)) for side in (8, 16)}
    recorded = {side: engine.capture(link) for side, (_, link) in links.items()}
    for turn in range(4):
        for side, (tensors, _) in links.items():
            given = feeds(side=side, seed=turn)
            for name, array in given.items():
                tensors[name].update_inplace(array)
            recorded[side]()
            same({"out_sample": tensors["out_sample"].numpy()}, reference(given))
    assert len(trt.contexts) == 2
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2


def test_links_are_checked(unet, gpu):
    engine = unet(shapes(2))
    tensors, _ = linked(engine, feeds())
    with pytest.raises(EngineError, match="nothing was bound to out_sample"):
        engine.bind_device({name: tensor for name, tensor in tensors.items() if name != "out_sample"})
    with pytest.raises(EngineError, match="'sample' must be float32"):
        engine.bind_device({**tensors, "sample": engine.to_device(np.zeros((2, 3, 8, 8), np.float32))})
    for wrong in (np.zeros((2, 4, 8, 9), np.float32), np.zeros((2, 4, 8, 8), np.float16)):
        with pytest.raises(
            EngineError, match=r"output 'out_sample' is float32 of shape \(2, 4, 8, 8\), what was bound"
        ):
            engine.bind_device({**tensors, "out_sample": engine.to_device(wrong)})
    with pytest.raises(EngineError, match="must lie on its GPU"):
        engine.bind_device({**tensors, "sample": Gpu().to_device(feeds()["sample"])})
    with pytest.raises(EngineError, match="no plan takes"):
        linked(engine, feeds(3))


def test_only_so_many_contexts_are_kept(unet, trt, monkeypatch, reference):
    monkeypatch.setattr(engine_module, "_MOST_CONTEXTS", 2)
    engine = unet(shapes((1, 2, 8), (8, 8, 16)))
    for rows, made in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):  # that of two rows was let go of
        same(engine(feeds(rows)), reference(feeds(rows)))
        assert len(trt.contexts) == made


def test_a_plan_that_does_not_load_says_for_what_it_was_built(unet):
    engine = unet((shapes(2), {"arch": "sm120"}))
    with pytest.raises(EngineError) as caught:
        engine(feeds())
    for part in (
        "unet",
        "unet-p0-0",
        "tensorrt-rtx 1.7.0 for sm120",
        "on Simulated GPU (sm89)",
        "plan file is for sm1",
    ):
        assert part in str(caught.value)
    for content, message in ((b"nonsense", "magicTag"), (b"", "cannot be read")):
        with pytest.raises(EngineError, match=message):
            unet((shapes(2), {"content": content}))(feeds())
    engine = unet(shapes(2))
    (engine._plans[0].folder / PLAN_NAME).write_bytes(b"changed")
    with pytest.raises(EngineError, match="is missing or was changed after it was built"):
        engine(feeds())


def test_a_plan_that_brings_its_own_runtime_may_run_it(unet, reference):
    same(unet((shapes(2), {"flags": ("version-compatible",)}))(feeds()), reference(feeds()))


def test_a_plan_of_other_tensors_is_refused(unet, bundle, tmp_path, gpu):
    engine = unet((shapes(2), {"dtypes": {"sample": "float16", "timestep": "bfloat16"}}))
    with pytest.raises(EngineError, match="the plan unet-p0-0 and the model do not agree on sample, timestep"):
        engine(feeds())
    part = shapes(2)
    del part["timestep"]
    with pytest.raises(EngineError, match="is of other inputs than the model"):
        unet(part)
    with pytest.raises(EngineError, match="no plan was built for it"):
        unet()


def test_what_was_compiled_for_the_gpu_is_kept_and_used(unet, trt, tmp_path, reference):
    first = unet(shapes((1, 2, 4)))
    first(feeds())
    (cache,) = tmp_path.glob(f"engines/*/{CACHE_NAME}")
    one = cache.read_bytes()
    first(feeds(3))
    two = cache.read_bytes()
    assert len(two) > len(one)
    assert trt.compiled == 2
    again = TensorRTEngine("unet", first.inputs, first.outputs, first._plans, first.gpu)
    for rows in (2, 3):
        same(again(feeds(rows)), reference(feeds(rows)))
    assert trt.compiled == 2
    assert [each._loaded["unet-p0-0"].cache_taken for each in (first, again)] == [False, True]
    assert [path.name for path in cache.parent.iterdir() if path.name.startswith(".")] == []
    cache.write_bytes(b"damaged")
    same(TensorRTEngine("unet", first.inputs, first.outputs, first._plans, first.gpu)(feeds()), reference(feeds()))
    assert cache.read_bytes() == one


def test_a_cache_that_cannot_be_written_is_no_error(unet, reference, monkeypatch):
    from diffoundry.engines.tensorrt import loaded

    def refuse(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(loaded, "replacing", refuse)
    same(unet(shapes(2))(feeds()), reference(feeds()))


def test_memory_for_weights_is_set_before_contexts_are_made(unet, trt, reference):
    plan = (shapes(2), {"flags": ("weight-streaming",)})
    for budget, found in ((None, 1 << 19), (1234, 1234), (1 << 40, 1 << 20)):
        same(unet(plan, weight_budget=budget)(feeds()), reference(feeds()))
        assert trt.engines[-1].weight_streaming_budget_v2 == found
    with pytest.raises(
        EngineError, match="-5 bytes cannot be the budget of its weights: the budget -5 is not possible"
    ):
        unet(plan, weight_budget=-5)(feeds())


def test_a_plan_without_weights_takes_them_of_the_model(unet, reference, bundle):
    plan = (shapes(2), {"flags": ("strip",)})
    with pytest.raises(EngineError, match="its plan holds no weights, and there is no ONNX model"):
        unet(plan)(feeds())
    path = bundle.root / "unet" / "model.onnx"
    same(unet(plan, onnx=path)(feeds()), reference(feeds()))
    with pytest.raises(EngineError, match=r"no.onnx, whose weights its plan is to have, is missing"):
        unet(plan, onnx=path.with_name("no.onnx"))(feeds())


def test_other_weights_are_taken_over(unet, reference, other, simulated_cuda):
    changed = OnnxRuntimeEngine.load(other, threads=1)(feeds())
    assert not np.allclose(changed["out_sample"], reference(feeds())["out_sample"], atol=1e-2)
    engine = unet((shapes(2), {"flags": ("refit",)}), (shapes(4), {"flags": ("refit", "strip")}), onnx=other)
    tensors, link = linked(engine, feeds())
    recorded = engine.capture(link)
    recorded()
    recorded()
    same({"out_sample": tensors["out_sample"].numpy()}, reference(feeds()))
    engine.refit(other)
    for _ in range(2):
        recorded()
        same({"out_sample": tensors["out_sample"].numpy()}, changed)
    assert simulated_cuda.calls["cudaGraphInstantiate"] == 2
    same(engine(feeds()), changed)
    same(engine(feeds(4)), OnnxRuntimeEngine.load(other, threads=1)(feeds(4)))
    fresh = unet((shapes(2), {"flags": ("refit",)}))  # refitted before it is loaded
    fresh.refit(other)
    same(fresh(feeds()), changed)


def test_weights_that_do_not_fit_are_named_and_the_engine_keeps_its_own(unet, reference, other, bundle):
    import onnx
    from onnx import numpy_helper

    engine = unet((shapes(2), {"flags": ("refit",)}))
    _, link = linked(engine, feeds())
    link()
    same(engine(feeds()), reference(feeds()))
    with pytest.raises(EngineError, match=r"lacks weights that its plan has: .* and \d+ more; is it another model"):
        engine.refit(bundle.root / "vae_decoder" / "model.onnx")
    with pytest.raises(EngineError, match="other weights were taken over in part"):
        link()
    same(engine(feeds()), reference(feeds()))
    model = onnx.load(other)
    weight = next(w for w in model.graph.initializer if len(w.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), weight.name))
    onnx.save(model, other)
    with pytest.raises(EngineError, match=re.escape(f"do not fit its plan: {weight.name} is of another shape")):
        engine.refit(other)
    same(engine(feeds()), reference(feeds()))
    with pytest.raises(EngineError, match="cannot take other weights: compile it with refit"):
        unet(shapes(2)).refit(other)


def test_a_failing_run_says_why(unet, trt):
    engine = unet(shapes(2))
    engine(feeds())
    trt.contexts[0].engine.onnx = None
    with pytest.raises(EngineError, match="unet: TensorRT did not run it: no weights"):
        engine(feeds())


def test_too_little_memory_is_told_and_leaves_nothing(unet, simulated_cuda, gpu):
    engine = unet(shapes((1, 2, 8)))
    engine(feeds())
    simulated_cuda.memory = simulated_cuda.used + 1000
    with pytest.raises(EngineError, match=r"out of GPU memory: .* of unet needs? .*: ask for a smaller size or batch"):
        engine(feeds(8))
    simulated_cuda.memory = 1 << 30
    engine(feeds(8))


def test_all_memory_is_given_back_at_once(unet, simulated_cuda, gpu):
    engine = unet(shapes((1, 2, 4)))
    gc.collect()
    gc.disable()
    try:
        engine(feeds())
        bound = engine.bind_host(feeds())
        bound()
        tensors, link = linked(engine, feeds(3))
        recorded = engine.capture(link)
        recorded()
        recorded()
        assert simulated_cuda.graphs
        del bound, tensors, link, recorded
        assert not simulated_cuda.graphs
        del engine
        assert simulated_cuda.used == gpu.arena.size
    finally:
        gc.enable()


def test_what_is_used_of_tensorrt_is_there(trt):
    real = pytest.importorskip("tensorrt_rtx")
    played = {
        "ICudaEngine": trt.engines,
        "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
        "Refitter": ("get_missing_weights", "refit_cuda_engine"),
        "OnnxParserRefitter": ("refit_from_file", "num_errors", "get_error"),
        "IRuntimeCache": ("serialize", "deserialize"),
        "IRuntimeConfig": (
            "set_execution_context_allocation_strategy",
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        ),
        "IExecutionContext": (
            "set_input_shape",
            "infer_shapes",
            "get_tensor_shape",
            "update_device_memory_size_for_shapes",
            "set_device_memory",
            "set_tensor_address",
            "execute_async_v3",
        ),
    }
    played["ICudaEngine"] = (
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_dtype",
        "create_runtime_config",
        "create_execution_context",
        "get_device_memory_size_for_profile_v2",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
        "get_weight_streaming_automatic_budget",
    )
    for owner, names in played.items():
        assert [name for name in names if not hasattr(getattr(real, owner), name)] == []
    for name in ("USER_MANAGED",):
        assert hasattr(real.ExecutionContextAllocationStrategy, name)
    assert hasattr(real.CudaGraphStrategy, "DISABLED")
    assert hasattr(real.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert real.ILogger.Severity.ERROR != real.ILogger.Severity.INFO
    assert real.nptype(real.DataType.INT64) == np.int64


def test_the_log_keeps_what_the_real_module_says():
    from diffoundry.engines.tensorrt.backend import Log

    real = pytest.importorskip("tensorrt_rtx")
    log = Log(real)
    assert real.Runtime(log.logger).deserialize_cuda_engine(b"nonsense" * 64) is None
    assert "Serialization" in log.why()
    assert log.why() == "it gave no reason"
