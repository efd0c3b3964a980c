"""What is said of the machine, and its peaks."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from diffoundry.bench import machine
from diffoundry.engines.names import EngineName
from diffoundry.engines.onnxruntime import default_threads

CPU = EngineName.parse("onnxruntime")


def test_the_machine_is_described():
    found = machine.describe(CPU, {"numpy": np.__version__})
    assert found.processor and found.cores == default_threads() and found.gpu is None
    assert found.memory_bytes > 1 << 28 and found.versions == {"numpy": np.__version__}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_model_of_a_product_is_one(dtype):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((8, 8)).astype(dtype) for _ in range(2))
    model = machine.product_model(right)
    onnx.checker.check_model(onnx.load_from_string(model))
    (found,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": left})
    assert np.allclose(found, left.astype(np.float32) @ right.astype(np.float32), atol=0.05)


def test_peaks_are_measured_and_what_is_not_is_said():
    found, missing = machine.peaks(CPU, ["fp32", "bf16"], 1)
    assert found.matmul_flops_per_s["fp32"] > 1e8 and found.copy_bytes_per_s > 1e8
    assert list(found.matmul_flops_per_s) == ["fp32"] and "bf16" in missing[0] and len(missing) == 1


def test_openvino_is_measured_by_itself():
    pytest.importorskip("openvino")
    assert machine.matmul_flops_per_s(EngineName.parse("openvino"), "fp32", 1, side=256) > 1e8
