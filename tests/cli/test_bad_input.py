"""Every bad input gives one clear line on standard error, exit code 1, and leaves nothing half-written."""

from __future__ import annotations

import functools
import hashlib
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


def test_a_folder_that_is_no_checkpoint(called, tmp_path):
    (tmp_path / "x").mkdir()
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "no model_index.json", "not a diffusers checkpoint")
    nothing_left(tmp_path, "x")


def test_a_checkpoint_that_does_not_exist(called, tmp_path):
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "does not exist", "hub id")


def test_a_file_instead_of_a_folder(called, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"x")
    fails(called("compile", tmp_path / "x.zip", "-o", tmp_path / "b"), "is a file", "folder", ".safetensors")
    nothing_left(tmp_path, "x.zip")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    fails(called("compile", tmp_path / "x.safetensors", "-o", tmp_path / "b"), "truncated", "download it again")
    nothing_left(tmp_path, "x.zip", "x.safetensors")


def test_an_unknown_pipeline_class(called, tmp_path, checkpoint_of):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    (tmp_path / "x/model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "KandinskyPipeline", "StableDiffusionPipeline")
    nothing_left(tmp_path, "x")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(called, tmp_path, checkpoint_of, keep):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    path = tmp_path / "x/unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "truncated", "download it again")
    nothing_left(tmp_path, "x")


def test_weights_that_lack_a_tensor(called, tmp_path, checkpoint_of):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    path = tmp_path / "x/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path)
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "decoder.conv_in.weight", "incomplete")


def test_a_missing_component(called, tmp_path, checkpoint_of):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    shutil.rmtree(tmp_path / "x/vae")
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "'vae'", "incomplete")


def test_output_into_a_folder_that_does_not_exist(called, tmp_path, checkpoint_of):
    fails(called("compile", checkpoint_of("pico"), "-o", tmp_path / "no" / "b"), "does not exist", "--output")


def test_output_over_something_that_is_no_bundle(called, tmp_path, checkpoint_of):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    fails(called("compile", checkpoint_of("pico"), "-o", tmp_path / "b"), "is no bundle")
    assert (tmp_path / "b" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_disk_full_during_compile(tmp_path, checkpoint_of):
    """A limit on the size of files stands in for the full disk: the write fails in the middle of the text encoder."""
    line = [sys.executable, "-m", "diffoundry", "compile", str(checkpoint_of("pico")), "-o", str(tmp_path / "b")]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert "Error: no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_an_interrupt_that_a_library_takes_for_an_error_of_its_own_is_one(tmp_path, checkpoint_of):
    """As diffusers does while it reads weights: whatever is raised there is a file that cannot be read."""
    code = (
        "import signal\n"
        "def read(*arguments, **options):\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException: raise OSError('Unable to load weights') from None\n"
        "from diffoundry.export import loading; loading.find = read\n"
        "from diffoundry.cli import main; main()"
    )
    line = [sys.executable, "-c", code, "compile", str(checkpoint_of("pico")), "-o", str(tmp_path / "b")]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=listen)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: interrupted; what was finished is kept")


