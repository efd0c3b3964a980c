"""The reference checkpoint: its world, its scorer, its weights."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from diffoundry.examples.pico.scorer import read, score
from diffoundry.examples.pico.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    caption,
    random_caption,
    render,
    split_scenes,
)

SCENE = Scene("large", "red", "star", "at the left", "navy")
OTHERS = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES, "background": BACKGROUNDS}


def test_captions():
    assert str(SCENE) == "a large red star at the left on a navy background"
    assert caption(SCENE, frozenset({"color"})) == "a red star"
    assert caption(Scene("small", "orange", "ring", "at the top", "gray"), frozenset({"color"})) == "an orange ring"
    rng = np.random.default_rng(0)
    drawn = [random_caption(SCENE, rng) for _ in range(300)]
    assert 0.7 < np.mean([text == str(SCENE) for text in drawn]) < 0.95


def test_held_out_scenes_are_not_trained_on():
    train, held_out = split_scenes()
    assert len(held_out) == 200
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(all_scenes())


def test_the_scorer_reads_jittered_renderings_without_a_mistake():
    rng = np.random.default_rng(1)
    scenes = [all_scenes()[i] for i in rng.permutation(3840)[:150]]
    assert score([render(scene, rng) for scene in scenes], scenes)["all"] == 1.0


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_the_scorer_sees_each_wrong_attribute(attribute):
    values = {name: getattr(SCENE, name) for name in ATTRIBUTES}
    other = next(value for value in OTHERS[attribute] if value != values[attribute])
    found = read(render(Scene(**{**values, attribute: other})))
    assert {name for name in ATTRIBUTES if found[name] != values[name]} == {attribute}


def test_a_blob_is_no_shape_and_an_empty_picture_has_none():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert read(noise)["shape"] is None
    empty = read(np.full((64, 64, 3), (16, 24, 92), np.uint8))
    assert empty == {"size": None, "color": None, "shape": None, "place": None, "background": "navy"}


def test_the_checkpoint_is_small_and_diffusers_draws_with_it(checkpoint_of):
    import torch
    from diffusers import StableDiffusionPipeline

    folder = checkpoint_of("pico")
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = dict.fromkeys(("lora", "dit", ""), 0)
    for path in files:
        sizes[next((part for part in ("lora", "dit") if part in path.parts), "")] += path.stat().st_size
    assert 0 < sizes["lora"] <= 1e6 and 0 < sizes["dit"] < 6e6 and 0 < sizes[""] <= 13e6
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    image = pipeline(str(SCENE), num_inference_steps=20, guidance_scale=4.0, generator=generator).images[0]
    assert read(np.asarray(image)) == {name: getattr(SCENE, name) for name in ATTRIBUTES}


def test_the_transformer_has_dropped_no_token_that_a_text_has(checkpoint_of):
    from transformers import AutoTokenizer

    pico = checkpoint_of("pico")
    rng = np.random.default_rng(3)
    planes = [(0x20, 0x80), (0x80, 0x600), (0x1E00, 0x2000), (0x3000, 0xD800), (0xE000, 0x110000)]
    drawn = rng.choice(planes, (2000, 8))
    texts = ["".join(map(chr, row)) for row in rng.integers(drawn[..., 0], drawn[..., 1])]
    found = []
    for folder in ("tokenizer", "dit/tokenizer", "dit/tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(pico / folder)
        found.append([encoding.tokens for encoding in tokenizer.backend_tokenizer.encode_batch(texts)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("captions", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_the_compiled_checkpoint_draws_what_held_out_captions_say(bundle_of, captions):
    line = [sys.executable, "-m", "diffoundry.examples.pico.score", bundle_of("pico"), "--captions", str(captions)]
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    shares = json.loads(done.stdout)
    assert shares["captions"] == captions
    assert shares["all"] >= 0.95
