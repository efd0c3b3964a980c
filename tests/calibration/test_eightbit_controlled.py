"""The denoiser that controls act in, in eight bits: of the plain one's scales, and measured under controls."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest

import diffoundry
from diffoundry import Control
from diffoundry.calibration import Scan
from diffoundry.calibration.eightbit import conversion
from diffoundry.calibration.eightbit.controlled import under_controls, widened
from diffoundry.calibration.eightbit.formats import Scale
from diffoundry.parity.pipelines import PICO, picture

SCAN = {"prompts": ("a large red star", "a small white ring"), "steps": 3, "budget_db": 12.0}


@pytest.fixture
def bundle(bundle_of, tmp_path):
    return shutil.copytree(bundle_of(PICO), tmp_path / "b", ignore=shutil.ignore_patterns("engines"))


def quality(bundle):
    return json.loads((bundle / "reports" / "quality.json").read_text())["int8"]["controlled"]


@pytest.mark.slow
def test_it_is_where_a_picture_under_controls_is_within_the_budget(bundle, bundle_of, monkeypatch, command):
    made = diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN), force=True)
    plain, controlled = (made.component(name).variants for name in ("unet", "unet_controlled"))
    assert {"int8/onnx", "int8/onnxruntime:cpu"} <= set(plain) and {"int8/onnx", "int8/onnxruntime:cpu"} <= set(
        controlled
    )
    found = quality(bundle)
    assert found["kept"] and found["psnr_db"] >= 12 and found["low"] > 0.4 * found["of"]
    counts = [
        sum(node.op_type == "QuantizeLinear" for node in onnx.load(bundle / part / "int8.onnx").graph.node)
        for part in ("unet", "unet_controlled")
    ]
    assert counts[0] >= counts[1] == found["low"]
    told = command("inspect", bundle).stdout
    assert f"int8: images under controls are {found['psnr_db']:.1f} dB from fp32 with {found['low']} of" in told
    asked = {
        "seed": 2,
        "steps": 3,
        "guidance": 3.0,
        "width": 64,
        "height": 64,
        "control": Control("edge", picture(64, 64)),
    }
    low, exact = (
        np.asarray(diffoundry.load(path)("a small ring", **asked).images[0], float)
        for path in (bundle, bundle_of(PICO))
    )
    assert 0 < np.abs(low - exact).mean() < 25

    figures = {"psnr_db": 3.0, "worst_db": 3.0, "measured": 3.0}
    monkeypatch.setattr(conversion, "measure", lambda *told: dict(figures))
    made = diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, seed=1), force=True)
    assert "int8/onnx" in made.component("unet").variants
    assert not any(key.startswith("int8") for key in made.component("unet_controlled").variants)
    assert not list((bundle / "unet_controlled").glob("int8*"))
    found = quality(bundle)
    assert not found["kept"] and found["low"] == found["of"] - round(found["of"] / 2)
    assert "too far: there the denoiser stays as it is" in command("inspect", bundle).stdout
    diffoundry.load(bundle)("a small ring", **asked)


def test_scales_are_as_wide_as_what_is_seen_under_controls():
    scales = {name: Scale(name, 0.5, "amax", 0.0) for name in ("a", "b", "c")}
    was = {"a": "a", "b_sum": "b", "c": "c", "other": "unknown"}
    found = widened(scales, was, {"a": 4.0, "b": 2.0, "c": 0.0}, {"a": 3.0, "b_sum": 5.0, "c": 9.0})
    assert {name: each.scale for name, each in found.items()} == {"a": 0.5, "b": 0.5, "c": 0.5, "b_sum": 1.25}
    assert all(found[name].value == name for name in found)
    good = {"psnr_db": 30.0, "kept": True, "low": 3, "of": 4}
    assert under_controls(good) == "images under controls are 30.0 dB from fp32 with 3 of 4 values in eight bits"
    assert "are not finite, too far" in under_controls({**good, "psnr_db": None, "kept": False})
    for key, value in (("psnr_db", 10**400), ("psnr_db", "x"), ("psnr_db", np.nan), ("low", "\x1b[31m"), ("kept", 1)):
        assert under_controls({**good, key: value}) == "the figures under controls are damaged"
