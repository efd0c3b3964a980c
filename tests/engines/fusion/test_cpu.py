"""The graphs that ONNX Runtime's CPU runs beside the exported one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import EngineError
from diffoundry.engines.fusion.cpu import fuse_for_cpu
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine, load_variant
from diffoundry.engines.split import SplitEngine


def kinds(path):
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


EXPORTED, FUSED = "fp32/onnx", "fp32/onnxruntime:cpu"


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return Bundle.open(bundle_of("pico"))


@pytest.fixture(scope="module")
def engines(bundle):
    """The U-Net as it was exported, and fused."""
    variants = bundle.manifest.components["unet"].variants
    return [load_variant(bundle.root, "unet", variants[name], threads=1) for name in (EXPORTED, FUSED)]


def feeds(seed, rows=2, side=8, tokens=77):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side + 8)).astype(np.float32),
        "timestep": rng.uniform(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, tokens, 64)).astype(np.float32),
    }


def test_every_unmasked_attention_is_one_operator_and_the_exported_graph_is_untouched(bundle):
    for name, count in (("unet", 8), ("vae_decoder", 1), ("vae_encoder", 1)):
        exported, fused = (bundle.path(bundle.component(name).variants[key].model) for key in (EXPORTED, FUSED))
        assert kinds(exported).count("Softmax") == count
        fused = kinds(fused)
        assert fused.count("MultiHeadAttention") == count
        assert "Softmax" not in fused
        domains = {opset.domain for opset in onnx.load(exported).opset_import}
        assert domains <= {"", "ai.onnx"}


def test_a_masked_attention_is_left_alone(bundle, tmp_path):
    variants = bundle.component("text_encoder").variants
    assert set(variants) == {EXPORTED}
    assert "Softmax" in kinds(bundle.path(variants[EXPORTED].model))


def test_the_prompts_part_is_cut_off(bundle):
    variant = bundle.component("unet").variants[FUSED]
    part = onnx.load(bundle.path(variant.per_prompt), load_external_data=False).graph
    rest = onnx.load(bundle.path(variant.model), load_external_data=False).graph
    assert [value.name for value in part.input] == ["encoder_hidden_states"]
    made = {value.name for value in part.output}
    assert len(made) == 8  # keys and values of four layers of cross-attention
    assert {value.name for value in rest.input} == {"sample", "timestep", *made}


@pytest.mark.parametrize("sizes", [{}, {"rows": 3, "side": 16}, {"rows": 1, "tokens": 20}])
def test_both_graphs_give_the_same(engines, sizes):
    plain, fused = (engine(feeds(1, **sizes))["out_sample"] for engine in engines)
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_inputs_and_outputs_are_those_of_the_exported_graph(engines):
    plain, fused = engines
    assert isinstance(fused, SplitEngine)
    assert {tensor.name for tensor in fused.inputs} == {tensor.name for tensor in plain.inputs}
    assert fused.outputs == plain.outputs
    with pytest.raises(EngineError, match="unknown extra"):
        fused({**feeds(0), "extra": np.zeros(1, np.float32)})
    with pytest.raises(EngineError, match="encoder_hidden_states"):
        fused({**feeds(0), "encoder_hidden_states": np.zeros((2, 77, 63), np.float32)})


def test_a_bound_engine_sees_a_changed_prompt_only_when_told(engines):
    plain, fused = engines
    given, other = feeds(1), feeds(2)
    bound = fused.bind_host(given)
    np.testing.assert_allclose(bound()["out_sample"], plain(given)["out_sample"], atol=2e-5)
    for name in ("sample", "timestep"):
        given[name][...] = other[name]
    np.testing.assert_allclose(bound("sample", "timestep")["out_sample"], plain(given)["out_sample"], atol=2e-5)
    given["encoder_hidden_states"][...] = other["encoder_hidden_states"]
    found = bound("encoder_hidden_states")["out_sample"]
    np.testing.assert_allclose(found, plain(other)["out_sample"], atol=2e-5)


def test_graphs_that_do_not_fit_are_refused(bundle, engines):
    plain = engines[0]
    encoder = load_variant(bundle.root, "vae_encoder", bundle.component("vae_encoder").variants[EXPORTED])
    with pytest.raises(EngineError, match="do not fit together"):
        SplitEngine("unet", encoder, plain)


def test_a_model_without_attention_is_not_written_again(bundle, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(bundle.path("step/model.onnx").read_bytes())
    assert fuse_for_cpu(model, ["noise"]) is None
    assert list(tmp_path.iterdir()) == [model]


def test_a_scale_that_is_not_the_usual_one_is_kept(tmp_path):
    from onnx import parser

    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        attention (float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v) => (float[B, S, 8] out)
        <int64[4] split = {0, -1, 2, 4}, int64[3] merged = {0, -1, 8}, float half = {0.3}>
        {
            q4 = Reshape(q, split)
            k4 = Reshape(k, split)
            v4 = Reshape(v, split)
            qt = Transpose<perm = [0, 2, 1, 3]>(q4)
            kt = Transpose<perm = [0, 2, 3, 1]>(k4)
            vt = Transpose<perm = [0, 2, 1, 3]>(v4)
            qs = Mul(qt, half)
            scores = MatMul(qs, kt)
            weights = Softmax<axis = -1>(scores)
            mixed = MatMul(weights, vt)
            back = Transpose<perm = [0, 2, 1, 3]>(mixed)
            out = Reshape(back, merged)
        }
    """
    onnx.save(parser.parse_model(text), tmp_path / "model.onnx")
    assert fuse_for_cpu(tmp_path / "model.onnx", []) == ("fused.onnx", "")
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((2, 5, 8)).astype(np.float32) for name in "qkv"}
    plain, fused = (
        OnnxRuntimeEngine.load(tmp_path / name, component="attention")(given)["out"]
        for name in ("model.onnx", "fused.onnx")
    )
    np.testing.assert_allclose(fused, plain, atol=1e-5)