@pytest.mark.slow
def test_a_stopped_compile_goes_on_where_it_was(called, tmp_path, checkpoint_of):
    """Interrupted, then killed at a later component, then left to end."""
    line = [sys.executable, "-m", "diffoundry", "compile", str(checkpoint_of("pico")), "-o", str(tmp_path / "b")]
    line += ["--tasks", "txt2img"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    stages = tmp_path / ".b.part" / ".stages"
    written: dict[str, int] = {}
    for how, after in ((signal.SIGINT, "text_encoder"), (signal.SIGKILL, "vae_decoder")):
        stopped = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        while not (stages / f"{after}.json").exists():
            assert stopped.poll() is None
            time.sleep(0.05)
        stopped.send_signal(how)
        _, stderr = stopped.communicate()
        if how == signal.SIGINT:
            assert stopped.returncode == 1
            assert "Error: interrupted; what was finished is kept" in stderr
            assert "Traceback" not in stderr
        assert not (tmp_path / "b").exists()
        found = {path.name: path.stat().st_mtime_ns for path in stages.iterdir()}
        assert written.items() < found.items()  # what was finished before is not made again
        written = found
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, at in written.items():
        assert (tmp_path / "b" / name.removesuffix(".json") / "model.onnx").stat().st_mtime_ns <= at
    assert (tmp_path / "b/unet/model.onnx").stat().st_mtime_ns > max(written.values())
    nothing_left(tmp_path, "b")
    assert called("verify", tmp_path / "b").returncode == 0


def test_files_that_are_not_the_bundles_are_not_lost(called, tmp_path, checkpoint_of, copied):
    (copied / "mine.png").write_bytes(b"a picture")
    fails(called("compile", checkpoint_of("pico"), "-o", copied), "mine.png", "would be lost")
    shutil.copytree(checkpoint_of("pico"), copied / "source")
    fails(called("compile", copied / "source", "-o", copied), "would overwrite the checkpoint")
    assert (copied / "mine.png").exists()


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("unet/config.json", {"cross_attention_dim": None}, "cross_attention_dim"),
        ("text_encoder/config.json", {"num_attention_heads": 7}, "text_encoder/config.json"),
        ("vae/config.json", {"block_out_channels": []}, "vae"),
        ("text_encoder/config.json", {"max_position_embeddings": "x"}, "config.json"),
        ("text_encoder/config.json", {"vocab_size": 10}, "not of one checkpoint"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "bogus"}, "scheduler configuration"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1}, "windows of 1"),
    ],
)
def test_damaged_configurations(called, tmp_path, checkpoint_of, file, change, word):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    config = json.loads((tmp_path / "x" / file).read_text())
    (tmp_path / "x" / file).write_text(json.dumps({**config, **change}))
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), word)


def test_an_empty_tokenizer_folder(called, tmp_path, checkpoint_of):
    shutil.copytree(checkpoint_of("pico"), tmp_path / "x")
    for path in (tmp_path / "x/tokenizer").iterdir():
        path.unlink()
    fails(called("compile", tmp_path / "x", "-o", tmp_path / "b"), "holds neither tokenizer.json nor vocab.json")
    nothing_left(tmp_path, "x")


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "100"], ["width must be a multiple of 8", "found 100", "try 96"]),
        (["--height", "-8"], ["height must be a whole number from 1 to 16384"]),
        (["--width", "0"], ["width must be a whole number"]),
        (["--width", "1e9"], None),
        (["--scheduler", ""], ["unknown scheduler ''"]),
        (["--threads", "3000000000"], None),
        (["-n", "a ring", "--guidance", "1"], ["--negative-prompt has no effect without guidance"]),
        (["--guidance", "1e39"], ["guidance must be a number from 0 to 1e+06"]),
        (["--count", "20000000"], ["count must be a whole number from 1 to 4096"]),
        (["-o", ".png"], ["must be a name that ends in .png"]),
        (["-o", "x" * 300 + ".png"], ["too long"]),
        (["--scheduler", "eular"], ["unknown scheduler 'eular'", "did you mean 'euler'"]),
        (["--steps", "0"], ["steps must be a whole number from 1"]),
        (["--steps", "1000", "--scheduler", "dpm++2m"], ["no 1000 distinct steps", "ask for fewer"]),
        (["--steps", "2000"], ["steps must be between 1 and 1000"]),
        (["--guidance", "nan"], ["guidance must be a number"]),
        (["--guidance", "-1"], ["guidance must be a number"]),
        (["--guidance", "inf"], ["guidance must be a number"]),
        (["--guidance-interval", "0.9", "0.1"], ["guidance interval"]),
        (["--skip-guidance-layers", "1"], ["--skip-guidance-layers has no effect on this bundle"]),
        (["--skip-guidance-layers", "-1"], None),
        (["--skip-layer-guidance-stop", "0.5"], ["goes with --skip-guidance-layers: give both"]),
        (["--seed", str(2**64)], ["seed must be a whole number from -9223372036854775808 to 18446744073709551615"]),
        (["--seed", str(2**64 - 1), "--count", "3"], ["smaller seed, 18446744073709551613 at most"]),
        (["--padding-mask-crop", "8"], ["--padding-mask-crop has no effect without a mask"]),
        (["--clip-skip", "9"], ["--clip-skip must be from 0 to 1"]),
        (["--negative-2", "a"], ["--negative-prompt-2 goes with --negative-prompt"]),
        (["-n", "((a ring))", "--weights"], ["--negative-prompt, character 1", "write (words)1.21"]),
        (["--count", "0"], ["count must be a whole number from 1"]),
        (["--engine", "onnxruntime:cuda"], ["'cuda'", "or use the engine onnxruntime"]),
        (["--engine", "npu"], ["unknown engine 'npu'", "onnxruntime, onnxruntime:cuda"]),
        (["-o", "nowhere/out.png"], ["nowhere does not exist"]),
        (["-o", "out.jpg"], ["must be a name that ends in .png"]),
    ],
)
def test_a_run_that_cannot_be(command, bundle_of, tmp_path, options, words):
    done = command("run", bundle_of("pico"), "a red star", "--steps", "2", *options, cwd=tmp_path)
    if words is None:
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    else:
        fails(done, *words)
    nothing_left(tmp_path)


