"""Weighted and long prompts against torch: what each window's hidden states are by definition, and against compel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffoundry.common.errors import RequestError
from diffoundry.export.loading import load_tokenizer
from diffoundry.runtime.text.tokenizer import PromptTokenizer
from diffoundry.runtime.text.weighting import pad_to_longest, weighted_embeddings

WINDOW = 16
ROOM = WINDOW - 2
VOCABULARY = 629
TOLERANCE = 1e-5


class Oracle:
    """A random CLIP text encoder in torch, with transformers' tokenizer: one window of text to hidden states."""

    def __init__(self, folder, pad_token):
        torch.manual_seed(0)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=WINDOW, pad_token=pad_token)
        config = CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            projection_dim=8,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.model = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # the default is so small that all words look alike
        self.calls = []

    def run(self, ids):
        assert ids.dtype == np.int64 and ids.shape[1] == WINDOW
        self.calls.append(ids)
        output = self.model(torch.from_numpy(ids), output_hidden_states=True)
        return output.hidden_states[-2].numpy(), output.text_embeds.numpy()

    def row(self, text):
        return self.tokenizer([text], padding="max_length", max_length=WINDOW, truncation=True, return_tensors="np")

    def hidden(self, text):
        """(WINDOW, width), the text cut to one window as diffusers cuts it."""
        return self.run(self.row(text).input_ids.astype(np.int64))[0][0]

    def pooled(self, text):
        return self.run(self.row(text).input_ids.astype(np.int64))[1][0]

    def count(self, text):
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def scaled(self, text, weights):
        """`text` with a weight for each word, not its tokens: z_empty + w (z - z_empty) at the word's tokens."""
        z, empty, at = self.hidden(text).copy(), self.hidden(""), 1
        for word, weight in zip(text.split(), weights, strict=True):
            span = slice(at, at + self.count(word))
            z[span] = empty[span] + weight * (z[span] - empty[span])
            at = span.stop
        return z


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint_of):
    target = tmp_path_factory.mktemp("tokenizer")
    return target, load_tokenizer(checkpoint_of("pico") / "tokenizer", target, WINDOW, VOCABULARY)


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def pair(request, folder):
    """The same encoder as we and as transformers see it, padded as in Stable Diffusion 1 and as in 2."""
    oracle = Oracle(folder[0], request.param)
    prompt = replace(folder[1], pad_token_id=oracle.tokenizer.pad_token_id)
    return PromptTokenizer(folder[0], prompt), oracle


def close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("text", ["", "  ", "a large red star", "a star, red. 3"])
@pytest.mark.parametrize("options", [{}, {"weights": False}, {"windows": False}])
def test_a_short_plain_prompt_is_bit_for_bit_that_of_encode(pair, text, options):
    tokenizer, oracle = pair
    found = weighted_embeddings(text, tokenizer, oracle.run, **options)
    hidden, pooled = oracle.run(tokenizer.encode([text])[0])
    np.testing.assert_array_equal(found.hidden, hidden[0])
    np.testing.assert_array_equal(found.pooled, pooled[0])
    assert found.truncated == ""


def test_weights_above_one_scale_the_difference_to_the_empty_prompt(pair):
    tokenizer, oracle = pair
    found = weighted_embeddings("a (large red+)1.5 zebra++ (ring)2", tokenizer, oracle.run)
    close(found.hidden, oracle.scaled("a large red zebra ring", [1, 1.5, 1.65, 1.21, 2]))
    close(found.pooled, oracle.pooled("a large red zebra ring"))
    np.testing.assert_array_equal(found.hidden[0], oracle.hidden("")[0])


@pytest.mark.parametrize(("weight", "pull"), [(0.5, 1), (0.25, 1 + math.sqrt(2)), (0.75, math.sqrt(2) - 1)])
def test_weights_below_one_draw_to_the_prompt_without_the_fragment(pair, weight, pull):
    tokenizer, oracle = pair
    found = weighted_embeddings(f"a (large red){weight} star", tokenizer, oracle.run)
    scaled = oracle.scaled("a large red star", [1, weight, weight, 1])
    close(found.hidden, (scaled + pull * oracle.hidden("a star")) / (1 + pull))


def test_several_fragments_are_drawn_at_once_and_keep_the_other_weights(pair):
    tokenizer, oracle = pair
    found = weighted_embeddings("(red)0.5 star+ (ring)0.25", tokenizer, oracle.run)
    pull = 1 + math.sqrt(2)
    total = oracle.scaled("red star ring", [0.5, 1.1, 0.25])
    total = total + oracle.scaled("star ring", [1.1, 0.25]) + pull * oracle.scaled("red star", [0.5, 1.1])
    close(found.hidden, total / (2 + pull))


