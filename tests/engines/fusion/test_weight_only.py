"""Weights of products in eight bits, held against NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffoundry.engines.fusion.graph import open_model, save
from diffoundry.engines.fusion.weight_only import BLOCK, block_scales, store_in_int8
from diffoundry.engines.onnxruntime import OnnxRuntimeEngine

READS, GIVES = 3 * BLOCK, 40


def write(path, weight, half):
    """x @ weight @ small, whose rows are no whole number of blocks; half: stored so, with a cast."""
    small = np.random.default_rng(1).standard_normal((GIVES, 8)).astype(np.float32)
    stored = onnx_ir.to_proto(onnx_ir.tensor(weight, dtype=onnx_ir.DataType.BFLOAT16, name="w")) if half else None
    nodes = [
        *([helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT)] if half else []),
        helper.make_node("MatMul", ["x", "wide" if half else "w"], ["h"]),
        helper.make_node("MatMul", ["h", "small"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", READS])],
        [
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["rows", GIVES]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8]),
        ],
        [stored or numpy_helper.from_array(weight, "w"), numpy_helper.from_array(small, "small")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.mark.parametrize("half", [False, True])
def test_products_read_weights_that_were_rounded_by_block(tmp_path, half):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((READS, GIVES)) * rng.lognormal(0, 2, (READS, 1))).astype(np.float32)
    weight[:BLOCK, 3] = 0
    if half:
        import ml_dtypes

        weight = weight.astype(ml_dtypes.bfloat16)
    write(tmp_path / "plain.onnx", weight, half)
    weight = weight.astype(np.float32)
    model = open_model(tmp_path / "plain.onnx")
    assert store_in_int8(model) == ["w"]
    save(model, tmp_path, "int8.onnx")
    kept = {each.name: each for each in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert "w" not in kept
    assert kept["small"].data_type == TensorProto.FLOAT
    rounded, scales = (
        numpy_helper.to_array(next(t for name, t in kept.items() if name.startswith(start)))
        for start in ("w:int8", "w:scales")
    )
    assert rounded.dtype == np.int8
    assert np.array_equal(scales, block_scales(weight))
    dequantized = rounded * np.repeat(scales, BLOCK, 0)
    assert (abs(dequantized - weight) <= np.repeat(scales, BLOCK, 0) * 0.5001).all()
    assert (abs(rounded.reshape(-1, BLOCK, GIVES)).max(1) == 127).sum() == scales.size - 1  # all blocks but the zeros
    x = rng.standard_normal((5, READS)).astype(np.float32)
    found = OnnxRuntimeEngine.load(tmp_path / "int8.onnx")({"x": x})["h"]
    np.testing.assert_allclose(found, x @ dequantized, rtol=1e-5, atol=1e-4 * abs(found).max())  # x is not rounded
