"""Every bad input gives one clear line on standard error, exit code 1, and leaves nothing half-written."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("compile:", "run:"))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])


def nothing_left(folder, *allowed: str) -> None:
    assert {path.name for path in folder.iterdir()} <= set(allowed)


# --- compile ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint(command, tmp_path):
    (tmp_path / "x").mkdir()
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "no model_index.json", "not a diffusers checkpoint")
    nothing_left(tmp_path, "x")


def test_a_checkpoint_that_does_not_exist(command, tmp_path):
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "does not exist", "hub id")


def test_a_file_instead_of_a_folder(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    fails(command("compile", tmp_path / "x.safetensors", "-o", tmp_path / "b"), "is a file", "folder")


def test_an_unknown_pipeline_class(command, tmp_path, checkpoint_of):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    (tmp_path / "x/model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "KandinskyPipeline", "StableDiffusionPipeline")
    nothing_left(tmp_path, "x")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(command, tmp_path, checkpoint_of, keep):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    path = tmp_path / "x/unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "truncated", "download it again")
    nothing_left(tmp_path, "x")


def test_weights_that_lack_a_tensor(command, tmp_path, checkpoint_of):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    path = tmp_path / "x/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path)
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "decoder.conv_in.weight", "incomplete")


def test_a_missing_component(command, tmp_path, checkpoint_of):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    shutil.rmtree(tmp_path / "x/vae")
    fails(command("compile", tmp_path / "x", "-o", tmp_path / "b"), "'vae'", "incomplete")


def test_output_into_a_folder_that_does_not_exist(command, tmp_path, checkpoint_of):
    fails(command("compile", checkpoint_of("pico"), "-o", tmp_path / "no" / "b"), "does not exist", "--output")


def test_output_over_something_that_is_no_bundle(command, tmp_path, checkpoint_of):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    fails(command("compile", checkpoint_of("pico"), "-o", tmp_path / "b"), "is no bundle")
    assert (tmp_path / "b" / "thesis.txt").read_text() == "years of work"


def test_disk_full_during_compile(tmp_path, checkpoint_of):
    """A limit on the size of files stands in for the full disk: the write fails in the middle of the U-Net."""
    line = [sys.executable, "-m", "diffoundry", "compile", str(checkpoint_of("pico")), "-o", str(tmp_path / "b")]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))

    done = subprocess.run(line, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert done.returncode == 1
    assert "Error: no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_compile_goes_on_where_it_was(tmp_path, checkpoint_of, how):
    line = [sys.executable, "-m", "diffoundry", "compile", str(checkpoint_of("pico")), "-o", str(tmp_path / "b")]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    first = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    stages = tmp_path / ".b.part" / ".stages"
    deadline = time.monotonic() + 240
    while not (stages / "vae_decoder.json").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(how)
    _, stderr = first.communicate(timeout=60)
    if how == signal.SIGINT:
        assert first.returncode == 1
        assert "Error: interrupted; what was finished is kept" in stderr
        assert "Traceback" not in stderr
    assert not (tmp_path / "b").exists()
    written = {path.name: path.stat().st_mtime_ns for path in stages.iterdir()}
    assert "text_encoder.json" in written
    second = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    for name, at in written.items():
        assert (tmp_path / "b/reports/stages" / name).exists()
        assert (tmp_path / "b/text_encoder/model.onnx").stat().st_mtime_ns <= at or name != "text_encoder.json"
    nothing_left(tmp_path, "b")
    assert subprocess.run([*line[:3], "verify", str(tmp_path / "b")], capture_output=True).returncode == 0


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "100"], ["width must be a multiple of 8", "found 100", "try 96"]),
        (["--height", "-8"], ["height must be a multiple of 8"]),
        (["--width", "0"], ["width must be a multiple of 8"]),
        (["--scheduler", "eular"], ["unknown scheduler 'eular'", "did you mean 'euler'"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--steps", "2000"], ["steps must be between 1 and 1000"]),
        (["--guidance", "nan"], ["guidance must be a number"]),
        (["--guidance", "-1"], ["guidance must be a number"]),
        (["--guidance", "inf"], ["guidance must be a number"]),
        (["--guidance-interval", "0.9", "0.1"], ["guidance interval"]),
        (["--seed", "-1"], ["seed must be a whole number"]),
        (["--count", "0"], ["count", "at least 1"]),
        (["--provider", "cuda"], ["'cuda'", "--provider cpu"]),
        (["--provider", "npu"], ["unknown provider 'npu'", "cpu, cuda, tensorrt"]),
        (["-o", "nowhere/out.png"], ["nowhere does not exist"]),
        (["-o", "out.jpg"], ["must end in .png"]),
    ],
)
def test_a_run_that_cannot_be(command, bundle_of, tmp_path, options, words):
    fails(command("run", bundle_of("pico"), "a red star", "--steps", "2", *options, cwd=tmp_path), *words)
    nothing_left(tmp_path)


def test_wrong_usage_is_exit_code_2(command, bundle_of):
    assert command("run", bundle_of("pico"), "x", "--stepps", "3").returncode == 2
    assert command("fly").returncode == 2


def test_a_bundle_that_is_not_there(command, tmp_path):
    fails(command("run", tmp_path / "b", "x"), "is not a folder")


def test_a_checkpoint_is_not_a_bundle(command, checkpoint_of):
    fails(command("run", checkpoint_of("pico"), "x"), "diffoundry compile")


@pytest.mark.parametrize(
    "file",
    ["unet/model.onnx", "text_encoder/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"],
)
def test_a_file_changed_after_it_was_built(command, copied, tmp_path, file):
    path = copied / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    fails(command("run", copied, "x", "-o", tmp_path / "o.png"), "changed after the bundle was built", file)
    fails(command("verify", copied), "changed after the bundle was built", file)
    assert not (tmp_path / "o.png").exists()


def test_a_truncated_model(command, copied, tmp_path):
    path = copied / "unet/model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    fails(command("run", copied, "x", "-o", tmp_path / "o.png"), "changed after the bundle was built")


def test_a_missing_file(command, copied):
    (copied / "vae_decoder/model.onnx").unlink()
    fails(command("verify", copied), "vae_decoder/model.onnx is missing")


def test_a_manifest_of_a_newer_schema(command, copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    fails(command("run", copied, "x"), "schema version 99", "upgrade diffoundry")
    fails(command("inspect", copied), "schema version 99")


@pytest.mark.parametrize("where", ["component", "files", "tokenizer"])
def test_a_path_that_leaves_the_bundle(command, copied, where):
    text = (copied / "bundle.json").read_text()
    manifest = json.loads(text)
    if where == "component":
        files = manifest["components"]["unet"]["files"]
        files["../../secret.onnx"] = files.pop("unet/model.onnx")
        manifest["components"]["unet"]["model"] = "../../secret.onnx"
    elif where == "files":
        manifest["files"]["/etc/passwd"] = "0" * 64
    else:
        manifest["prompts"]["text_encoder"]["tokenizer"] = "../tokenizer"
    (copied / "bundle.json").write_text(json.dumps(manifest))
    fails(command("run", copied, "x"), "leaves the bundle")


def test_a_damaged_engine_is_built_again(command, copied, tmp_path):
    for path in (copied / "engines").glob("*/model.onnx*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = command("run", copied, "a red star", "--steps", "1", "-o", tmp_path / "o.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o.png").exists()