def test_weight_zero_leaves_the_prompt_without_the_fragment(pair):
    tokenizer, oracle = pair
    found = weighted_embeddings("a (large red)0 star", tokenizer, oracle.run)
    without = oracle.hidden("a star")
    np.testing.assert_allclose(found.hidden, without, atol=1e-4 * np.abs(without).max())
    assert np.abs(found.hidden - oracle.hidden("a large red star")).max() > 0.1


@pytest.mark.parametrize(
    "windows",
    [
        ["a star . " * 4, "red " * 6],  # after the last sentence that fits
        ["a star .", "red , " * 7, "ring ring"],  # even if it is short; then after the last phrase
        ["red " * 12 + ":", "red " * 12],
        ["red " * 14, "red " * 14, "red"],  # after a word
    ],
)
def test_long_prompts_are_split_into_windows(pair, windows):
    tokenizer, oracle = pair
    text = " ".join(windows)
    found = weighted_embeddings(text, tokenizer, oracle.run)
    close(found.hidden, np.concatenate([oracle.hidden(window) for window in windows]))
    close(found.pooled, oracle.pooled(text))
    assert found.truncated == ""


def test_a_word_longer_than_a_window_is_split_anywhere(pair):
    tokenizer, oracle = pair
    text = "qzxj" * 10
    ids = oracle.tokenizer(text, add_special_tokens=False).input_ids
    assert ROOM < len(ids) <= 3 * ROOM
    found = weighted_embeddings(text, tokenizer, oracle.run)
    chunks = [ids[at : at + ROOM] for at in range(0, len(ids), ROOM)]
    rows = np.array([tokenizer.row(chunk) for chunk in chunks])
    close(found.hidden, np.concatenate(list(oracle.run(rows)[0])))


def test_each_window_is_weighted_on_its_own(pair):
    tokenizer, oracle = pair
    windows = ["a (red)0.5 star " + "a " * 8 + "ring+ .", "a (blue)0.25 ring and (" + "a " * 5 + ")0.75 (star)2"]
    found = weighted_embeddings(" ".join(windows), tokenizer, oracle.run)
    alone = [weighted_embeddings(window, tokenizer, oracle.run) for window in windows]
    close(found.hidden, np.concatenate([window.hidden for window in alone]))
    spread = weighted_embeddings("(" + "red " * 20 + ")0.5", tokenizer, oracle.run)
    halves = [(oracle.scaled("red " * n, [0.5] * n) + oracle.hidden("")) / 2 for n in (14, 6)]
    close(spread.hidden, np.concatenate(halves))


def test_without_windows_a_long_prompt_is_cut_as_diffusers_cuts_it(pair):
    tokenizer, oracle = pair
    text = "red " * ROOM + "star ring"
    found = weighted_embeddings(text, tokenizer, oracle.run, windows=False)
    close(found.hidden, oracle.hidden(text))
    assert found.truncated == "star ring" and tokenizer.encode([text])[1] == ["star ring"]
    weighted = weighted_embeddings(f"a+ {text} (ring)0.5", tokenizer, oracle.run, windows=False)
    close(weighted.hidden, oracle.scaled("a" + " red" * (ROOM - 1), [1.1] + [1] * (ROOM - 1)))
    assert weighted.truncated == "red star ring ring"


def test_without_weights_the_syntax_is_text(pair):
    tokenizer, oracle = pair
    for text in ["a (red)++", '("a").blend(']:
        assert 0 < oracle.count(text) <= ROOM
        found = weighted_embeddings(text, tokenizer, oracle.run, weights=False)
        close(found.hidden, oracle.hidden(text))
    assert len(weighted_embeddings("(red)+ " * 5, tokenizer, oracle.run, weights=False).hidden) == 2 * WINDOW


def test_a_blend_is_the_mean_of_its_parts(pair):
    tokenizer, oracle = pair
    found = weighted_embeddings('("a red star+", "a ring").blend(3, 1)', tokenizer, oracle.run)
    star = oracle.scaled("a red star", [1, 1, 1.1])
    close(found.hidden, 0.75 * star + 0.25 * oracle.hidden("a ring"))
    close(found.pooled, 0.75 * oracle.pooled("a red star") + 0.25 * oracle.pooled("a ring"))
    raw = weighted_embeddings('("a red star+", "a ring").blend(1, -0.5, no_normalize)', tokenizer, oracle.run)
    close(raw.hidden, star - 0.5 * oracle.hidden("a ring"))


