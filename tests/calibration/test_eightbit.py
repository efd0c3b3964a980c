"""A denoiser in eight bits: measured on the real loop, written, run, and the same however it is computed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import diffoundry
from diffoundry.bundle import Bundle
from diffoundry.calibration import Budget, QualityError, Scan, emulation
from diffoundry.calibration.eightbit import recipes, reference, stage, times
from diffoundry.calibration.eightbit.attention import attentions_of
from diffoundry.calibration.eightbit.formats import FORMATS, Scale
from diffoundry.calibration.eightbit.layers import groups_of
from diffoundry.calibration.eightbit.outputs import losses
from diffoundry.calibration.eightbit.scales import candidates
from diffoundry.calibration.eightbit.smoothing import shifts, smooth
from diffoundry.calibration.eightbit.statistics import Statistics
from diffoundry.calibration.eightbit.switched import SwitchedEngine, switched
from diffoundry.calibration.eightbit.write import write
from diffoundry.calibration.graph import read
from diffoundry.calibration.sessions import start
from diffoundry.common.errors import DiffoundryError
from diffoundry.engines.verify import verify

SCAN = {"prompts": ("a large red star", "a small white ring"), "steps": 4}


@pytest.fixture
def bundle(bundle_of, tmp_path):
    return shutil.copytree(bundle_of("pico"), tmp_path / "b", ignore=shutil.ignore_patterns("engines"))


@pytest.fixture
def observed(bundle, tmp_path):
    """The reference run of the bundle's denoiser, and its groups and attentions."""
    opened = Bundle.open(bundle)
    model = read(bundle / "unet" / "model.onnx")
    groups, attentions = groups_of(model), attentions_of(model)
    (tmp_path / "parts").mkdir()
    made = reference.observe(
        opened, "unet", groups, attentions, Scan(**SCAN), tmp_path / "parts", "m", None, lambda text, done, total: None
    )
    return made, groups, attentions


def test_statistics_are_of_all_that_the_loop_showed(bundle, observed):
    """The ranges and counts of one value, against those of the value itself in the calls that were recorded."""
    made, groups, attentions = observed
    value = groups[5].value
    model = read(bundle / "unet" / "model.onnx")
    node = next(each for each in model.graph if any(out.name == value for out in each.outputs))
    model.graph.outputs.append(next(out for out in node.outputs if out.name == value))
    engine = start(model, bundle / "unet", "unet")
    seen = [abs(engine(feeds)[value]).max() for part in made.calls for feeds, _ in part]
    assert made.statistics.largest()[value] >= max(seen) - 1e-6
    counts = made.statistics.of(value)
    assert counts.sum() == 2 * 2 * 2 * 48 * 8 * 8  # two prompts, every other of four calls, two rows
    stretches = np.flatnonzero(counts.any(axis=1))
    assert len(stretches) >= 2
    sizes = made.statistics.sizes
    assert sizes[groups[2].layers[0].name] == 2 * 48 * 8 * 8  # conv_in: two rows of guidance, its channels, the latents
    assert len(made.images) == 2 and made.images[0].dtype == np.uint8


def test_a_run_goes_on_where_it_was(bundle, observed, tmp_path, monkeypatch):
    made, groups, attentions = observed
    (tmp_path / "parts" / "part-1.npz").write_bytes(b"cut off")
    seeds = []
    real = reference.run_loop
    monkeypatch.setattr(
        reference, "run_loop", lambda b, e, scan, *more: seeds.append(scan.seed) or real(b, e, scan, *more)
    )
    again = reference.observe(
        Bundle.open(bundle), "unet", groups, attentions, Scan(**SCAN), tmp_path / "parts", "m", None, lambda *told: None
    )
    assert seeds == [1]  # the second prompt alone
    assert np.array_equal(again.statistics.counts, made.statistics.counts)
    assert all(np.array_equal(*pair) for pair in zip(again.images, made.images, strict=True))


