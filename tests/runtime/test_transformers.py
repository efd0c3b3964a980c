"""Models of flow matching: their schedules, their text encoders, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffoundry import Guidance, Request, load
from diffoundry.bundle import Bundle, Tensor
from diffoundry.common.errors import BundleError, CheckpointError, DiffoundryError, EngineError, RequestError
from diffoundry.common.files import sha256_file
from diffoundry.engines.engine import check_feeds
from diffoundry.engines.verify import recorded_case, verify
from diffoundry.export import compile
from diffoundry.export.loading import load_mapped
from diffoundry.export.modules.transformer import (
    Frequencies,
    Rotations,
    StableDiffusion3,
    packed,
    positions,
    unpacked,
)
from diffoundry.runtime.conditions.picture import Picture
from diffoundry.runtime.loop.noise import GENERATORS
from diffoundry.runtime.pictures.preprocess import mask_channels
from diffoundry.runtime.schedulers import Steps, flowing, make_table
from diffoundry.runtime.schedulers.flow_match import shift_of


@pytest.mark.parametrize("tokens", [16, 256, 1000, 4096, 9000])
def test_the_shift_follows_the_size_as_in_diffusers(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {"base_image_seq_len": 300, "max_image_seq_len": 5000, "base_shift": 0.4, "max_shift": 1.3}
    assert shift_of(config, tokens) == calculate_shift(tokens, 300, 5000, 0.4, 1.3)
    assert shift_of({}, tokens) == calculate_shift(tokens)


def test_samplers_of_noise_take_their_form_for_flow_or_are_refused():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    for name in ("dpm++2m", "dpm++2s", "unipc", "deis"):
        table = make_table(flowing(config, name), 4, name)
        assert np.allclose(table.alpha_sigma.sum(1), 1)  # x = (1 - σ) · image + σ · noise
    assert flowing(config, "flow-heun") == config
    for name in ("euler", "ddim", "EulerAncestralDiscreteScheduler", "lcm", "sa"):
        with pytest.raises(RequestError, match="predict noise, this one is of flow matching: choose flow-euler"):
            flowing(config, name)


SHIFTING = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
PLAIN = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize(
    ("config", "name", "options", "told"),
    [
        (PLAIN, "flow-euler", {"mu": 0.8}, "no scheduler option 'mu', or it has no effect"),
        (PLAIN, "unipc", {"mu": 0.8}, "no scheduler option 'mu', or it has no effect"),
        (PLAIN, "dpm++2m", {"mu": 0.8}, "mu needs use_dynamic_shifting"),
        (SHIFTING, "dpm++2m", {"mu": 0.8, "flow_shift": 2.0}, "'flow_shift', or it has no effect"),
        (SHIFTING, "unipc", {"mu": 0.8, "flow_shift": 2.0}, "'flow_shift', or it has no effect"),
        *(
            (PLAIN, name, option, f"'{next(iter(option))}', or it has no effect with the others")
            for name in ("dpm++2m", "dpm++2s", "deis", "unipc")
            for option in ({"beta_start": 0.001}, {"beta_end": 0.01}, {"beta_schedule": "scaled_linear"})
        ),
    ],
)
def test_an_option_that_changes_nothing_is_refused(config, name, options, told):
    flow = flowing({**config, **options}, name)
    with pytest.raises(RequestError, match=told):
        make_table(flow, 4, name, options)
    heeded = {key: value for key, value in options.items() if key == "mu" and config is SHIFTING}
    kept = make_table(flow, 4, name, heeded).weights
    assert np.array_equal(make_table(flowing(config, name), 4, name, heeded).weights, kept)  # it would change nothing
    if heeded:
        assert not np.array_equal(make_table(flow, 4, name, {"mu": 0.3}).weights, kept)


def test_betas_are_heeded_where_they_decide_the_last_sigma():
    options = {"final_sigmas_type": "sigma_min", "beta_start": 0.01}
    flow = flowing({**PLAIN, **options}, "dpm++2m")
    plain = flowing({**PLAIN, "final_sigmas_type": "sigma_min"}, "dpm++2m")
    assert not np.array_equal(make_table(flow, 4, "dpm++2m", options).weights, make_table(plain, 4, "dpm++2m").weights)


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("flow-euler", {"sigmas": (1.5, 0.5)}, "sigmas of flow matching must be from 0 to 1, found 1.5"),
        ("flow-euler", {"sigmas": (1.0, -0.5)}, "sigmas of flow matching must be from 0 to 1, found -0.5"),
        ("flow-lcm", {"timesteps": (1001.0, 500.0)}, "timesteps of flow matching must be from 0 to 1000, found 1001"),
        ("flow-euler", {"sigmas": (1.0, 0.5), "timesteps": (1000.0, -1.0)}, "timesteps .* from 0 to 1000, found -1"),
        ("unipc", {"sigmas": (0.9, -0.5)}, "sigmas of flow matching must be from 0 to 1, found -0.5"),
    ],
)
def test_a_schedule_of_ones_own_lies_between_the_image_and_noise(name, asked, told):
    with pytest.raises(RequestError, match=told):
        make_table(flowing(PLAIN, name), Steps(2, **asked), name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"in_channels": "x"}, "a config.json in .* is damaged or of another kind .*give the configuration that"),
        ({"joint_attention_dim": 3.5}, "built from its configuration, which is damaged or not supported .give the one"),
        ({"attention_head_dim": 15}, "run as the transformer configuration describes it, which is damaged or not"),
        ({"axes_dims_rope": [4, 6, 5]}, "built from the transformer configuration, which is damaged or not supported"),
        ({"patch_size": 2}, "the configuration is damaged, or not supported; give the one that the part was saved"),
    ],
)
def test_a_number_that_cannot_be_in_a_configuration_is_said_to_be_damaged(changes, told, checkpoint_of, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of("flux-dev-small"), tmp_path / "checkpoint")
    path = checkpoint / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=told):
        compile(checkpoint, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_packing_and_positions_are_those_of_the_pipelines():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = packed(latents, 2)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpacked(tokens, 3, 5, 2), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(positions(3, 5, "cpu").float(), ids)


def test_the_tables_are_what_the_model_computes():
    from diffusers.models.embeddings import Timesteps
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    embed = FluxPosEmbed(10000, [4, 6, 6])
    ids = positions(5, 7, "cpu", first=1)
    for found, expected in zip(Rotations(embed)(ids), embed(ids.float()), strict=True):
        assert torch.equal(found, expected)
    for flip in (True, False):
        plain = Timesteps(16, flip_sin_to_cos=flip, downscale_freq_shift=0)
        numbers = torch.tensor([0.0, 3.5, 1000.0, 30000.0])
        assert torch.equal(Frequencies(plain)(numbers), plain(numbers))


def test_a_mask_becomes_channels_as_in_the_fill_pipeline():
    mask = (np.random.default_rng(0).random((1, 48, 32)) > 0.5).astype(np.float32)
    whole = torch.from_numpy(mask)
    theirs = whole[:, :, :].view(1, 6, 8, 4, 8).permute(0, 2, 4, 1, 3).reshape(64, 6, 4)
    assert np.array_equal(mask_channels(mask, 6, 4), theirs.numpy())


def test_t5_reads_the_tokens_that_its_own_tokenizer_gives(checkpoint_of, bundle_of):
    from transformers import T5TokenizerFast

    theirs = T5TokenizerFast.from_pretrained(checkpoint_of("flux-dev-small") / "tokenizer_2")
    ours = load(bundle_of("flux-dev-small"))._jobs.text.encoders.tokenizer("text_encoder_2")
    texts = ["a large red star", "", "ring,  on the left - it's", "a star " * 400]
    for window in (12, 512):
        found, left = ours.encode(texts, window)
        expected = theirs(texts, padding="max_length", truncation=True, max_length=window, return_tensors="np")
        assert np.array_equal(found, expected.input_ids)
        assert [bool(each) for each in left] == [False, False, window == 12, True]


def test_a_picture_that_is_not_there_has_no_tokens(bundle_of):
    """As of FLUX.1 Kontext; what it draws then is held against diffusers in the cases of `parity.pipelines`."""
    pipe = load(bundle_of("flux-dev-small"))
    plain = pipe.bundle.manifest
    sizes = ((1024, 1024), (672, 1568))
    wiring = replace(plain.wiring, inputs={**plain.wiring.inputs, "picture": "picture"}, picture_sizes=sizes)
    condition = Picture(replace(plain, wiring=wiring), pipe._autoencoder)
    options = {"width": 64, "height": 48, "seed": 3}
    bare = pipe._jobs.make(Request("a star", **options))
    (fed,) = condition.feed([bare])
    assert fed.prompt["picture"].shape == fed.negative["picture"].shape == (16, 0, 2)
    assert fed.start(0, GENERATORS["cpu"](3)).latents.shape == (16, 6, 8)
    square, tall = (
        pipe._jobs.make(Request("a star", image=np.zeros((*side, 3), np.uint8), **options))
        for side in ((64, 64), (160, 64))
    )
    condition.check([square, square])
    for other in (bare, tall):
        with pytest.raises(RequestError, match="must be of one shape: run others on their own"):
            condition.check([square, other])


def test_an_axis_is_empty_where_a_picture_may_be_absent_and_nowhere_else():
    shown = Tensor("picture", "float32", (1, 16, "picture_height", "picture_width"))
    made = Tensor("tokens", "float32", ("batch_size", "(picture_height//2)*(picture_width//2)", 64))
    check_feeds("transformer", (shown, made), {"picture": zeros(1, 16, 0, 2), "tokens": zeros(1, 0, 64)})
    sample = Tensor("sample", "float32", (1, 16, "height", "width"))
    for tensor, shape in ((sample, (1, 16, 0, 2)), (shown, (1, 16, 2, 0)), (made, (0, 4, 64))):
        with pytest.raises(EngineError, match="found shape"):
            check_feeds("transformer", (tensor,), {tensor.name: zeros(*shape)})


def zeros(*shape):
    return np.zeros(shape, np.float32)


def said(pipe, **options):
    with pytest.raises(RequestError) as refused:
        pipe.check(Request("a star", width=64, height=64, **options))
    return str(refused.value)


def test_what_a_model_of_flow_does_not_take_is_said(bundle_of):
    flux = load(bundle_of("flux-dev-small"))
    assert "true_cfg_scale above 1" in said(flux, negative_prompt="a ring")
    assert "at most 512" in said(flux, max_sequence_length=600)
    assert "no third text encoder" in said(flux, prompt_3="a ring")
    assert "weights has no effect" in said(flux, weights=True)
    assert "windows has no effect" in said(flux, windows=True)
    assert "clip_skip has no effect" in said(flux, clip_skip=1)
    assert "no scheduler option 'shift'" in said(flux, scheduler_options={"shift": 5.0})
    assert "what the model was trained for" in said(
        flux, scheduler="unipc", scheduler_options={"use_flow_sigmas": False}
    )
    assert "has no form for flow matching, as this model wants: choose dpm++2m" in said(
        flux, scheduler="dpm++2m-karras"
    )
    assert "choose flow-euler or dpm++2m" in said(flux, scheduler="flow-heun")
    assert "is a scheduler of models that predict noise" in said(flux, scheduler="euler")
    with pytest.raises(RequestError, match="one max_sequence_length: run others on their own"):
        flux.generate_many([Request("a", width=64, height=64, max_sequence_length=n) for n in (20, 40)])
    with pytest.raises(RequestError, match="guidance is off, and true_cfg_scale asks for some"):
        Guidance(mode="off", true_cfg_scale=2.0)
    with pytest.raises(RequestError, match="multiple of 16 from 16 to 16384, found 72: try 64"):
        flux.check(Request("a star", width=64, height=72))


def test_rows_skip_the_layers_that_they_are_told_as_in_diffusers():
    from diffusers import SD3Transformer2DModel

    from diffoundry.examples.random_transformer import SIZES

    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SIZES["sd35-small"].transformer).eval()
    sample, text, pooled = torch.randn(4, 16, 8, 8), torch.randn(4, 9, 96), torch.randn(4, 64)
    times = torch.tensor([900.0, 500.0, 100.0, 3.0])
    skipped = [[], [1], [0, 2], [0, 1, 2]]
    with torch.no_grad():
        expected = [
            model(*(each[i : i + 1] for each in (sample, text, pooled, times)), skip_layers=layers).sample
            for i, layers in enumerate(skipped)
        ]
        kept = torch.tensor([[float(layer not in layers) for layer in range(3)] for layers in skipped])
        found = StableDiffusion3(model)(sample, times, text, pooled, kept)
    assert torch.allclose(found, torch.cat(expected), atol=1e-6)


def test_layers_are_skipped_by_models_that_can_and_by_whole_numbers(bundle_of):
    flux = load(bundle_of("flux-dev-small"))
    skipping = Guidance(skip_guidance_layers=(1,))
    assert "whose denoiser skips no layers: leave it out, or compile the" in said(flux, guidance=skipping)
    assert Guidance(skip_guidance_layers=[9, 7, 7]).skip_guidance_layers == (7, 9)
    assert Guidance(skip_guidance_layers=None) == Guidance()
    for options, message in (
        ({"skip_guidance_layers": (-1,)}, "must be a list of numbers of layers, counted from 0"),
        ({"skip_guidance_layers": 7}, "must be a list of numbers of layers"),
        ({"skip_guidance_layers": (1.5,)}, "must be a list of numbers of layers"),
        ({"skip_layer_guidance_scale": 2.0}, "skip_layer_guidance_scale goes with skip_guidance_layers"),
        ({"skip_guidance_layers": (1,), "skip_layer_guidance_scale": float("nan")}, "must be a number from"),
        (
            {"skip_guidance_layers": (1,), "skip_layer_guidance_start": 0.3},
            "0 <= start <= stop <= 1, found 0.3 and 0.2",
        ),
        ({"skip_guidance_layers": (1,), "skip_layer_guidance_stop": 1.5}, "0 <= start <= stop <= 1"),
    ):
        with pytest.raises(RequestError, match=message):
            Guidance(**options)
    with pytest.raises(RequestError, match="the same guidance in all steps: leave skip_guidance_layers out"):
        Request("a star", forecast=True, guidance=skipping)


@pytest.mark.slow
def test_rows_with_and_without_skipped_layers_share_a_batch(bundle_of):
    sd3 = load(bundle_of("sd35-small"))

    def asked(seed, **options):
        guidance = Guidance(4.0, **({"skip_layer_guidance_stop": 0.9, **options} if options else {}))
        return Request("a star", seed=seed, width=64, height=64, steps=4, guidance=guidance, output="latent")

    requests = [
        asked(1, skip_guidance_layers=(1,)),
        asked(1),
        asked(2, skip_guidance_layers=(0, 1), mode="split", skip_layer_guidance_scale=-1.0),
    ]
    together = sd3.generate_many(requests)
    for request, found in zip(requests, together, strict=True):
        np.testing.assert_allclose(found.latents, sd3.generate(request).latents, atol=1e-5)
    assert abs(together[0].latents - together[1].latents).max() > 0.1
    assert together[0].request["guidance"]["skip_guidance_layers"] == (1,)
    assert "skip_guidance_layers" not in together[1].request["guidance"]
    assert "from 0 to 2 for this model, which has 3 layers, found 3" in said(
        sd3, guidance=Guidance(skip_guidance_layers=(1, 3))
    )
    few = Guidance(4.0, skip_guidance_layers=(1,))
    assert "none of 5 steps is guided and lies between" in said(sd3, guidance=few, steps=5)
    sd3.check(Request("a star", guidance=few, steps=6))
    assert "has no effect without guidance" in said(sd3, guidance=Guidance(1.0, skip_guidance_layers=(1,)))


@pytest.mark.slow
def test_what_stable_diffusion_3_does_not_take_is_said(bundle_of):
    sd3 = load(bundle_of("sd35-small"))
    assert "give it as guidance" in said(sd3, guidance=Guidance(4.0, true_cfg_scale=2.0))
    assert "windows has no effect" in said(sd3, windows=True)
    with pytest.raises(RequestError, match="from 16 to 384, found 400: try 384"):
        sd3.check(Request("a star", width=400, height=64))


def test_a_shift_may_be_asked_for_and_null_is_the_default(bundle_of):
    flux = load(bundle_of("flux-dev-small"))

    def timesteps(**options):
        request = Request("a star", width=64, height=64, steps=3, scheduler_options=options)
        return flux._jobs.make(request).table.timesteps

    assert np.array_equal(timesteps(base_shift=None), timesteps())
    assert not np.array_equal(timesteps(base_shift=2.0), timesteps())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxFillPipeline"},
            "64 numbers a token .* a FluxFillPipeline gives it 384",
        ),
        ("transformer/config.json", {"num_layers": 0}, r"no place for: transformer_blocks\.0\..* in all"),
        ("transformer/config.json", {"guidance_embeds": False}, "no place for: time_text_embed.guidance_embedder"),
        ("scheduler/scheduler_config.json", {"base_shift": "a"}, "scheduler_config.json of .* base_shift must be"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_go_together_is_refused(checkpoint_of, tmp_path, file, change, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("flux-dev-small"), folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        compile(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_models_that_see_no_pictures_of_others_and_no_unets_parts_are_refused(checkpoint_of, tmp_path):
    flux = checkpoint_of("flux-dev-small")
    with pytest.raises(DiffoundryError, match="a T2I-Adapter goes with a U-Net, a FluxPipeline has a transformer"):
        compile(flux, tmp_path / "b", t2i_adapters={"edge": flux / "vae"})
    with pytest.raises(CheckpointError, match=r"holds a text encoder of the type .clip_text_model.*T5 is"):
        compile(flux, tmp_path / "b", components={"text_encoder_2": flux / "text_encoder"})
    with pytest.raises(CheckpointError, match=r"is a Unigram model, a CLIP text encoder has a BPE"):
        compile(flux, tmp_path / "b", components={"tokenizer": flux / "tokenizer_2"})
    with pytest.raises(CheckpointError, match=r"is a BPE model, a T5 text encoder has a Unigram"):
        compile(flux, tmp_path / "b", components={"tokenizer_2": flux / "tokenizer"})
    with pytest.raises(DiffoundryError, match="unknown validation 'none': choose one of full, twin"):
        compile(flux, tmp_path / "b", validate="none")
    assert not (tmp_path / "b").exists()


def test_mapped_weights_are_those_of_the_file_and_none_may_be_missing(tmp_path):
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    from diffoundry.examples.random_transformer import _FLUX

    model = FluxTransformer2DModel(**_FLUX).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    mapped = load_mapped(FluxTransformer2DModel, tmp_path, dict(model.config))
    name = "transformer_blocks.1.attn.to_q"
    assert torch.equal(mapped.get_submodule(name).weight, model.get_submodule(name).weight.float())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != "proj_out.weight"}, path)
    with pytest.raises(CheckpointError, match=r"lacks the weights proj_out\..*download it again"):
        load_mapped(FluxTransformer2DModel, tmp_path, dict(model.config))
    save_file({**tensors, "proj_out.bias": tensors["proj_out.bias"][:3].clone()}, path)
    with pytest.raises(CheckpointError, match=r"the weight proj_out.bias has the shape \(3,\), its config.json asks"):
        load_mapped(FluxTransformer2DModel, tmp_path, dict(model.config))


def test_where_a_twin_was_held_against_torch_the_memory_of_the_whole_is_told(bundle_of, tmp_path):
    root = shutil.copytree(bundle_of("flux-dev-small"), tmp_path / "b", copy_function=os.link)
    parity = json.loads((root / "reports/parity.json").read_text())
    parity["transformer"]["twin"] = "2 of 9 transformer_blocks"
    manifest = json.loads((root / "bundle.json").read_text())
    del manifest["files"]["reports/reference/transformer.npz"]
    for path, value in (("reports/parity.json", parity), ("bundle.json", manifest)):
        (root / path).unlink()  # they are linked to the bundle that others use
        (root / path).write_text(json.dumps(value))
        if path in manifest["files"]:
            manifest["files"][path] = sha256_file(root / path)
    weights = sum(path.stat().st_size for path in root.glob("transformer/model.onnx*"))
    with pytest.raises(BundleError, match=r"--validate full, which takes about .* GiB of memory, here or on a") as said:
        recorded_case(Bundle.open(root), "transformer")
    assert float(str(said.value).split("about ")[1].split()[0]) == pytest.approx(2.5 * weights / 2**30, rel=0.1)


@pytest.mark.slow
def test_a_twin_is_held_against_torch_and_the_whole_is_the_same(checkpoint_of, tmp_path):
    from diffusers import FluxPipeline

    from diffoundry.bundle.reports import read_report

    FluxPipeline.from_pretrained(checkpoint_of("flux-dev-small")).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    bundles = {
        each: compile(tmp_path / "half", tmp_path / each, tasks=["txt2img"], validate=each) for each in ("full", "twin")
    }
    told = {each: read_report(bundle, "parity")["transformer"].get("twin") for each, bundle in bundles.items()}
    assert told == {"full": None, "twin": "2 of 2 transformer_blocks and 2 of 2 single_transformer_blocks"}
    models = [bundle.component("transformer").variants["fp32/onnx"].files for bundle in bundles.values()]
    assert models[0] == models[1]
    assert {check.component for check in verify(bundles["twin"])} == {"text_encoder", "vae_decoder", "step"}
    assert all(check.passed for check in verify(bundles["full"]))
    with pytest.raises(BundleError, match=r"of the transformer a twin alone .* --validate full"):
        recorded_case(bundles["twin"], "transformer")
    pictures = [
        np.asarray(load(bundle.root)("a star", width=64, height=64, steps=2, seed=1).images[0])
        for bundle in bundles.values()
    ]
    assert np.array_equal(*pictures)
    again = compile(tmp_path / "half", bundles["twin"].root, tasks=["txt2img"], validate="full")
    assert "twin" not in read_report(again, "parity")["transformer"]  # as the message above asks for
    assert recorded_case(again, "transformer")[1]