def test_a_blend_of_different_lengths_is_padded_with_the_empty_prompt(pair):
    tokenizer, oracle = pair
    found = weighted_embeddings(f'("{"red " * 20}", "a ring").blend()', tokenizer, oracle.run)
    long = np.concatenate([oracle.hidden("red " * 14), oracle.hidden("red " * 6)])
    close(found.hidden, (long + np.concatenate([oracle.hidden("a ring"), oracle.hidden("")])) / 2)
    cut = weighted_embeddings(f'("{"red " * 14} star", "{"ring " * 16}").blend()', tokenizer, oracle.run, windows=False)
    close(cut.hidden, (oracle.hidden("red " * 14) + oracle.hidden("ring " * 14)) / 2)
    assert cut.truncated == "star ring ring"


def test_a_conjunction_is_its_parts_one_after_the_other(pair):
    tokenizer, oracle = pair
    text = f'("a red star+", "{"ring " * 16}", "").and(1, 0.5, 2)'
    found = weighted_embeddings(text, tokenizer, oracle.run)
    empty = oracle.hidden("")
    ring = [empty + 0.5 * (oracle.hidden("ring " * n) - empty) for n in (14, 2)]
    close(found.hidden, np.concatenate([oracle.scaled("a red star", [1, 1, 1.1]), *ring, empty]))
    close(found.pooled, oracle.pooled("a red star " + "ring " * 16))
    with pytest.raises(RequestError, match="allow prompts longer than one window"):
        weighted_embeddings(text, tokenizer, oracle.run, windows=False)


def test_one_call_with_each_row_once(pair):
    tokenizer, oracle = pair
    oracle.calls.clear()
    weighted_embeddings('("(red)0.5 (red)0.25 star++", "star++", "").and(2, 2, 1)', tokenizer, oracle.run)
    (ids,) = oracle.calls
    rows = {tuple(row) for row in ids.tolist()}
    texts = ["red red star", "red star", "star", "", "red red star star"]
    assert rows == {tuple(oracle.row(text).input_ids[0].tolist()) for text in texts} and len(ids) == len(texts)


def test_half_precision_stays_and_is_not_computed_in(pair):
    tokenizer, oracle = pair

    def run(ids, dtype=np.float16):
        hidden, _ = oracle.run(ids)
        return hidden.astype(np.float16).astype(dtype), None

    text = "a (red)1.3 (large)0.7 star"
    found = weighted_embeddings(text, tokenizer, run)
    exact = weighted_embeddings(text, tokenizer, lambda ids: run(ids, np.float64))
    assert found.hidden.dtype == np.float16 and exact.hidden.dtype == np.float64 and found.pooled is None
    ulp = np.spacing(np.abs(exact.hidden).astype(np.float16)).astype(np.float64)
    assert (np.abs(found.hidden - exact.hidden) <= 0.51 * ulp).all()


def test_padding_appends_the_empty_prompt(pair):
    tokenizer, oracle = pair
    long = weighted_embeddings("red " * 40, tokenizer, oracle.run).hidden
    short, empty = oracle.hidden("a star"), oracle.hidden("")
    padded = pad_to_longest([short, long, np.concatenate([short, short])], empty)
    for found, expected in zip(padded, [[short, empty, empty], [long], [short, short, empty]], strict=True):
        np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a (large red)1.3 star++ on a (navy)0.5 background-",
        "((red)0.25 star)1.5 (ring)0.8 cat--",
        "a red+ star . " * 5 + "(ring)1.5 " * 5,
        '("a red star+", "a (large)0.5 ring").blend(0.7, 0.3)',
        '("a red star", "ring").blend(1, -0.4, no_normalize)',
        f'("{"red+ star , " * 8}", "a ring").blend(0.7, 0.3)',
        f'("a (red)0.5 star", "{"ring+ " * 20}").and(1, 0.5)',
    ],
)
def test_hidden_states_equal_those_of_compel(pair, text):
    compel = pytest.importorskip("compel")
    tokenizer, oracle = pair
    theirs = compel.Compel(
        tokenizer=oracle.tokenizer,
        text_encoder=oracle.model,
        truncate_long_prompts=False,
        downweight_mode=compel.DownweightMode.REMOVE,
        returned_embeddings_type=compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    )
    close(weighted_embeddings(text, tokenizer, oracle.run).hidden, theirs(text)[0].numpy())
