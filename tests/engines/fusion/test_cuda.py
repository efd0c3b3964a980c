"""The graphs for ONNX Runtime's CUDA provider: what they are made of, and that they compute the same.

No GPU is asked: operators that the CPU lacks are written out in the standard's. Which kernels there are on CUDA was
read from the symbols of `onnxruntime_gpu-1.31.1`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import parser, save
from onnx_ir.passes.common import ShapeInferencePass

from diffoundry.bundle import Bundle
from diffoundry.bundle.reports import read_report
from diffoundry.calibration.build import build
from diffoundry.calibration.fusion import _engine
from diffoundry.engines.fusion.cuda import fuse_for_cuda
from diffoundry.engines.fusion.graph import DOMAIN, open_model
from diffoundry.engines.fusion.linear import SPLIT_GELU_WIDTHS
from diffoundry.tests.engines.fusion.kernels import HALF, KERNELS

LACKED = ("NhwcConv", "GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "BiasAdd")
"""What the CPU has no kernels for."""


def operators(report):
    return report["operators"]["before"], report["operators"]["after"]


@pytest.fixture(scope="module", params=["pico", "sd15-small", "sdxl-small"])
def built(request, bundle_of, tmp_path_factory):
    """Bundles of each topology with their graphs for CUDA in fp32, which `build` has held against torch."""
    folder = tmp_path_factory.mktemp("built")
    build(shutil.copytree(bundle_of(request.param), folder / "a.bundle"), engine="onnxruntime:cuda")
    return request.param, Bundle.open(folder / "a.bundle")


def test_attention_norms_and_convolutions_are_one_operator_each(built):
    name, bundle = built
    report = read_report(bundle, "fusion")["fp32/onnxruntime:cuda"]
    assert set(report) == {n for n, part in bundle.manifest.components.items() if part.role != "step"}
    for component, part in report.items():
        before, after = operators(part)
        odd = 11 if (name, component) == ("pico", "unet") else 0  # its narrowest layers have three channels a group
        assert after.get("MultiHeadAttention", 0) == before.get("Softmax", 0) and "Softmax" not in after
        norms = after.get("GroupNorm", 0) + after.get("SkipGroupNorm", 0)
        assert norms == before.get("InstanceNormalization", 0) - odd
        assert after.get("NhwcConv", 0) == before.get("Conv", 0) and "Conv" not in after
        layers = after.get("LayerNormalization", 0) + after.get("SkipLayerNormalization", 0)
        assert layers == before.get("LayerNormalization", 0)
        if not odd:
            assert after.get("Transpose", 0) <= (5 if component == "unet" else 2)
            assert after.get("SkipGroupNorm", 0) >= before.get("InstanceNormalization", 0) // 5
        assert part["max_abs_error"] <= part["allowed"] / 2


def test_every_float_is_made_by_a_kernel_that_cuda_has(built):
    _, bundle = built
    for path in bundle.root.glob("*/fp32.cuda*.onnx"):
        for node in open_model(path).graph:
            made = {value.dtype.name for value in node.outputs if value.name and value.dtype is not None} & HALF
            if node.op_type == "ArgMax":
                made = {node.inputs[0].dtype.name}
            assert made <= KERNELS.get(node.op_type, set()), f"{path.parent.name}: {node.op_type} {made}"


def test_onnx_runtime_takes_every_operator_with_its_types_and_attributes(built):
    """It lacks kernels on this machine, and says that of a graph that is right in all else."""
    _, bundle = built
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for path in bundle.root.glob("*/fp32.cuda*.onnx"):
        if any(node.op_type in LACKED for node in open_model(path).graph):
            with pytest.raises(Exception, match=r"NOT_IMPLEMENTED : .*(NhwcConv|GroupNorm|BiasSplitGelu|BiasAdd)"):
                ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        else:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_the_prompts_part_is_cut_off_and_no_size_crosses(built):
    _, bundle = built
    variant = bundle.component("unet").variants["fp32/onnxruntime:cuda"]
    part, rest = (open_model(bundle.path(path)).graph for path in (variant.per_prompt, variant.model))
    made = {value.name for value in part.outputs}
    assert made and made <= {value.name for value in rest.inputs}
    assert {value.dtype.name for value in part.outputs} == {"FLOAT"}
    assert "encoder_hidden_states" not in {value.name for value in rest.inputs}


def fused(folder, text, per_prompt=()):
    """The kinds of nodes of a graph before and after, and the engines that run it."""
    save(parser.parse_model(text), folder / "model.onnx")
    model = onnx_ir.load(folder / "model.onnx")
    for value in (v for node in model.graph for v in node.outputs):
        assert value.name
    model = ShapeInferencePass()(model).model
    onnx_ir.save(model, folder / "model.onnx")
    whole, _ = fuse_for_cuda(folder / "model.onnx", per_prompt)
    options = ort.SessionOptions()
    plain = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in open_model(whole[0]).graph]
    return kinds, lambda feeds: plain.run(None, feeds)[0], _engine("test", "fp32", whole[0])


def same(run, engine, feeds, atol=1e-5):
    (made,) = engine(feeds).values()
    np.testing.assert_allclose(made, run(feeds), atol=atol)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ones(name, *shape):
    """A constant of the parser's text, of numbers that differ."""
    numbers = ", ".join(f"{0.5 + 0.01 * (i % 37):.2f}" for i in range(int(np.prod(shape))))
    return f"float[{','.join(map(str, shape))}] {name} = {{{numbers}}}"


