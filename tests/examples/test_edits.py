"""pico edits pictures: what an edit is to change changes, what it is to keep stays, by the scorer."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import diffoundry
from diffoundry.examples.pico import edits
from diffoundry.examples.pico.edit_score import score_edits
from diffoundry.examples.pico.score import GUIDANCE
from diffoundry.examples.pico.scorer import score
from diffoundry.examples.pico.world import render, split_scenes
from diffoundry.parity.pipelines import WIDE, Case, compare, diffoundry_run, diffusers_run

SCENES = split_scenes()[1][:20]


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return diffoundry.load(bundle_of("pico"))


DISTILLED = ("unet", "scheduler")


@pytest.fixture(scope="module")
def distilled_bundle(tmp_path_factory, bundle_of, checkpoint_of):
    """pico with the U-Net and the scheduler that were distilled from it."""
    target = shutil.copytree(bundle_of("pico"), tmp_path_factory.mktemp("lcm") / "pico-lcm.bundle")
    components = {name: checkpoint_of("pico") / "lcm" / name for name in DISTILLED}
    diffoundry.compile(checkpoint_of("pico"), target, components=components, default_steps=4, default_guidance=4.0)
    return target


@pytest.fixture(scope="module")
def distilled(distilled_bundle):
    return diffoundry.load(distilled_bundle)


def test_image_to_image_changes_the_colour_and_keeps_the_rest(pipe):
    results = list(edits.image_to_image(pipe, SCENES, steps=20, strength=edits.STRENGTH))
    shares = score_edits(results, [(scene, edits.recolored(scene, i)) for i, scene in enumerate(SCENES)])
    assert shares["changed"] >= 0.95
    assert shares["kept"] >= 0.95


def test_inpainting_changes_what_is_masked_and_keeps_the_rest(pipe):
    results = list(edits.inpaint(pipe, SCENES, steps=20))
    shares = edits.score_inpainting(pipe, SCENES, results)
    assert shares["inside"] >= 0.95
    assert shares["kept"] == 1
    assert shares["difference"] < 4


def test_the_strength_decides_how_much_stays(pipe):
    scene = SCENES[0]
    source = render(scene).astype(float)
    options = {"image": Image.fromarray(render(scene)), "seed": 1, "steps": 20, "guidance": GUIDANCE}
    other = str(dataclasses.replace(scene, background="beige"))
    differences = [
        np.abs(np.asarray(pipe(other, strength=strength, **options).images[0]) - source).mean()
        for strength in (0.05, 0.3, 1.0)
    ]
    assert differences[0] < 0.3 * differences[1] < 0.3 * differences[2]


def test_the_distilled_pico_draws_in_four_steps(distilled):
    pictures = [np.asarray(distilled(str(scene), seed=i).images[0]) for i, scene in enumerate(SCENES)]
    assert distilled(str(SCENES[0]), seed=0).request["steps"] == 4
    assert min(score(pictures, SCENES).values()) >= 0.85
    assert score(pictures, SCENES)["all"] >= 0.9


@pytest.mark.parametrize("kind", ["LatentConsistencyModelPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_distilled_pico_gives_what_diffusers_gives(distilled_bundle, checkpoint_of, tmp_path, kind):
    folder = shutil.copytree(checkpoint_of("pico"), tmp_path / "pico-lcm")
    for name in DISTILLED:
        shutil.copytree(folder / "lcm" / name, folder / name, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "LCMScheduler"]}))
    task, more = ("img2img", {"strength": 0.5}) if "Img2Img" in kind else ("txt2img", {})
    case = Case("pico", task, kind, {"steps": 4, "guidance": 4.0, **more}, count=2, size=WIDE, picture=WIDE)
    errors = compare(diffoundry_run(case, lambda _: distilled_bundle), diffusers_run(case, lambda _: folder))
    assert errors.passed, errors


def test_four_steps_of_the_teacher_are_not_enough(pipe):
    pictures = [
        np.asarray(pipe(str(scene), seed=i, steps=4, scheduler="lcm", guidance=GUIDANCE).images[0])
        for i, scene in enumerate(SCENES)
    ]
    assert score(pictures, SCENES)["all"] < 0.9
