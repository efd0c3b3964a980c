"""A lower precision of OpenVINO: measured, held against the budget, kept; and the choice of an engine by time."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

import diffoundry
from diffoundry.bundle import Bundle
from diffoundry.calibration import QualityError, Scan, choice
from diffoundry.calibration.choice import Trial, candidates, describe
from diffoundry.engines.loader import EngineLoader
from diffoundry.engines.openvino import device

pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif("bf16" not in device.precisions(), reason="this processor has no bfloat16")
SCAN = {"prompts": ("a large red star",), "steps": 2}


@pytest.fixture
def bundle(bundle_of, tmp_path):
    return shutil.copytree(bundle_of("pico"), tmp_path / "b", ignore=shutil.ignore_patterns("engines"))


def quality(bundle):
    return json.loads((bundle / "reports" / "quality.json").read_text())["bf16/openvino"]


def test_bf16_is_measured_and_shares_the_models(bundle):
    before = {path: path.stat().st_size for path in bundle.rglob("*.onnx*")}
    made = diffoundry.build(bundle, engine="openvino", precision="bf16", scan=Scan(**SCAN, budget_db=10))
    assert {path: path.stat().st_size for path in bundle.rglob("*.onnx*")} == before
    assert (made.manifest.engine, made.manifest.precision) == ("openvino", "bf16")
    assert 10 <= quality(bundle)["psnr_db"] < 80
    pipe = diffoundry.load(bundle)
    assert pipe.info() == {"engine": "openvino", "precision": "bf16"}
    assert diffoundry.load(bundle, engine="onnxruntime").info()["precision"] == "fp32"
    asked = {"steps": 2, "seed": 1, "guidance": 1.0, "output": "latent"}
    low, exact = (diffoundry.load(bundle, precision=each)("a star", **asked).latents for each in ("bf16", "fp32"))
    assert 1e-4 < abs(low - exact).max() < 0.2
    told = []
    diffoundry.build(bundle, engine="openvino", precision="bf16", progress=lambda text, done, total: told.append(text))
    assert not [text for text in told if "quality" in text]


def test_components_that_lose_too_much_stay_in_fp32(bundle):
    diffoundry.build(bundle, engine="openvino", precision="bf16", scan=Scan(prompts=Scan().prompts[:1], steps=20))
    report = quality(bundle)
    assert report["tries"][0]["psnr_db"] < 35 <= report["psnr_db"]
    assert "text_encoder" not in report["lower"]
    assert EngineLoader(Bundle.open(bundle)).precision_of("text_encoder") == "fp32"
    assert EngineLoader(Bundle.open(bundle)).precision_of("unet") == "bf16"


def test_images_too_far_from_fp32_are_refused(bundle):
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(
        QualityError, match=r"bf16 images of openvino differ from fp32 by \d+\.\d dB PSNR, 110 are asked"
    ):
        diffoundry.build(bundle, engine="openvino", precision="bf16", scan=Scan(**SCAN, budget_db=110))
    assert (bundle / "bundle.json").read_bytes() == before


@pytest.mark.slow
def test_a_compile_takes_over_what_was_measured(bundle, checkpoint_of):
    diffoundry.build(bundle, engine="openvino", precision="bf16", scan=Scan(**SCAN, budget_db=10))
    found = quality(bundle)
    diffoundry.compile(checkpoint_of("pico"), bundle)
    assert quality(bundle) == found
    diffoundry.load(bundle, engine="openvino", precision="bf16")
    diffoundry.build(bundle, engine="onnxruntime", precision="bf16", scan=Scan(**SCAN, budget_db=5))
    keys = Bundle.open(bundle).component("unet").variants
    assert {"bf16/onnx", "bf16/openvino"} <= set(keys)
    with pytest.raises(diffoundry.EngineError, match="ONNX Runtime has no bfloat16 on the CPU"):
        diffoundry.load(bundle, engine="onnxruntime", precision="bf16")


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([3.0, 2.0, 1.0], ("openvino", "bf16")),
        ([3.0, 2.0, 1.95], ("openvino", "fp32")),
        ([3.0, 2.9, 2.8], ("openvino", "bf16")),
        ([1.0, 2.0, 3.0], ("onnxruntime", "fp32")),
    ],
)
def test_the_fastest_is_chosen_once_and_recorded(bundle, monkeypatch, times, wanted):
    given = dict(zip(candidates(True), times, strict=True))
    calls = []

    def timed(bundle, engine, precision):
        calls.append((engine, precision))
        return [given[engine, precision]] * 3

    monkeypatch.setattr(choice, "times", timed)
    asked = {"scan": Scan(**SCAN, budget_db=10)}
    made = diffoundry.build(bundle, engine="auto", **asked)
    assert (made.manifest.engine, made.manifest.precision) == wanted
    report = json.loads((bundle / "reports" / "engines.json").read_text())
    assert [each["seconds"] for each in report["trials"]] == times
    assert (report["engine"], report["precision"]) == wanted
    assert diffoundry.load(bundle).info()["engine"] == wanted[0]
    before = len(calls)
    diffoundry.build(bundle, engine="auto", **asked)
    assert len(calls) == before


@pytest.mark.slow
def test_real_times_choose_an_engine_and_one_without_budget_is_refused(bundle):
    diffoundry.build(bundle, engine="auto", scan=Scan(**SCAN, budget_db=110))
    report = json.loads((bundle / "reports" / "engines.json").read_text())
    assert report["precision"] == "fp32"
    assert all(each["calls"] >= 3 and each["seconds"] > 0 for each in report["trials"])
    lower = report["trials"][-1]
    fastest = min(each["seconds"] for each in report["trials"][:-1])
    assert ("110 are asked" in lower["refused"]) == (lower["seconds"] < 0.95 * fastest)


def test_with_a_precision_asked_for_only_the_engine_is_chosen():
    assert candidates(False) == [("onnxruntime", "fp32"), ("openvino", "fp32")]


def test_with_one_engine_nothing_is_tried(bundle, monkeypatch):
    def missing():
        raise diffoundry.EngineError("the engine openvino is not installed")

    monkeypatch.setattr(choice, "precisions_of", missing)
    monkeypatch.setattr(choice, "times", None)
    made = diffoundry.build(bundle, engine="auto")
    assert made.manifest.engine == "onnxruntime"
    assert not (bundle / "reports" / "engines.json").exists()


def test_the_choice_in_words():
    trials = [Trial("onnxruntime", "fp32", 9.2, 3), Trial("openvino", "bf16", 0.0047, 50, 41.0, "too far off")]
    report = {"engine": "onnxruntime", "precision": "fp32", "trials": [asdict(each) for each in trials]}
    assert describe(report) == (
        "onnxruntime in fp32 is the fastest here (a step of the loop: onnxruntime fp32 9.20 s, openvino bf16 4.70 ms "
        "(too far off)); --engine overrides"
    )
    assert describe({"trials": 3}) == "the report on engines is damaged"
