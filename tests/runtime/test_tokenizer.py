"""Token ids against transformers 5 and diffusers, from `tokenizer.json` and from CLIP's own files alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError
from diffoundry.examples.random_checkpoint import _tokenizer
from diffoundry.export.loading import load_tokenizer
from diffoundry.export.single_file.tokenizer import TOKENS, write_clip_tokenizer
from diffoundry.families.optimum import read_tokenizer
from diffoundry.runtime.text.tokenizer import PromptTokenizer

PROMPTS = [
    "",
    "a large red star",
    "Ünïcode — 猫 and 3 dogs's",
    "  spaced   out\n",
    "<|endoftext|> in the middle",
    "word " * 100,
]
START, END = "<|startoftext|>", "<|endoftext|>"


def spec_of(clip):
    """How a folder of another tool has its tokenizer used."""
    return read_tokenizer(clip, json.loads((clip.parent / "text_encoder/config.json").read_text()))


def flags(content, **changes):
    plain = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {**plain, **changes}


OF_OLD = {name: flags(text, normalized=True) for name, text in (("bos_token", START), ("eos_token", END))}
VECTORS = ["<fox>", "<fox>_1", "<fox>_2", "<Owl>", "<Owl>_1", "<two words>", "<two words>_1", "cat", "cat_1"]
LISTED = {
    **{str(998 + i): flags(text, normalized=True, special=True) for i, text in enumerate((START, END))},
    **{str(1000 + i): flags(text, normalized=True) for i, text in enumerate(VECTORS)},
    "1010": flags("<left>", lstrip=True),
    "1011": flags("<right>", rstrip=True, normalized=True),
    "1012": flags("<alone>", single_word=True, normalized=True),
    "1013": flags("<Exact>"),
}
FOLDERS = {
    "vocabulary alone": {},
    "SD 1": {"tokenizer_config": {**{k: {"__type": "AddedToken", **v} for k, v in OF_OLD.items()}, "pad_token": END}},
    "SD 2": {"special_tokens_map": {**OF_OLD, "unk_token": OF_OLD["eos_token"], "pad_token": "!"}},
    "the map overrides": {"tokenizer_config": {"pad_token": END}, "special_tokens_map": {"pad_token": "!"}},
    "of transformers 4": {"tokenizer_config": {"added_tokens_decoder": {"0": flags("!", special=True), **LISTED}}},
    "a textual inversion of old": {
        "special_tokens_map": OF_OLD,
        "added_tokens": {START: 998, **{text: 1000 + i for i, text in enumerate(VECTORS)}},
    },
    "further special tokens": {
        "tokenizer_config": {"additional_special_tokens": ["<fox>", {"__type": "AddedToken", **flags("<Fox>_1")}]},
        "special_tokens_map": {"pad_token": "<pad>", "unk_token": "<unk>"},
    },
}
PIECES = st.sampled_from(
    [
        *VECTORS,
        *(text.upper() for text in VECTORS),
        *(START, END, END.upper(), "!", "<left>", "<right>", "<alone>", "<Exact>", "<exact>", "<pad>", "<unk>"),
        *("<fox", ">_1", "_2", "<Fox>_1", " ", "\t", "a cat", "don't", "1990"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join)
SETTINGS = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", params=FOLDERS)
def clip(request, tmp_path_factory):
    """A tokenizer folder without `tokenizer.json`, beside the configuration of a text encoder."""
    root = tmp_path_factory.mktemp("clip")
    folder = root / "tokenizer"
    whole = root / "whole"
    _tokenizer(1000, END).save_pretrained(whole)
    model = json.loads((whole / "tokenizer.json").read_text())["model"]
    files = {"tokenizer_config": {}, **FOLDERS[request.param]}
    files["tokenizer_config"] = {"model_max_length": 77, **files["tokenizer_config"]}
    folder.mkdir()
    for name, value in {"vocab": model["vocab"], **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
    (root / "text_encoder").mkdir()
    (root / "text_encoder" / "config.json").write_text('{"max_position_embeddings": 77, "vocab_size": 1020}')
    return folder


def converted(text, theirs):
    return TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs)


def test_folders_without_tokenizer_json_are_read_as_transformers_reads_them(clip):
    theirs, spec = CLIPTokenizer.from_pretrained(clip), spec_of(clip)
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (spec.bos_token_id, spec.eos_token_id, spec.pad_token_id) == ids
    ours = PromptTokenizer(clip, spec)

    @SETTINGS
    @given(text=TEXTS)
    def same(text):
        expected = theirs([converted(text, theirs)], padding="max_length", truncation=True, return_tensors="np")
        np.testing.assert_array_equal(ours.encode([text])[0], expected.input_ids)

    same()
    for text in (f"a cat {END} dog", f"{START}a", "a <fox>, <Owl> cat", "hi!!", "<alone>x <alone> <left> <right> y"):
        assert ours.tokens([text])[0] == theirs(converted(text, theirs), add_special_tokens=False).input_ids, text


def test_compiled_they_are_read_the_same(clip, tmp_path):
    """`compile` writes a `tokenizer.json`."""
    spec = spec_of(clip)
    assert load_tokenizer(clip, tmp_path / "tokenizer", 77, 1020) == spec
    compiled, bare = (PromptTokenizer(folder, spec) for folder in (tmp_path / "tokenizer", clip))

    @SETTINGS
    @given(text=TEXTS)
    def same(text):
        assert compiled.tokens([text]) == bare.tokens([text])

    same()


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
    np.testing.assert_array_equal(ids, expected)
    assert [bool(part) for part in cut] == [False] * 5 + [True]


def test_any_text_is_tokenized_as_transformers_does(bundle_of, checkpoint_of):
    bundle = Bundle.open(bundle_of("pico"))
    ours = PromptTokenizer(bundle.path("tokenizer"), bundle.manifest.tokenizers["tokenizer"])
    theirs = CLIPTokenizer.from_pretrained(checkpoint_of("pico") / "tokenizer")

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(max_size=200))
    def same(text):
        expected = theirs([text], padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
        np.testing.assert_array_equal(ours.encode([text])[0], expected)

    same()


def test_the_part_that_did_not_fit_is_told(bundle_of):
    bundle = Bundle.open(bundle_of("pico"))
    tokenizer = PromptTokenizer(bundle.path("tokenizer"), bundle.manifest.tokenizers["tokenizer"])
    _, (cut,) = tokenizer.encode(["star " * 75 + "red heart"])
    assert cut == "red heart"


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path, bundle_of):
    spec = Bundle.open(bundle_of("pico")).manifest.tokenizers["tokenizer"]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="compile the bundle again"):
        PromptTokenizer(tmp_path, spec)
    (tmp_path / "tokenizer.json").unlink()
    for damaged in ({"added_tokens_decoder": {"x": flags("a")}}, {"added_tokens_decoder": {"1": {}}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(damaged))
        with pytest.raises(BundleError, match=r"special tokens of .* are damaged"):
            PromptTokenizer(tmp_path, spec)


@pytest.mark.slow
def test_transformers_4_reads_only_the_texts_named_in_the_readme_otherwise(tmp_path):
    """And its fast tokenizer, which `compile` takes, none but special tokens in capitals."""
    write_clip_tokenizer(tmp_path / "clip", END, 77)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "transformers==4.57.6"], check=True)
    spec = load_tokenizer(tmp_path / "clip", tmp_path / "compiled", 77, TOKENS)
    ours = PromptTokenizer(tmp_path / "compiled", spec)
    assigned = [chr(i) for i in range(1, 0x20000) if unicodedata.category(chr(i)) not in ("Cs", "Co", "Cn", "Cc", "Cf")]
    other = [letter for letter in assigned if "CJK" in unicodedata.name(letter, "") or letter in "Σ\ufffd\u0345"]
    words = [
        "a cat",
        "don't",
        " ",
        "  ",
        "\n",
        START,
        END,
        "!",
        "1990",
        "...",
        "(x:1.3)",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "👍🏽",
    ]
    mixed = ["".join(random.Random(i).choices(words, k=6)) for i in range(3000)]
    same = [f"a{letter}b {letter} X{letter}{letter}" for letter in assigned if letter not in other] + mixed
    named = ["日本", "a\u200db", "soft\u00adhyphen", "a\ufffd", "ΟΔΟΣ", "a\ue000", "a\u0378", "a\x07", "a\u0345"]
    (tmp_path / "texts.json").write_text(json.dumps([*same, *named, END.upper()]))
    found = {}
    for kind in ("CLIPTokenizer", "CLIPTokenizerFast"):
        code = (
            f"import json, sys, transformers; read = transformers.{kind}.from_pretrained(sys.argv[1])\n"
            "texts = json.load(open(sys.argv[2]))\n"
            "print(json.dumps([read(text, add_special_tokens=False).input_ids for text in texts]))"
        )
        line = [python, "-c", code, tmp_path / "clip", tmp_path / "texts.json"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
        found[kind] = json.loads(done.stdout)
    wanted = ours.tokens([*same, *named, END.upper()])
    slow, fast = found["CLIPTokenizer"], found["CLIPTokenizerFast"]
    assert [text for text, a, b in zip(same, wanted, slow, strict=False) if a != b] == []
    assert all(a != b for a, b in zip(wanted[len(same) :], slow[len(same) :], strict=True))
    assert fast[:-1] == wanted[:-1]