@pytest.mark.parametrize("name", list(FORMATS))
def test_groups_can_be_turned_and_give_what_the_written_model_gives(name, bundle, observed):
    made, groups, attentions = observed
    form, source = FORMATS[name], bundle / "unet" / "model.onnx"
    heads = attentions if form.has_attention else []
    plain = candidates(made.statistics, form)["amax"]
    scales = {value: Scale(value, scale, "amax", 0.0) for value, scale in plain.items()}
    feeds, exact = made.calls[0][0]
    scales = smooth(source, "unet", form, groups, scales, made.statistics, [feeds], lambda done, total: None)
    assert form.name == "fp8" or any(scale.factors is not None for scale in scales.values())
    moved = shifts(source, form, groups, scales, made.statistics)
    for each in heads:
        scales |= each.scales(made.statistics.amax, form)
    engine, clear = switched(source, "unet", form, scales, groups, heads, moved)
    assert np.allclose(engine(feeds)["out_sample"], exact["out_sample"], atol=1e-5)
    few, whole = [group.value for group in groups[5:20]], engine.values
    assert len(whole) == len(groups) + (8 if name == "fp8" else 0)
    for low, shift, exactly in (
        (few, False, True),
        (whole[-8:], False, False),
        (whole, False, True),
        (whole, True, False),
    ):
        engine.choose(low, shift)
        files = write(source, "unet", form, scales, low, f"{name}.onnx", moved if shift else None)
        onnx.checker.check_model(str(files[0]), full_check=True)
        written = start(read(files[0]), files[0].parent, "unet", fast=False)(feeds)["out_sample"]
        turned = engine(feeds)["out_sample"]
        if exactly:
            assert np.allclose(turned, written, atol=1e-4)
        else:  # sums of another order, which turn a rounding here and there
            assert np.sum((turned - written) ** 2) < 0.1 * np.sum((written - exact["out_sample"]) ** 2)
        assert abs(written - exact["out_sample"]).max() > 1e-3
    clear()
    assert not list((bundle / "unet").glob("switched*"))


def test_what_a_scale_loses_is_what_numpy_says(bundle, observed):
    made, groups, _ = observed
    form, source = FORMATS["int8"], bundle / "unet" / "model.onnx"
    group = groups[0]  # the embedding of the timestep: one Gemm
    feeds = made.calls[0][0][0]
    model = read(source)
    node = next(each for each in model.graph if each.outputs[0].name == group.layers[0].name)
    model.graph.outputs[:] = [node.inputs[0]]
    value = start(model, source.parent, "unet")(feeds)[group.value]
    weight = node.inputs[1].const_value.numpy().astype(np.float32)
    bias = node.inputs[2].const_value.numpy().astype(np.float32)
    exact = value @ weight.T + bias
    scales = {"fine": 1 / 127, "coarse": 1 / 20}
    tried = [dict.fromkeys([each.value for each in groups], scale) for scale in scales.values()]
    found = losses(source, "unet", form, groups, tried, [feeds], lambda done, total: None)
    for i, scale in enumerate(scales.values()):
        error = (form.rounded(value, np.float32(scale)) - value) @ weight.T
        assert found[i, 0] == pytest.approx(np.sum(error**2) / np.sum(exact**2), rel=1e-3)


def values_of(path, names, feeds):
    """Values within a model in one call, by their names."""
    model = read(path)
    made = {out.name: out for node in model.graph for out in node.outputs}
    model.graph.outputs[:] = [made[name] for name in names]
    found = start(model, path.parent, "unet", fast=False)(feeds)
    return [found[name] for name in names]


def test_attentions_in_8_bit_floats_are_what_numpy_says(bundle, observed):
    made, _, attentions = observed
    form, source, feeds = FORMATS["fp8"], bundle / "unet" / "model.onnx", made.calls[0][0][0]
    for attention in attentions[:2]:  # of tokens to one another, and to the prompt
        names, factors = zip(*attention.sources, strict=True)
        *read_in, exact = values_of(source, [*names, attention.made], feeds)
        assert all(made.statistics.amax[name] >= abs(x).max() - 1e-5 for name, x in zip(names, read_in, strict=True))
        query, key, _ = read_in
        assert made.statistics.sizes[attention.value] == 4 * query.size * key.shape[1]
        assert made.statistics.sizes[attention.keys] == key.shape[1]
        scales = attention.scales(made.statistics.amax, form)
        steps = [scales[name].scale for name in attention.reads]
        assert steps[2] == np.float32(1 / 448)
        q, k, v = (
            form.rounded(
                x.reshape(*x.shape[:2], -1, attention.size).transpose(0, 2, 1, 3) * np.float32(factor), np.float32(step)
            )
            for x, factor, step in zip(read_in, factors, (steps[0], steps[1], steps[3]), strict=True)
        )
        scores = q @ k.swapaxes(-1, -2)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = form.rounded(weights / weights.sum(axis=-1, keepdims=True), np.float32(steps[2]))
        expected = (weights @ v).transpose(0, 2, 1, 3).reshape(query.shape)
        written = write(source, "unet", form, scales, [attention.value], "fp8.onnx")[0]
        [low] = values_of(written, [attention.made], feeds)
        lost = np.sum((low - exact) ** 2)
        assert lost > 0
        assert np.sum((low - expected) ** 2) < 0.01 * lost  # a rounding here and there turns