def test_one_of_several_outputs_is_a_folder(command, bundle_of, tmp_path):
    (tmp_path / "o-1.png").mkdir()
    done = command("run", bundle_of("pico"), "x", "--steps", 1, "--count", 2, "-o", tmp_path / "o.png")
    fails(done, "o-1.png is a folder")
    nothing_left(tmp_path, "o-1.png")


def test_a_prompt_that_is_no_text(command, bundle_of, tmp_path):
    done = command("run", bundle_of("pico"), b"\xff\xfe".decode("utf-8", "surrogateescape"), cwd=tmp_path)
    fails(done, "prompt must be a string of text")


def test_a_path_that_is_too_long(command, bundle_of):
    fails(command("run", "x" * 5000, "a red star"), "File name too long", "check the path")


def test_wrong_usage_is_exit_code_2(command, bundle_of):
    assert command("run", bundle_of("pico"), "x", "--stepps", "3").returncode == 2
    assert command("fly").returncode == 2


@pytest.mark.parametrize("prompt", ["-star", "-a red star", "-nice", "--star in the sky"])
def test_a_prompt_that_begins_with_a_dash(called, bundle_of, prompt):
    done = called("run", bundle_of("pico"), prompt, "--steps", 1)
    assert done.returncode == 2
    assert "run BUNDLE -- '-star'" in done.stderr
    assert "Traceback" not in done.stderr


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


