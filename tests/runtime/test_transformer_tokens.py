"""IP-Adapters of transformers: tokens and scales against diffusers' classes, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessor

import diffoundry
from diffoundry import Control, ImagePrompt, Request
from diffoundry.bundle import Bundle
from diffoundry.bundle.manifest import from_json, to_json
from diffoundry.bundle.wiring import ImagePrompt as Wired
from diffoundry.common.errors import CheckpointError, DiffoundryError, RequestError
from diffoundry.engines.verify import verify
from diffoundry.examples.random_transformer import _FLUX, _SD3, make_ip_adapter
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.graphs.shared import share_weights
from diffoundry.export.graphs.validate import torch_cases
from diffoundry.export.ip_adapter import IPAdapterFile
from diffoundry.export.modules.image_prompt import projection_of
from diffoundry.export.modules.transformer import Flux, StableDiffusion3
from diffoundry.export.modules.transformer_control import taking_residuals
from diffoundry.export.modules.transformer_tokens import Tokens
from diffoundry.export.reading import Asked, Reading
from diffoundry.families.image_prompt import SCALE, TOKENS
from diffoundry.parity.pipelines import PROMPTED, READ, STEERED, picture
from diffoundry.runtime.conditions.image_prompt import ImagePromptCondition
from diffoundry.runtime.pictures.clip import stretched_pixels

ROWS, TEXT = 2, 5
SIZE = {"width": 64, "height": 64}
OF_FLUX = {**_FLUX, "num_layers": 3, "num_single_layers": 1, "_class_name": "FluxTransformer2DModel"}
OF_SD3 = {**_SD3, "num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
OF_SD3["_class_name"] = "SD3Transformer2DModel"


def inputs(config):
    generator = torch.Generator().manual_seed(0)
    skips = {} if "pos_embed_max_size" not in config else {"kept_layers": torch.ones(ROWS, config["num_layers"])}
    return {
        **skips,
        "sample": torch.randn(ROWS, 16, 8, 12, generator=generator),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(ROWS, config["pooled_projection_dim"], generator=generator),
    }


def made(kind, config):
    torch.manual_seed(0)
    return kind(**{name: value for name, value in config.items() if name != "_class_name"}).eval().requires_grad_(False)


def read(folder, number, layers):
    """An adapter as a bundle has it."""
    file = IPAdapterFile.open(folder / "ip_adapter.safetensors", None)
    adapter = file.describe("image_encoder")
    wired = Wired(
        *("ip_adapter_look", "image_encoder", adapter.reads, layers, TOKENS.format(number), SCALE.format(number)),
        *((), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
    return Tokens(wired, file, adapter, file.parts())


def test_tokens_are_read_as_the_class_of_flux_reads_them(tmp_path):
    from diffusers import FluxTransformer2DModel

    model, folders = made(FluxTransformer2DModel, OF_FLUX), [tmp_path / name for name in "ab"]
    for i, folder in enumerate(folders):
        make_ip_adapter(OF_FLUX, folder, i)
    adapters = [read(folder, i, 3) for i, folder in enumerate(folders)]
    model._load_ip_adapter_weights([each.file.state() for each in adapters], low_cpu_mem_usage=False)
    embeds = [torch.randn(ROWS, count, 24, generator=torch.Generator().manual_seed(count)) for count in (1, 2)]
    scales, expected = [[[0.5, 0.0, 1.0], [1.2, 0.7, 0.1]], [[0.3, 0.9, 0.0], [0.0, 0.4, 0.8]]], []
    given = inputs(OF_FLUX)
    for row in range(ROWS):  # diffusers has one scale for all rows
        for layer, block in enumerate(model.transformer_blocks):
            block.attn.processor.scale = [each[row][layer] for each in scales]
        own = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [each[row : row + 1] for each in embeds]}}
        wrapped = Flux(made(FluxTransformer2DModel, OF_FLUX))
        wrapped.model = model
        model.pos_embed = wrapped.model.pos_embed
        expected.append(plain_flux(model, {name: value[row : row + 1] for name, value in given.items()}, own))
    ours = taking_residuals(Flux(made(FluxTransformer2DModel, OF_FLUX)), [], [], adapters)
    for each, encoded, scale in zip(adapters, embeds, scales, strict=True):
        project = projection_of(each.file, each.component, each.adapter)
        tokens = project(encoded.flatten(0, 1)).reshape(ROWS, 1, -1, 96)
        given |= {each.tokens: tokens, each.scale: torch.tensor(scale)}
    torch.testing.assert_close(ours(**given), torch.cat(expected), atol=1e-5, rtol=1e-5)


def plain_flux(model, given, own):
    """What diffusers' class gives, as latents."""
    from diffusers import FluxPipeline

    height, width = given["sample"].shape[2:]
    tokens = FluxPipeline._pack_latents(given["sample"], 1, 16, height, width)
    made = model(
        tokens,
        encoder_hidden_states=given["encoder_hidden_states"],
        pooled_projections=given["pooled_projections"],
        timestep=given["timestep"] / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(TEXT, 3),
        **own,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(made, 8 * height, 8 * width, 8)


def test_tokens_are_read_as_the_class_of_stable_diffusion_3_reads_them(tmp_path):
    from diffusers import SD3Transformer2DModel

    model = made(SD3Transformer2DModel, OF_SD3)
    make_ip_adapter(OF_SD3, tmp_path)
    adapter = read(tmp_path, 0, 5)  # two blocks have two attentions each
    model._load_ip_adapter_weights(adapter.file.state(), low_cpu_mem_usage=False)
    states, given = torch.randn(ROWS, 16, 32, generator=torch.Generator().manual_seed(3)), inputs(OF_SD3)
    expected = []
    for row, scale in enumerate((0.4, 1.3)):
        for processor in model.attn_processors.values():
            processor.scale = scale
        own = {name: value[row : row + 1] for name, value in given.items() if name not in ("sample", "kept_layers")}
        told = {"ip_adapter_image_embeds": states[row : row + 1]}
        expected.append(model(given["sample"][row : row + 1], **own, joint_attention_kwargs=told, return_dict=False)[0])
    ours = taking_residuals(StableDiffusion3(made(SD3Transformer2DModel, OF_SD3)), [], [], [adapter])
    tokens = projection_of(adapter.file, adapter.component, adapter.adapter).proj_in(states)
    given |= {adapter.tokens: tokens[:, None], adapter.scale: torch.tensor([[0.4] * 5, [1.3] * 5])}
    torch.testing.assert_close(ours(**given), torch.cat(expected), atol=1e-5, rtol=1e-5)
    ends = adapter.ends({**OF_SD3, "num_layers": 3})
    assert [id(each) for each in ends.layers] == [id(adapter.layers[i]) for i in (0, 1, 4)]
    assert ends.inputs[1].shape == ("batch_size", 3)


def test_a_twin_has_the_last_layer_of_the_whole_and_its_attentions(checkpoint_of, tmp_path):
    """Of Stable Diffusion 3.5 the first layers have two attentions each, the last one has one."""
    half = shutil.copytree(checkpoint_of("sd35-small"), tmp_path / "half")
    weights = half / "transformer" / "diffusion_pytorch_model.safetensors"
    narrow = {name: value.to(torch.bfloat16) for name, value in load_file(weights).items()}
    save_file(narrow, weights, metadata={"format": "pt"})
    adapter = IPAdapterFile.open(checkpoint_of("sd35-small+image-look"), None)
    asked = Asked(None, ("txt2img",), {}, None, None, adapters={"look": adapter})
    for spec in Reading.of(Checkpoint.open(half), asked, half).specs:
        if spec.twin is None or spec.source != "transformer":
            continue
        twin = spec.twin()
        module = twin.load()
        assert [block.attn2 is not None for block in module.model.transformer_blocks] == [True, False]
        [(_, made), *_] = torch_cases(twin, module)
        assert np.isfinite(made["out_sample"]).all()


@pytest.mark.parametrize("size", [(90, 70), (32, 32), (20, 131)])
def test_pixels_are_stretched_as_siglip_takes_them(size):
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    wanted = processor(picture(*size), return_tensors="np").pixel_values[0]
    found = stretched_pixels(picture(*size), 32, processor.image_mean, processor.image_std)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_weights_are_shared_by_what_they_are_and_not_by_their_names(tmp_path):
    values = {name: np.full((16, 16), i, np.float32) for i, name in enumerate("ab", 1)}

    def model(initializers):
        graph = onnx_ir.Graph([], [], nodes=[], initializers=[], opset_imports={"": 20}, name="g")
        for name, weight in initializers.items():
            value = onnx_ir.Value(
                name=name, shape=onnx_ir.Shape([16, 16]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            )
            value.const_value = onnx_ir.tensor(values[weight], name=name)
            graph.register_initializer(value)
        return onnx_ir.Model(graph, ir_version=10)

    def told(folder, initializers):
        text = {name: {"weights": [weight], "dtype": "float32"} for name, weight in initializers.items()}
        (folder / "weights.json").write_text(json.dumps(text))

    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    onnx_ir.save(model({"val_1": "a", "val_2": "b"}), plain / "model.onnx", external_data="model.onnx_data")
    told(plain, {"val_1": "a", "val_2": "b"})
    told(other, {"val_1": "b", "val_3": "a"})
    mine = model({"val_1": "b", "val_3": "a"})
    share_weights(mine, plain / "model.onnx", other)
    for name, weight in (("val_1", "b"), ("val_3", "a")):
        held = mine.graph.initializers[name].const_value
        assert isinstance(held, onnx_ir.ExternalTensor)
        data = (other / "plain.onnx_data").read_bytes()[held.offset :][: held.length]
        np.testing.assert_array_equal(np.frombuffer(data, np.float32), values[weight].ravel())


def test_a_manifest_says_what_is_not_usual_alone(bundle_of):
    manifest = Bundle.open(bundle_of("flux-dev-small")).manifest
    usual = Wired("a", "b", "image_embeds", 2, "t", "s", (), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for wired in (usual, replace(usual, stretched=True, negative="zeros", several=False)):
        changed = replace(manifest, wiring=replace(manifest.wiring, image_prompts={"look": wired}))
        text = to_json(changed)
        assert ("negative" in text["wiring"]["image_prompts"]["look"]) == (wired != usual)
        assert from_json(text, "here").wiring.image_prompts == {"look": wired}


# ------------------------------------------------------------------------------------------------------ what is refused


def changed(folder, out, change):
    """The file of an adapter with other weights, beside its encoder."""
    shutil.copytree(folder / "image_encoder", out / "image_encoder")
    save_file(change(load_file(folder / "ip_adapter.safetensors")), out / "ip_adapter.safetensors")
    return out / "ip_adapter.safetensors"


@pytest.mark.parametrize(
    ("checkpoint", "of", "problem"),
    [
        (
            "flux-dev-small",
            "pico+image-plain",
            "look is one of U-Nets, this checkpoint takes those of FLUX.1: give one",
        ),
        ("pico", "flux-dev-small+image-look", "look is one of FLUX.1, this checkpoint takes those of U-Nets"),
        (
            "sd35-small",
            "flux-dev-small+image-look",
            "look is one of FLUX.1, this checkpoint takes those of Stable Diff",
        ),
        (
            "flux-dev-small",
            "sd35-small+image-look",
            "look is one of Stable Diffusion 3, this checkpoint takes those of FL",
        ),
        (
            "flux-fill-small",
            "flux-dev-small+image-look",
            "the pipelines of FluxFillPipeline take no IP-Adapter: leave loo",
        ),
        (
            "z-image-small",
            "flux-dev-small+image-look",
            "a ZImageTransformer2DModel takes no IP-Adapter, those of FLUX.1",
        ),
    ],
)
def test_an_adapter_of_another_family_is_refused_by_its_name(checkpoint, of, problem, checkpoint_of, tmp_path):
    with pytest.raises(CheckpointError, match=problem):
        diffoundry.compile(checkpoint_of(checkpoint), tmp_path / "out", ip_adapters={"look": checkpoint_of(of)})
    assert not (tmp_path / "out").exists()


def without(name):
    return lambda tensors: {each: value for each, value in tensors.items() if each != name}


def narrowed(tensors):
    return {name: value[..., :64].contiguous() if "_proj.weight" in name else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (narrowed, "look makes tokens of width 64, this checkpoint has 96"),
        (
            lambda tensors: {name: value for name, value in tensors.items() if ".1.processor" not in name},
            "look is for attentions, as many as 1, this checkpoint has 2",
        ),
        (
            without("double_blocks.1.processor.ip_adapter_double_stream_v_proj.bias"),
            "lacks to_v_ip.bias of layer 1: download it again",
        ),
        (without("ip_adapter_proj_model.norm.weight"), "an IP-Adapter of FLUX.1 without norm.weight, which is of an"),
        (
            lambda tensors: {**tensors, "ip_adapter.0.norm_added_k.weight": torch.ones(4)},
            "is an IP-Adapter of InstantX for FLUX.1, which is not supported: give one in the form of XLabs'",
        ),
        (
            lambda tensors: {**tensors, "ip_adapter_proj_model.proj.weight": torch.zeros(4 * 96, 20)},
            "look reads 20 numbers of a picture, its image encoder gives 24",
        ),
        (
            lambda tensors: {
                **tensors,
                "double_blocks.1.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(64, 96),
            },
            r"a key or a value of the IP-Adapter look has the shape \(64, 96\), this checkpoint takes \(32, 96\)",
        ),
        (
            lambda tensors: {**tensors, "ip_adapter_proj_model.proj.weight": torch.zeros(5)},
            "is damaged: image_proj.proj.weight has another shape than is due",
        ),
        (
            lambda tensors: {
                **tensors,
                "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(32, 0),
            },
            "is damaged: ip_adapter.0.to_k_ip.weight has another shape than is due",
        ),
        (
            lambda tensors: {**tensors, "ip_adapter_proj_model.norm.bias": torch.full((96,), torch.nan)},
            r"is damaged: image_proj.norm.bias \(torch.float32\) holds what is no finite float",
        ),
        (
            lambda tensors: {**tensors, "ip_adapter_proj_model.norm.bias": torch.zeros(96, dtype=torch.int64)},
            r"is damaged: image_proj.norm.bias \(torch.int64\) holds what is no finite float",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, problem, checkpoint_of, tmp_path):
    file = changed(checkpoint_of("flux-dev-small+image-look"), tmp_path / "ip", change)
    with pytest.raises(CheckpointError, match=problem):
        diffoundry.compile(checkpoint_of("flux-dev-small"), tmp_path / "out", ip_adapters={"look": file})
    assert not (tmp_path / "out").exists()


def test_the_encoder_is_of_the_kind_that_the_adapter_reads(checkpoint_of, tmp_path):
    folder, other = checkpoint_of("flux-dev-small+image-look"), checkpoint_of("sd35-small+image-look") / "image_encoder"
    with pytest.raises(
        CheckpointError, match=r"of the type 'siglip_vision_model', .* of this IP-Adapter; clip_vision_mod"
    ):
        diffoundry.compile(
            checkpoint_of("flux-dev-small"), tmp_path / "out", ip_adapters={"look": folder}, image_encoder=other
        )
    with pytest.raises(CheckpointError, match="Stable Diffusion 3 takes one IP-Adapter, found look, mood: give one"):
        diffoundry.compile(
            checkpoint_of("sd35-small"),
            tmp_path / "out",
            ip_adapters=dict.fromkeys(("look", "mood"), checkpoint_of("sd35-small+image-look")),
        )


def test_a_whole_clip_is_taken_for_the_part_of_it_that_sees(checkpoint_of, tmp_path):
    """The published ones of FLUX.1 name openai/clip-vit-large-patch14, which reads texts, too."""
    folder = checkpoint_of("flux-dev-small+image-look")
    whole = shutil.copytree(folder / "image_encoder", tmp_path / "clip")
    seen = json.loads((whole / "config.json").read_text())
    text = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512, "vision_config": seen}
    (whole / "config.json").write_text(json.dumps(text))
    file = IPAdapterFile.open(folder, whole)
    assert file.describe("image_encoder").config["projection_dim"] == 24


@pytest.mark.parametrize(
    ("wired", "prompt", "problem"),
    [
        (
            {},
            {"mask": picture(8, 8)},
            "a mask has no effect on the IP-Adapter look, which a transformer reads everywhere",
        ),
        ({"several": False}, {"image": [picture(8, 8)] * 2}, "the IP-Adapter look reads one image, found 2: give one"),
        (
            {},
            {"scale": (1.0, 0.5, 0.2)},
            "look is read by 2 attentions, found 3 scales: give one for each, or one number",
        ),
        ({}, {"negative": "missing.png"}, "the negative image of the IP-Adapter look 'missing.png' does not exist"),
    ],
)
def test_a_request_that_cannot_be_is_refused(wired, prompt, problem, bundle_of):
    bundle = Bundle.open(bundle_of("flux-dev-small"))
    usual = Wired("a", "b", "image_embeds", 2, "t", "s", (), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    wiring = replace(bundle.manifest.wiring, image_prompts={"look": replace(usual, **wired)})
    condition = ImagePromptCondition(replace(bundle, manifest=replace(bundle.manifest, wiring=wiring)), _nothing)
    with pytest.raises(RequestError, match=problem):
        condition.pixels(
            Request("a star", image_prompt=(ImagePrompt(**{"name": "look", "image": picture(8, 8), **prompt}),))
        )


def _nothing(name):
    raise AssertionError(f"{name} is loaded")


def test_a_bundle_without_them_says_how_it_gets_them(bundle_of):
    prompt = ImagePrompt("look", picture(8, 8))
    with pytest.raises(
        RequestError, match=r"again with --ip-adapter look=FILE, which FLUX\.1 and Stable Diffusion 3 take"
    ):
        diffoundry.load(bundle_of("flux-dev-small")).check(Request("a star", image_prompt=(prompt,), **SIZE))
    with pytest.raises(RequestError, match="takes one negative image, or as many as images, 1 in all, found 2"):
        ImagePrompt("look", picture(8, 8), negative=[picture(8, 8)] * 2)


# ----------------------------------------------------------------------------------------------------- compiled bundles


@pytest.fixture(scope="module")
def reading(bundle_of):
    return bundle_of(f"flux-dev-small{STEERED}edge{''.join(PROMPTED + each for each in READ['flux-dev-small'])}")


@pytest.mark.slow
def test_rows_with_an_image_with_a_control_and_with_neither_share_a_batch(reading):
    pipe = diffoundry.load(reading)
    look, edge = ImagePrompt("look", picture(50, 40)), Control("edge", picture(64, 64))

    def request(i, **options):
        return Request("a blue ring", seed=i, steps=3 + i, **SIZE, **options)

    requests = [
        request(0, image_prompt=(look,)),
        request(1, control=(edge,)),
        request(2),
        request(3, image_prompt=(replace(look, scale=0.4, interval=(0.0, 0.6)),), control=(edge,)),
        request(4, image_prompt=(ImagePrompt("mood", picture(30, 60), scale=(0.2, 1.0)),)),
    ]
    alone = [pipe.generate(each).latents for each in requests]
    for found, wanted in zip(pipe.generate_many(requests), alone, strict=True):
        np.testing.assert_allclose(found.latents, wanted, atol=1e-5)
    assert np.abs(alone[0] - pipe.generate(request(0)).latents).max() > 0.05
    pipe = diffoundry.load(reading)
    pipe.generate(replace(requests[0], output="latent"), low_memory=True)
    assert pipe.loaded == []
    device = diffoundry.load(reading, loop="device")
    np.testing.assert_allclose(device.generate(requests[0]).latents, alone[0], atol=1e-4)
    vino = diffoundry.load(reading, engine="openvino")
    np.testing.assert_allclose(vino.generate(requests[0]).latents, alone[0], atol=1e-3)


@pytest.mark.slow
def test_what_the_tokens_make_is_made_once_and_weights_are_shared(reading):
    bundle = Bundle.open(reading)
    assert all(check.passed for check in verify(bundle))
    part = bundle.component("transformer_controlled")
    [fused] = [variant for key, variant in part.variants.items() if key.endswith(":cpu")]
    graph = onnx_ir.load(bundle.path(fused.model)).graph
    once = onnx_ir.load(bundle.path(fused.per_prompt)).graph
    assert {"ip_tokens_0", "ip_tokens_1"} <= {value.name for value in once.inputs}
    assert not {"ip_tokens_0", "ip_tokens_1"} & {value.name for value in graph.inputs}


@pytest.mark.slow
def test_a_negative_image_takes_guidance(reading):
    pipe = diffoundry.load(reading)
    prompt = ImagePrompt("look", picture(50, 40), negative=picture(20, 30))
    with pytest.raises(
        RequestError, match=r"negative image of the IP-Adapter look has no effect without guidance: .*true_"
    ):
        pipe.check(Request("a star", image_prompt=(prompt,), **SIZE))
    asked = {"seed": 3, "steps": 2, "true_cfg_scale": 2.0, "output": "latent", **SIZE}
    plain = replace(prompt, negative=None)
    black = replace(prompt, negative=Image.new("RGB", (9, 9)))
    drawn = [pipe("a star", image_prompt=[each], **asked).latents for each in (prompt, plain, black)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
    np.testing.assert_allclose(drawn[2], drawn[1], atol=1e-5)  # which is what diffusers gives


@pytest.mark.slow
def test_an_adapter_that_is_added_leaves_the_rest(checkpoint_of, bundle_of, tmp_path):
    out = shutil.copytree(bundle_of("flux-schnell-small"), tmp_path / "b")
    before = {name: part.key for name, part in Bundle.open(out).manifest.components.items()}
    made = diffoundry.compile(
        checkpoint_of("flux-schnell-small"), out, ip_adapters={"look": checkpoint_of("flux-schnell-small+image-look")}
    )
    assert {name: part.key for name, part in made.manifest.components.items() if name in before} == before
    with pytest.raises(DiffoundryError, match="is read by 2 attentions, found 1 scales"):
        diffoundry.load(out)("a star", image_prompt=[ImagePrompt("", picture(9, 9), scale=(1.0,))], **SIZE)