def made_of(bundle, **options):
    return diffoundry.build(bundle, precision="int8", scan=Scan(**SCAN, budget_db=12), force=True, **options)


def report(bundle, name):
    return json.loads((bundle / "reports" / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_bundle_in_int8_is_run_by_both_engines_and_is_the_same_each_time(bundle, tmp_path):
    pytest.importorskip("openvino")
    twin = shutil.copytree(bundle, tmp_path / "twin")
    made = made_of(bundle)
    assert (made.manifest.engine, made.manifest.precision) == ("openvino", "int8")
    found = report(bundle, "precision")["int8"]["unet"]
    assert found["nodes"]["low"] + found["nodes"]["kept"] == 83 and found["share"] > 0.9
    times_of = report(bundle, "calibration")["int8/openvino"]
    assert times_of["layers"] == {"int8": found["nodes"]["low"], "float": found["nodes"]["kept"]}
    assert times_of["warnings"] == [] and set(times_of["step_s"]) >= {"fp32", "int8"}
    for engine in ("openvino", "onnxruntime"):
        checks = [each for each in verify(made, engine=engine) if each.precision == "int8"]
        assert [each.component for each in checks] == ["unet"] and checks[0].passed
        assert checks[0].max_abs_error > 1e-3  # it is in eight bits indeed
    asked = {"steps": 4, "seed": 1, "guidance": 1.0, "output": "latent"}
    emulated = diffoundry.Pipeline(made, engine="onnxruntime", engines=emulation(made, "int8"))("a star", **asked)
    latents = [
        diffoundry.load(bundle, engine=each, precision="int8")("a star", **asked).latents
        for each in ("openvino", "onnxruntime")
    ]
    exact = diffoundry.load(bundle, precision="fp32")("a star", **asked).latents
    for each in latents:
        power = np.sum(exact**2)
        assert 10 * np.log10(power / np.sum((each - exact) ** 2)) > 15
        assert 10 * np.log10(power / np.sum((each - emulated.latents) ** 2)) > 15
    assert diffoundry.load(bundle).info() == {"engine": "openvino", "precision": "int8"}
    made_of(twin)
    for path in ("unet/int8.onnx", "unet/int8.fused.onnx", "unet/int8.statistics.npz"):
        assert (bundle / path).read_bytes() == (twin / path).read_bytes()


@pytest.mark.slow
def test_what_is_damaged_and_can_be_made_again_stops_no_run_and_is_mended(bundle, monkeypatch):
    made_of(bundle, engine="onnxruntime")
    whole = {path: path.read_bytes() for path in (bundle / "unet").glob("int8*")}
    documents = [bundle / "unet" / name for name in ("int8.statistics.npz", "int8.pictures.png")]
    for path in documents:
        path.write_bytes(path.read_bytes()[:-3])
    assert diffoundry.load(bundle)("a star", steps=1).images
    made_of(bundle, engine="onnxruntime")
    assert {path: path.read_bytes() for path in whole} == whole
    monkeypatch.setattr(stage.Conversion, "run", None)  # nothing is measured again for a lost report
    for name in ("precision", "quality"):
        before = report(bundle, name)
        (bundle / "reports" / f"{name}.json").write_text("{}")
        made_of(bundle, engine="onnxruntime")
        assert report(bundle, name) == before
    (bundle / "reports" / "precision.json").unlink()
    built = diffoundry.build(bundle, precision="fp32", engine="onnxruntime")
    assert built.component("unet").variant("int8") and not (bundle / "reports" / "precision.json").exists()
    made_of(bundle, engine="onnxruntime")
    assert report(bundle, "quality") == before


@pytest.mark.slow
def test_statistics_of_another_bundle_serve_and_those_of_another_model_do_not(bundle, tmp_path, monkeypatch):
    made_of(bundle, engine="onnxruntime")
    kept = Path(shutil.copy(bundle / "unet" / "int8.statistics.npz", tmp_path / "s.npz"))
    scales = [each["scale"] for each in report(bundle, "precision")["int8"]["unet"]["groups"]]
    monkeypatch.setattr(reference.Observer, "engine", None)  # nothing is gathered any more
    made_of(bundle, engine="onnxruntime", calibration=kept)
    assert scales == [each["scale"] for each in report(bundle, "precision")["int8"]["unet"]["groups"]]
    replace(Statistics.load(kept), model="0" * 64).save(kept)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    with pytest.raises(DiffoundryError, match=r"s\.npz is of another model: leave it out, and it is measured anew"):
        made_of(bundle, engine="onnxruntime", calibration=kept)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_a_budget_that_cannot_be_met_names_the_best(bundle):
    before = sorted((path, path.stat().st_size) for path in bundle.rglob("*"))
    with pytest.raises(QualityError, match=r"int8 images differ from fp32 by \d+\.\d dB PSNR with \d+ % of the arith"):
        diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, budget_db=119), force=True)
    assert sorted((path, path.stat().st_size) for path in bundle.rglob("*")) == before


