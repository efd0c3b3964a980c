"""TensorRT's description of a plan, as the engine inspector gives it and as the builder's log has it."""

from __future__ import annotations

import json

import pytest

from diffoundry.engines.tensorrt.layers import from_inspector, from_log, is_described, memory_of, summary

TENSOR = (
    "{{ Name: {name}, Dimensions: [2,4,8,8], Strides: [256,1,32,4], StrideOrder: [3,0,2,1], Datatype: {kind}, "
    "Format: (NHWC) Channel major format }}"
)


def line(name, kind, inputs, outputs, constants=(), nodes=()):
    parts = {
        part: ", ".join(TENSOR.format(name=f"{part}{i}", kind=each) for i, each in enumerate(types))
        for part, types in (("Inputs", inputs), ("Constants", constants), ("Outputs", outputs))
    }
    lists = ", ".join(f"{part}: [ {text} ]" if text else f"{part}: []" for part, text in parts.items())
    told = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {name}, LayerType: {kind}, {lists}, TacticName: {name}_0x12, StreamId: 0, Metadata: {told}"


LOG = [
    "Engine Layer Information:",
    line("__mye54_myl0_0", "shape_call", [], []),
    line("__myl_Cast_myl0_1", "kgen", ["Float"], ["Half"], nodes=["cast"]),
    line("node_conv2d_myl0_2", "correlation", ["Half"], ["Half"], ["Half", "Float"], ["node_conv2d"]),
    line("_gemm_mha_v2_myl0_3", "kgen", ["Half", "Half"], ["Half"], nodes=["node_MatMul", "node_Softmax"]),
    line("__myl_Move_myl0_4", "kgen", [], ["Int32"]),
    line("node_linear_3_myl0_5", "gemm", ["Float"], ["Float"], nodes=["node_linear_3"]),
    line("node_linear_4_myl0_6", "gemm", ["BFloat16"], ["Float"], nodes=["node_linear_4", "node_add"]),
]


@pytest.fixture(params=["log", "one message", "inspector", "older inspector"])
def layers(request):
    if request.param == "log":
        return from_log(text for text in LOG if is_described(text))
    if request.param == "one message":
        return from_log(["\n".join(LOG)])
    key = "Datatype" if request.param == "inspector" else "Format/Datatype"
    described = [
        {
            "Name": layer.name,
            "LayerType": layer.kind,
            "Inputs": [{"Name": "x", key: types[0]}] if (types := TYPES[layer.name])[0] else [],
            "Outputs": [{"Name": "y", key: types[1]}] if types[1] else [],
            "TacticName": layer.tactic,
            "Metadata": "".join(f"[ONNX Layer: {node}]" for node in layer.nodes),
        }
        for layer in from_log(LOG)
    ]
    return from_inspector(json.dumps({"Layers": described, "Bindings": ["sample"]}))


TYPES = {
    "__mye54_myl0_0": ("", ""),
    "__myl_Cast_myl0_1": ("Float", "Half"),
    "node_conv2d_myl0_2": ("Half", "Half"),
    "_gemm_mha_v2_myl0_3": ("Half", "Half"),
    "__myl_Move_myl0_4": ("", "Int32"),
    "node_linear_3_myl0_5": ("Float", "Float"),
    "node_linear_4_myl0_6": ("BFloat16", "Float"),
}


def test_each_layer_has_the_precision_of_its_first_float_input(layers):
    assert [(layer.precision, layer.heavy, layer.attention) for layer in layers] == [
        ("", False, False),
        ("fp32", False, False),
        ("fp16", True, False),
        ("fp16", True, True),
        ("", False, False),
        ("fp32", True, False),
        ("bf16", True, False),
    ]
    assert layers[3].nodes == ("node_MatMul", "node_Softmax")
    assert layers[2].tactic == "node_conv2d_myl0_2_0x12"


def test_the_summary_names_what_did_not_get_the_precision(layers):
    told = summary(layers, "fp16", attentions=2, fp32_nodes=["node_linear_4"])
    assert told["layers"] == {"bf16": 1, "fp16": 2, "fp32": 2, "other": 2}
    assert told["heavy"] == {"bf16": 1, "fp16": 2, "fp32": 1}
    assert told["attention"] == {"fused": 1, "of": 2}
    assert told["not_in_precision"] == ["node_linear_3_myl0_5"]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"Layers": ["a", "b"]}', '{"Layers": null}'])
def test_an_inspector_that_tells_names_alone_gives_no_layers(text):
    assert from_inspector(text) == []


def test_the_memory_is_read_from_the_log():
    log = [
        "Total Weights Memory: 7147520 bytes",
        "Total Activation Memory: 8988160 bytes",
        "Total Host Memory: 1 bytes",
    ]
    assert memory_of(log) == {"weights": 7147520, "activation": 8988160}
