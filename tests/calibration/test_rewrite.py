"""Converted and emulated graphs, ranges and losses, on small graphs made here."""

from __future__ import annotations

import errno

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffoundry.calibration import PRECISIONS, rewrite
from diffoundry.calibration.fp32_nodes import Fp32Nodes
from diffoundry.calibration.graph import castable, key, read, version_for
from diffoundry.calibration.losses import Trial, decibels, measure
from diffoundry.calibration.ranges import Ranges
from diffoundry.calibration.sessions import start
from diffoundry.common.errors import DiffoundryError
from diffoundry.engines.fusion import graph
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine

FP16, BF16 = PRECISIONS["fp16"], PRECISIONS["bf16"]
LOWEST = float(np.finfo(np.float32).min)


def save(path, nodes, inputs, outputs, weights=(), opset=20):
    """A model of `nodes`; inputs and outputs are (name, type, shape), weights (name, array)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def all_low(path, precision):
    model = read(path)
    return {key(node): bool(castable(node, version_for(model, precision), precision).outputs) for node in model.graph}


def emulate(path, precision, feeds, low=None):
    """What the converted model gives where a GPU computes it."""
    written = rewrite.write(path, "c", precision, low or all_low(path, precision))
    onnx.checker.check_model(str(written[0]), full_check=True)
    return start(rewrite.emulated(read(written[0]), precision), path.parent, "c")(feeds)


def fp32_nodes(path, precision, feeds, threshold=None, limit=None):
    ranges = Ranges(path, "c")
    ranges.engine(lambda *_: None)(feeds)
    found = Fp32Nodes(path, "c", precision, ranges.largest(), [feeds])
    return found, found.find(threshold or precision.threshold, limit or precision.limit)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), output.split(), name=f"n_{output.split()[0]}", **attributes)


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def masked(tmp_path):
    """Attention scores under a mask of the lowest float32, of infinity, and of what a graph computes."""

    def make(mask):
        weights = [("mask", np.where(np.tri(4, dtype=bool), np.float32(0), np.float32(mask)))]
        nodes = [node("MatMul", "x x", "scores"), node("Add", "scores mask", "sum"), node("Softmax", "sum", "y")]
        return save(tmp_path / "model.onnx", nodes, [("x", FLOAT, [4, 4])], [("y", FLOAT, [4, 4])], weights)

    return make


@pytest.mark.parametrize("precision", [FP16, BF16], ids=lambda precision: precision.name)
@pytest.mark.parametrize("mask", [LOWEST, -np.inf, -1e35], ids=["lowest", "infinity", "large"])
def test_masks_need_no_float32(masked, mask, precision):
    path = masked(mask)
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)}
    ranges = Ranges(path, "c")
    ranges.engine(lambda *_: None)(feeds)
    assert max(ranges.largest().values()) < 100
    measured, found = fp32_nodes(path, precision, feeds)
    assert found == []
    made = emulate(path, precision, feeds, measured.types(found))["y"]
    exact = OnnxRuntimeEngine.load(path)(feeds)["y"]
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made, exact, atol=0.02)
    assert not np.array_equal(made, exact)
    assert (made[exact == 0] == 0).all()


def test_a_row_that_is_masked_whole_stays_finite_where_float32_is(tmp_path):
    weights = [("mask", np.full((2, 2), LOWEST, np.float32))]
    nodes = [node("Add", "x mask", "sum"), node("Softmax", "sum", "y")]
    path = save(tmp_path / "model.onnx", nodes, [("x", FLOAT, [2, 2])], [("y", FLOAT, [2, 2])], weights)
    made = emulate(path, FP16, {"x": np.ones((2, 2), np.float32)})["y"]
    np.testing.assert_allclose(made, 0.5, atol=1e-3)


def test_a_value_above_half_of_the_largest_stays_in_float32(tmp_path):
    weights = [("w", np.float32([[100, 0], [0, 100]])), ("v", np.float32([[0.01, 0], [0, 0.01]]))]
    nodes = [
        node("Neg", "x", "a"),
        node("MatMul", "a w", "b"),
        node("Transpose", "b", "c"),
        node("MatMul", "c v", "d"),
        node("Neg", "d", "y"),
    ]
    path = save(tmp_path / "model.onnx", nodes, [("x", FLOAT, [2, 2])], [("y", FLOAT, [2, 2])], weights)
    for largest, expected in ((300, []), (330, ["b", "c", "d"])):
        feeds = {"x": np.float32([[largest, 1], [2, 3]])}
        measured, found = fp32_nodes(path, FP16, feeds)
        assert [each.node for each in found if each.reason == "range"] == expected
    assert all(each.measured == pytest.approx(33000, rel=1e-3) for each in found if each.reason == "range")
    assert [each.node for each in found if each.reason == "isolated"] == ["a", "y"]
    assert fp32_nodes(path, BF16, feeds)[1] == []
    feeds = {"x": np.float32([[700, 1], [2, 3]])}
    assert not np.isfinite(emulate(path, FP16, feeds)["y"]).all()
    np.testing.assert_allclose(emulate(path, FP16, feeds, measured.types(found))["y"], feeds["x"].T, rtol=1e-3)


def test_weights_that_vanish_are_a_loss(tmp_path):
    rng = np.random.default_rng(0)
    weights = [("w", (rng.standard_normal((8, 8)) * 1e-7).astype(np.float32)), ("s", np.float32(1e7))]
    nodes = [node("MatMul", "x w", "a"), node("Mul", "a s", "b"), node("MatMul", "b b", "y")]
    path = save(tmp_path / "model.onnx", nodes, [("x", FLOAT, [8, 8])], [("y", FLOAT, [8, 8])], weights)
    feeds = {"x": rng.standard_normal((8, 8)).astype(np.float32)}
    measured, found = fp32_nodes(path, FP16, feeds)
    assert {each.node: each.reason for each in found} == {"a": "loss", "b": "range"}
    assert fp32_nodes(path, BF16, feeds)[1] == []
    exact = OnnxRuntimeEngine.load(path)(feeds)["y"]
    made = emulate(path, FP16, feeds, measured.types(found))["y"]
    assert np.abs(made - exact).max() < 0.01 * np.abs(exact).max()


@pytest.fixture
def wave(tmp_path):
    """An embedding of timesteps, as far from the sine as a shape and a scale."""
    weights = [("axis", np.int64([1])), ("f", (1000.0 ** -(np.arange(8) / 8)).astype(np.float32)[None])]
    weights += [("w", np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32))]
    nodes = [
        node("Unsqueeze", "t axis", "u"),
        node("Mul", "u f", "m"),
        node("Sin", "m", "s"),
        node("MatMul", "s w", "y"),
    ]
    return save(tmp_path / "model.onnx", nodes, [("t", FLOAT, ["n"])], [("y", FLOAT, ["n", 8])], weights)


@pytest.mark.parametrize("precision", [FP16, BF16], ids=lambda precision: precision.name)
def test_what_a_lossy_node_reads_is_kept_as_far_back_as_it_matters(wave, precision):
    feeds = {"t": np.float32([999, 723.5, 481.25, 7])}
    measured, found = fp32_nodes(wave, precision, feeds)
    assert [each.node for each in found] == ["u", "m", "s"]
    assert found[-1].reason == "loss" and found[-1].measured < precision.threshold
    assert [each.of for each in found[:2] if each.reason == "feeds_sensitive"] == ["s"] * sum(
        e.reason == "feeds_sensitive" for e in found
    )
    exact = OnnxRuntimeEngine.load(wave)(feeds)["y"]
    bare, kept = (
        np.square(emulate(wave, precision, feeds, low)["y"] - exact).sum() for low in (None, measured.types(found))
    )
    assert kept < bare / 100


def test_an_island_grows_over_what_would_not_join_it(tmp_path):
    weights = [("f", (1000.0 ** -(np.arange(8) / 8)).astype(np.float32)[None]), ("w", np.eye(8, dtype=np.float32))]
    nodes = [node("Neg", "t", "u"), node("MatMul", "u f", "m"), node("Sin", "m", "s"), node("MatMul", "s w", "y")]
    path = save(tmp_path / "model.onnx", nodes, [("t", FLOAT, [4, 1])], [("y", FLOAT, [4, 8])], weights)
    _, found = fp32_nodes(path, FP16, {"t": np.float32([[999], [724], [481], [7]])})
    assert {each.node: each.reason for each in found} == {"u": "isolated", "m": "feeds_sensitive", "s": "loss"}
    assert found[1].of == "s" and found[1].measured == found[2].measured < 50
    _, found = fp32_nodes(path, FP16, {"t": np.float32([[999.3], [723.5], [481.2], [7.1]])})
    assert {each.node: each.reason for each in found} == {"u": "feeds_sensitive", "m": "feeds_sensitive", "s": "loss"}


def test_a_higher_threshold_keeps_more(wave):
    feeds = {"t": np.float32([999, 723.5, 481.25, 7])}
    assert "y" in [each.node for each in fp32_nodes(wave, FP16, feeds, threshold=90)[1]]
    assert fp32_nodes(wave, FP16, feeds, threshold=-100)[1] == []


def test_the_loss_is_that_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16)).astype(np.float32)
    path = save(
        tmp_path / "model.onnx",
        [node("MatMul", "x w", "y")],
        [("x", FLOAT, [4, 16])],
        [("y", FLOAT, [4, 16])],
        [("w", weight)],
    )
    feeds = {"x": rng.standard_normal((4, 16)).astype(np.float32)}
    exact = feeds["x"].astype(np.float64) @ weight.astype(np.float64)
    rough = feeds["x"].astype(np.float16).astype(np.float64) @ weight.astype(np.float16).astype(np.float64)
    expected = 10 * np.log10(np.square(exact).sum() / np.square(exact - rough).sum())
    (low, kept) = measure(path, "c", FP16, [Trial("y"), Trial("y", frozenset("y"))], [feeds])
    assert low == pytest.approx(expected, abs=0.1)
    assert kept > 140, "x comes from outside the graph in float32"


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100, 1, 20), (1, 100, -20), (1, 0, 200), (0, 0, 200), (0, 1, -200), (1, np.inf, -200), (1, np.nan, -200)],
)
def test_decibels(signal, noise, expected):
    assert decibels(signal, noise) == pytest.approx(expected)


@pytest.fixture
def mixed(tmp_path):
    """Operators with inputs that stay float32, without a lower form, and that make floats of whole numbers."""
    nodes = [
        node("Constant", "", "c", value=numpy_helper.from_array(np.float32([0.1, 0.2]), "c")),
        node("Resize", "x  scales", "r", mode="nearest"),
        node("Range", "zero two one", "a"),
        node("Cast", "k", "k1", to=FLOAT),
        node("ConstantOfShape", "shape", "o", value=numpy_helper.from_array(np.float32([0.3]), "v")),
        node("Add", "r k1", "s"),
        node("Mul", "s o", "p"),
        node("Less", "p c", "l"),
        node("Where", "l p a", "z"),
        node("Shape", "z", "n"),
        node("Add", "z c", "y"),
    ]
    nodes[1].ClearField("input")
    nodes[1].input.extend(["x", "", "scales"])
    weights = [("scales", np.float32([1, 2])), ("shape", np.int64([1]))]
    weights += [("zero", np.float32(0)), ("two", np.float32(2)), ("one", np.float32(1))]
    inputs = [("x", FLOAT, ["b", 1]), ("k", INT64, [1])]
    outputs = [("y", FLOAT, ["b", 2]), ("n", INT64, [2]), ("p", FLOAT, ["b", 2])]
    return save(tmp_path / "model.onnx", nodes, inputs, outputs, weights)


@pytest.mark.parametrize("precision", [FP16, BF16], ids=lambda precision: precision.name)
def test_every_kind_of_node_finds_its_types(mixed, precision):
    feeds = {"x": np.float32([[0.7], [-0.9]]), "k": np.int64([1])}
    made = emulate(mixed, precision, feeds)
    exact = OnnxRuntimeEngine.load(mixed)(feeds)
    for name in ("y", "p"):
        np.testing.assert_allclose(made[name], exact[name], atol=0.01)
        assert not np.array_equal(made[name], exact[name]), "nothing was rounded"
        assert made[name].dtype == np.float32
    np.testing.assert_array_equal(made["n"], exact["n"])
    graph = onnx.load(mixed.with_name(f"{precision.name}.onnx")).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in graph.value_info}
    kind = getattr(TensorProto, precision.dtype)
    assert {name: kinds[name] == kind for name in ("r", "a", "k1", "o", "s", "z")} == {
        "r": True,
        "a": False,
        "k1": True,
        "o": True,
        "s": True,
        "z": True,
    }
    assert {tensor.name: tensor.data_type for tensor in graph.initializer}["scales"] == FLOAT


def test_a_comparison_reads_the_type_that_is_there(mixed):
    for low, casts in ((False, 1), (True, 5)):
        kinds = {name: low and possible for name, possible in all_low(mixed, FP16).items()}
        (written,) = rewrite.write(mixed, "c", FP16, {**kinds, "a": False})
        graph = onnx.load(written).graph
        assert sum(each.op_type == "Cast" for each in graph.node) == casts
        (less,) = [each for each in graph.node if each.op_type == "Less"]
        assert [name.endswith(":fp16") for name in less.input] == [low, low]


def test_a_weight_that_both_types_read_is_kept_in_both(tmp_path):
    nodes = [node("Mul", "x w", "a"), node("Mul", "a w", "y")]
    path = save(
        tmp_path / "model.onnx", nodes, [("x", FLOAT, [2])], [("y", FLOAT, [2])], [("w", np.float32([0.1, 0.2]))]
    )
    (written,) = rewrite.write(path, "c", FP16, {"a": True, "y": False})
    graph = onnx.load(written).graph
    assert sorted(tensor.data_type for tensor in graph.initializer) == [FLOAT, TensorProto.FLOAT16]
    (written,) = rewrite.write(path, "c", FP16, {"a": True, "y": True})
    assert [tensor.data_type for tensor in onnx.load(written).graph.initializer] == [TensorProto.FLOAT16]


def test_one_cast_serves_all_readers(tmp_path):
    nodes = [node("Mul", "x x", "a"), node("Add", "x a", "b"), node("Sub", "a b", "c"), node("Sub", "b a", "d")]
    outputs = [("c", FLOAT, [2]), ("d", FLOAT, [2])]
    path = save(tmp_path / "model.onnx", nodes, [("x", FLOAT, [2])], outputs)
    (written,) = rewrite.write(path, "c", FP16, {"a": True, "b": True, "c": False, "d": False})
    casts = [each.input[0] for each in onnx.load(written).graph.node if each.op_type == "Cast"]
    assert sorted(casts) == ["a", "b", "x"]


def test_large_weights_go_beside_the_graph(tmp_path, monkeypatch):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    path = save(
        tmp_path / "model.onnx",
        [node("MatMul", "x w", "y")],
        [("x", FLOAT, [1, 64])],
        [("y", FLOAT, [1, 64])],
        [("w", weight)],
    )
    feeds = {"x": np.ones((1, 64), np.float32)}
    inline = emulate(path, FP16, feeds)["y"]
    monkeypatch.setattr(graph, "_EXTERNAL_FROM_BYTES", 1024)
    written = rewrite.write(path, "c", FP16, {"y": True})
    assert [each.name for each in written] == ["fp16.onnx", "fp16.onnx_data"]
    assert written[1].stat().st_size >= 64 * 64 * 2
    assert written[0].stat().st_size < 4096
    before = [each.read_bytes() for each in written]
    np.testing.assert_array_equal(emulate(path, FP16, feeds)["y"], inline)
    assert [each.read_bytes() for each in written] == before
    monkeypatch.setattr(graph, "_EXTERNAL_FROM_BYTES", 1 << 20)
    assert [each.name for each in rewrite.write(path, "c", FP16, {"y": True})] == ["fp16.onnx"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fp16.onnx", "model.onnx"]


def test_a_source_with_weights_beside_it_is_read(tmp_path):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    path = save(
        tmp_path / "model.onnx",
        [node("MatMul", "x w", "y")],
        [("x", FLOAT, [1, 64])],
        [("y", FLOAT, [1, 64])],
        [("w", weight)],
    )
    feeds = {"x": np.ones((1, 64), np.float32)}
    inline = emulate(path, BF16, feeds)["y"], fp32_nodes(path, BF16, feeds, threshold=90)[1]
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert path.stat().st_size < 4096
    (tmp_path / "linked").hardlink_to(tmp_path / "model.onnx_data")  # as the old bundle of one that is made anew
    np.testing.assert_array_equal(emulate(path, BF16, feeds)["y"], inline[0])
    assert fp32_nodes(path, BF16, feeds, threshold=90)[1] == inline[1] != []


def test_a_full_disk_leaves_what_was_there(wave, monkeypatch):
    (written,) = rewrite.write(wave, "c", FP16, all_low(wave, FP16))
    before = written.read_bytes()

    def full(model, path, external_data=None):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(DiffoundryError, match="no space left to write"):
        rewrite.write(wave, "c", FP16, dict.fromkeys(all_low(wave, FP16), False))
    assert written.read_bytes() == before
    assert sorted(each.name for each in wave.parent.iterdir()) == ["fp16.onnx", "model.onnx"]


def test_an_operator_that_changed_its_meaning_is_refused_in_bf16(tmp_path):
    weights = [("s", np.ones(2, np.float32)), ("b", np.zeros(2, np.float32))]
    nodes = [node("GroupNormalization", "x s b", "y", num_groups=2)]
    shape = [1, 4, 2, 2]
    path = save(tmp_path / "model.onnx", nodes, [("x", FLOAT, shape)], [("y", FLOAT, shape)], weights)
    with pytest.raises(DiffoundryError, match="c: the operator GroupNormalization means something else in opset 22"):
        rewrite.write(path, "c", BF16, {"y": True})
    assert rewrite.write(path, "c", FP16, {"y": True})


def test_control_flow_is_refused(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", FLOAT, [1])]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    inputs = [("x", FLOAT, [1]), ("c", TensorProto.BOOL, [])]
    path = save(tmp_path / "model.onnx", nodes, inputs, [("y", FLOAT, [1])])
    with pytest.raises(DiffoundryError, match="control flow"):
        read(path)


def test_types_that_the_file_does_not_tell_are_inferred(wave):
    model = onnx.load(wave)
    del model.graph.value_info[:]
    onnx.save(model, wave)
    assert all_low(wave, FP16) == {"u": True, "m": True, "s": True, "y": True}


def test_weights_stored_in_half_precision_are_read_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    half = {name: rng.standard_normal((64, 64)).astype(np.float16) for name in ("w", "v")}
    products = [node("MatMul", "x w_float", "a"), node("MatMul", "a v_float", "y")]
    casts = [node("Cast", name, f"{name}_float", to=FLOAT) for name in half]
    ends = [("x", FLOAT, [1, 64])], [("y", FLOAT, [1, 64])]
    path = save(tmp_path / "model.onnx", casts + products, *ends, half.items())
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    wide = [(f"{name}_float", array.astype(np.float32)) for name, array in half.items()]
    (tmp_path / "wide").mkdir()
    full = save(tmp_path / "wide/model.onnx", products, *ends, wide)
    feeds = {"x": rng.standard_normal((1, 64)).astype(np.float32)}
    for precision in (FP16, BF16):
        assert all_low(path, precision) == {"w_float": False, "v_float": False} | all_low(full, precision)
        found = [fp32_nodes(each, precision, feeds, threshold=90)[1] for each in (path, full)]
        assert found[0] == found[1] != []
        low = {"a": True, "y": False}
        np.testing.assert_array_equal(
            emulate(path, precision, feeds, low)["y"], emulate(full, precision, feeds, low)["y"]
        )
    written = rewrite.write(path, "c", FP16, {"a": True, "y": False})
    assert [each.name for each in written] == ["fp16.onnx", "model.onnx_data"]
    graph = onnx.load(written[0]).graph
    assert [each.name for each in graph.initializer] == ["w", "v"]
    weights = {each.input[1] for each in graph.node if each.op_type == "MatMul"}
    assert weights == {"w", "v_float"}  # the one in float32 is cast as before
