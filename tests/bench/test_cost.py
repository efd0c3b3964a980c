"""Operations and bytes of a graph, held against what a hand or torch counts."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry.bench.cost import cost_of, model_cost
from diffoundry.common.errors import BenchError
from diffoundry.families import open_bundle
from diffoundry.tests.conftest import PICO

onnx = pytest.importorskip("onnx")
F = 4
"""Bytes of a float32."""


def saved(path, nodes, inputs, weights=(), opset=20):
    """An ONNX model. inputs: name → shape with names for free axes. weights: name → array."""
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    last = onnx.ValueInfoProto()
    last.name = nodes[-1].output[0]
    held = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in dict(weights).items()]
    graph = helper.make_graph(nodes, "g", values, [last], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def node(kind, inputs, output, **attributes):
    return onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)


def ones(*shape):
    return np.ones(shape, np.float32)


def test_a_product_of_matrices(tmp_path):
    path = saved(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], {"x": ["n", 3, 5]}, {"w": ones(5, 7)})
    cost = model_cost(path, {"x": (2, 3, 5)})
    assert cost.flops == 2 * (2 * 3 * 7) * 5
    assert cost.bytes == F * (2 * 3 * 5 + 5 * 7 + 2 * 3 * 7)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product_with_a_sum(tmp_path, transposed):
    path = saved(
        tmp_path / "m.onnx",
        [node("Gemm", ["x", "w", "b"], "y", transA=transposed)],
        {"x": ["a", "b"]},
        {"w": ones(5, 7), "b": ones(7)},
    )
    assert model_cost(path, {"x": (5, 3) if transposed else (3, 5)}).flops == 2 * 3 * 7 * 5


def test_convolutions(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], "y", strides=[2, 2], pads=[1, 1, 1, 1], group=2),
        node("ConvTranspose", ["y", "v"], "z", strides=[2, 2]),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"x": ["n", 4, "h", "w"]}, {"w": ones(6, 2, 3, 3), "v": ones(6, 3, 2, 2)})
    # (2, 4, 8, 8) → (2, 6, 4, 4), each of 2 channels by 3x3; then each of its numbers goes to 3 channels by 2x2
    assert model_cost(path, {"x": (2, 4, 8, 8)}).flops == 2 * (2 * 6 * 4 * 4) * (2 * 3 * 3) + 2 * (2 * 6 * 4 * 4) * (
        3 * 2 * 2
    )


def test_shapes_that_are_computed_and_views_that_are_free(tmp_path):
    nodes = [
        node("Shape", ["x"], "n", start=0, end=1),
        node("Shape", ["x"], "h", start=2, end=3),
        node("Shape", ["x"], "w", start=3, end=4),
        node("Squeeze", ["h"], "h0"),
        node("Squeeze", ["w"], "w0"),
        node("Mul", ["h0", "w0"], "hw0"),
        node("Reshape", ["hw0", "one"], "hw"),
        node("Concat", ["n", "four", "hw"], "shape", axis=0),
        node("Reshape", ["x", "shape"], "flat"),
        node("MatMul", ["transposed", "flat"], "y"),
    ]
    nodes.insert(-1, node("Transpose", ["flat"], "transposed", perm=[0, 2, 1]))
    path = saved(tmp_path / "m.onnx", nodes, {"x": ["n", 4, "h", "w"]}, {"one": np.array([-1]), "four": np.array([4])})
    cost = model_cost(path, {"x": (2, 4, 3, 5)})
    assert cost.flops == 2 * (2 * 15 * 15) * 4
    assert cost.bytes == F * (2 * 2 * 4 * 15) + F * (2 * 2 * 4 * 15 + 2 * 15 * 15)


def test_weights_are_not_read(tmp_path):
    path = saved(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], {"x": ["n", 256]}, {"w": ones(256, 512)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert model_cost(path, {"x": (3, 256)}).flops == 2 * 3 * 512 * 256


@pytest.mark.parametrize(
    ("nodes", "shapes", "message"),
    [
        ([("Einsum", {"equation": "ab,bc->ac"})], {"x": (3, 5)}, "Einsum is not counted"),
        ([("MatMul", {})], {}, "no shape is given for the input 'x'"),
        ([("MatMul", {})], {"x": (3, 6)}, "cannot be counted"),
    ],
)
def test_what_cannot_be_counted_is_said(tmp_path, nodes, shapes, message):
    made = [node(kind, ["x", "w"], "y", **attributes) for kind, attributes in nodes]
    path = saved(tmp_path / "m.onnx", made, {"x": ["a", "b"]}, {"w": ones(5, 7)})
    with pytest.raises(BenchError, match=message):
        model_cost(path, shapes)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(BenchError, match=r"m\.onnx cannot be counted"):
        model_cost(tmp_path / "m.onnx", {})


def test_a_unet_has_the_operations_that_torch_counts(bundle_of):
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}
    model = UNet2DConditionModel.from_pretrained(PICO / "unet").eval()
    model.set_attn_processor(AttnProcessor())  # in products of matrices, which torch counts
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*(torch.zeros(shape) for shape in shapes.values()))
    assert cost_of(open_bundle(bundle_of("pico")), "unet", "fp32", shapes).flops == counter.get_total_flops()
