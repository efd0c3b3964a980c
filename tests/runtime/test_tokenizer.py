"""Token ids against transformers, from `tokenizer.json` and from CLIP's own files alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffoundry.bundle import Bundle, BundleError
from diffoundry.export.loading import load_tokenizer
from diffoundry.runtime.tokenizer import PromptTokenizer

PROMPTS = [
    "",
    "a large red star",
    "Ünïcode — 猫 and 3 dogs's",
    "  spaced   out\n",
    "<|endoftext|> in the middle",
    "word " * 100,
]


@pytest.mark.parametrize("name", ["pico", "sd2-small"])
@pytest.mark.parametrize("from_json", [True, False])
def test_ids_equal_transformers(name, from_json, checkpoint_of, tmp_path):
    source, folder = checkpoint_of(name) / "tokenizer", tmp_path / "tokenizer"
    theirs = CLIPTokenizer.from_pretrained(source)
    folder.mkdir()
    prompt = load_tokenizer(source, folder, 77, len(theirs))
    if not from_json:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(theirs.get_vocab(), ensure_ascii=False))
        state = json.loads(theirs.backend_tokenizer.to_str())
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ours = PromptTokenizer(folder, prompt)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    ids, cut = ours.encode(PROMPTS)
    keep = [i for i, prompt in enumerate(PROMPTS) if from_json or "<|" not in prompt]
    np.testing.assert_array_equal(ids[keep], expected[keep])
    assert [bool(part) for part in cut] == [False] * 5 + [True]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200))
def test_any_text_is_tokenized_as_transformers_does(text, bundle_of, checkpoint_of):
    bundle = Bundle.open(bundle_of("pico"))
    ours = PromptTokenizer(bundle.path("tokenizer"), bundle.manifest.prompts["text_encoder"])
    theirs = CLIPTokenizer.from_pretrained(checkpoint_of("pico") / "tokenizer")
    expected = theirs([text], padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours.encode([text])[0], expected)


def test_the_part_that_did_not_fit_is_told(bundle_of):
    bundle = Bundle.open(bundle_of("pico"))
    tokenizer = PromptTokenizer(bundle.path("tokenizer"), bundle.manifest.prompts["text_encoder"])
    _, (cut,) = tokenizer.encode(["star " * 75 + "red heart"])
    assert cut == "red heart"


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path, bundle_of):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="compile the bundle again"):
        PromptTokenizer(tmp_path, Bundle.open(bundle_of("pico")).manifest.prompts["text_encoder"])
