"""The parts of eight bits, each against NumPy or ONNX Runtime."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from diffoundry.calibration.eightbit.formats import FORMATS
from diffoundry.calibration.eightbit.histogram import BINS, count, divergence, noise, quantile, signal
from diffoundry.calibration.eightbit.search import LEAST_SHARE, Probe, search
from diffoundry.calibration.eightbit.statistics import STRETCHES, Statistics
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
    return found


def test_statistics_are_kept_as_they_were(tmp_path):
    found = statistics()
    found.save(tmp_path / "s.npz")
    again = Statistics.load(tmp_path / "s.npz")
    assert (again.model, again.values, again.sizes) == (found.model, found.values, found.sizes)
    assert np.array_equal(again.counts, found.counts) and np.array_equal(again.low, found.low)
    assert again.largest() == {"a": 4.0, "b": 0.0}
    both = found.plus(found)
    assert both.counts.sum() == 2 * found.counts.sum() and both.largest() == found.largest()
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
    "values that are none": lambda path: _changed(path, values=7),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(case, tmp_path):
    path = tmp_path / "s.npz"
    statistics().save(path)
    DAMAGES[case](path)
    with pytest.raises(DiffoundryError, match="is no calibration file of this version of diffoundry"):
        Statistics.load(path)


def drawn(good):
    """`quality` of a made-up model: within the budget where all of `good` are kept."""

    def quality(kept):
        flops = {f"v{i}": 1 for i in range(10)}
        share = 1 - sum(flops[value] for value in kept) / 10
        return Probe(tuple(kept), share, 30.0 if set(good) <= set(kept) else 20.0, 10.0, {})

    return quality


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 8, 9])
def test_the_search_keeps_no_more_than_the_budget_needs(needed):
    order = [f"v{i}" for i in range(10)]
    found, probes = search(order, dict.fromkeys(order, 1), drawn(order[:needed]), 25.0)
    if needed <= 9 and 1 - needed / 10 >= LEAST_SHARE:
        assert found is not None and found.kept == tuple(order[:needed])
    assert len(probes) <= 8


def test_a_budget_that_cannot_be_met_is_told_with_the_best():
    order = [f"v{i}" for i in range(10)]
    found, probes = search(order, dict.fromkeys(order, 1), drawn(order), 25.0)
    assert found is None and max(probe.psnr_db for probe in probes) == 20.0
