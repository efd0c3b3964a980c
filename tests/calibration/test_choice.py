"""The choice of an engine where there is no memory to time them."""

from __future__ import annotations

import shutil

import pytest

import diffoundry
from diffoundry.bundle.reports import read_report
from diffoundry.calibration import choice

pytest.importorskip("openvino")


def test_engines_are_not_timed_without_memory_for_the_weights(bundle_of, tmp_path, monkeypatch):
    bundle = shutil.copytree(bundle_of("pico"), tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    files = [bundle / "unet" / "model.onnx", bundle / "text_encoder" / "model.onnx"]
    weights = sum(file.stat().st_size for file in files)
    monkeypatch.setattr(choice, "times", lambda *given: pytest.fail("an engine was loaded"))
    monkeypatch.setattr(choice, "available_memory", lambda: int(1.6 * weights))
    made = diffoundry.build(bundle, engine="auto", precision="fp32")
    assert (made.manifest.engine, made.manifest.precision) == ("onnxruntime", "fp32")
    said = choice.describe(read_report(made, "engines"))
    assert "no engine was timed: it takes about 0 GiB of memory, 0 GiB are free; `build` times them where" in said
    monkeypatch.setattr(choice, "available_memory", lambda: int(2.1 * weights))
    monkeypatch.setattr(choice, "times", lambda bundle, engine, precision: [2.0 if engine == "openvino" else 3.0] * 3)
    timed = diffoundry.build(bundle, engine="auto", precision="fp32")
    assert timed.manifest.engine == "openvino"
    assert "openvino in fp32 is the fastest here" in choice.describe(read_report(timed, "engines"))