@pytest.mark.slow
def test_what_loses_most_stays_in_fp32_where_the_budget_asks_for_it(bundle):
    diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, budget_db=33), force=True)
    found = report(bundle, "precision")["int8"]["unet"]
    assert 0 < found["nodes"]["kept"] < 83
    worst = min(found["groups"], key=lambda each: each["loss_alone_db"])
    assert not worst["low"]
    assert report(bundle, "quality")["int8"]["psnr_db"] >= 33
    shares = [each["share"] for each in found["curve"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.9


@pytest.mark.slow
def test_slower_is_refused_with_its_figures(bundle, monkeypatch):
    taken = {"fp32": 0.002, "bf16": 0.001, "int8": 0.0015}
    monkeypatch.setattr(times, "times", lambda bundle, engine, precision: [taken[precision]])
    message = r"int8 is not faster than (bf16|fp32) on this processor .*: use --precision (bf16|fp32)"
    taken["fp32"] = 0.0015
    with pytest.raises(DiffoundryError, match=message):
        diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, budget_db=12))
    taken["int8"] = 0.0005
    made = diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, budget_db=12))
    assert made.manifest.precision == "int8"
    taken["int8"] = 0.01
    if importlib.util.find_spec("openvino") is not None:
        with pytest.raises(DiffoundryError, match=r"is not faster than .* with openvino"):  # what is there is timed too
            diffoundry.build(bundle, engine="openvino", precision="int8")


def test_a_value_that_is_not_finite_is_named_with_its_timestep(bundle):
    path = bundle / "unet" / "model.onnx"
    model = onnx.load(path)
    weight = next(
        each
        for each in model.graph.initializer
        if each.name.endswith("conv1.parametrizations.weight.original_axes_0_1_2_3")
    )
    broken = onnx.numpy_helper.to_array(weight).copy()
    broken[0, 0, 0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(broken, weight.name))
    onnx.save(model, path)
    model = read(path)
    groups, attentions = groups_of(model), attentions_of(model)
    opened = Bundle.open(bundle)
    parts = bundle.parent / "parts"
    parts.mkdir()
    with pytest.raises(DiffoundryError, match=r"unet: .*, which .* reads, is infinity or NaN in fp32 at timestep \d+"):
        reference.observe(opened, "unet", groups, attentions, Scan(**SCAN), parts, "m", None, lambda *told: None)


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on(bundle, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(f"a large red star, number {i}" for i in range(6)))
    line = [sys.executable, "-m", "diffoundry", "build", str(bundle), "--engine", "onnxruntime", "--precision", "int8"]
    line += ["--scan-prompts", str(prompts), "--min-psnr", "5", "--force"]
    parts = bundle.parent / f".{bundle.name}.part" / ".stages" / "eightbit"
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    while not (parts / "part-2.npz").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert (bundle / "bundle.json").exists() and len(written) >= 3
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    while not (parts / "alone-int8.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    found = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert written.items() <= found.items() and len(found) == 6
    assert process.wait() == 0
    assert Bundle.open(bundle).manifest.precision == "int8" and not list(bundle.parent.glob(".b.*"))


@pytest.mark.slow
def test_a_budget_of_another_measure_decides(bundle):
    pytest.importorskip("skimage")
    scan = Scan(**SCAN, budget=Budget("ssim", 0.5))
    diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=scan, force=True)
    quality = report(bundle, "quality")["int8"]
    assert quality["budget"] == "ssim=0.5" and 0.5 <= quality["measured"] <= 1 and "budget_db" not in quality
    before = sorted((path, path.stat().st_size) for path in bundle.rglob("*"))
    never = replace(scan, budget=Budget("builtins:len", 1))
    with pytest.raises(DiffoundryError, match="the budget's builtins:len fails: "):
        diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=never, force=True)
    unmet = replace(scan, budget=Budget("ssim", 0.999999))
    with pytest.raises(
        QualityError, match=r"int8 images have a ssim of 0\.\d+ with \d+ % .* use a lower --budget, scan"
    ):
        diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=unmet, force=True)
    assert sorted((path, path.stat().st_size) for path in bundle.rglob("*")) == before


