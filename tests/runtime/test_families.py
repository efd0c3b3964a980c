"""Every family and task against diffusers: the cases of `parity/pipelines.py`, on random checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffoundry.parity import pipelines as parity
from diffoundry.parity.pipelines import Case, Outcome, cases, compare, diffoundry_run, diffusers_run
from diffoundry.runtime.schedulers import SAMPLERS

QUICK = ("sd15-small", "sdxl-small", "sdxl-refiner-small")
"""The checkpoints that a run compiles when the slow tests are left out; of LCM it has the distilled pico."""
LABELS = (
    "clip_skip",
    "prompt_2",
    "empty negative prompt",
    "guidance_rescale",
    "crop",
    "picture 77x93",
    "sizes",
    "negative sizes",
    "sizes and scores",
    "denoising_end",
    "denoising split",
    "split, inpaint",
)


QUICK_TRANSFORMERS = ("flux-dev-small",)
LABELS_OF_TRANSFORMERS = ("max_sequence_length", "guidance 30.0", "clip_skip")


def is_quick(case: Case) -> bool:
    """Whether a case is run each time: one of each task with all that varies, and one of each option."""
    if case.flows and (case.controls or case.prompts):
        return False
    if case.flows:
        all_varies = case.count == 2 and case.size != (64, 64)
        told = any(label in case.label for label in LABELS_OF_TRANSFORMERS) or case.scheduler == "dpm++2m"
        return case.checkpoint in QUICK_TRANSFORMERS and (all_varies or told)
    if case.controls or case.prompts:
        return case.checkpoint == "pico" and case.count == 2
    if case.checkpoint not in QUICK or (case.loras and case.checkpoint != "sd15-small"):
        return False
    largest = case.count == 2 and case.size == parity.WIDE
    return largest or (case.checkpoint != "sd15-small" and case.scheduler is None and case.label in LABELS)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if is_quick(case) else pytest.mark.slow) for case in cases()]
)
def test_the_result_is_that_of_diffusers(case, checkpoint_of, bundle_of):
    errors = compare(diffoundry_run(case, bundle_of), diffusers_run(case, checkpoint_of))
    assert errors.passed, errors


CLASSES = sorted({sampler.class_name for sampler in SAMPLERS.values()})
UNSUITED = ("DDIMInverse", "EDM", "FlowMatch", "IPNDM")
"""Schedulers of other models, some of which the pipelines cannot run."""
TASKS = [
    *(("sd15-small", task) for task in ("img2img", "inpaint")),
    *(("sdxl-small", task) for task in ("txt2img", "img2img", "inpaint")),
]


def first_case(checkpoint, task, kind=None):
    return next(
        case
        for case in cases()
        if (case.checkpoint, case.task) == (checkpoint, task) and kind in (None, case.kind) and case.count == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("checkpoint", "task"), TASKS)
def test_every_class_gives_the_result_of_the_pipeline(checkpoint, task, name, checkpoint_of, bundle_of):
    """With the arguments that each pipeline passes to `step` when nothing is said beside the class."""
    case = replace(first_case(checkpoint, task), scheduler=name)
    try:
        expected = diffusers_run(case, checkpoint_of)
    except (AttributeError, TypeError, ValueError):
        assert name.startswith(UNSUITED)
        return
    errors = compare(diffoundry_run(case, bundle_of), expected)
    assert errors.passed, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_the_pipeline_of_consistency_models_runs_no_other_scheduler(name, checkpoint_of):
    """It passes eta=None and steps of the training schedule, which only LCM takes."""
    case = replace(first_case("lcm-small", "txt2img", "LatentConsistencyModelPipeline"), scheduler=name)
    if name == "LCMScheduler":
        assert np.isfinite(diffusers_run(case, checkpoint_of).latents).all()
        return
    with pytest.raises((AttributeError, TypeError, ValueError)):
        diffusers_run(case, checkpoint_of)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["txt2img", "img2img"])
def test_the_original_steps_of_consistency_models(task, checkpoint_of, bundle_of):
    """An argument of that pipeline is an option of the scheduler here."""
    kind = {"txt2img": "LatentConsistencyModelPipeline", "img2img": "LatentConsistencyModelImg2ImgPipeline"}[task]
    case = first_case("lcm-small", task, kind)
    told = {"original_inference_steps": 40}
    expected = diffusers_run(replace(case, options={**case.options, **told}), checkpoint_of)
    found = diffoundry_run(replace(case, options={**case.options, "scheduler_options": told}), bundle_of)
    errors = compare(found, expected)
    assert errors.passed, errors
    assert not compare(diffoundry_run(case, bundle_of), expected).passed


CHANGES = {
    "sd15-inpaint-small": ("prompt", "negative_prompt", "guidance", "clip_skip", "strength"),
    "lcm-small": ("prompt", "guidance", "clip_skip"),
    "sdxl-small": (
        "prompt",
        "negative_prompt",
        "prompt_2",
        "negative_prompt_2",
        "guidance",
        "guidance_rescale",
        "original_size",
        "crops_coords_top_left",
        "target_size",
    ),
    "sdxl-refiner-small": ("prompt", "aesthetic_score", "negative_aesthetic_score", "original_size"),
}
OTHERS = {
    "prompt": parity.OTHER,
    "negative_prompt": parity.OTHER,
    "prompt_2": parity.OTHER,
    "negative_prompt_2": parity.OTHER,
    "guidance": 6.5,
    "guidance_rescale": 0.2,
    "clip_skip": 1,
    "strength": 1.0,
    "original_size": (60, 64),
    "crops_coords_top_left": (0, 8),
    "target_size": (64, 56),
    "aesthetic_score": 6.5,
    "negative_aesthetic_score": 2.0,
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CHANGES for option in CHANGES[name]])
def test_a_random_checkpoint_shows_what_it_is_asked(name, option, checkpoint_of):
    """Else the comparison with diffusers could not fail: weights drawn by the libraries hardly heed a prompt."""
    task = parity.FAMILIES[name][1][0]
    case = next(case for case in cases() if (case.checkpoint, case.task) == (name, task))
    changed = replace(case, options={**case.options, option: OTHERS[option]})
    assert compare(diffusers_run(changed, checkpoint_of), diffusers_run(case, checkpoint_of)).share > 100


def outcome(latents=0.0, pixels=0.5, image=100):
    shape = (1, 4, 2, 2)
    return Outcome(
        np.full(shape, latents, np.float32), np.full((1, 2, 2, 3), pixels), np.full((1, 2, 2, 3), image, np.uint8)
    )


def test_compare_allows_what_is_promised_and_no_more():
    reference = outcome()
    assert compare(outcome(latents=9e-5, pixels=0.505, image=101), reference).passed
    worse = [outcome(latents=1.1e-4), outcome(pixels=0.506), outcome(image=102), outcome(image=98)]
    worse += [outcome(latents=np.nan), replace(reference, images=None), replace(reference, pixels=None)]
    worse += [replace(reference, latents=reference.latents[:, :, :1])]
    assert not any(compare(found, reference).passed for found in worse)


def test_the_cases_cover_every_task_of_every_family():
    found = {(case.checkpoint, case.task) for case in cases()}
    assert found == {(name, task) for name, (_, tasks, _) in parity.FAMILIES.items() for task in tasks} | {
        ("lcm-small", "img2img"),
        *(("pico", task) for task in ("txt2img", "img2img", "inpaint")),  # with controls and image prompts
        *((name, task) for name in parity.TRANSFORMERS for task in parity.tasks_of(name)),
    }
    described = [str(case) for case in cases()]
    assert len(described) == len(set(described))


def test_pictures_in_half_precision_are_judged_by_their_likeness():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    given = Outcome(np.zeros((3, 4, 2, 2), np.float32), None, images)
    assert parity.likeness(given, given) == (np.inf, 1.0)
    far = images.copy()
    far[0] = 255 - far[0]  # one of three is another picture: the median is not
    assert parity.likeness(replace(given, images=far), given) == (np.inf, 1.0)
    noisy = np.clip(images.astype(int) + rng.integers(-8, 9, images.shape), 0, 255).astype(np.uint8)
    psnr, ssim = parity.likeness(replace(given, images=noisy), given)
    assert 30 < psnr < 40 and 0.9 < ssim < 1
    assert parity._is_alike(31.0, 0.98, 0.0, 50.0) and parity._is_alike(10.0, 0.5, 40.0, 39.0)
    assert not parity._is_alike(29.0, 0.98, 30.0, 31.0) and not parity._is_alike(31.0, 0.9, 30.0, 31.0)
    assert len({str(case) for case in parity.half_cases()}) == 12