@pytest.mark.parametrize(("width", "one"), [(SPLIT_GELU_WIDTHS[0], True), (16, False)])
def test_geglu_is_one_operator_at_the_widths_that_have_kernels(tmp_path, width, one):
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[B, S, 2] x) => (float[B, S, {width}] y)
        <{ones("w", 2, 2 * width)}, {ones("b", 2 * width)}>
        {{
            product = MatMul(x, w)
            biased = Add(product, b)
            left, right = Split<axis = -1, num_outputs = 2>(biased)
            active = Gelu(right)
            y = Mul(left, active)
        }}
    """
    kinds, run, engine = fused(tmp_path, text)
    assert ("BiasSplitGelu" in kinds) == one and ("Gelu" in kinds) != one
    same(run, engine, {"x": random(2, 3, 2)}, atol=1e-4)


NORM = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B, {c}, H, W] x, float[B, {c}, H, W] r) => (float[B, {c}, H, W] y, float[B, {c}, H, W] total)
    <int64[3] grouped = {{0, {g}, -1}}, {ones}, {zeros}, {gamma}, {beta}>
    {{
        total = Add(x, r)
        split = Reshape(total, grouped)
        normed = InstanceNormalization<epsilon = 0.001>(split, one, zero)
        sizes = Shape(total)
        whole = Reshape(normed, sizes)
        scaled = Mul(whole, gamma)
        y = Add(scaled, beta)
    }}
"""


@pytest.mark.parametrize(("channels", "groups", "one"), [(8, 4, True), (12, 4, False), (9, 3, False)])
def test_a_norm_that_the_kernel_does_not_take_stays(tmp_path, channels, groups, one):
    text = NORM.format(
        c=channels,
        g=groups,
        ones=f"float[{groups}] one = {{{', '.join(['1.0'] * groups)}}}",
        zeros=f"float[{groups}] zero = {{{', '.join(['0.0'] * groups)}}}",
        gamma=ones("gamma", channels, 1, 1),
        beta=ones("beta", channels, 1, 1),
    )
    kinds, run, engine = fused(tmp_path, text)
    assert ("SkipGroupNorm" in kinds) == one and ("InstanceNormalization" in kinds) != one
    feeds = {"x": random(2, channels, 4, 6), "r": random(2, channels, 4, 6, seed=1)}
    made = engine(feeds)
    np.testing.assert_allclose(made["y"], run(feeds), atol=1e-5)
    np.testing.assert_allclose(made["total"], feeds["x"] + feeds["r"], atol=1e-6)