def test_a_manifest_of_a_newer_schema(called, copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    fails(called("run", copied, "x"), "schema version 99", "upgrade diffoundry")
    fails(called("inspect", copied), "schema version 99")


def rehash(bundle, *names):
    """Put the present hashes of `names` into the manifest, as somebody would who tampers with care."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name in names:
        manifest["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": "x"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**12},
        {"beta_start": None},
        {"beta_start": -0.1},
        {"trained_betas": [0.1]},
        {"steps_offset": -500, "timestep_spacing": "leading"},
        {"prediction_type": "nonsense"},
        {"solver_type": "bogus"},
        {"_class_name": "NoSuchScheduler"},
    ],
)
def test_a_damaged_scheduler_configuration(called, copied, change):
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    rehash(copied, "scheduler/scheduler_config.json")
    fails(called("run", copied, "x"), "")


INPUTS = {"sample": "latents", "timestep": "timestep", "encoder_hidden_states": "text.hidden"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wiring": {"text": [], "inputs": {"x": "ray"}}}, ["ray", "upgrade diffoundry"]),
        ({"tasks": ["upscale"]}, ["upscale", "txt2img"]),
        ({"precision": "int3"}, ["'int3'"]),
        ({"wiring": {"text": [], "inputs": INPUTS}}, ["'wiring.text' is empty"]),
        ({"components": {}}, ["components must not be empty"]),
        ({"files": {}}, ["no hash for scheduler/scheduler_config.json"]),
    ],
)
def test_a_manifest_that_vouches_for_too_little(called, copied, change, words):
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps({**manifest, **change}))
    fails(called("run", copied, "x"), *words)
    fails(called("verify", copied), *words)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("wiring", "text", 0, "component"), "step", "no component 'step' of the role text"),
        (("wiring", "text", 0, "hidden"), "x", "do not agree on 'x'"),
        (("wiring", "text", 0, "skips"), ["x"], "do not agree on 'x'"),
        (("components", "unet", "variants", "fp32/onnx", "model"), "", "no hash for the model ''"),
        (("latents", "shift_factor"), 1e300, "latents.shift_factor must be from -1e+30 to 1e+30"),
        (("latents", "downscale"), 4, "must make (3, 32, 32)"),
        (("wiring", "inputs", "sample"), "\x1b[31m\u202e", "reads \\x1b[31m\\u202e; this version"),
    ],
)
def test_a_manifest_of_other_models(called, copied, path, value, words):
    manifest = json.loads((copied / "bundle.json").read_text())
    part = manifest
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (copied / "bundle.json").write_text(json.dumps(manifest))
    fails(called("run", copied, "x", "--steps", 1, "--width", 32, "--height", 32, "-o", copied.parent / "o.png"), words)
    assert not (copied.parent / "o.png").exists()


def test_a_name_in_a_bundle_is_shown_and_does_nothing(called, copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["family"] = "\x1b]0;mine\x07"
    manifest["versions"] = {"torch": "\x9b31m"}
    (copied / "bundle.json").write_text(json.dumps(manifest))
    done = called("inspect", copied)
    assert "\\x1b]0;mine\\x07 from" in done.stdout and "\x1b" not in done.stdout and "\x9b" not in done.stdout


def test_a_reference_without_outputs_verifies_nothing(command, copied):
    import numpy as np

    name = "reports/reference/unet.npz"
    with np.load(copied / name) as archive:
        inputs = {key: archive[key] for key in archive.files if key.startswith("in.")}
    np.savez(copied / name, **inputs)
    rehash(copied, name)
    done = command("verify", copied)
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "does not hold every output of unet" in done.stderr


@pytest.mark.parametrize("where", ["component", "files", "tokenizer"])
def test_a_path_that_leaves_the_bundle(command, copied, where):
    text = (copied / "bundle.json").read_text()
    manifest = json.loads(text)
    if where == "component":
        variant = manifest["components"]["unet"]["variants"]["fp32/onnx"]
        variant["files"]["../../secret.onnx"] = variant["files"].pop("unet/model.onnx")
        variant["model"] = "../../secret.onnx"
    elif where == "files":
        manifest["files"]["/etc/passwd"] = "0" * 64
    else:
        manifest["tokenizers"]["../tokenizer"] = manifest["tokenizers"].pop("tokenizer")
        manifest["wiring"]["text"][0]["tokenizer"] = "../tokenizer"
    (copied / "bundle.json").write_text(json.dumps(manifest))
    fails(command("run", copied, "x"), "leaves the bundle")


def test_memory_that_is_wanting_is_one_line():
    program = """
import sys
from diffoundry.cli import cli, main
@cli.command()
def fill():
    bytearray(1 << 62)
sys.argv = ["diffoundry", "fill"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    fails(done, "out of memory: end other programs that hold memory")
