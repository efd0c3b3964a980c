"""The parts of eight bits, each against NumPy or ONNX Runtime."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from diffoundry.calibration.eightbit.conversion import Conversion, _is_scale
from diffoundry.calibration.eightbit.formats import FORMATS, Scale
from diffoundry.calibration.eightbit.histogram import BINS, count, divergence, noise, quantile, signal
from diffoundry.calibration.eightbit.layers import groups_of
from diffoundry.calibration.eightbit.search import FREE_SHARE, LEAST_SHARE, Probe, search, worth
from diffoundry.calibration.eightbit.smoothing import ALPHAS, factors_of, shifts, smooth
from diffoundry.calibration.eightbit.statistics import STRETCHES, Statistics
from diffoundry.calibration.eightbit.write import write
from diffoundry.calibration.graph import read
from diffoundry.calibration.sessions import start
from diffoundry.common.errors import DiffoundryError

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("name", list(FORMATS))
def test_rounding_is_that_of_onnx(name):
    form = FORMATS[name]
    kind = getattr(TensorProto, form.dtype)
    scale = np.float32(0.031)
    ties = (np.arange(-140, 140) + 0.5).astype(np.float32) * scale
    values = np.concatenate([ties, RNG.standard_normal(4000).astype(np.float32) * 3, np.zeros(1, np.float32)])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    weights = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [float(scale)]),
        helper.make_tensor("z", kind, [], b"\0", raw=True),
    ]
    x, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT, [None]) for each in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": values})[0]
    assert np.array_equal(form.rounded(values, scale), found)
    assert onnx.checker.check_model(model) is None


def test_a_histogram_tells_power_quantiles_and_what_rounding_loses():
    values = np.concatenate([RNG.standard_normal(60_000), 20 * RNG.standard_normal(50)]).astype(np.float32)
    counts = count(values)
    assert counts.shape == (BINS,) and counts.sum() == values.size
    assert signal(counts) == pytest.approx(np.sum(values.astype(np.float64) ** 2), rel=0.01)
    for share in (0.5, 0.999):
        assert quantile(counts, share) == pytest.approx(np.quantile(abs(values), share), rel=0.05)
    for scale in (0.02, 0.2):  # the second clips little and rounds much
        for form in FORMATS.values():
            error = form.rounded(values, scale).astype(np.float64) - values
            assert noise(counts, scale, form) == pytest.approx(np.sum(error**2), rel=0.05)
    limits = (1.0, 4.0, 60.0)
    found = [divergence(counts, limit) for limit in limits]
    assert min(found) == found[1]  # cutting half off, and wasting most levels, are both worse


def test_zeros_and_enormous_numbers_are_counted():
    counts = count(np.asarray([0.0, 1e-30, -1e30, 1.0], np.float32))
    assert counts[0] == 2 and counts[-1] == 1 and counts.sum() == 4
    assert quantile(np.zeros(BINS, np.int64), 0.5) == 0.0


def statistics():
    found = Statistics.empty("m" * 64, ["a", "b"])
    found.counts[0, 2] += count(RNG.standard_normal(100).astype(np.float32))
    found.high[0, 2], found.low[0, 2] = 3.0, -4.0
    found.sizes["layer"] = 12
    peaks = {"a": np.asarray([4.0, 3.0, 0.0], np.float32), "b": np.zeros(2, np.float32)}
    means = {"a": np.asarray([0.5, -1.0, 0.0], np.float32), "b": np.zeros(2, np.float32)}
    return replace(found, calls=3, peaks=peaks, means=means)


def test_statistics_are_kept_as_they_were(tmp_path):
    found = statistics()
    found.save(tmp_path / "s.npz")
    again = Statistics.load(tmp_path / "s.npz")
    assert (again.model, again.values, again.sizes) == (found.model, found.values, found.sizes)
    assert np.array_equal(again.counts, found.counts) and np.array_equal(again.low, found.low)
    assert again.largest() == {"a": 4.0, "b": 0.0}
    both = found.plus(found)
    assert both.counts.sum() == 2 * found.counts.sum() and both.largest() == found.largest()
    assert again.calls == 3 and all(np.array_equal(again.peaks[each], found.peaks[each]) for each in "ab")
    other = replace(found, calls=1, means={"a": np.asarray([2.5, 0.0, 4.0], np.float32), "b": np.ones(2, np.float32)})
    both = again.plus(other)
    assert both.calls == 4 and np.allclose(both.means["a"], [1.0, -0.75, 1.0]) and np.allclose(both.means["b"], 0.25)
    assert found.plus(Statistics.empty(found.model, found.values)).calls == 3
    first = (tmp_path / "s.npz").read_bytes()
    found.save(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == first


def _changed(path, **changes):
    with np.load(path) as found:
        arrays = {key: found[key] for key in found.files}
    head = json.loads(arrays["head"].tobytes()) | {k: v for k, v in changes.items() if k not in arrays}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez(path, **(arrays | {k: v for k, v in changes.items() if k in arrays}))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:400]),
    "empty": lambda path: path.write_bytes(b""),
    "an array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "no head": lambda path: zipfile.ZipFile(path, "w").close(),
    "another version": lambda path: _changed(path, revision=99),
    "ranges of another shape": lambda path: _changed(path, high=np.zeros((2, STRETCHES + 1), np.float32)),
    "ranges that are not finite": lambda path: _changed(path, high=np.full((2, STRETCHES), np.nan, np.float32)),
    "counts in floats": lambda path: _changed(path, counts=np.zeros((2, STRETCHES, 3), np.float32)),
    "bins beyond the last": lambda path: _changed(path, first=BINS),
    "channels of another number": lambda path: _changed(path, channels=np.zeros((2, 4), np.float32)),
    "channels of none": lambda path: _changed(path, channels=np.full((2, 5), np.inf, np.float32)),
    "values that are none": lambda path: _changed(path, values=7),
    "counts below zero": lambda path: _changed(path, counts=np.full((2, STRETCHES, 3), -1)),
    "a highest below the lowest": lambda path: _changed(path, high=np.full((2, STRETCHES), -1e9, np.float32)),
    "layers of no size": lambda path: _changed(path, sizes={"layer": 0}),
    "an array alone": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a text": lambda path: path.write_text("statistics"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(case, tmp_path):
    path = tmp_path / "s.npz"
    statistics().save(path)
    DAMAGES[case](path)
    with pytest.raises(
        DiffoundryError, match=r"is no calibration file of this version .*: leave it out, and it is"
    ) as e:
        Statistics.load(path)
    assert "pickle" not in str(e.value)


def test_records_that_an_earlier_run_left_are_believed_where_they_can_be(tmp_path):
    record, kept = tmp_path / "scales.json", Conversion._kept
    for found, whole in (
        ({"v": [0.5, "amax", 30.0]}, True),
        ({"v": "x"}, False),
        ({"v": [0.5, "amax"]}, False),
        ({"v": ["0.5", "amax", 30.0]}, False),
        ({"v": [-0.5, "amax", 30.0]}, False),
        (["v"], False),
    ):
        record.write_text(json.dumps({"key": "k", "found": found}))
        assert kept(record, "k", _is_scale) == (found if whole else None)
    assert kept(record, "another", _is_scale) is None


def drawn(good):
    """`quality` of a made-up model: within the budget where all of `good` are kept."""

    def quality(kept):
        flops = {f"v{i}": 1 for i in range(10)}
        share = 1 - sum(flops[value] for value in kept) / 10
        reached = 30.0 if set(good) <= set(kept) else 20.0
        return Probe(tuple(kept), share, reached >= 25.0, {"psnr_db": reached, "measured": reached})

    return quality


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 8, 9])
def test_the_search_keeps_no_more_than_the_budget_needs(needed):
    order = [f"v{i}" for i in range(10)]
    found, probes = search(order, dict.fromkeys(order, 1), dict.fromkeys(order, 1.0), drawn(order[:needed]))
    if needed <= 9 and 1 - needed / 10 >= LEAST_SHARE:
        assert found is not None and found.kept == tuple(order[:needed])
    assert len(probes) <= 8


def test_a_budget_that_cannot_be_met_is_told_with_the_best():
    order = [f"v{i}" for i in range(10)]
    found, probes = search(order, dict.fromkeys(order, 1), dict.fromkeys(order, 1.0), drawn(order))
    assert found is None and max(probe.figures["psnr_db"] for probe in probes) == 20.0


def test_what_gains_more_than_it_costs_stays_in_fp32():
    flops = {"out": 2, "in": 3, "shortcut": 10, "rest": 985}
    alone = {"out": 1e-3, "in": 5e-4, "shortcut": 1e-5, "rest": 1e-3}
    order = ["out", "in", "shortcut", "rest"]
    # 2.2 dB for 0.2 % and 1.7 dB for 0.3 %; then 0.04 dB for 1 %
    assert worth(order, flops, alone) == 2
    assert worth(order, flops, {**alone, "shortcut": 1e-3}) == 3
    large = {**flops, "in": 2 + 1000 * FREE_SHARE}
    assert worth(order, large, {**alone, "in": 1e-3}) == 1  # more than may stay, whatever it gains
    assert worth(["a"], {"a": 1}, {"a": 1.0}) == 0


def test_factors_take_from_a_channel_what_its_weights_lack():
    peaks, weights = np.asarray([1.0, 100.0, 0.0, 4.0], np.float32), np.asarray([1.0, 1.0, 1.0, 0.0], np.float32)
    for alpha in ALPHAS:
        found = factors_of(alpha, peaks, weights)
        assert found.dtype == np.float32 and np.isfinite(found).all() and (found > 0).all()
        # what is left of the range between two channels: as Xiao et al. have it, 100^(1 - α)
        assert found[1] * peaks[1] / (found[0] * peaks[0]) == pytest.approx(100 ** (1 - alpha), rel=1e-4)
    assert np.array_equal(factors_of(0.5, np.zeros(3, np.float32), np.ones(3, np.float32)), np.ones(3, np.float32))


def linear(folder, kind, outlier=60):
    """A model of one layer that reads a value with two channels of outliers; its weight and bias, and feeds."""
    rng = np.random.default_rng(3)
    spread = np.ones(32, np.float32)
    spread[[4, 17]] = outlier
    offset = rng.standard_normal(32).astype(np.float32) * spread
    weight, bias = rng.standard_normal((32, 24)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    weight /= spread[:, None]  # as in a trained model: what stands out is not what counts
    weights = {"w": weight.T.copy() if kind == "Gemm" else weight, "b": bias}
    nodes = [helper.make_node("Identity", ["x"], ["v"])]
    shape = ["n", 32]
    if kind == "Gemm":
        nodes.append(helper.make_node("Gemm", ["v", "w", "b"], ["y"], name="y", transB=1))
    elif kind == "MatMul":
        nodes += [helper.make_node("MatMul", ["v", "w"], ["m"], name="m"), helper.make_node("Add", ["b", "m"], ["y"])]
    else:
        weights = {"w": np.ascontiguousarray(weight.T.reshape(24, 32, 1, 1))}
        nodes.append(helper.make_node("Conv", ["v", "w"], ["y"], name="y"))
        shape = ["n", 32, 4, 4]
    tensors = [onnx.numpy_helper.from_array(each, name) for name, each in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:1], 24, *shape[2:]])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    (folder / "unet").mkdir()
    path = folder / "unet" / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    # weights in a file of their own, as those of large models are: they are mapped, and the map is closed
    beside = {"save_as_external_data": True, "location": "weights", "size_threshold": 0}
    onnx.save(onnx.shape_inference.infer_shapes(model), path, **beside)

    def draw():
        values = rng.standard_normal((200, 32)).astype(np.float32) * spread + offset
        return {"x": values if kind != "Conv" else np.tile(values[..., None, None], (1, 1, 4, 4))}

    return path, [draw() for _ in range(3)]


def observed(path, calls):
    """The statistics of one value from its calls."""
    groups = groups_of(read(path))
    axes = tuple(i for i in range(calls[0]["x"].ndim) if i != 1)
    peaks = np.max([np.abs(each["x"]).max(axis=axes) for each in calls], axis=0)
    means = np.mean([each["x"].mean(axis=axes) for each in calls], axis=0).astype(np.float32)
    empty = Statistics.empty("m" * 64, [group.value for group in groups])
    return groups, replace(empty, calls=len(calls), peaks={"v": peaks}, means={"v": means})


def outputs(path, calls):
    engine = start(read(path), path.parent, "unet", fast=False)
    return [engine(feeds)["y"] for feeds in calls]


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_smoothing_gains_where_a_few_channels_stand_out(kind, tmp_path):
    path, calls = linear(tmp_path, kind)
    groups, found = observed(path, calls)
    form = FORMATS["int8"]
    plain = {"v": Scale("v", float(found.peaks["v"].max() / 127), "amax", 0.0)}
    made = smooth(path, "unet", form, groups, plain, found, calls, lambda done, total: None)
    assert made["v"].method.startswith("smooth 0.") and made["v"].factors.shape == (32,)
    exact = outputs(path, calls)
    lost = {}
    for name, scales in (("plain", plain), ("smooth", made)):
        written = write(path, "unet", form, scales, ["v"], f"{name}.onnx")[0]
        onnx.checker.check_model(str(written), full_check=True)
        pairs = zip(outputs(written, calls), exact, strict=True)
        lost[name] = max(np.sum((a - b) ** 2) / np.sum(b**2) for a, b in pairs)
    assert lost["smooth"] < lost["plain"] / 2
    assert made["v"].loss_db == pytest.approx(-10 * np.log10(lost["smooth"]), abs=1.5)  # of some rows


def test_a_value_without_outliers_is_left_alone(tmp_path):
    path, calls = linear(tmp_path, "Gemm", outlier=1)
    calls = [{"x": RNG.uniform(-1, 1, (200, 32)).astype(np.float32)} for _ in calls]
    groups, found = observed(path, calls)
    plain = {"v": Scale("v", float(found.peaks["v"].max() / 127), "amax", 0.0)}
    assert smooth(path, "unet", FORMATS["int8"], groups, plain, found, calls, lambda *told: None) == plain


@pytest.mark.parametrize("kind", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize("form", list(FORMATS))
def test_shifts_put_the_mean_of_each_channel_back(kind, form, tmp_path):
    path, calls = linear(tmp_path, kind)
    groups, found = observed(path, calls)
    scales = {"v": Scale("v", float(found.peaks["v"].max() / FORMATS[form].largest), "amax", 0.0)}
    by = shifts(path, FORMATS[form], groups, scales, found)
    assert list(by) == [groups[0].layers[0].name]
    exact = np.concatenate(outputs(path, calls))
    off = {}
    for name, given in (("plain", None), ("shifted", by)):
        written = write(path, "unet", FORMATS[form], scales, ["v"], f"{name}.onnx", given)[0]
        onnx.checker.check_model(str(written), full_check=True)
        axes = tuple(i for i in range(exact.ndim) if i != 1)
        off[name] = np.abs((np.concatenate(outputs(written, calls)) - exact).mean(axis=axes))
    assert off["shifted"].mean() < off["plain"].mean() / 2