def test_a_norm_with_other_weights_inside_is_no_group_norm(tmp_path):
    text = NORM.format(
        c=4,
        g=2,
        ones="float[2] one = {1.0, 2.0}",
        zeros="float[2] zero = {0.0, 0.0}",
        gamma=ones("gamma", 4, 1, 1),
        beta=ones("beta", 4, 1, 1),
    )
    kinds, run, engine = fused(tmp_path, text)
    assert "InstanceNormalization" in kinds
    feeds = {"x": random(1, 4, 2, 2), "r": random(1, 4, 2, 2, seed=1)}
    np.testing.assert_allclose(engine(feeds)["y"], run(feeds), atol=1e-5)


CONV = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B, 2, H, W] x, float[B, 4] t) => (float[B, C, H2, W2] y)
    <{w}, {b}, int64[2] behind = {{2, 3}}, float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, {half}>
    {{
        made = Conv<pads = {pads}, strides = {strides}>(x, w, b)
        wide = Unsqueeze(t, behind)
        moved = Add(made, wide)
        halved = Mul(moved, half)
        larger = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (halved, , scales)
        y = Concat<axis = 1>(larger, larger)
    }}
"""


@pytest.mark.parametrize(
    ("pads", "strides"),
    [([1, 1, 1, 1], [1, 1]), ([0, 0, 1, 1], [2, 2]), ([0, 1, 0, 1], [1, 1]), ([0, 0, 0, 0], [1, 1])],
)
def test_feature_maps_have_their_channels_last_from_end_to_end(tmp_path, pads, strides):
    text = CONV.format(w=ones("w", 4, 2, 3, 3), b=ones("b", 4), half=ones("half", 4, 1, 1), pads=pads, strides=strides)
    kinds, run, engine = fused(tmp_path, text)
    assert kinds.count("Transpose") == 2 and "NhwcConv" in kinds
    assert ("Pad" in kinds) == (pads[:2] != pads[2:])
    same(run, engine, {"x": random(2, 2, 6, 8), "t": random(2, 4, seed=1)}, atol=1e-4)


def test_a_grouped_convolution_stays_as_it_is(tmp_path):
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[B, 4, H, W] x) => (float[B, 4, H2, W2] y) <{ones("w", 4, 2, 3, 3)}>
        {{
            y = Conv<group = 2>(x, w)
        }}
    """
    kinds, run, engine = fused(tmp_path, text)
    assert kinds == ["Conv"]
    same(run, engine, {"x": random(1, 4, 5, 5)})


ATTENTION = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v{more}) => (float[B, S, 8] out)
    <int64[4] split = {{0, -1, 2, 4}}, int64[3] merged = {{0, -1, 8}}, float half = {{0.3}}{constants}>
    {{
        {mask}
        q4 = Reshape(q, split)
        k4 = Reshape(k, split)
        v4 = Reshape(v, split)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)
        kt = Transpose<perm = [0, 2, 3, 1]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        qs = Mul(qt, half)
        scores = MatMul(qs, kt)
        hidden = Add(scores, mask)
        weights = Softmax<axis = -1>(hidden)
        mixed = MatMul(weights, vt)
        back = Transpose<perm = [0, 2, 1, 3]>(mixed)
        out = Reshape(back, merged)
    }}
"""
CAUSAL = """
        size = Shape<start = 1, end = 2>(q)
        length = Squeeze(size)
        places = Range(zero, length, one)
        rows = Unsqueeze(places, last)
        seen = LessOrEqual(places, rows)
        mask = Where(seen, nothing, {hidden})
