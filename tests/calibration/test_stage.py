"""The stage of lower precisions: when it is done again, what is taken over, and what is never believed."""

from __future__ import annotations

import json
import shutil

import pytest

import diffoundry
from diffoundry.bundle import Bundle, ledger
from diffoundry.calibration import stage
from diffoundry.common.files import holds, mark, sha256_file

ASKED = {"precision": "fp16", "scan": diffoundry.Scan(prompts=("a small red ring",), budget_db=0), "default_steps": 2}


@pytest.fixture(scope="module")
def lowered(bundle_of, checkpoint_of, tmp_path_factory):
    """pico's bundle with fp16 models; do not change it."""
    bundle = shutil.copytree(bundle_of("pico"), tmp_path_factory.mktemp("lowered") / "pico.bundle")
    diffoundry.compile(checkpoint_of("pico"), bundle, **ASKED)
    return bundle


@pytest.fixture
def copy(lowered, tmp_path):
    return shutil.copytree(lowered, tmp_path / "pico.bundle")


def quality(bundle):
    return json.loads((bundle / "reports/quality.json").read_text())


def test_the_same_again_scans_nothing_and_other_defaults_scan_again(copy, checkpoint_of, scans):
    before = (copy / "unet/fp16.onnx").stat().st_mtime_ns
    diffoundry.compile(checkpoint_of("pico"), copy, **ASKED)
    assert not scans and (copy / "unet/fp16.onnx").stat().st_mtime_ns == before
    assert quality(copy)["fp16"]["scan"]["steps"] == 2
    diffoundry.compile(checkpoint_of("pico"), copy, **{**ASKED, "default_steps": 3, "default_guidance": 1.0})
    assert len(scans) == 1
    assert (quality(copy)["fp16"]["scan"]["steps"], quality(copy)["fp16"]["scan"]["guidance"]) == (3, 1.0)
    Bundle.open(copy).check()


@pytest.mark.slow
def test_pictures_that_are_too_far_from_fp32_are_refused_unless_they_are_asked_for(copy, checkpoint_of):
    before = (copy / "bundle.json").read_bytes()
    scan = {"prompts": ("a small red ring",), "steps": 2}
    with pytest.raises(
        diffoundry.DiffoundryError, match=r"bf16 images differ from fp32 by .*, 110 are asked.*--min-psnr"
    ):
        diffoundry.compile(checkpoint_of("pico"), copy, precision="bf16", scan=diffoundry.Scan(**scan, budget_db=110))
    assert (copy / "bundle.json").read_bytes() == before
    diffoundry.compile(checkpoint_of("pico"), copy, precision="bf16", scan=diffoundry.Scan(**scan, budget_db=5))
    told = quality(copy)["bf16"]
    assert told["budget_db"] == 5 and 5 <= told["worst_db"] <= told["psnr_db"] < 110


def test_fp32_again_keeps_the_models_and_what_was_measured(copy, checkpoint_of, scans):
    diffoundry.compile(checkpoint_of("pico"), copy, default_steps=2)
    assert not scans
    assert set(Bundle.open(copy).component("unet").precisions) == {"fp32", "fp16"}
    assert set(quality(copy)) == {"fp16"}


def test_what_an_interrupted_compile_left_is_swept(bundle_of, lowered, checkpoint_of, tmp_path):
    bundle = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    work = tmp_path / ".pico.bundle.part"
    (work / ".stages").mkdir(parents=True)
    mark(work)
    (work / "unet").mkdir()
    shutil.copy(lowered / "reports/stages/precision.fp16.json", work / ".stages")
    shutil.copy(lowered / "unet/fp16.onnx", work / "unet")
    diffoundry.compile(checkpoint_of("pico"), bundle)
    assert not list(bundle.rglob("fp16*")) and not list(bundle.rglob("*fp16*"))
    assert not (bundle / "reports/quality.json").exists()
    assert Bundle.open(bundle).component("unet").precisions == ["fp32"]


@pytest.mark.parametrize("record", ["precision.fp16.json", "text_encoder.json"])
def test_a_record_that_names_files_outside_the_bundle_touches_none_of_them(copy, checkpoint_of, tmp_path, record):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    path = copy / "reports/stages" / record
    value = json.loads(path.read_text())
    part = value["converted"]["unet"]["files"] if "converted" in value else value["reference"]
    part["../victim.txt"] = sha256_file(victim)
    path.write_text(json.dumps(value))
    diffoundry.compile(checkpoint_of("pico"), copy, **ASKED)
    assert victim.read_text() == "mine"
    Bundle.open(copy).check()


def damaged(value, *path, to):
    value = json.loads(json.dumps(value))
    part = value
    for name in path[:-1]:
        part = part[name]
    if to is None:
        del part[path[-1]]
    else:
        part[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("key",), None),
        (("models",), None),
        (("quality",), 5),
        (("quality", "psnr_db"), "x"),
        (("quality", "psnr_db"), float("nan")),
        (("converted",), {}),
        (("converted", "unet"), 5),
        (("converted", "unet", "model"), "nowhere"),
        (("converted", "unet", "model"), 5),
        (("converted", "unet", "files"), []),
        (("converted", "unet", "report"), 5),
        (("converted", "unet", "report", "islands"), [5]),
        (("converted", "unet", "report", "nodes"), {}),
    ],
)
def test_a_damaged_record_is_no_record(lowered, tmp_path, path, to):
    record = json.loads((lowered / "reports/stages/precision.fp16.json").read_text())
    copy = tmp_path / "precision.fp16.json"
    copy.write_text(json.dumps(record))
    assert ledger._read(lowered, copy, None, stage.CONVERTED) is not None
    copy.write_text(json.dumps(damaged(record, *path, to=to)))
    assert ledger._read(lowered, copy, None, stage.CONVERTED) is None


def test_files_hold_only_when_each_is_inside_and_unchanged(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("a")
    (tmp_path / "b").write_text("b")
    root, a = tmp_path / "in", sha256_file(tmp_path / "in/a")
    assert holds(root, {"a": a})
    for wrong in ({}, None, [], {"a": "0" * 64}, {"a": a, "x": a}, {"../b": sha256_file(tmp_path / "b")}, {5: a}):
        assert not holds(root, wrong)


@pytest.mark.parametrize(("name", "value"), [("target", "sm89"), ("scan", "a ring")])
def test_values_of_another_kind_are_refused_before_any_work(checkpoint_of, tmp_path, name, value):
    asked = {"engine": "tensorrt-rtx"} if name == "target" else {"precision": "fp16"}
    with pytest.raises(diffoundry.DiffoundryError, match=rf"the {name} must be a diffoundry\.\w+, found str"):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "b", **asked, **{name: value})
    assert list(tmp_path.iterdir()) == []
