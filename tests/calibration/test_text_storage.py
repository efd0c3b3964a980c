"""Weights of T5 in eight bits: what a bundle is then, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import diffoundry
from diffoundry import Scan
from diffoundry.bundle import Bundle
from diffoundry.bundle.reports import read_report
from diffoundry.calibration import QualityError
from diffoundry.common.errors import DiffoundryError, EngineError
from diffoundry.engines.verify import recorded_case, verify
from diffoundry.runtime.pipeline import load

T5 = "text_encoder_2"
QUICK = {"prompts": ("a red star",), "steps": 1, "size": (64, 64)}


def test_t5_is_stored_in_eight_bits_where_the_pictures_stay_near(bundle_of, tmp_path):
    path = shutil.copytree(bundle_of("flux-dev-small"), tmp_path / "flux.bundle")
    before = Bundle.open(path).manifest
    with pytest.raises(QualityError, match=r"int8 weights of text_encoder_2 images differ .* 120 are asked: leave"):
        diffoundry.build(path, text_storage_dtype="int8", scan=Scan(**QUICK, budget_db=120))
    assert Bundle.open(path).manifest == before
    made = diffoundry.build(path, text_storage_dtype="int8", scan=Scan(**QUICK))
    part = made.component(T5)
    assert part.storage == "int8"
    assert not (path / T5 / "model.onnx").exists()
    held = [
        sum((root / each).stat().st_size for each in made.component(T5).variants["fp32/onnx"].files) for root in [path]
    ]
    plain = before.components[T5].variants["fp32/onnx"].files
    assert held[0] < 0.45 * sum((bundle_of("flux-dev-small") / each).stat().st_size for each in plain)
    report = read_report(made, "text_storage")["int8"]
    assert report["psnr_db"] > 40
    feeds, expected = recorded_case(made, T5)
    found = load(path).engine(T5)(feeds)["last_hidden_state"]
    lost = np.square(found - expected["last_hidden_state"]).sum() / np.square(expected["last_hidden_state"]).sum()
    assert report["encoders"][T5]["snr_db"] == pytest.approx(-10 * np.log10(lost), abs=0.1)
    assert 25 < report["encoders"][T5]["snr_db"] < 60
    assert all(check.passed for check in verify(made))
    with pytest.raises(
        EngineError, match="the weights of text_encoder_2 in int8, for engines of the processor: choose"
    ):
        load(path, engine="onnxruntime:cuda")
    with pytest.raises(
        EngineError, match="not 'fp16': choose one of them, or compile the checkpoint again without --te"
    ):
        diffoundry.load(path, engine="onnxruntime", precision="fp16")
    again = diffoundry.build(path, text_storage_dtype="int8", scan=Scan(**QUICK))
    assert again.manifest == made.manifest
    with pytest.raises(
        DiffoundryError, match="are for engines of the processor, not for fp16 with onnxruntime: compile"
    ):
        diffoundry.build(path, precision="fp16")


def test_what_has_no_t5_or_runs_elsewhere_is_refused(bundle_of):
    with pytest.raises(DiffoundryError, match="unknown text storage dtype 'int4': choose int8, or leave it out"):
        diffoundry.build(bundle_of("flux-dev-small"), text_storage_dtype="int4")
    with pytest.raises(DiffoundryError, match="are for engines of the processor, not for fp16 with onnxruntime: leave"):
        diffoundry.build(bundle_of("flux-dev-small"), text_storage_dtype="int8", precision="fp16")
    with pytest.raises(
        DiffoundryError, match="has no T5 whose weights could be in int8: leave the text storage dtype out"
    ):
        diffoundry.build(bundle_of("pico"), text_storage_dtype="int8")


@pytest.mark.slow
def test_compile_stores_it_and_brings_the_weights_back(checkpoint_of, tmp_path):
    asked = {"tasks": ["txt2img"], "scan": Scan(**QUICK)}
    path, source = tmp_path / "flux.bundle", checkpoint_of("flux-dev-small")
    made = diffoundry.compile(source, path, text_storage_dtype="int8", **asked)
    assert made.component(T5).storage == "int8"
    again = diffoundry.compile(source, path, text_storage_dtype="int8", **asked)
    assert again.manifest == made.manifest
    back = diffoundry.compile(source, path, tasks=["txt2img"])
    assert not back.component(T5).storage
    assert (path / T5 / "model.onnx").is_file()
    with pytest.raises(DiffoundryError, match="sd15-small has no T5"):
        diffoundry.compile(checkpoint_of("sd15-small"), tmp_path / "other", text_storage_dtype="int8")


@pytest.mark.slow
def test_openvino_runs_it_in_floats_too(bundle_of, tmp_path):
    pytest.importorskip("openvino")
    path = shutil.copytree(bundle_of("flux-dev-small"), tmp_path / "flux.bundle")
    made = diffoundry.build(path, text_storage_dtype="int8", scan=Scan(**QUICK))
    assert all(check.passed for check in verify(made, engine="openvino"))
    feeds, _ = recorded_case(made, T5)
    ours, theirs = (load(path, engine=e, precision="fp32").engine(T5)(feeds) for e in ("onnxruntime", "openvino"))
    for name, found in ours.items():
        np.testing.assert_allclose(theirs[name], found, atol=1e-3 * abs(found).max())
