"""`compile --engine tensorrt-rtx`, `inspect` and `run` as a user without a GPU sees them, with the real builder."""

from __future__ import annotations

import json
import shutil

import pytest

import diffoundry
from diffoundry.bundle import Bundle

pytest.importorskip("tensorrt_rtx")
BUILD = ("--engine", "tensorrt-rtx", "--precision", "fp16", "--scan-steps", "4")
COMPONENTS = {"text_encoder", "vae_encoder", "vae_decoder", "unet", "step"}


@pytest.fixture(scope="module")
def planned(bundle_of, checkpoint_of, tmp_path_factory):
    """pico's bundle with fp16 plans for two architectures, and what compile printed."""
    import subprocess
    import sys

    bundle = tmp_path_factory.mktemp("planned") / "pico.bundle"
    shutil.copytree(bundle_of("pico"), bundle)
    line = [sys.executable, "-m", "diffoundry", "compile", str(checkpoint_of("pico")), "-o", str(bundle), *BUILD]
    done = subprocess.run([*line, "--arch", "sm89,sm120"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return bundle, done


def plans(bundle):
    records = [json.loads(path.read_text()) for path in bundle.glob("engines/*/engine.json")]
    return {record["key"]: record for record in records if record["backend"] == "tensorrt-rtx"}


def test_compile_builds_a_plan_for_each_component(planned):
    bundle, done = planned
    built = plans(bundle)
    assert sorted(record["component"] for record in built.values()) == sorted(COMPONENTS)
    assert all(record["archs"] == ["sm89", "sm120"] for record in built.values())
    assert {r["component"]: r["precision"] for r in built.values()} == {
        name: "fp32" if name == "step" else "fp16" for name in COMPONENTS
    }
    assert all(f"plan of {name}, " in done.stderr for name in COMPONENTS)
    unet = next(record for record in built.values() if record["component"] == "unet")
    assert unet["made_of"]["attention"] == {"fused": 8, "of": 8}
    assert unet["made_of"]["layers"]["fp16"] > 100
    manifest = Bundle.open(bundle).manifest
    assert (manifest.engine, manifest.precision) == ("tensorrt-rtx", "fp16")
    Bundle.open(bundle).check()


def test_inspect_shows_the_plans_and_the_precision(planned, command):
    bundle, _ = planned
    shown = command("inspect", bundle).stdout
    for name in COMPONENTS:
        assert any(f": {name} " in line and "for sm89, sm120 (tensorrt-rtx" in line for line in shown.splitlines())
    assert "attention fused 8 of 8" in shown
    assert "fp16: images " in shown and "dB from fp32; nodes that stay in fp32: " in shown
    told = json.loads(command("inspect", bundle, "--json").stdout)
    assert told["quality"]["fp16"]["psnr_db"] >= 35
    islands = told["precision"]["fp16"]["unet"]["islands"]
    assert {"Sin", "Cos"} <= {island["op"] for island in islands}
    assert {e["component"] for e in told["engines"] if e["backend"] == "tensorrt-rtx"} == COMPONENTS


@pytest.mark.slow
def test_a_second_compile_builds_nothing_and_one_changed_weight_rebuilds_one_component(
    planned, command, tmp_path, checkpoint_of
):
    from safetensors.numpy import load_file, save_file

    bundle = shutil.copytree(planned[0], tmp_path / "pico.bundle")
    checkpoint = shutil.copytree(checkpoint_of("pico"), tmp_path / "pico")
    before = plans(bundle)
    times = {path: path.stat().st_mtime_ns for path in bundle.glob("engines/*/plan")}
    again = command("compile", checkpoint, "-o", bundle, *BUILD, "--arch", "sm89,sm120")
    assert again.returncode == 0, again.stderr
    assert "plan of" not in again.stderr and "fp16" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in bundle.glob("engines/*/plan")} == times
    path = checkpoint / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file({**tensors, name: tensors[name] + 0.25}, path)
    changed = command("compile", checkpoint, "-o", bundle, *BUILD, "--arch", "sm89,sm120")
    assert changed.returncode == 0, changed.stderr
    assert [line.split("plan of ")[1].split(",")[0] for line in changed.stderr.splitlines() if "plan of" in line] == [
        "text_encoder"
    ]
    after = plans(bundle)
    gone = {record["component"] for key, record in before.items() if key not in after}
    new = {record["component"] for key, record in after.items() if key not in before}
    assert gone == new == {"text_encoder"}


@pytest.mark.slow
def test_another_architecture_precision_and_shape_are_kept_beside(planned, tmp_path, checkpoint_of):
    bundle = shutil.copytree(planned[0], tmp_path / "pico.bundle")
    before = plans(bundle)
    diffoundry.compile(
        checkpoint_of("pico"),
        bundle,
        engine="tensorrt-rtx",
        precision="bf16",
        target=diffoundry.Target(archs=("sm86",), sizes=((64, 64), (96, 64))),
        scan=diffoundry.Scan(prompts=("a small red ring",), steps=2, budget_db=0),
    )
    after = plans(bundle)
    assert before.keys() < after.keys()
    new = [record for key, record in after.items() if key not in before]
    assert {tuple(record["archs"]) for record in new} == {("sm86",)}
    assert {record["precision"] for record in new if record["component"] != "step"} == {"bf16"}
    opened = Bundle.open(bundle)
    opened.check()
    assert all(
        {"fp16", "bf16"} < set(part.precisions) for name, part in opened.manifest.components.items() if name != "step"
    )
    assert set(json.loads((bundle / "reports/quality.json").read_text())) == {"fp16", "bf16"}
    assert sorted(record["profile"]["name"] for record in new if record["component"] == "unet") == [
        "64x64, batch 1",
        "96x64, batch 1",
    ]


def test_without_a_gpu_run_says_so_and_onnxruntime_still_runs(planned, command, tmp_path):
    bundle, _ = planned
    from diffoundry.common.errors import EngineError
    from diffoundry.engines.gpu.device import Device

    try:
        Device().close()
    except EngineError:
        failed = command("run", bundle, "a red ring", "--steps", "1")
        assert failed.returncode == 1
        assert failed.stderr.startswith("Error: no NVIDIA GPU") and "--engine onnxruntime" in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    pictures = {}
    for precision in ("fp32", "fp16"):
        out = tmp_path / f"{precision}.png"
        options = ("--steps", "4", "--seed", "1", "--engine", "onnxruntime", "--precision", precision, "--json")
        done = command("run", bundle, "a small red ring", *options, "-o", out)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["engine"], told["precision"]) == ("onnxruntime", precision)
        pictures[precision] = out.read_bytes()
    assert pictures["fp32"] != pictures["fp16"]
    default = command("run", bundle, "x", "--steps", "1", "--engine", "onnxruntime", "--json", "-o", tmp_path / "d.png")
    assert json.loads(default.stdout)["precision"] == "fp32"


