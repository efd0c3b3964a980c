"""The verb `schedulers`, the options of `run` that choose a schedule, and schedulers traced by `compile`."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffoundry import Request
from diffoundry.runtime.pipeline import load
from diffoundry.runtime.schedule import Schedules
from diffoundry.runtime.schedulers import SAMPLERS, make_table

PROMPT = "a large red star at the left on a navy background"
OWN = """
    import torch

    class OwnScheduler:
        init_noise_sigma = 1.0

        def __init__(self, beta_start=0.0001, beta_end=0.02):
            self.bar = torch.cumprod(1 - torch.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2, 0)

        def set_timesteps(self, count):
            self.timesteps = torch.linspace(999, 0, count).round().long()
            self.k = 0

        def step(self, output, timestep, x):
            self.k += 1
            now = self.bar[timestep]
            then = self.bar[self.timesteps[self.k]] if self.k < len(self.timesteps) else torch.ones(())
            image = (x - (1 - now) ** 0.5 * output) / now**0.5
            return (then**0.5 * image + (1 - then) ** 0.5 * output,)
"""


def test_every_scheduler_is_listed_with_its_paper(command):
    lines = command("schedulers").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SAMPLERS)
    for line, sampler in zip(lines, SAMPLERS.values(), strict=True):
        assert sampler.paper in line
        assert sampler.class_name in line
        assert hasattr(diffusers, sampler.class_name)
    told = json.loads(command("schedulers", "--json").stdout)
    assert told["unipc"]["class"] == "UniPCMultistepScheduler"


def test_the_table_of_a_scheduler_is_shown(command):
    told = json.loads(command("schedulers", "euler", "--steps", 5, "--json").stdout)
    assert len(told["weights"]) == 5
    assert told["init_scale"] == pytest.approx(14.6146, abs=1e-3)
    shown = command("schedulers", "euler", "--steps", 5, "--start", 3).stdout
    assert "2 calls" in shown
    assert "249.75" in shown
    options = ["--scheduler-option", "use_karras_sigmas=true"]
    karras = json.loads(command("schedulers", "euler", "--steps", 5, "--json", *options).stdout)
    assert karras["levels"][1] != told["levels"][1]


def test_a_schedule_that_shifts_with_the_size_is_that_of_the_default_size(called, bundle_of):
    bundle = bundle_of("flux-dev-small")
    told = json.loads(called("schedulers", "flow-euler", "--bundle", bundle, "--steps", 5, "--json").stdout)
    pipe = load(bundle)
    side = pipe.bundle.manifest.default_width
    job = pipe._jobs.make(Request("a star", steps=5, width=side, height=side, scheduler="flow-euler"))
    assert np.array_equal(told["timesteps"], job.table.timesteps)
    other = pipe._jobs.make(Request("a star", steps=5, width=64, height=64, scheduler="flow-euler"))
    assert not np.array_equal(told["timesteps"], other.table.timesteps)
    own = ["--scheduler-option", "mu=0.3", "--json"]
    assert json.loads(called("schedulers", "flow-euler", "--bundle", bundle, "--steps", 5, *own).stdout) != told


def test_a_bundle_lends_its_noise_schedule(command, copied):
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.05}))
    changed = command("schedulers", "ddim", "--bundle", copied)
    assert changed.returncode == 1
    assert "changed after the bundle was built" in changed.stderr
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["files"]["scheduler/scheduler_config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copied / "bundle.json").write_text(json.dumps(manifest))
    own, common = (
        json.loads(command("schedulers", "ddim", "--json", *more).stdout) for more in (["--bundle", copied], [])
    )
    assert own["levels"] != common["levels"]


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_the_schedule_is_plotted(command, tmp_path, name):
    done = command("schedulers", "dpm++2m", "--steps", 12, "--plot", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).stat().st_size > 5000
    if name.endswith(".png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 20


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["eular"], 1, ["did you mean 'euler'"]),
        (["euler", "--steps", 0], 1, ["steps must be between 1"]),
        (["euler", "--start", 20], 1, ["first step must be between 0 and 19"]),
        (["euler", "--scheduler-option", "use_karas_sigmas=1"], 1, ["did you mean 'use_karras_sigmas'"]),
        (["euler", "--scheduler-option", "karras"], 2, ["takes KEY=VALUE"]),
        (["euler", "--scheduler-option", "use_karras_sigmas=off"], 1, ["must be true or false, found 'off'"]),
        (["euler", "--scheduler-option", "s_churn=abc"], 1, ["s_churn must be a number from 0"]),
        (["euler-karras", "--scheduler-option", "sigma_max=-1"], 1, ["sigma_max must be a number"]),
        (["euler-karras", "--scheduler-option", "sigma_min=1000"], 1, ["must not be above sigma_max"]),
        (["ddim", "--scheduler-option", "num_train_timesteps=999.7"], 1, ["must be a whole number"]),
        (["ddim", "--scheduler-option", "eta=" + "[" * 100000], 1, ["eta must be a number"]),
        (["ddim", "--scheduler-option", "eta=0", "--scheduler-option", "eta=1"], 2, ["given twice"]),
        (["--start", 5], 2, ["name the scheduler"]),
        (["euler", "--plot", "plot.gif"], 1, [".png or .svg"]),
        (["euler", "--plot", "nowhere/plot.png"], 1, ["does not exist"]),
        (["--plot", "plot.png"], 2, ["name the scheduler"]),
        (["euler", "--bundle", "nowhere"], 1, ["not a folder"]),
    ],
)
def test_bad_requests_are_refused(command, options, code, words):
    done = command("schedulers", *options)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) <= 4
    assert all(word in done.stderr for word in words), done.stderr


def latents_of(pipe, **options):
    return pipe(PROMPT, seed=3, **options).latents


def test_each_option_of_run_changes_the_image(command, bundle_of, tmp_path):
    def pixels(*options):
        done = command("run", bundle_of("pico"), PROMPT, "--seed", 3, *options, "-o", tmp_path / "o.png")
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(tmp_path / "o.png")).astype(int)

    base = ["--scheduler", "ddim", "--steps", 4]
    plain = pixels(*base)
    for options in (
        [*base, "--scheduler-option", "eta=1"],
        [*base, "--guidance-rescale", 0.9],
        [*base, "--rng", "cuda"],
        ["--scheduler", "ddpm", "--timesteps", "999,700,300,20"],
        ["--scheduler", "euler", "--sigmas", "14,5,1,0.1,0"],
    ):
        assert (pixels(*options) != plain).any(), options
    made = json.loads(Image.open(tmp_path / "o.png").text["diffoundry"])
    assert made["sigmas"] == [14, 5, 1, 0.1, 0]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--timesteps", "999,a"], 2, ["takes numbers"]),
        (["--scheduler", "ddim", "--timesteps", "999,500"], 1, ["timesteps"]),
        (["--timesteps", "999", "--sigmas", "3,0"], 1, ["give one of them"]),
        (["--rng", "mps"], 2, ["mps"]),
        (["--steps", "7", "--scheduler", "ddpm", "--timesteps", "900,500,10"], 2, ["leave --steps out"]),
        (["--guidance", "1", "--guidance-rescale", "0.7"], 1, ["no effect without guidance"]),
        (["--rng", "cuda", "--seed", str(2**64 - 1), "--count", "2"], 1, ["smaller seed"]),
        (["--guidance-rescale", "1.5"], 1, ["rescale must be a number from 0 to 1"]),
        (["--scheduler", "euler", "--scheduler-option", "eta=1"], 1, ["euler has no scheduler option 'eta'"]),
    ],
)
def test_bad_schedules_are_refused(command, bundle_of, tmp_path, options, code, words):
    done = command("run", bundle_of("pico"), PROMPT, *options, "-o", tmp_path / "o.png")
    assert done.returncode == code
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "o.png").exists()


def test_a_seed_of_a_gpu_gives_the_noise_of_that_gpu(bundle_of):
    pipe = load(bundle_of("pico"))
    assert not np.allclose(latents_of(pipe, steps=2), latents_of(pipe, steps=2, rng="cuda"), atol=1e-2)


@pytest.mark.slow
def test_a_scheduler_of_ones_own_is_traced_and_run(command, checkpoint_of, bundle_of, copied, tmp_path):
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    options = ["--trace-scheduler", "own:OwnScheduler", "--steps", "6,8"]
    done = command("compile", checkpoint_of("pico"), "-o", copied, *options, env=environment)
    assert done.returncode == 0, done.stderr
    pipe = load(copied)
    # it is DDIM on evenly spaced timesteps; DDIM steps back by 1000 // 8 instead, so its own code is the reference
    found = latents_of(pipe, scheduler="OwnScheduler", steps=8)
    assert np.isfinite(found).all()
    table = make_table(
        {**Schedules(pipe.bundle).config, "timestep_spacing": "linspace", "set_alpha_to_one": True}, 8, "ddim"
    )
    np.testing.assert_array_equal(
        table.timesteps, Schedules(pipe.bundle).table(_steps(8), "txt2img", "OwnScheduler").timesteps
    )
    refused = command("run", copied, PROMPT, "--scheduler", "OwnScheduler", "--steps", 7, "-o", tmp_path / "o.png")
    assert refused.returncode == 1
    assert "traced for 6, 8 steps" in refused.stderr
    path = Path(copied) / "scheduler/traced/OwnScheduler/8.json"
    path.write_text(path.read_text().replace("0", "1", 3))
    changed = command("run", copied, PROMPT, "--scheduler", "OwnScheduler", "--steps", 8, "-o", tmp_path / "o.png")
    assert changed.returncode == 1
    assert "changed after the bundle was built" in changed.stderr


def _steps(count):
    from diffoundry.runtime.schedulers import Steps

    return Steps(count)


def test_a_traced_scheduler_draws_what_diffusers_draws(checkpoint_of, copied):
    import diffoundry

    diffoundry.compile(checkpoint_of("pico"), copied, trace_scheduler="DPMSolverMultistepInverseScheduler", steps=(5,))
    pipe = load(copied)
    found = latents_of(pipe, scheduler="DPMSolverMultistepInverseScheduler", steps=5, guidance=1.0)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint_of("pico"), safety_checker=None)
    theirs.scheduler = diffusers.DPMSolverMultistepInverseScheduler.from_config(Schedules(pipe.bundle).config)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        PROMPT,
        num_inference_steps=5,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--trace-scheduler", "NoScheduler", "--steps", "5"], 1, ["no class 'NoScheduler'"]),
        (["--trace-scheduler", "nowhere:Own", "--steps", "5"], 1, ["cannot be imported"]),
        (["--trace-scheduler", "DDIMScheduler"], 1, ["give both"]),
        (["--trace-scheduler", "DDIMScheduler", "--steps", "5"], 1, ["needs no tracing"]),
        (["--trace-scheduler", "../x:Y", "--steps", "5"], 1, ["'../x:Y'"]),
        (["--trace-scheduler", "builtins:int", "--steps", "5"], 1, ["'builtins:int'", "cannot be traced"]),
        (["--trace-scheduler", "", "--steps", "5"], 1, ["no class ''"]),
        (["--trace-scheduler", "DDIMParallelScheduler", "--steps", "inf"], 2, ["takes whole numbers"]),
        (["--steps", "5"], 1, ["give both"]),
        (["--trace-scheduler", "DDIMScheduler", "--steps", "2.5"], 2, ["takes whole numbers"]),
    ],
)
def test_what_cannot_be_traced_is_refused(called, checkpoint_of, tmp_path, options, code, words):
    done = called("compile", checkpoint_of("pico"), "-o", tmp_path / "b", *options)
    assert done.returncode == code
    assert all(word in done.stderr for word in words), done.stderr
    assert list(tmp_path.iterdir()) == []
