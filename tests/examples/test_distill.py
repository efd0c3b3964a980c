"""The distilled pico: its arithmetic against diffusers' schedulers, a run of the recipe, and the weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffoundry.examples.pico.distill import Solver, draw, main, make_pipeline, make_scheduler, make_student
from diffoundry.examples.pico.scorer import score
from diffoundry.examples.pico.train import BETAS
from diffoundry.examples.pico.world import split_scenes

LADDER = [19 + 20 * i for i in range(50)]


@pytest.fixture(scope="module")
def pico(checkpoint_of):
    return checkpoint_of("pico")


@pytest.fixture(scope="module")
def student(pico) -> StableDiffusionPipeline:
    """The shipped weights on pico's other parts, put together by diffusers alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        pico,
        unet=UNet2DConditionModel.from_pretrained(pico / "lcm" / "unet"),
        scheduler=LCMScheduler.from_pretrained(pico / "lcm" / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_and_sample() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 4, 8, 8, generator=generator), torch.randn(50, 4, 8, 8, generator=generator)


def test_the_consistency_function_is_what_lcm_scheduler_denoises_to():
    scheduler = make_scheduler()
    noise, sample = noise_and_sample()
    expected = []
    for i, timestep in enumerate(LADDER):
        scheduler.set_timesteps(50)
        expected.append(scheduler.step(noise[i], timestep, sample[i]).denoised)
    found = Solver(scheduler).consistency(noise, torch.tensor(LADDER), sample)
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_consistency_function_returns_its_sample_at_timestep_zero():
    noise, sample = noise_and_sample()
    torch.testing.assert_close(
        Solver(make_scheduler()).consistency(noise, torch.zeros(50, dtype=int), sample), sample, rtol=0, atol=0
    )


def test_a_step_of_the_solver_is_one_of_ddim():
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(50)
    noise, sample = noise_and_sample()
    expected = [scheduler.step(noise[i], timestep, sample[i]).prev_sample for i, timestep in enumerate(LADDER)]
    upper = torch.tensor(LADDER)
    found = Solver(make_scheduler()).ddim(noise, upper, sample, (upper - 20).clamp(min=0))
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_new_student_predicts_what_the_teacher_does(pico):
    teacher = make_pipeline(pico).unet
    fresh = make_student(teacher)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    prompts = torch.randn(2, 77, 64, generator=generator)
    timesteps = torch.tensor([19, 999])
    with torch.no_grad():
        expected = teacher(sample, timesteps, prompts).sample
        guidance = torch.randn(2, 64, generator=generator)
        torch.testing.assert_close(fresh(sample, timesteps, prompts, timestep_cond=guidance).sample, expected)


def test_the_recipe_writes_a_student_and_a_second_run_finds_nothing_left_to_do(pico, tmp_path):
    line = ["--pico", pico, "--out", tmp_path / "lcm", "--work", tmp_path / "work"]
    line = [*map(str, line), "--steps", "2", "--batch", "2", "--pictures", "8"]
    written = []
    for _ in range(2):
        done = CliRunner().invoke(main, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        written.append((tmp_path / "lcm" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert written[0] == written[1]
    config = json.loads((tmp_path / "lcm" / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] == 64
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "lcm" / "unet")
    assert trained.time_embedding.cond_proj.weight.abs().max() > 0


def test_the_weights_are_small_and_pico_with_a_guidance_embedding(pico):
    assert (pico / "lcm" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 5e6
    config = json.loads((pico / "unet" / "config.json").read_text())
    own = json.loads((pico / "lcm" / "unet" / "config.json").read_text())
    assert {name for name in own if own[name] != config.get(name)} <= {"time_cond_proj_dim", "_diffusers_version"}
    assert own["time_cond_proj_dim"] == 64
    shipped = json.loads((pico / "lcm" / "scheduler" / "scheduler_config.json").read_text())
    assert shipped["_class_name"] == "LCMScheduler"
    assert shipped["original_inference_steps"] == 50


@pytest.mark.parametrize("captions", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_four_steps_draw_what_held_out_captions_say(student, pico, captions):
    scenes = split_scenes()[1][:captions]
    shares = score(draw(student, scenes, steps=4, guidance=4.0), scenes)
    assert shares["all"] >= 0.95
    # the teacher cannot do it in the same steps at the same guidance
    assert score(draw(make_pipeline(pico, make_pipeline(pico).unet), scenes, 4, 4.0), scenes)["all"] < 0.85


def test_the_guidance_scale_is_an_input_of_the_student(student):
    scenes = split_scenes()[1][:8]
    assert not np.array_equal(*(draw(student, scenes, 4, guidance) for guidance in (2.0, 9.0)))
