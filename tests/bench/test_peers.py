"""Other programs to be timed against: their environments, their questions and answers, and what they draw."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from diffoundry.bench import peers
from diffoundry.bench.peers import peer as known
from diffoundry.bench.session import first_latents
from diffoundry.bench.systems import running
from diffoundry.common.errors import BenchError

making = importlib.import_module("diffoundry.bench.peers.setup")
SCRIPTS = Path(known.__file__).parent
ASKED = {
    "prompt": "a small blue circle",
    "negative_prompt": "a star",
    "steps": 3,
    "guidance": 4.0,
    "width": 64,
    "height": 64,
    "seed": 3,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of environments with none in it, and no GPU."""
    monkeypatch.setenv("DIFFOUNDRY_PEERS", str(tmp_path / "peers"))
    monkeypatch.setattr(making, "_NVIDIA", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "peers"


@pytest.fixture
def here(home, monkeypatch):
    """The environment of `diffusers` is that of the tests."""
    python = known.PEERS["diffusers"].python
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (python.parents[1] / known.WHOLE).write_text("{}")
    monkeypatch.setenv("PATH", os.defpath)


def imported(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for each in ("protocol", name):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return importlib.import_module(name)


def load(checkpoint, work, **more):
    return {"checkpoint": str(checkpoint), "precision": "fp32", "threads": 2, "work": str(work), **more}


def test_diffusers_draws_what_its_pipeline_draws_from_these_latents(here, checkpoint_of, tmp_path):
    checkpoint, count = checkpoint_of("pico"), 2
    latents = first_latents(ASKED["seed"], count, (4, 8, 8))
    np.save(tmp_path / "latents.npy", latents)
    files = {"latents": str(tmp_path / "latents.npy"), "image": str(tmp_path / "image.npy")}
    with running("diffusers") as process:
        answer = process.ask(
            "load", 60, **load(checkpoint, tmp_path, scheduler_class="EulerAncestralDiscreteScheduler")
        )
        assert answer["info"]["device"] == "cpu" and process.versions["torch"]
        answer = process.ask("draw", 60, **ASKED, **files, count=count)
        ended = process.end()
    stages = answer["stages"]
    assert len(stages["steps"]) == ASKED["steps"] - 1 and stages["first_step"] > 0 and stages["after"] > 0
    told = stages["first_step"] + sum(stages["steps"]) + stages["after"]
    assert told == pytest.approx(answer["seconds"]) and ended["peak_rss"] > 10**8

    import torch

    pipeline = DiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    options = {names.get(key, key): value for key, value in ASKED.items() if key != "seed"}
    seeds = [ASKED["seed"] + i for i in range(count)]
    # without latents: it draws its own, and the noise of each step, from the same generators
    images = pipeline(
        **options,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    wanted = np.stack([np.asarray(image) for image in images]).astype(int)
    assert np.abs(np.load(tmp_path / "image.npy") - wanted).max() <= 1  # rounding depends on the number of threads


def test_what_it_cannot_do_is_refused_and_the_next_question_answered(here, checkpoint_of, tmp_path):
    with running("diffusers") as process:
        cases = {
            "give its folder with --checkpoint": load("", tmp_path),
            "not in int8: choose another --precision": load(checkpoint_of("pico"), tmp_path, precision="int8"),
            "not on tpu": load(checkpoint_of("pico"), tmp_path, device="tpu"),
            "nowhere": load(tmp_path / "nowhere", tmp_path),
        }
        for expected, asked in cases.items():
            with pytest.raises(BenchError, match=expected) as refused:
                process.ask("load", 60, **asked)
            assert "\n" not in str(refused.value)
        with pytest.raises(BenchError, match="nothing was loaded"):
            process.ask("draw", 60, **ASKED)
        assert process.ask("load", 60, **load(checkpoint_of("pico"), tmp_path))["seconds"]["load"] > 0


@pytest.mark.slow
def test_a_run_against_diffusers_has_its_ratio_and_its_picture(here, command, bundle_of, checkpoint_of, tmp_path):
    command(
        *("bench", bundle_of("pico"), "--vs", "diffusers,optimum", "--checkpoint", checkpoint_of("pico")),
        *("--scheduler", "euler", "--steps", 3, "--turns", 2, "--cold", 1, "--json", tmp_path / "r.json"),
    )
    report = json.loads((tmp_path / "r.json").read_text())
    ours, theirs, missing = report["systems"]
    assert theirs["error"] is None and theirs["ratio"]["median"] > 0 and len(theirs["turns"]) == 2
    assert report["reference"].startswith("diffusers") and theirs["max_levels"] is None
    assert ours["max_levels"] <= 1 and not ours["changes_picture"]
    assert missing["error"] == "optimum is not set up: run `diffoundry bench --setup optimum`"


def wheel(folder, name, requires=(), files=()):
    """A wheel that pip installs."""
    folder.mkdir(exist_ok=True)
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    contents = {
        **dict(files),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)


@pytest.fixture
def tiny(home, tmp_path, monkeypatch):
    """A peer that needs one wheel of a folder; no index is asked."""
    scripts, wheels = tmp_path / "scripts", tmp_path / "wheels"
    (scripts / "requirements").mkdir(parents=True)
    (scripts / "requirements" / "tiny.txt").write_text("tiny-torch==1.0\n")
    shutil.copy(SCRIPTS / "protocol.py", scripts)
    (scripts / "tiny_peer.py").write_text(
        "import sys, tiny_torch\nprint('{\"ready\": true}', flush=True)\nsys.stdin.read()\n"
    )
    monkeypatch.setattr(known, "HERE", scripts)
    monkeypatch.setitem(known.PEERS, "tiny", known.Peer("Tiny", ("tiny_peer.py",), "tiny", ("fp32",)))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return wheels


@pytest.mark.slow
def test_an_environment_is_made_once_and_in_place_of_an_older_one(tiny, home):
    wheel(tiny, "tiny-torch", files={"tiny_torch.py": ""})
    older, other = home / "tiny-0123456789abcdef", home / "tiny-notes"
    older.mkdir(parents=True)
    other.mkdir()
    with pytest.raises(BenchError, match="tiny is not set up: run `diffoundry bench --setup tiny`"):
        peers.command("tiny")
    folder = peers.setup("tiny")
    assert (folder / known.WHOLE).is_file() and not older.exists() and other.exists()
    with running("tiny") as process:
        assert process.ready_s > 0
    made = (folder / known.WHOLE).stat().st_mtime_ns
    assert peers.setup("tiny") == folder and (folder / known.WHOLE).stat().st_mtime_ns == made


@pytest.mark.slow
@pytest.mark.parametrize(
    "gone", ["bin", pytest.param("lib/python*/site-packages/tiny_torch.py", marks=pytest.mark.slow)]
)
def test_an_environment_that_does_not_start_is_made_anew(gone, tiny, home):
    wheel(tiny, "tiny-torch", files={"tiny_torch.py": ""})
    folder = peers.setup("tiny")
    next(folder.glob(gone)).rename(home / "elsewhere")
    with pytest.raises(BenchError, match="diffoundry bench --setup tiny"), running("tiny"):
        pass
    assert peers.setup("tiny") == folder
    with running("tiny") as process:
        assert process.ready_s > 0


@pytest.mark.slow
def test_cuda_is_not_fetched_for_a_machine_without_a_gpu(tiny, home, monkeypatch):
    wheel(tiny, "tiny-torch", ["nvidia-cublas"], {"tiny_torch.py": ""})
    wheel(tiny, "nvidia-cublas")
    with pytest.raises(BenchError, match="PIP_EXTRA_INDEX_URL"):
        peers.setup("tiny")
    assert not list(home.glob("tiny-*"))
    monkeypatch.setattr(making, "_NVIDIA", (str(tiny),))
    assert peers.setup("tiny").is_dir()


FAILURES = {
    "no such wheel": ({}, "tiny: pip failed: No matching distribution found for tiny-torch==1.0"),
    "an import that fails": (
        {"tiny_torch.py": "raise ImportError('libmagic.so is missing')"},
        "tiny was installed and does not start: ImportError: libmagic.so is missing",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_fails_leaves_nothing(case, tiny, home):
    files, expected = FAILURES[case]
    if files:
        wheel(tiny, "tiny-torch", files=files)
    with pytest.raises(BenchError, match=expected) as failed:
        peers.setup("tiny")
    assert "\n" not in str(failed.value) and not list(home.glob("tiny-*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFOUNDRY_PEERS", str(tmp_path / "file"))
    with pytest.raises(BenchError, match=f"cannot be made in {tmp_path / 'file'}"):
        peers.setup("sdcpp")


@pytest.mark.parametrize("name", ["setup", "command", "needs_checkpoint", "precisions"])
def test_an_unknown_peer_is_told(name):
    with pytest.raises(BenchError, match="unknown peer 'x': choose one of diffusers, compile"):
        getattr(peers, name)("x")


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("made", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler])
def test_stable_diffusion_cpp_is_given_the_noise_levels_of_diffusers(made, karras, spacing, monkeypatch):
    script = imported("sdcpp_peer", monkeypatch)
    own = {} if made is EulerAncestralDiscreteScheduler else {"use_karras_sigmas": karras}
    scheduler = made(**BETAS, timestep_spacing=spacing, steps_offset=1, **own)
    for steps in (4, 20):
        scheduler.set_timesteps(steps)
        found = script._sigmas({"_class_name": made.__name__, **scheduler.config}, steps)
        assert np.allclose(found, scheduler.sigmas.numpy(), rtol=2e-5)


def test_stable_diffusion_cpp_refuses_what_it_would_end_over(checkpoint_of, monkeypatch):
    script = imported("sdcpp_peer", monkeypatch)
    refused = importlib.import_module("protocol").Refused
    with pytest.raises(refused, match=r"not one of \[48, 96\] channels"):
        script._check(checkpoint_of("pico"))
    for config, expected in {
        "HeunDiscreteScheduler": "it has no HeunDiscreteScheduler: give --scheduler euler, euler_a or dpm",
        "EulerDiscreteScheduler": "no prediction_type=v_prediction, epsilon alone",
    }.items():
        with pytest.raises(refused, match=expected):
            script._method({"_class_name": config, "prediction_type": "v_prediction"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusers", "optimum", "openvino-genai"])
def test_a_peer_in_its_own_environment_draws_our_picture(name, command, bundle_of, checkpoint_of, tmp_path):
    command("bench", "--setup", name)
    command(
        *("bench", bundle_of("pico"), "--vs", name, "--checkpoint", checkpoint_of("pico"), "--scheduler", "euler"),
        *("--precision", "fp32", "--turns", 2, "--cold", 1, "--json", tmp_path / "r.json"),
    )
    theirs = json.loads((tmp_path / "r.json").read_text())["systems"][1]
    assert theirs["error"] is None and (theirs["max_levels"] or 0) <= 2