@pytest.mark.slow
def test_what_was_measured_is_kept_when_a_build_fails_or_is_stopped(bundle, monkeypatch):
    """And serves the next try: with another budget nothing is drawn in fp32 again."""
    with pytest.raises(QualityError):
        diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(**SCAN, budget_db=119), force=True)
    parts = bundle.parent / f".{bundle.name}.part" / ".stages" / "eightbit"
    before = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert {"part-0.npz", "part-1.npz", "scales-int8.json", "alone-int8.json"} <= set(before)

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SwitchedEngine, "_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            made_of(bundle, engine="onnxruntime")
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}.items()
    with monkeypatch.context() as patched:
        patched.setattr(reference.Observer, "engine", None)
        made_of(bundle, engine="onnxruntime")
    assert not list(bundle.parent.glob(".b.*"))
    nothing = bundle.parent / f".{bundle.name}.part"
    with monkeypatch.context() as patched:
        patched.setattr(reference, "run_loop", stopped)
        with pytest.raises(KeyboardInterrupt):
            diffoundry.build(bundle, engine="onnxruntime", precision="int8", scan=Scan(("other",), 2), force=True)
    assert not nothing.exists()  # there is nothing to go on from


@pytest.mark.slow
def test_a_page_shows_what_was_measured(bundle, called, tmp_path):
    page = tmp_path / "page.html"
    done = called("inspect", bundle, "--report", page)
    assert done.returncode == 1 and "has nothing in eight bits to report: run `diffoundry build " in done.stderr
    assert not page.exists()
    made_of(bundle, engine="onnxruntime")
    done = called("inspect", bundle, "--report", page)
    assert done.returncode == 0 and done.stdout.strip() == str(page)
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "http://" not in text and "<script" not in text
    found = report(bundle, "precision")["int8"]["unet"]
    assert f"{found['nodes']['low']} of 83 layers with" in text
    for words in (
        "a large red star (seed 0): ",
        "Loss by timestep",
        "onnxruntime runs",
        "conv2d",
        "largest, by stretch",
    ):
        assert words in text
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (3 * 64, 2 * 64)  # a row for each prompt: fp32, int8, their difference
    left, middle, right = np.split(np.asarray(shown, int), 3, axis=1)
    assert np.array_equal(right, np.minimum(4 * abs(left - middle), 255)) and 0 < abs(left - middle).mean() < 40
    times = [each["timestep"] for each in found["by_timestep"]]
    assert times == sorted(times, reverse=True) and all(0 < each["loss_db"] < 80 for each in found["by_timestep"])
    manifest = (bundle / "bundle.json").read_bytes()
    for target, said in (
        (bundle / "bundle.json", "a name that ends in .html"),
        (tmp_path, "a name that ends in .html"),
        ("", "a name that ends in .html"),
        (tmp_path / "none" / "p.html", "does not exist: make it, or choose another --report"),
    ):
        done = called("inspect", bundle, "--report", target)
        assert done.returncode in (1, 2) and said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert (bundle / "bundle.json").read_bytes() == manifest
    done = called("run", bundle, "a star", "--steps", "2", "-o", bundle / "unet" / "int8.pictures.png")
    assert done.returncode == 1 and "is a file of the bundle" in done.stderr
    done = called("inspect", bundle, "--report", tmp_path / "none" / "page.html")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    path = bundle / "reports" / "precision.json"
    path.write_text(json.dumps({"int8": {"unet": {}}}))
    done = called("inspect", bundle)
    assert done.returncode == 0 and "Warning:" in done.stderr and "precision.json" in done.stderr
    done = called("inspect", bundle, "--report", page)
    assert done.returncode == 1 and "precision.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_other_recipes_stand_in_one_table(bundle):
    made_of(bundle, engine="onnxruntime")
    before = sorted(path for path in bundle.parent.rglob("*"))
    ours, static, published = recipes.compare(Bundle.open(bundle), "int8")
    assert sorted(path for path in bundle.parent.rglob("*")) == before
    assert [each.recipe for each in (ours, static, published)] == [recipes.OURS, recipes.STATIC, recipes.PUBLISHED]
    assert static.layers == (83, 83) and static.share == 1.0
    assert published.layers == (62, 83) and published.share < ours.share
    assert ours.share == pytest.approx(report(bundle, "precision")["int8"]["unet"]["share"], abs=1e-3)
    for row in (ours, static, published):
        assert len(row.psnr_db) == len(row.latents_db) == 2 and np.isfinite(row.psnr_db + row.latents_db).all()
    assert np.median(ours.psnr_db) >= 12  # what was asked
    assert np.mean(ours.latents_db) > np.mean(static.latents_db)
    with pytest.raises(DiffoundryError, match="has no fp8 models: run `diffoundry build"):
        recipes.compare(Bundle.open(bundle), "fp8")


