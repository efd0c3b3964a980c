"""Z-Image: its transformer in real numbers, its chat tokenizer, texts of any length, and a family of one's own."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from diffoundry import Control, Request, load
from diffoundry.bundle import Tensor
from diffoundry.common.errors import CheckpointError, DiffoundryError, RequestError
from diffoundry.examples.random_transformer import _Z_IMAGE, _chat
from diffoundry.export import chat_template, compile
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.loading import load_chat_tokenizer
from diffoundry.export.modules.z_image import ZImage, turned
from diffoundry.export.reading import described
from diffoundry.families import family_named
from diffoundry.families.z_image import FAMILY
from diffoundry.runtime.text.tokenizer import PromptTokenizer


@pytest.mark.parametrize("sides", [(8, 12), (16, 16), (2, 2)])
@torch.no_grad()
def test_the_transformer_is_that_of_diffusers_for_rows_of_different_texts(sides):
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**_Z_IMAGE).eval()
    sample, timestep = torch.randn(3, 16, *sides), torch.tensor([700.0, 300.0, 999.0])
    texts = [torch.randn(count, 40) for count in (40, 96, 3)]
    given = [each[:, None] for each in sample]
    expected = -torch.stack(model(given, (1000 - timestep) / 1000, texts, return_dict=False)[0])[:, :, 0]
    hidden, mask = torch.full((3, 96, 40), 7.0), torch.zeros(3, 96)  # what stands for no token is not read
    for i, text in enumerate(texts):
        hidden[i, : len(text)], mask[i, : len(text)] = text, 1
    found = ZImage(model)(sample, timestep, hidden, mask)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_pairs_are_turned_as_complex_numbers_are():
    heads, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4)
    complex_heads = torch.view_as_complex(heads.unflatten(-1, (4, 2)))
    expected = torch.view_as_real(complex_heads * torch.polar(torch.ones(2, 5, 4), angles)[:, :, None]).flatten(3)
    assert torch.allclose(turned(heads, angles.cos(), angles.sin()), expected, atol=1e-6)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    _chat().save_pretrained(folder / "theirs")
    return folder


def test_a_prompt_is_what_the_user_says_in_the_chat_template(chat):
    theirs = _chat()
    ours = PromptTokenizer(chat / "ours", load_chat_tokenizer(chat / "theirs", chat / "ours", 512, 1000))
    texts = ["a large red star", "", "  two\nlines <|im_end|> ", "a star " * 90]
    said = [
        theirs.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    for window in (20, 64, 512):
        expected = theirs(said, padding="max_length", truncation=True, max_length=window, return_tensors="np")
        found, left = ours.encode(texts, window)
        assert np.array_equal(found, expected.input_ids)
        for some in (texts, texts[:3]):
            short, cut, counts = ours.encode_in_bucket(some, window, 32)
            assert counts == expected.attention_mask.sum(1).tolist()[: len(some)] and cut == left[: len(some)]
            assert short.shape[1] == -(-max(counts) // 32) * 32
            width = min(short.shape[1], window)
            assert np.array_equal(short[:, :width], found[: len(some), :width])
            assert (short[:, width:] == theirs.pad_token_id).all()
        assert bool(left[3]) == (expected.attention_mask[3].all() and window < 512)
        assert "assistant" not in left[3]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].nothing.here }}", r"cannot be rendered \('dict object' has no attribute 'nothing'\)"),
        ("{{ messages[0].content | e }}", "changes what the user says"),
        (None, "has no chat template .*: give the tokenizer that the model was published with"),
    ],
)
def test_a_chat_template_that_cannot_be_two_texts_is_refused(chat, tmp_path, template, said):
    shutil.copytree(chat / "theirs", tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").unlink()
    if template is not None:
        (tmp_path / "t/chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=said):
        load_chat_tokenizer(tmp_path / "t", tmp_path / "out", 512, 1000)
    assert not (tmp_path / "out").exists()


_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (_LOOPS, r"template of the tokenizer in a is not rendered in \d s: give the tokenizer that the model was pub"),
        pytest.param("{{ 'a'.ljust(5 * 1024 ** 3) }}", "takes more than 2 GiB", marks=_LINUX),
    ],
)
def test_a_chat_template_without_end_is_left(monkeypatch, template, said):
    monkeypatch.setattr(chat_template, "_SECONDS", 60.0 if "ljust" in template else 1.5)
    with pytest.raises(CheckpointError, match=said):
        chat_template.rendered(template, {}, ["a star"], Path("a"))


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(chat, tmp_path):
    with pytest.raises(CheckpointError, match="the text encoder 600 tokens: they are not of one checkpoint"):
        load_chat_tokenizer(chat / "theirs", tmp_path / "out", 512, 600)


@pytest.mark.parametrize("window", [-1, 0, 7])
def test_a_window_that_the_chat_template_fills_is_refused(chat, tmp_path, window):
    with pytest.raises(
        CheckpointError, match=rf"reads {window} tokens \(max_position_embeddings\), of which .*takes \d"
    ):
        load_chat_tokenizer(chat / "theirs", tmp_path / "out", window, 1000)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def damaged(checkpoint_of, tmp_path):
    """A copy of the checkpoint, and what changes one of its JSON files."""
    folder = shutil.copytree(checkpoint_of("z-image-small"), tmp_path / "z")

    def change(file, **values):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return change


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("transformer/config.json", {"all_patch_size": [4]}, "patches of .*its pipelines use"),
        ("transformer/config.json", {"axes_lens": [256]}, "damaged or of another kind"),
        ("transformer/config.json", {"axes_lens": [33, 64, 64]}, "positions for 31 tokens of text .*at least 32"),
        ("transformer/config.json", {"n_layers": 10**19}, r"asks for 1e\+19 layers \(n_layers\)"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**19}, r"asks for 1e\+19 layers"),
        ("transformer/config.json", {"cap_feat_dim": 41}, "text_encoder gives 40 numbers a token, .*takes 41"),
        ("text_encoder/config.json", {"model_type": "llama"}, "type 'llama', which is not supported; Qwen3 is"),
        ("text_encoder/config.json", {"layer_types": ["sliding_attention"] * 4}, "other than full_attention"),
        ("model_index.json", {"_class_name": "OvisImagePipeline"}, "ZImagePipeline.*a family of your own"),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer .*is a T5Tokenizer"),
    ],
)
def test_what_is_no_z_image_is_said_before_anything_is_loaded(damaged, tmp_path, file, values, said):
    with pytest.raises(CheckpointError, match=said):
        compile(damaged(file, **values), tmp_path / "b", engine="onnxruntime")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("nowhere:FAMILY", "the family nowhere:FAMILY cannot be loaded .*name a Family of a module"),
        ("json:dumps", "json:dumps is no diffoundry.families.Family"),
        ("json:", "the family json: is not of the form module:NAME"),
        ("runs_away:FAMILY", r"runs_away:FAMILY cannot be loaded \(3\)"),
        ("z-imagine", "unknown family 'z-imagine': choose one of .*z-image, or name your own as module:FAMILY"),
    ],
)
def test_a_family_that_is_none_is_refused(checkpoint_of, tmp_path, monkeypatch, family, said):
    (tmp_path / "runs_away.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DiffoundryError, match=said):
        compile(checkpoint_of("z-image-small"), tmp_path / "b", family=family, engine="onnxruntime")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": {"vae": "AutoencoderKL"}}, "models.vae must be a list, found 'AutoencoderKL'"),
        ({"models": {"vae": ()}}, r"models.vae must not be empty, found \(\)"),
        ({"describe": 5}, "describe must be a function, found 5"),
        ({"steps": "many"}, "steps must be a whole number, found 'many'"),
        ({"guidance": None}, "guidance must be a finite number, found None"),
        ({"scheduler": ("txt2img",)}, r"scheduler must be an object, found \('txt2img',\)"),
        ({"optional": "vae"}, "optional must be a list, found 'vae'"),
    ],
)
def test_what_a_family_of_ones_own_says_is_checked(monkeypatch, values, said):
    monkeypatch.setitem(sys.modules, "my_family", SimpleNamespace(FAMILY=replace(FAMILY, **values)))
    with pytest.raises(CheckpointError, match=f"^the family my_family:FAMILY cannot be used: its {said}; mend it$"):
        family_named("my_family:FAMILY")


def test_what_a_family_of_ones_own_makes_is_checked(checkpoint_of):
    source = Checkpoint.open(checkpoint_of("z-image-small"))

    def said(make):
        own = replace(FAMILY, name="own", describe=lambda configs: make(FAMILY.describe(configs)))
        with pytest.raises(CheckpointError) as refused:
            described(source, own)
        return str(refused.value)

    assert "the family own cannot describe" in said(lambda pipeline: pipeline.nothing)
    assert "gives a NoneType, a diffoundry.families.Pipeline is due" in said(lambda pipeline: None)
    assert "its tasks are ('fly',)" in said(lambda pipeline: replace(pipeline, tasks=("fly",)))
    assert "17 by -3 pixels" in said(lambda pipeline: replace(pipeline, width=17, height=-3))

    def other(part, **values):
        return lambda made: replace(made, **{part: replace(getattr(made, part), **values)})

    assert "its wiring has no flow, which a transformer needs" in said(other("wiring", flow=None))
    assert "wiring.flow must be an object, found 'even'" in said(other("wiring", flow="even"))
    for multiple, wrong in ((0, "be from 1 to 64"), (-2, "be from 1"), (1 << 40, "be from 1"), ("2", "be a whole")):
        assert f"latents.multiple must {wrong}" in said(other("latents", multiple=multiple))
    assert "inputs[0].shape must be a list" in said(
        lambda made: replace(made, inputs=(Tensor("sample", "float32", 4),))
    )
    assert "inputs and wiring do not agree on own" in said(
        lambda made: replace(made, inputs=(*made.inputs, Tensor("own", "float32", ("batch_size",))))
    )
    assert "0 of the role decoder, one is due" in said(
        lambda made: replace(made, parts={n: part for n, part in made.parts.items() if part.role != "decoder"})
    )

    def fed(**inputs):
        return lambda made: replace(made, wiring=replace(made.wiring, inputs={**made.wiring.inputs, **inputs}))

    assert "is fed from 'clouds'; known are latents" in said(fed(sample="clouds"))
    assert "no input of the denoiser is fed from timestep" in said(fed(timestep="guidance"))


def test_a_language_model_in_another_folder_is_one(checkpoint_of):
    folder = checkpoint_of("z-image-small")
    source = Checkpoint.open(folder).replace({"text_encoder": folder / "text_encoder"})
    assert described(source, FAMILY).wiring.text[0].most == 224


OWN = """
import dataclasses