@pytest.mark.slow
def test_the_pictures_of_a_gpu_are_scored_on_the_cpu(planned, bundle_of):
    import subprocess
    import sys

    def run(bundle, *options):
        line = [sys.executable, "-m", "diffoundry.examples.pico.score", str(bundle), "--captions", "8", "--json"]
        return subprocess.run([*line, *options], capture_output=True, text=True)

    exact = json.loads(run(planned[0]).stdout)
    rounded = json.loads(run(planned[0], "--precision", "fp16").stdout)
    assert "psnr_db" not in exact
    assert 35 <= rounded["psnr_db"]["worst"] < 100
    assert abs(rounded["all"] - exact["all"]) <= 0.01
    assert "has no fp16 models: run `diffoundry build" in run(bundle_of("pico"), "--precision", "fp16").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--engine", "onnxruntime", "--precision", "int8"),
            "has the precisions fp16, fp32 for onnxruntime, not 'int8'",
        ),
        (("--engine", "onnxruntime", "--precision", "fp8"), "not 'fp8': choose one of them\n"),  # no processor can
        (("--engine", "npu"), "unknown engine 'npu': choose one of onnxruntime, onnxruntime:cuda"),
        (("--engine", "onnxruntime", "--weight-budget", "1"), "goes with TensorRT plans"),
    ],
)
def test_run_refuses_what_the_bundle_has_not(planned, command, arguments, message):
    failed = command("run", planned[0], "a ring", "--steps", "1", *arguments)
    assert failed.returncode == 1
    assert message in failed.stderr and len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "tensorrt-rtx", "--arch", "sm42"), "does not know the architecture 'sm42'"),
        (("--engine", "tensorrt-rtx", "--arch", "sm89", "--shape", "100x64"), "multiples of 8"),
        (("--arch", "sm89"), "builds no plans"),
        (("--engine", "onnxruntime", "--scan-steps", "4"), "fp32 needs no scan"),
        (("--precision", "fp16", "--scan-steps", "0"), "steps"),
        (("--precision", "fp16", "--scan-prompts", "/no/such/file"), "cannot be read"),
        (("--precision", "fp16", "--min-psnr", "200"), "from 0 to 120 dB"),
        (("--engine", "onnxruntime", "--min-psnr", "20"), "fp32 needs no scan"),
    ],
)
def test_compile_refuses_it_before_any_work_and_leaves_nothing(called, checkpoint_of, tmp_path, arguments, message):
    failed = called("compile", checkpoint_of("pico"), "-o", tmp_path / "b", *arguments)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("Error: ")
    assert list(tmp_path.iterdir()) == []