"""
NUMBERS = ", int64 zero = {0}, int64 one = {1}, int64[1] last = {1}, float nothing = {0.0}, float low = {-30000.0}"


def test_a_causal_mask_becomes_an_attribute(tmp_path):
    text = ATTENTION.format(more="", constants=NUMBERS, mask=CAUSAL.format(hidden="low"))
    kinds, run, engine = fused(tmp_path, text)
    assert kinds == ["MultiHeadAttention"]
    same(run, engine, {n: random(2, 5, 8, seed=i) for i, n in enumerate("qkv")})


def test_a_mask_of_another_kind_is_given_to_the_operator(tmp_path):
    barely = NUMBERS.replace("-30000.0", "-2.0")
    text = ATTENTION.format(more="", constants=barely, mask=CAUSAL.format(hidden="low"))
    kinds, run, engine = fused(tmp_path, text)
    assert "MultiHeadAttention" in kinds and "Where" in kinds
    same(run, engine, {n: random(2, 5, 8, seed=i) for i, n in enumerate("qkv")})


def test_a_mask_that_depends_on_what_is_fed_is_no_attribute(tmp_path):
    text = ATTENTION.format(more=", float[1, 1, S, S] given", constants="", mask="mask = Identity(given)")
    kinds, run, engine = fused(tmp_path, text)
    assert "MultiHeadAttention" in kinds
    causal = np.where(np.tri(5, dtype=bool), 0, -30000).astype(np.float32)[None, None]
    for given in (causal, np.zeros_like(causal), random(1, 1, 5, 5)):
        same(run, engine, {**{n: random(2, 5, 8, seed=i) for i, n in enumerate("qkv")}, "given": given})


LAYERS = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B, S, 4] x, float[B, S, 4] r) => (float[B, S, 4] y, float[B, S, 4] z)
    <{w}, {b}, {gamma}, {beta}>
    {{
        product = MatMul(x, w)
        biased = Add(product, b)
        total = Add(biased, r)
        y = LayerNormalization<axis = -1, epsilon = 0.001>(total, gamma, beta)
        product2 = MatMul(y, w)
        biased2 = Add(b, product2)
        z = Add(total, biased2)
    }}
"""