REFUSED = {
    "a file for fp32": (["--precision", "fp32", "--calibration", "x.npz"], "fp32 takes no calibration file"),
    "force for bf16": (["--precision", "bf16", "--engine", "openvino", "--force"], "bf16 takes no calibration file"),
    "no such file": (["--precision", "int8", "--calibration", "x.npz"], "there is no calibration file x.npz"),
    "a GPU": (
        ["--precision", "int8", "--engine", "onnxruntime:cuda"],
        "tensorrt-rtx, not with onnxruntime:cuda",
    ),
    "floats on a processor": (["--precision", "fp8"], "fp8 runs with tensorrt, tensorrt-rtx, not with"),
    "floats for an old GPU": (
        ["--precision", "fp8", "--engine", "tensorrt-rtx", "--arch", "sm86"],
        "sm86 has no 8-bit floats: use --precision int8, or build for sm89 and newer",
    ),
    "an unknown measure": (["--precision", "int8", "--budget", "lpips=0.1"], "unknown measure 'lpips' of a budget"),
    "a measure of no module": (["--precision", "int8", "--budget", "no.such:f=1"], "cannot be loaded (No module named"),
    "two budgets": (
        ["--precision", "int8", "--budget", "psnr=20", "--min-psnr", "20"],
        "say the same: give one of them",
    ),
    "an unknown precision": (["--precision", "int4"], "'int4' is not one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case, called, bundle_of):
    options, expected = REFUSED[case]
    done = called("build", bundle_of("pico"), *options)
    assert done.returncode in (1, 2) and expected in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("precision", [pytest.param("int8", marks=pytest.mark.slow), "fp8"])
def test_plans_for_gpus_have_their_layers_in_eight_bits_beside_fp16(precision, bundle):
    pytest.importorskip("tensorrt_rtx")
    target = diffoundry.Target(archs=("sm89", "sm120"))
    scan = Scan(**SCAN, budget_db=12)
    made = diffoundry.build(bundle, engine="tensorrt-rtx", precision=precision, target=target, scan=scan)
    assert (made.manifest.engine, made.manifest.precision) == ("tensorrt-rtx", precision)
    plans = {each["component"]: each for each in report(bundle, "plans")["plans"]}
    assert [plans[name]["precision"] for name in ("unet", "text_encoder", "step")] == [precision, "fp16", "fp32"]
    heavy, kept = plans["unet"]["made_of"]["heavy"], report(bundle, "precision")[precision]["unet"]["nodes"]["kept"]
    merged = 22 if precision == "int8" else 0  # of Q, K and V, into one product
    found = report(bundle, "precision")[precision]["unet"]
    assert heavy[precision] >= 83 - kept - merged and heavy["fp16"] <= 8 + kept and "fp32" not in heavy
    if precision == "fp8":  # a kernel for each attention that is in it; one has 16 keys, too few
        assert found["reasons"]["few keys"] == 2
        layers = [each for path in bundle.rglob("layers.json") for each in json.loads(path.read_text())]
        asked = sum(each["low"] and isinstance(each["scale"], list) for each in found["groups"])
        assert 0 < asked <= 7
        assert sum("mha" in each["name"] and each["precision"] == "fp8" for each in layers) == asked
    assert plans["unet"]["made_of"]["attention"] == {"fused": 8, "of": 8}
    assert report(bundle, "plans")["warnings"] == []
    graph = onnx.load(bundle / "unet" / f"{precision}.fp16.onnx").graph
    held = {each.name: each.data_type for each in graph.initializer}
    types = [held[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert types.count(onnx.TensorProto.FLOAT16) >= 0.95 * len(types)  # scales in the type of the data
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()}
    diffoundry.build(bundle, engine="tensorrt-rtx", precision=precision, target=target)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()} == before