import torch

from diffoundry.export.modules.z_image import ZImage
from diffoundry.families import parts, z_image


class Louder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner, self.model = ZImage(model), model

    def forward(self, sample, timestep, encoder_hidden_states, encoder_hidden_states_mask):
        return 2 * self.inner(sample, timestep, encoder_hidden_states, encoder_hidden_states_mask)


def describe(configs):
    found = z_image.FAMILY.describe(configs)
    denoiser = dataclasses.replace(found.parts[parts.TRANSFORMER], wrapper="my_family:Louder")
    return dataclasses.replace(found, parts={**found.parts, parts.TRANSFORMER: denoiser})


FAMILY = dataclasses.replace(z_image.FAMILY, name="louder", pipelines=("LouderPipeline",), describe=describe)
"""


@pytest.mark.slow
def test_a_family_of_ones_own_lies_outside_of_the_package(damaged, tmp_path, monkeypatch, bundle_of):
    (tmp_path / "my_family.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    folder = damaged("model_index.json", _class_name="LouderPipeline")
    bundle = compile(folder, tmp_path / "b", family="my_family:FAMILY", engine="onnxruntime", tasks=["txt2img"])
    assert bundle.manifest.family == "louder"
    request = Request("a red star", seed=3, width=64, height=64, steps=1, guidance=0.0, output="latent")
    plain, louder = (load(each).generate(request) for each in (bundle_of("z-image-small"), tmp_path / "b"))
    # one step of Euler: noise + (0 - 1) * output
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3)).numpy()
    assert np.allclose(louder.latents - noise, 2 * (plain.latents - noise), atol=1e-4)


@pytest.mark.slow
def test_rows_of_different_texts_go_as_each_goes_alone(bundle_of):
    pipe = load(bundle_of("z-image-small"))
    texts = ["a star", "a large red star at the left on a navy background, " * 3, "a ring and a small blue star"]
    options = {"width": 64, "height": 64, "steps": 3, "output": "latent"}
    requests = [Request(text, seed=i, guidance=2.0 * i, **options) for i, text in enumerate(texts)]
    requests.append(Request(texts[1], seed=3, max_sequence_length=20, **options))
    together = pipe.generate_many(requests)
    for request, found in zip(requests, together, strict=True):
        assert np.allclose(found.latents, pipe.generate(request).latents, atol=1e-4)


@pytest.mark.slow
def test_embeddings_take_the_place_of_a_prompt(bundle_of):
    pipe = load(bundle_of("z-image-small"))
    options = {"width": 64, "height": 64, "steps": 2, "output": "latent", "seed": 1, "guidance": 0.0}
    [hidden], [left] = pipe.encode(["a red star"])
    assert left == "" and hidden.shape[1] == 40 and len(hidden) % 32
    plain = pipe.generate(Request("a red star", **options))
    assert np.allclose(pipe.generate(Request(prompt_embeds=hidden, **options)).latents, plain.latents, atol=1e-5)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        long = {"prompt_embeds": hidden, name: np.zeros((225, 40), np.float32)}
        with pytest.raises(RequestError, match=f"{name} may have 224 tokens at most with this model, found 225"):
            pipe.check(Request(**long, **{**options, "guidance": 2.0}))
    with pytest.raises(RequestError, match="max_sequence_length must be at most 224 with this model, found 225"):
        pipe.check(Request("a star", max_sequence_length=225, **options))
    with pytest.raises(RequestError, match="encode one at a time"):
        pipe.encode(["a red star", "a"])
    with pytest.raises(RequestError, match="without guidance: leave it out, or set guidance above 0"):
        pipe.check(Request("a star", negative_prompt="a ring", **options))
    with pytest.raises(RequestError, match="no control 'depth': ControlNets of its model are not supported, leave it"):
        pipe.check(Request("a star", control=[Control("depth", np.zeros((64, 64, 3), np.uint8))], **options))
    with pytest.raises(RequestError, match="weights has no effect"):
        pipe.check(Request("a star", weights=True, width=64, height=64))
