"""Tokens of several vectors, saved in a checkpoint by a textual inversion, against diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

import diffoundry
from diffoundry.examples.random_checkpoint import _tokenizer
from diffoundry.export.loading import load_tokenizer
from diffoundry.runtime.text.tokenizer import PromptTokenizer
from diffoundry.runtime.text.weighting import weighted_embeddings

PROMPT = "a <fox> and an <owl> in the snow"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and theirs, with `<fox>` of three vectors."""
    folder = tmp_path_factory.mktemp("fox")
    saved = _tokenizer(1000, "<|endoftext|>")
    saved.add_tokens(["<fox>", "<fox>_1", "<fox>_2", "<owl>"])
    saved.save_pretrained(folder / "saved")
    spec = load_tokenizer(folder / "saved", folder / "tokenizer", 77, 1004)
    return PromptTokenizer(folder / "tokenizer", spec), CLIPTokenizer.from_pretrained(folder / "saved")


@pytest.mark.parametrize("text", [PROMPT, "<fox>", "<fox><fox>, <fox>_1", "<fox> " * 40, "a <fo x>", "<owl>_1"])
def test_ids_are_those_of_diffusers_and_what_is_left_out_is_told(text, tokenizers):
    ours, theirs = tokenizers
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs)
    expected = theirs([converted], padding="max_length", truncation=True, return_tensors="np").input_ids
    ids, (cut,) = ours.encode([text])
    np.testing.assert_array_equal(ids, expected)
    assert bool(cut) == (len(theirs(converted, add_special_tokens=False).input_ids) > 75)


@pytest.mark.parametrize(
    "text", ["(a <fox>)1.3 in the snow", "<fox>++ snow", '("a <fox>", "snow").and()', "<fox> " * 40]
)
def test_every_vector_has_the_weight_and_windows_hold_them_all(text, tokenizers):
    ours, _ = tokenizers
    seen = []

    def run(ids):
        seen.append(ids)
        return np.repeat(ids[..., None].astype(np.float32), 2, axis=-1), None

    made = weighted_embeddings(text, ours, run).hidden[:, 0]
    (fox,) = ours.tokens(["<fox>"])
    assert len(fox) == 3 and len(set(fox)) == 3
    plain = [token for row in seen[0] for token in row if token in fox]
    assert len(plain) % 3 == 0 and set(plain) == set(fox)
    if "(a" in text or "++" in text:
        scale = 1.3 if "1.3" in text else 1.21
        at = list(seen[0][0]).index(fox[0])
        empty = ours.row([])[at : at + 3]
        expected = [e + scale * (token - e) for token, e in zip(fox, empty, strict=True)]
        np.testing.assert_allclose(made[at : at + 3], expected, rtol=1e-5)


@pytest.mark.slow
def test_two_tokenizers_with_tokens_of_their_own_draw_as_diffusers_does(tmp_path, checkpoint_of):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoint_of("sdxl-small"), torch_dtype=torch.float32)
    torch.manual_seed(5)
    for token, vectors, suffix in (("<fox>", 3, ""), ("<fox>", 2, "_2"), ("<owl>", 2, "_2")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
        learnt = {token: torch.randn(vectors, encoder.config.hidden_size) * 0.7}
        pipe.load_textual_inversion(learnt, text_encoder=encoder, tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "inverted")
    pipe.set_progress_bar_config(disable=True)
    ours = diffoundry.load(diffoundry.compile(tmp_path / "inverted", tmp_path / "b", tasks=("txt2img",)).root)
    for asked in (
        {"prompt": PROMPT},
        {"prompt": "snow", "prompt_2": PROMPT, "negative_prompt": "<owl> <fox>"},
        {"prompt": "<fox> " * 40, "negative_prompt": "snow", "negative_prompt_2": "a <fox>"},
    ):
        generator = torch.Generator().manual_seed(3)
        theirs = pipe(**asked, num_inference_steps=3, generator=generator, output_type="latent").images.numpy()
        found = ours(**asked, steps=3, seed=3, output="latent").latents
        np.testing.assert_allclose(found, theirs, atol=1e-3 * np.abs(theirs).max())