def test_sums_go_into_the_norm_after_them_or_with_the_bias_before_them(tmp_path):
    text = LAYERS.format(w=ones("w", 4, 4), b=ones("b", 4), gamma=ones("gamma", 4), beta=ones("beta", 4))
    kinds, run, engine = fused(tmp_path, text)
    assert sorted(kinds) == ["BiasAdd", "MatMul", "MatMul", "SkipLayerNormalization"]
    feeds = {"x": random(2, 3, 4), "r": random(2, 3, 4, seed=1)}
    made = engine(feeds)
    np.testing.assert_allclose(made["y"], run(feeds), atol=1e-4)
    assert made["z"].shape == (2, 3, 4)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    text = LAYERS.format(w=ones("w", 4, 4), b=ones("b", 4), gamma=ones("gamma", 4), beta=ones("beta", 4))
    fused(tmp_path, text)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(model, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(Exception, match="no space left"):
        fuse_for_cuda(tmp_path / "model.onnx", ())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_same_model_gives_the_same_bytes(built, tmp_path):
    _, bundle = built
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(bundle.path("unet/model.onnx"), tmp_path / name / "model.onnx")
        whole, once = fuse_for_cuda(tmp_path / name / "model.onnx", ["encoder_hidden_states"])
        made.append([path.read_bytes() for path in (*whole, *once)])
    assert made[0] == made[1]


def test_what_is_own_to_onnx_runtime_is_of_its_domain(built):
    _, bundle = built
    graph = open_model(bundle.path("unet/fp32.cuda.onnx"))
    assert graph.opset_imports[DOMAIN] == 1
    assert {node.op_type for node in graph.graph if node.domain == DOMAIN} >= {"NhwcConv", "MultiHeadAttention"}


def test_in_bfloat16_what_has_no_kernel_computes_in_float32(tmp_path):
    """Convolutions have kernels for it with the channels first alone."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 22]>
        g (float[1, 4, H, W] x) => (float[1, 4, H2, W2] y)
        <int64[3] grouped = {{0, 2, -1}}, float[2] one = {{1.0, 1.0}}, float[2] zero = {{0.0, 0.0}},
         {ones("w", 4, 4, 3, 3)}, float[4] scales = {{1.0, 1.0, 2.0, 2.0}}>
        {{
            low = Cast<to = 16>(x)
            wl = Cast<to = 16>(w)
            onel = Cast<to = 16>(one)
            zerol = Cast<to = 16>(zero)
            made = Conv<pads = [1, 1, 1, 1]>(low, wl)
            split = Reshape(made, grouped)
            normed = InstanceNormalization(split, onel, zerol)
            sizes = Shape(made)
            whole = Reshape(normed, sizes)
            larger = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric">(whole, , scales)
            y = Cast<to = 1>(larger)
        }}
    """
    save(parser.parse_model(text), tmp_path / "model.onnx")
    model = ShapeInferencePass()(onnx_ir.load(tmp_path / "model.onnx")).model
    onnx_ir.save(model, tmp_path / "model.onnx")
    whole, _ = fuse_for_cuda(tmp_path / "model.onnx", ())
    nodes = {node.op_type: node for node in open_model(whole[0]).graph}
    assert {"Conv", "InstanceNormalization", "Resize"} <= nodes.keys()
    for node in nodes.values():
        made = {value.dtype.name for value in node.outputs if value.dtype is not None} & HALF
        assert made <= KERNELS.get(node.op_type, set())
    assert nodes["Conv"].outputs[0].dtype.name == "BFLOAT16"


ODD = {
    "softmax over another axis": ("axis = -1>(hidden)", "axis = -2>(hidden)"),
    "heads that are not moved": ("qt = Transpose<perm = [0, 2, 1, 3]>(q4)", "qt = Transpose<perm = [0, 1, 2, 3]>(q4)"),
    "keys that are not turned": ("kt = Transpose<perm = [0, 2, 3, 1]>(k4)", "kt = Transpose<perm = [0, 2, 1, 3]>(k4)"),
    "an output that is not moved back": (
        "back = Transpose<perm = [0, 2, 1, 3]>",
        "back = Transpose<perm = [0, 1, 2, 3]>",
    ),
}


@pytest.mark.parametrize("name", list(ODD))
def test_what_only_looks_like_attention_is_left_alone(tmp_path, name):
    text = ATTENTION.format(more="", constants=NUMBERS, mask=CAUSAL.format(hidden="low"))
    kinds, run, engine = fused(tmp_path, text.replace(*ODD[name]))
    assert "MultiHeadAttention" not in kinds
    size = 4 if "keys" in name else 2 if "heads" in name or "back" in name else 5
    same(run, engine, {n: random(2, size, 8, seed=i) for i, n in enumerate("qkv")})


@pytest.mark.parametrize("shape", ["1, 1, 1, S", "1, S", "S", "S, 1"])
def test_a_mask_that_the_operator_would_have_to_spread_is_not_given_to_it(tmp_path, shape):
    text = ATTENTION.format(more=f", float[{shape}] given", constants="", mask="mask = Identity(given)")
    kinds, run, engine = fused(tmp_path, text)
    assert "MultiHeadAttention" not in kinds
    given = random(*(5 if axis == "S" else int(axis) for axis in shape.split(", ")))
    same(run, engine, {**{n: random(2, 5, 8, seed=i) for i, n in enumerate("qkv")}, "given": given})


def test_rows_that_are_masked_as_a_whole_stay_zero(tmp_path):
    guard = """
        weights = Softmax<axis = -1>(hidden)
        broken = IsNaN(weights)
        whole = Where(broken, none, weights)
        mixed = MatMul(whole, vt)
    """
    text = ATTENTION.format(
        more=", float[1, 1, S, S] given", constants=", float none = {0.0}", mask="mask = Identity(given)"
    )
    text = text.replace("weights = Softmax<axis = -1>(hidden)", "").replace("mixed = MatMul(weights, vt)", guard)
    kinds, run, engine = fused(tmp_path, text)
    assert "MultiHeadAttention" not in kinds
    given = np.zeros((1, 1, 5, 5), np.float32)
    given[..., 2, :] = -np.inf
    same(run, engine, {**{n: random(2, 5, 8, seed=i) for i, n in enumerate("qkv")}, "given": given})


MAPS = {
    "split across rows": (
        f"float[B, 4, 2] x) => (float[B, 2, 2560] y) <{ones('w', 2, 2560)}, {ones('b', 2560)}",
        """product = MatMul(x, w)
        biased = Add(product, b)
        left, right = Split<axis = 1, num_outputs = 2>(biased)
        active = Gelu(right)
        y = Mul(left, active)""",
        (2, 4, 2),
    ),
    "channels last as an output": (
        f"float[B, 2, H, W] x) => (float[B, H, W, 4] y) <{ones('w', 4, 2, 3, 3)}",
        """made = Conv<pads = [1, 1, 1, 1]>(x, w)
        y = Transpose<perm = [0, 2, 3, 1]>(made)""",
        (2, 2, 4, 6),
    ),
    "a map that is turned the wrong way": (
        f"float[B, 2, H, W] x) => (float[B, W, 4, H] y) <{ones('w', 4, 2, 3, 3)}",
        """made = Conv<pads = [1, 1, 1, 1]>(x, w)
        y = Transpose<perm = [0, 3, 1, 2]>(made)""",
        (2, 2, 4, 6),
    ),
    "zeros in the sizes of a Reshape": (
        f"float[B, 4, 6] x) => (float[B, 4, 2, 3] y) <{ones('w', 4, 4, 1, 1)}, int64[4] sizes = {{0, 0, 2, 3}}",
        """turned = Transpose<perm = [0, 2, 1]>(x)
        back = Transpose<perm = [0, 2, 1]>(turned)
        square = Reshape(back, sizes)
        y = Conv(square, w)""",
        (2, 4, 6),
    ),
    "a constant of more axes": (
        f"float[B, 2, H, W] x) => (float[1, B2, 4, H, W] y) <{ones('w', 4, 2, 1, 1)}, {ones('five', 1, 1, 4, 1, 1)}",
        """made = Conv(x, w)
        y = Add(made, five)""",
        (2, 2, 4, 6),
    ),
    "a norm whose mean is read": (
        f"float[B, S, 4] x, float[B, S, 4] r) => (float[B, S, 4] y, float[B, S, 1] mean) <{ones('gamma', 4)}",
        """total = Add(x, r)
        y, mean = LayerNormalization<axis = -1>(total, gamma)""",
        (2, 3, 4),
    ),
    "a factor with more axes than what it scales": (
        f"float[B, S] x) => (float[1, 1, B, S] y) <{ones('alpha', 1, 1, 1, 1)}",
        """scaled = Mul(x, alpha)
        gate = Sigmoid(scaled)
        y = Mul(x, gate)""",
        (2, 3),
    ),
}


@pytest.mark.parametrize("name", list(MAPS))
def test_graphs_that_passes_could_get_wrong_compute_the_same(tmp_path, name):
    head, body, shape = MAPS[name]
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g ({head}>
        {{
        {body}
        }}
    """
    _, run, engine = fused(tmp_path, text)
    feeds = {"x": random(*shape)} | ({"r": random(*shape, seed=1)} if " r)" in head else {})
    np.testing.assert_allclose(engine(feeds)["y"], run(feeds), atol=1e-4)
