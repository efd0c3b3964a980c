"""Tokens of several vectors, saved in a checkpoint by a textual inversion, against diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import diffoundry
from diffoundry.common.errors import LoraError
from diffoundry.examples.random_checkpoint import _tokenizer
from diffoundry.export.loading import load_tokenizer
from diffoundry.families.lora.embeddings import EmbeddingFile, matrix_of
from diffoundry.families.lora.reader import Weights
from diffoundry.runtime.lora import weights_of
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


FORMS = ("diffusers", "a1111", "safetensors", "tensor", "one vector")


def inversion(path, form, width):
    """A file of this form, and what diffusers is given for it."""
    torch.manual_seed(3)
    vectors = torch.randn(1 if form == "one vector" else 3, width) * 0.7
    if form == "a1111":
        torch.save({"string_to_param": {"*": vectors}, "name": "<fox>", "step": 3}, path.with_suffix(".pt"))
        return path.with_suffix(".pt"), vectors
    if form == "tensor":
        torch.save(vectors, path.with_suffix(".bin"))
        return f"{path.with_suffix('.bin')}=<fox>", vectors
    if form == "safetensors":
        named = path.with_name("<fox>.safetensors")
        save_file({"emb_params": vectors}, named)
        return named, vectors
    save_file({"<fox>": vectors}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors"), vectors


@pytest.fixture(scope="module")
def theirs(checkpoint_of):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint_of("pico"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_latents(pipe, prompt, steps=4):
    made = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    )
    return made.images.numpy()


ASKED = {"steps": 4, "guidance": 3.0, "seed": 2, "output": "latent"}


@pytest.mark.parametrize("form", FORMS)
def test_a_word_at_run_draws_as_diffusers_does(form, theirs, bundle_of, tmp_path):
    given, vectors = inversion(tmp_path / "x", form, theirs.text_encoder.config.hidden_size)
    ours = diffoundry.load(bundle_of("pico"), engine="onnxruntime")
    bare = ours("a large <fox> at the left", **ASKED).latents
    ours.set_embeddings([str(given)])
    theirs.load_textual_inversion({"<fox>": vectors}, token="<fox>")
    try:
        for prompt in ("a large <fox> at the left", "<fox>, a <fox>", "a ring"):
            made = ours(prompt, **ASKED)
            np.testing.assert_allclose(made.latents, their_latents(theirs, prompt), atol=1e-4, rtol=1e-2)
        assert made.request["embeddings"] == [str(given)]
    finally:
        theirs.unload_textual_inversion()
    assert np.abs(ours("a large <fox> at the left", **ASKED).latents - bare).max() > 1e-3
    ours.set_embeddings([])
    np.testing.assert_array_equal(ours("a large <fox> at the left", **ASKED).latents, bare)


def test_two_words_a_lora_and_another_engine(theirs, bundle_of, checkpoint_of, tmp_path):
    fox, vectors = inversion(tmp_path / "x", "diffusers", theirs.text_encoder.config.hidden_size)
    lora = checkpoint_of("pico+lora-peft")
    prompt = "a <fox> and an <owl>"
    theirs.load_textual_inversion({"<fox>": vectors}, token="<fox>")
    theirs.load_textual_inversion({"<owl>": vectors[:2].flip(0)}, token="<owl>")
    save_file({"<owl>": vectors[:2].flip(0).contiguous()}, tmp_path / "owl.safetensors")
    theirs.load_lora_weights(lora.parent, weight_name=lora.name)
    expected = their_latents(theirs, prompt)
    theirs.unload_lora_weights()
    theirs.unload_textual_inversion(["<fox>", "<owl>"])
    for engine in ("onnxruntime", "openvino"):
        ours = diffoundry.load(bundle_of("pico"), engine=engine, precision="fp32")
        ours.set_embeddings([fox, tmp_path / "owl.safetensors"])
        ours.set_loras([lora])
        np.testing.assert_allclose(ours(prompt, **ASKED).latents, expected, atol=1e-4, rtol=1e-2)


def test_each_encoder_of_xl_has_its_vectors(bundle_of, tmp_path):
    ours = diffoundry.load(bundle_of("sdxl-small"), engine="onnxruntime")
    weights = weights_of(ours.bundle)
    widths = [matrix_of(weights, name)[1][1] for name in ("text_encoder", "text_encoder_2")]
    both = {key: torch.randn(2, width) for key, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    save_file(both, tmp_path / "xl.safetensors")
    opened = EmbeddingFile.open(tmp_path / "xl.safetensors", weights, "<fox>")
    assert [opened.vectors[name].shape[1] for name in ("text_encoder", "text_encoder_2")] == widths
    with pytest.raises(LoraError, match=r"two text encoders .* has one"):
        diffoundry.load(bundle_of("pico")).set_embeddings([tmp_path / "xl.safetensors"])
    ours.set_embeddings([f"{tmp_path / 'xl.safetensors'}=<fox>"])
    first, second = (ours.encode([text])[0] for text in ("a <fox>", "a <owl>"))
    assert np.abs(first - second).max() > 1e-3


def test_a_word_of_flux_goes_to_clip_as_in_diffusers(bundle_of, checkpoint_of, tmp_path):
    """T5 reads its letters."""
    theirs = diffusers.FluxPipeline.from_pretrained(checkpoint_of("flux-dev-small"), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    fox, vectors = inversion(tmp_path / "x", "diffusers", theirs.text_encoder.config.hidden_size)
    theirs.load_textual_inversion({"<fox>": vectors}, token="<fox>")
    ours = diffoundry.load(bundle_of("flux-dev-small"), engine="onnxruntime")
    asked = {"width": 64, "height": 48, "steps": 2, "seed": 2, "output": "latent", "max_sequence_length": 24}
    bare = ours("a <fox> on the left", **asked).latents
    ours.set_embeddings([fox])
    found = ours("a <fox> on the left", **asked).latents
    options = {"num_inference_steps": 2, "max_sequence_length": 24, "output_type": "latent"}
    tokens = theirs(
        "a <fox> on the left", width=64, height=48, generator=torch.Generator().manual_seed(2), **options
    ).images
    expected = theirs._unpack_latents(tokens, 48, 64, theirs.vae_scale_factor).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-2)
    assert np.abs(found - bare).max() > 1e-3
    save_file({"<fox>": torch.ones(2, 96)}, tmp_path / "t5.safetensors")
    with pytest.raises(LoraError, match=r"vectors of width 96, the text encoders of .* 32: it was made for another"):
        ours.set_embeddings([tmp_path / "t5.safetensors"])


def test_text_encoders_that_are_not_clips_take_no_word(tmp_path):
    save_file({"<fox>": torch.ones(2, 40)}, tmp_path / "x.safetensors")
    weights = Weights({"transformer": {}, "text_encoder": {"embed_tokens.weight": (99, 40)}}, "transformer", 0, "b", "")
    with pytest.raises(LoraError, match="the text encoders of b have no place: textual inversions go with CLIP's"):
        EmbeddingFile.open(tmp_path / "x.safetensors", weights)


@pytest.mark.slow
def test_each_clip_of_stable_diffusion_3_has_its_vectors(bundle_of, checkpoint_of, tmp_path):
    """Its pipeline loads none: they are put into its tokenizers and text encoders by diffusers' loader."""
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(checkpoint_of("sd3-small"), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    both = {}
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{suffix}"), getattr(theirs, f"tokenizer{suffix}")
        both[key] = torch.randn(1, encoder.config.hidden_size) * 0.7
        tokenizer.add_tokens("<fox>")
        encoder.resize_token_embeddings(len(tokenizer))
        encoder.get_input_embeddings().weight.data[-1] = both[key][0]
    save_file(both, tmp_path / "x.safetensors")
    ours = diffoundry.load(bundle_of("sd3-small"), engine="onnxruntime")
    ours.set_embeddings([f"{tmp_path / 'x.safetensors'}=<fox>"])
    asked = {"width": 64, "height": 48, "steps": 2, "guidance": 4.0, "seed": 2, "output": "latent"}
    found = ours("a <fox> on the left", **asked).latents
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    expected = theirs(
        "a <fox> on the left", width=64, height=48, generator=torch.Generator().manual_seed(2), **options
    ).images.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(
    ("tensors", "given", "said"),
    [
        ({"<fox>": (2, 63)}, "", "width 63, the text encoders of .* 64: it was made for another model"),
        ({"a": (2, 64), "b": (2, 64)}, "", "is no textual inversion"),
        ({"<fox>": (2, 64)}, "=a", "is a token already"),
        ({"<fox>": (2, 64)}, "=a fox", "no spaces"),
        ({"<fox>": (90, 64)}, "", "90 vectors"),
    ],
)
def test_bad_inversions_are_refused(tensors, given, said, bundle_of, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    ours = diffoundry.load(bundle_of("pico"), engine="onnxruntime")
    with pytest.raises(LoraError, match=said):
        ours.set_embeddings([f"{tmp_path / 'x.safetensors'}{given}"])
    ours("a ring", **ASKED)


@pytest.mark.slow
def test_a_word_at_compile_draws_as_at_run(bundle_of, checkpoint_of, theirs, tmp_path):
    fox, _ = inversion(tmp_path / "x", "a1111", theirs.text_encoder.config.hidden_size)
    lora = checkpoint_of("pico+lora-peft")
    asked = {"embeddings": [fox], "loras": [f"{lora}=0.5"], "tasks": ["txt2img"]}
    fused = diffoundry.load(diffoundry.compile(checkpoint_of("pico"), tmp_path / "b", **asked).root)
    ours = diffoundry.load(bundle_of("pico"), engine="onnxruntime")
    ours.set_embeddings([fox])
    ours.set_loras([(lora, 0.5)])
    made = fused("a large <fox> at the left", **ASKED).latents
    np.testing.assert_array_equal(made, ours("a large <fox> at the left", **ASKED).latents)
    assert {"loras", "embeddings"} <= fused.bundle.manifest.source.keys()
    with pytest.raises(LoraError, match="token already"):
        fused.set_embeddings([fox])
