"""Images, masks, embeddings and prompts as requests give them; parity is in `test_families`."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffoundry import Conditioning, Guidance, Request, load
from diffoundry.common.errors import RequestError

PROMPT = "a large red star at the left on a navy background"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
_LEADING = {"timestep_spacing": "leading"}
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))


@pytest.fixture(scope="module")
def pipe(bundle_of):
    return load(bundle_of("pico"))


@pytest.fixture(scope="module")
def untouched(bundle_of):
    """A pipeline that only gets requests that it refuses."""
    return load(bundle_of("pico"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength has no effect without an image"),
        ({"mask": MASK}, "mask has no effect without an image"),
        ({"image": PICTURE, "strength": 0}, "strength must be above 0 and at most 1, found 0"),
        ({"image": PICTURE, "strength": 2}, "strength must be above 0 and at most 1, found 2"),
        ({"image": PICTURE, "strength": float("nan")}, "strength must be"),
        ({"image": PICTURE, "strength": 0.01, "steps": 10}, "strength 0.01 leaves no step of 10: raise it to 0.1"),
        ({"image": PICTURE, "mask": MASK.resize((32, 64))}, "64x64.*32x64|32x64.*64x64"),
        ({"image": "/does/not/exist.png"}, "exist"),
        ({"image": __file__}, "picture"),
        ({"image": np.zeros((1, 3, 8, 8), np.float32)}, "latents must have 4 channels"),
        ({"image": np.full((1, 4, 8, 8), np.nan, np.float32)}, "latents must be finite"),
        ({"image": np.zeros((2, 4, 8, 8), np.float32), "count": 3}, "2 latents make as many images"),
        ({"image": PICTURE, "padding_mask_crop": 8}, "padding_mask_crop has no effect without a mask"),
        ({"image": PICTURE, "mask": MASK, "padding_mask_crop": 8, "output": "latent"}, "takes no latents"),
        ({"image": PICTURE, "mask": Image.new("L", (64, 64)), "padding_mask_crop": 8}, "black throughout"),
        ({"image": PICTURE, "resize": "squeeze"}, "unknown resize 'squeeze': choose one of default, fill, crop"),
        ({"image": PICTURE, "denoising_start": 0.5, "strength": 0.5}, "both say where to start"),
        ({"image": PICTURE, "denoising_start": 0.6, "denoising_end": 0.4}, "must be below denoising_end"),
        ({"denoising_end": 1.0}, "denoising_end must be between 0 and 1"),
        (
            {"denoising_end": 0.001, "steps": 2, "scheduler": "ddim", "scheduler_options": _LEADING},
            "leaves no step of 2",
        ),
        ({"clip_skip": 99}, "clip_skip must be from 0 to"),
        ({"prompt_2": "a ring"}, "prompt_2 has no effect on this model, which has no second text encoder"),
        ({"conditioning": Conditioning(crop=(1, 0))}, "crop has no effect on this model"),
        ({"conditioning": 5}, "conditioning must be a Conditioning"),
        ({"prompt_embeds": np.zeros((77, 64))}, "prompt and prompt_embeds say the same"),
        ({"pooled_prompt_embeds": np.zeros(8)}, "goes with prompt_embeds"),
        ({"weights": 1}, "weights must be true or false"),
        ({"image": PICTURE, "strength": 0.3, "steps": 3}, "raise it to 0.334 or more"),
        ({"image": np.zeros((1, 4, 8, 8), np.float32), "mask": MASK.resize((640, 100))}, "mask has 640x100"),
        ({"image": np.full((1, 4, 8, 8), 1e300)}, "latents must be finite"),
        ({"image": PICTURE.resize((16000, 1)), "width": 2048, "height": 2048, "resize": "crop"}, "too narrow"),
        ({"output": "picture"}, "unknown output"),
        ({"output": "latent", "decoder": "tiny"}, "decoder has no effect on latents"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_loaded(untouched, options, message):
    with pytest.raises(RequestError, match=message):
        untouched(PROMPT, **options)
    assert not untouched.loaded


def test_batches_that_cannot_be_run_are_refused_before_anything_is_loaded(untouched):
    long, short = Request("a ring, " * 60, windows=True), Request("a ring")
    with pytest.raises(RequestError, match=r"must take as many tokens, found \[77, \d+\]"):
        untouched.generate_many([long, short])
    with pytest.raises(RequestError, match="one length"):
        untouched.generate_many([Request(prompt_embeds=np.zeros((5, 64))), short])
    with pytest.raises(RequestError, match="one size"):
        untouched.generate_many([Request("a ring", width=128), short])
    with pytest.raises(RequestError, match="allow prompts longer than one window"):
        untouched('("a ring", "a star").and()', weights=True)
    assert not untouched.loaded


def test_a_model_that_sees_the_masked_image_takes_no_latents(bundle_of, tmp_path):
    copied = shutil.copytree(bundle_of("pico"), tmp_path / "b", copy_function=os.link)
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["wiring"]["inputs"]["sample"] = "latents.masked"
    sample = next(each for each in manifest["components"]["unet"]["inputs"] if each["name"] == "sample")
    sample["shape"][1] = 4 + 1 + 4
    (copied / "bundle.json").unlink()
    (copied / "bundle.json").write_text(json.dumps({**manifest, "tasks": ["inpaint"]}))
    pipe = load(copied)
    latents = np.zeros((1, 4, 8, 8), np.float32)
    with pytest.raises(RequestError, match="give the image itself, not latents"):
        pipe(PROMPT, image=latents, mask=np.full((64, 64), 255, np.uint8))
    with pytest.raises(RequestError, match="is an inpainting model"):
        pipe(PROMPT)
    assert not pipe.loaded


@pytest.mark.parametrize(
    "values", [{"crop": (1,)}, {"original_size": (-1, 5)}, {"target_size": "ab"}, {"aesthetic_score": float("inf")}]
)
def test_conditioning_is_checked(values):
    with pytest.raises(RequestError, match=next(iter(values))):
        Conditioning(**values)


def test_embeddings_may_stand_for_the_prompts(pipe):
    embeddings, _ = pipe.encode([PROMPT, "a ring"])
    expected = pipe(PROMPT, negative_prompt="a ring", seed=1, steps=2).latents
    found = pipe(prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1], seed=1, steps=2).latents
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(RequestError, match="must take as many tokens, found"):
        pipe(prompt_embeds=embeddings[0][:10], seed=1, steps=2)


@pytest.mark.parametrize("width", [63, 65])
def test_embeddings_of_another_width_are_refused(pipe, width):
    with pytest.raises(RequestError, match=f"prompt_embeds must be 64 wide for this model, found shape .77, {width}."):
        pipe(prompt_embeds=np.zeros((77, width), np.float32))


@pytest.mark.parametrize("prompts", [[], "a ring", [None]])
def test_encode_takes_texts(pipe, prompts):
    with pytest.raises(RequestError, match="takes a list of texts"):
        pipe.encode(prompts)


def test_a_pipe_is_no_picture(pipe, tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(RequestError, match="is no file"):
        pipe(PROMPT, image=tmp_path / "image.png")


def test_a_picture_that_is_inpainted_keeps_its_size(pipe):
    picture, mask = PICTURE.resize((96, 72)), MASK.resize((96, 72))
    assert pipe(PROMPT, image=picture, mask=mask, steps=1, seed=1).images[0].size == (96, 72)
    assert pipe(PROMPT, image=picture, mask=mask, steps=1, seed=1, width=64, height=48).images[0].size == (64, 48)


def test_a_picture_may_be_a_file_and_comes_to_its_own_size(pipe, tmp_path):
    PICTURE.resize((75, 49)).save(tmp_path / "a.png")
    result = pipe(PROMPT, image=tmp_path / "a.png", seed=1, steps=2, strength=0.5)
    assert result.images[0].size == (72, 48)
    assert result.request["image"] == str(tmp_path / "a.png")
    assert pipe(PROMPT, image=tmp_path / "a.png", width=64, height=64, seed=1, steps=2).images[0].size == (64, 64)


def test_each_of_several_images_is_the_one_made_alone(pipe):
    options = {"image": PICTURE, "mask": MASK, "strength": 0.7, "steps": 4, "scheduler": "euler_a"}
    both = pipe(PROMPT, seed=5, count=2, **options)
    alone = pipe(PROMPT, seed=6, **options)
    np.testing.assert_array_equal(both.latents[1], alone.latents[0])
    assert np.abs(both.latents[0] - both.latents[1]).max() > 0.1


def test_tasks_may_share_a_batch(pipe):
    requests = [
        Request(PROMPT, seed=1, steps=4),
        Request(PROMPT, seed=2, steps=4, image=PICTURE, strength=0.5),
        Request(PROMPT, seed=3, steps=4, image=PICTURE, mask=MASK),
    ]
    together = pipe.generate_many(requests)
    for request, result in zip(requests, together, strict=True):
        np.testing.assert_array_equal(result.latents, pipe.generate(request).latents)


def test_what_is_not_masked_stays(pipe):
    result = pipe(PROMPT, image=PICTURE, mask=MASK, seed=1, steps=4)
    again = pipe("a ring", image=PICTURE, mask=MASK, seed=1, steps=4)
    outside = np.ones((8, 8), bool)
    outside[2:6, 2:6] = False
    np.testing.assert_array_equal(result.latents[0][:, outside], again.latents[0][:, outside])
    assert np.abs(result.latents - again.latents).max() > 0.1


def test_latents_come_back_where_they_are_asked_for(pipe):
    result = pipe(PROMPT, seed=1, steps=2, output="latent")
    assert result.images == []
    assert "decoder" not in result.seconds
    np.testing.assert_array_equal(result.latents, pipe(PROMPT, seed=1, steps=2).latents)


def test_two_runs_share_a_schedule(pipe):
    options = {"seed": 1, "steps": 8, "scheduler": "ddim"}
    whole = pipe(PROMPT, **options).latents
    begun = pipe(PROMPT, denoising_end=0.5, output="latent", **options).latents
    assert np.abs(begun - whole).max() > 0.1
    np.testing.assert_array_equal(pipe(PROMPT, image=begun, denoising_start=0.5, **options).latents, whole)


def test_weights_change_the_image_and_plain_text_is_as_without(pipe):
    plain = pipe(PROMPT, seed=1, steps=2).latents
    np.testing.assert_allclose(pipe(PROMPT, seed=1, steps=2, weights=True).latents, plain, atol=1e-5)
    weighted = "a large (red)1.5 star at the left on a navy background"
    assert np.abs(pipe(weighted, seed=1, steps=2, weights=True).latents - plain).max() > 1e-3
    with pytest.raises(RequestError, match="prompt"):
        pipe("a (red star", weights=True)


def test_a_long_prompt_takes_several_windows(pipe):
    window = pipe.bundle.manifest.tokenizers["tokenizer"].max_length
    long = "a large red star at the left, " * window
    cut = pipe(long, seed=1, steps=1)
    assert cut.truncated["prompt"]
    taken = pipe(long, seed=1, steps=1, windows=True)
    assert not taken.truncated
    assert np.abs(taken.latents - cut.latents).max() > 1e-4
    np.testing.assert_allclose(
        pipe(PROMPT, seed=1, steps=1, windows=True).latents, pipe(PROMPT, seed=1, steps=1).latents, atol=1e-5
    )


def test_skipped_layers_are_those_of_diffusers(pipe, checkpoint_of):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint_of("pico"))
    # diffusers reads text_encoder.text_model, which transformers 5 has no more
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    expected = pipeline(PROMPT, clip_skip=1, **options).images.numpy()
    found = pipe(PROMPT, clip_skip=1, steps=2, seed=1, guidance=7.5).latents
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-2)
    assert np.abs(found - pipe(PROMPT, steps=2, seed=1, guidance=7.5).latents).max() > 1e-3


def test_guidance_without_a_number_is_the_bundles(pipe):
    found = pipe(PROMPT, seed=1, steps=2, guidance=Guidance(rescale=0.7)).latents
    expected = pipe(PROMPT, seed=1, steps=2, guidance=Guidance(7.5, rescale=0.7)).latents
    np.testing.assert_array_equal(found, expected)
