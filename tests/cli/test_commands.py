"""What the verbs print and write when all is well."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

COMPONENTS = {"text_encoder", "unet", "vae_encoder", "vae_decoder", "step"}
PROMPT = "a large red star at the left on a navy background"


def test_run_prints_one_json_object(command, bundle_of, tmp_path):
    done = command("run", bundle_of("pico"), PROMPT, "--seed", 3, "--count", 2, "--json", "-o", tmp_path / "o.png")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [image["seed"] for image in told["images"]] == [3, 4]
    assert [image["path"] for image in told["images"]] == [str(tmp_path / "o-0.png"), str(tmp_path / "o-1.png")]
    assert (told["engine"], told["precision"]) == ("onnxruntime", "fp32")
    assert set(told["seconds"]) == {"text", "load", "loop", "decoder"}
    assert done.stderr == ""


def test_the_png_tells_how_to_make_it_again(command, bundle_of, tmp_path):
    options = ["--steps", 6, "--guidance", 4.5, "--scheduler", "ddpm", "--width", 72, "--count", 2, "-n", "a ring"]
    assert command("run", bundle_of("pico"), PROMPT, *options, "-o", tmp_path / "a.png").returncode == 0
    made = json.loads(Image.open(tmp_path / "a-1.png").text["diffoundry"])
    again = ["--steps", made["steps"], "--guidance", made["guidance"]["scale"], "--scheduler", made["scheduler"]]
    again += [
        "--width",
        made["width"],
        "--height",
        made["height"],
        "--seed",
        made["seed"],
        "-n",
        made["negative_prompt"],
    ]
    assert command("run", bundle_of("pico"), made["prompt"], *again, "-o", tmp_path / "b.png").returncode == 0
    first, second = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a-1.png", "b.png"))
    assert np.abs(first - second).max() <= 1


def test_options_are_known_by_the_names_of_diffusers(command, bundle_of, tmp_path):
    """And a prompt may begin with a dash, and a seed be negative."""
    ours = ["--steps", 2, "--guidance", 3, "--negative", "a ring"]
    theirs = ["--num-inference-steps", 2, "--guidance-scale", 3, "--negative-prompt", "a ring"]
    small = ["--width", 32, "--height", 32, "--seed", -1, "--json"]
    told = [
        json.loads(command("run", bundle_of("pico"), *names, *small, "-o", tmp_path / name, "--", "-a star").stdout)
        for name, names in (("a.png", ours), ("b.png", theirs))
    ]
    assert told[0]["request"] == told[1]["request"]
    assert (told[0]["request"]["prompt"], told[0]["images"][0]["seed"]) == ("-a star", -1)
    assert json.loads(Image.open(tmp_path / "a.png").text["diffoundry"])["seed"] == -1
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_inspect_shows_components_and_parity(command, bundle_of):
    done = command("inspect", bundle_of("pico"), "--json")
    told = json.loads(done.stdout)
    assert set(told["components"]) == COMPONENTS
    assert all(case["max_abs_error"] < 1e-3 for part in told["parity"].values() for case in part["cases"])
    assert told["engines"] == []
    shown = command("inspect", bundle_of("pico")).stdout
    assert "unet" in shown


def test_verify_runs_each_component(command, bundle_of):
    told = json.loads(command("verify", bundle_of("pico"), "--json").stdout)
    assert {row["component"] for row in told["components"]} == COMPONENTS
    assert all(0 < row["max_abs_error"] <= row["allowed"] for row in told["components"])


def test_a_truncated_prompt_is_reported(command, bundle_of, tmp_path):
    long = "star " * 90 + "omega"
    done = command("run", bundle_of("pico"), long, "--steps", 1, "-o", tmp_path / "o.png")
    assert done.returncode == 0
    assert "Warning: prompt is too long" in done.stderr
    assert "omega" in done.stderr


def test_every_verb_has_help(command):
    for verb in ("compile", "run", "inspect", "verify"):
        done = command(verb, "--help")
        assert done.returncode == 0
        assert "Usage: " in done.stdout
    assert command("--version").stdout.startswith("diffoundry ")


@pytest.mark.parametrize("module", ["torch", "onnxruntime", "numpy", "rich"])
def test_importing_the_package_imports_nothing_heavy(module):
    code = f"import diffoundry, sys; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
