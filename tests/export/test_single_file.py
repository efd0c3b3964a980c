"""Single files in the original layout, made from diffusers models by an inverse of our own, come back as they were."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import diffoundry
from diffoundry.common.errors import CheckpointError, DiffoundryError
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.reading import Asked
from diffoundry.export.single_file import SingleFile, is_single_file
from diffoundry.export.single_file.configs import built_in
from diffoundry.export.single_file.layouts import SD1, recognise
from diffoundry.export.single_file.names import clip_names, unet_names, vae_names
from diffoundry.export.single_file.parts import PartFile
from diffoundry.export.single_file.weights import Weights, open_weights
from diffoundry.export.unpacked import unpack as unpack_all

PICO = Path(__file__).resolve().parents[2] / "examples" / "pico"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TOKENS = 49408
Tensors = dict[str, torch.Tensor]


def unpack(source: Path, target: Path, **options: Any) -> None:
    SingleFile.open(source, **options).write(target)


class Layout:
    """Collects tensors below names of the original layout, in the order in which its code makes the modules."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def put(self, name: str, module: torch.nn.Module) -> None:
        for key, value in module.state_dict().items():
            self.tensors[f"{name}.{key}"] = value.clone()

    def residual(self, name: str, block: Any) -> None:
        for place, module in (
            ("in_layers.0", block.norm1),
            ("in_layers.2", block.conv1),
            ("emb_layers.1", block.time_emb_proj),
            ("out_layers.0", block.norm2),
            ("out_layers.3", block.conv2),
            ("skip_connection", block.conv_shortcut),
        ):
            if module is not None:
                self.put(f"{name}.{place}", module)


def original_unet(unet: UNet2DConditionModel) -> Tensors:
    made = Layout()
    made.put("time_embed.0", unet.time_embedding.linear_1)
    made.put("time_embed.2", unet.time_embedding.linear_2)
    if unet.time_embedding.cond_proj is not None:
        made.put("time_embed.cond_proj", unet.time_embedding.cond_proj)
    if unet.config.addition_embed_type:
        made.put("label_emb.0.0", unet.add_embedding.linear_1)
        made.put("label_emb.0.2", unet.add_embedding.linear_2)
    made.put("input_blocks.0.0", unet.conv_in)
    count = 1
    for block in unet.down_blocks:
        for i, residual in enumerate(block.resnets):
            made.residual(f"input_blocks.{count}.0", residual)
            if hasattr(block, "attentions"):
                made.put(f"input_blocks.{count}.1", block.attentions[i])
            count += 1
        for downsampler in block.downsamplers or ():
            made.put(f"input_blocks.{count}.0.op", downsampler.conv)
            count += 1
    middle = [unet.mid_block.resnets[0], *getattr(unet.mid_block, "attentions", ()), *unet.mid_block.resnets[1:]]
    for i, block in enumerate(middle):
        (made.residual if i % 2 == 0 else made.put)(f"middle_block.{i}", block)
    count = 0
    for block in unet.up_blocks:
        for i, residual in enumerate(block.resnets):
            name, parts = f"output_blocks.{count}", 1
            made.residual(f"{name}.0", residual)
            if hasattr(block, "attentions"):
                made.put(f"{name}.1", block.attentions[i])
                parts = 2
            if block.upsamplers and i == len(block.resnets) - 1:
                made.put(f"{name}.{parts}.conv", block.upsamplers[0].conv)
            count += 1
    made.put("out.0", unet.conv_norm_out)
    made.put("out.2", unet.conv_out)
    return {UNET + name: value for name, value in made.tensors.items()}


def original_vae(vae: AutoencoderKL) -> Tensors:
    made = Layout()

    def block(name: str, source: Any) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            made.put(f"{name}.{part}", getattr(source, part))
        if source.conv_shortcut is not None:
            made.put(f"{name}.nin_shortcut", source.conv_shortcut)

    for side, coder in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        made.put(f"{side}.conv_in", coder.conv_in)
        for i, residual in enumerate(coder.mid_block.resnets):
            block(f"{side}.mid.block_{i + 1}", residual)
        attention = coder.mid_block.attentions[0]
        made.put(f"{side}.mid.attn_1.norm", attention.group_norm)
        for part, module in zip(
            ["q", "k", "v", "proj_out"],
            (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]),
            strict=True,
        ):
            made.tensors[f"{side}.mid.attn_1.{part}.weight"] = module.weight.data[:, :, None, None].clone()
            made.tensors[f"{side}.mid.attn_1.{part}.bias"] = module.bias.data.clone()
        made.put(f"{side}.norm_out", coder.conv_norm_out)
        made.put(f"{side}.conv_out", coder.conv_out)
    for level, down in enumerate(vae.encoder.down_blocks):
        for i, residual in enumerate(down.resnets):
            block(f"encoder.down.{level}.block.{i}", residual)
        for sampler in down.downsamplers or ():
            made.put(f"encoder.down.{level}.downsample.conv", sampler.conv)
    for level, up in enumerate(reversed(vae.decoder.up_blocks)):
        for i, residual in enumerate(up.resnets):
            block(f"decoder.up.{level}.block.{i}", residual)
        for sampler in up.upsamplers or ():
            made.put(f"decoder.up.{level}.upsample.conv", sampler.conv)
    made.put("quant_conv", vae.quant_conv)
    made.put("post_quant_conv", vae.post_quant_conv)
    return {VAE + name: value for name, value in made.tensors.items()}


def inner(text: Any) -> Any:
    """The text transformer, which transformers 5 no longer wraps in every class."""
    return getattr(text, "text_model", text)


def original_clip(text: Any, prefix: str) -> Tensors:
    tensors = {f"{prefix}text_model.{name}": value.clone() for name, value in inner(text).state_dict().items()}
    positions = torch.arange(text.config.max_position_embeddings)[None]
    return {**tensors, f"{prefix}text_model.embeddings.position_ids": positions}


def original_open_clip(text: Any, prefix: str, spare_layer: bool = False) -> Tensors:
    """spare_layer: with the last layer and the projection, which Stable Diffusion 2 does not use."""
    made, model = Layout(), inner(text)
    made.put("token_embedding", model.embeddings.token_embedding)
    made.tensors["positional_embedding"] = model.embeddings.position_embedding.weight.data.clone()
    layers = list(model.encoder.layers)
    for i, layer in enumerate([*layers, layers[0]] if spare_layer else layers):
        name, attention = f"transformer.resblocks.{i}", layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        made.tensors[f"{name}.attn.in_proj_weight"] = torch.cat([part.weight.data for part in parts])
        made.tensors[f"{name}.attn.in_proj_bias"] = torch.cat([part.bias.data for part in parts])
        made.put(f"{name}.attn.out_proj", attention.out_proj)
        made.put(f"{name}.ln_1", layer.layer_norm1)
        made.put(f"{name}.ln_2", layer.layer_norm2)
        made.put(f"{name}.mlp.c_fc", layer.mlp.fc1)
        made.put(f"{name}.mlp.c_proj", layer.mlp.fc2)
    made.put("ln_final", model.final_layer_norm)
    if hasattr(text, "text_projection"):
        made.tensors["text_projection"] = text.text_projection.weight.data.T.contiguous()
    elif spare_layer:
        made.tensors["text_projection"] = torch.ones(text.config.hidden_size, 8)
    made.tensors["logit_scale"] = torch.tensor(4.6)
    return {prefix + name: value for name, value in made.tensors.items()}


@dataclass(frozen=True)
class Made:
    """A single file and the models that it was made of, by the folder that they must come back in."""

    path: Path
    models: dict[str, Any]
    tensors: Tensors = field(repr=False)


def clip(width: int, layers: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=TOKENS,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **{"projection_dim": width, "intermediate_size": 2 * width, **options},
    )


def drawn(model: Any) -> Any:
    """The model with biases and norms drawn too: as constants they would hide that two of them were exchanged."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def unet(levels: str, widths: tuple[int, ...], **options: Any) -> UNet2DConditionModel:
    """levels: one letter a level, A with attention and R with residual blocks alone."""
    down = {"A": "CrossAttnDownBlock2D", "R": "DownBlock2D"}
    up = {"A": "CrossAttnUpBlock2D", "R": "UpBlock2D"}
    return drawn(
        UNet2DConditionModel(
            block_out_channels=widths,
            down_block_types=[down[level] for level in levels],
            up_block_types=[up[level] for level in reversed(levels)],
            out_channels=4,
            **{"layers_per_block": 2, "in_channels": 4, "norm_num_groups": 32, **options},
        )
    )


def small_vae(**options: Any) -> AutoencoderKL:
    return drawn(
        AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            **{"layers_per_block": 1, "latent_channels": 4, "scaling_factor": 0.18215, **options},
        )
    )


def sd1(**options: Any) -> tuple[dict[str, Any], Tensors]:
    text = drawn(CLIPTextModel(clip(64, 2, hidden_act="quick_gelu")))
    models = {
        "text_encoder": text,
        "unet": unet("AAAR", (32, 32, 64, 64), cross_attention_dim=64, attention_head_dim=8, **options),
        "vae": small_vae(),
    }
    return models, original_clip(text, "cond_stage_model.transformer.")


def sd2(spare_layer: bool = True, **options: Any) -> tuple[dict[str, Any], Tensors]:
    text = drawn(CLIPTextModel(clip(64, 2, hidden_act="gelu")))
    heads = {"attention_head_dim": [1, 2, 2], "use_linear_projection": True}
    models = {
        "text_encoder": text,
        "unet": unet("AAR", (64, 128, 128), cross_attention_dim=64, layers_per_block=1, **heads, **options),
        "vae": small_vae(layers_per_block=2),
    }
    return models, original_open_clip(text, "cond_stage_model.model.", spare_layer)


def xl_unet(levels: str, widths: tuple[int, ...], pooled: int, sizes: int, **options: Any) -> UNet2DConditionModel:
    return unet(
        levels,
        widths,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=pooled + 16 * sizes,
        attention_head_dim=[width // 64 for width in widths],
        use_linear_projection=True,
        **options,
    )


def sdxl(**options: Any) -> tuple[dict[str, Any], Tensors]:
    first = drawn(CLIPTextModel(clip(64, 2, hidden_act="quick_gelu")))
    second = drawn(CLIPTextModelWithProjection(clip(128, 2, hidden_act="gelu", projection_dim=96)))
    depths = {"transformer_layers_per_block": [1, 2, 3], "layers_per_block": 1}
    models = {
        "text_encoder": first,
        "text_encoder_2": second,
        "unet": xl_unet("RAA", (64, 64, 128), 96, 6, cross_attention_dim=192, **{**depths, **options}),
        "vae": small_vae(scaling_factor=0.13025),
    }
    texts = original_clip(first, "conditioner.embedders.0.transformer.")
    return models, {**texts, **original_open_clip(second, "conditioner.embedders.1.model.")}


def distilled() -> tuple[dict[str, Any], Tensors]:
    """As SSD-1B: uneven depths, and a middle without attention."""
    depths = {"transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": [[2, 1], 1, 1]}
    return sdxl(mid_block_type="UNetMidBlock2D", **depths)


def refiner() -> tuple[dict[str, Any], Tensors]:
    text = drawn(CLIPTextModelWithProjection(clip(64, 2, hidden_act="gelu")))
    options = {"cross_attention_dim": 64, "transformer_layers_per_block": 2, "layers_per_block": 1}
    models = {
        "text_encoder_2": text,
        "unet": xl_unet("RAAR", (64, 64, 128, 128), 64, 5, **options),
        "vae": small_vae(scaling_factor=0.13025),
    }
    return models, original_open_clip(text, "conditioner.embedders.0.model.")


KINDS: dict[str, tuple[Callable[[], tuple[dict[str, Any], Tensors]], torch.dtype, str, str]] = {
    "sd1": (sd1, torch.float16, "StableDiffusionPipeline", "PNDMScheduler"),
    "sd1-inpainting": (lambda: sd1(in_channels=9), torch.float32, "StableDiffusionInpaintPipeline", "DDIMScheduler"),
    "sd1-lcm": (lambda: sd1(time_cond_proj_dim=16), torch.float16, "StableDiffusionPipeline", "PNDMScheduler"),
    "sd2": (sd2, torch.float32, "StableDiffusionPipeline", "DDIMScheduler"),
    "sd2-inpainting": (lambda: sd2(in_channels=9), torch.float16, "StableDiffusionInpaintPipeline", "PNDMScheduler"),
    "sd2-converted": (lambda: sd2(spare_layer=False), torch.float16, "StableDiffusionPipeline", "DDIMScheduler"),
    "sdxl": (sdxl, torch.float16, "StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sdxl-inpainting": (
        lambda: sdxl(in_channels=9),
        torch.bfloat16,
        "StableDiffusionXLInpaintPipeline",
        "EulerDiscreteScheduler",
    ),
    "sdxl-distilled": (distilled, torch.float16, "StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "refiner": (refiner, torch.float16, "StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler"),
}


PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The single file of a name in `KINDS`, written once."""
    root = tmp_path_factory.mktemp("single")
    done: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in done:
            torch.manual_seed(0)
            build, dtype, *_ = KINDS[name]
            models, texts = build()
            tensors = {**original_unet(models["unet"]), **original_vae(models["vae"]), **texts}
            for module in models.values():
                module.to(dtype).eval()
            path = root / f"{name}.safetensors"
            tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
            save_file(tensors, path)
            done[name] = Made(path, models, tensors)
        return done[name]

    return get


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def published(name: str) -> str:
    """The name of a weight in a published text encoder."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    """What a model makes of fixed inputs, in float32, where its configuration shows as well as its weights."""
    torch.manual_seed(1)
    model = model.float()
    if isinstance(model, AutoencoderKL):
        pixels = torch.randn(1, 3, 16, 16)
        latents = model.encode(pixels).latent_dist.mean
        return [latents, model.decode(latents).sample]
    if isinstance(model, UNet2DConditionModel):
        config = model.config
        sample, text = torch.randn(1, config.in_channels, 8, 8), torch.randn(1, 5, config.cross_attention_dim)
        added = None
        if config.addition_embed_type:
            sizes = 5 if config.projection_class_embeddings_input_dim == 64 + 5 * 16 else 6
            width = config.projection_class_embeddings_input_dim - 16 * sizes
            added = {"text_embeds": torch.randn(1, width), "time_ids": torch.rand(1, sizes) * 64}
        guidance = torch.randn(1, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
        return [model(sample, 500, text, timestep_cond=guidance, added_cond_kwargs=added).sample]
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]])
    found = model(ids, output_hidden_states=True)
    return [found.hidden_states[-2], found[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_as_they_were(kind, made, tmp_path):
    file, (_, dtype, pipeline, scheduler) = made(kind), KINDS[kind]
    unpack(file.path, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.class_name == pipeline and checkpoint.index["scheduler"] == ["diffusers", scheduler]
    for name, model in file.models.items():
        (path,) = checkpoint.weights(name).files
        found = load_file(path)
        due = {published(key) if "text" in name else key: value for key, value in model.state_dict().items()}
        assert found.keys() == due.keys()
        assert all(value.dtype == dtype and torch.equal(value, due[key].to(dtype)) for key, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner"])
def test_each_part_of_a_whole_file_can_be_read_alone(kind, made, tmp_path):
    unpack(made(kind).path, tmp_path / "out")
    checkpoint, weights = Checkpoint.open(tmp_path / "out"), open_weights(made(kind).path)
    for name in made(kind).models:
        PartFile.of(weights, name, *checkpoint.kind(name), checkpoint.config(name)).write(tmp_path / name)
        found, due = checkpoint.replace({name: tmp_path / name}).weights(name).read(), checkpoint.weights(name).read()
        assert found.keys() == due.keys()
        assert all(torch.equal(found[key], due[key]) and found[key].dtype == due[key].dtype for key in due)


def test_a_file_of_another_autoencoder_goes_with_a_single_file(made, tmp_path):
    """As `vae-ft-mse-840000-ema-pruned.safetensors` is given beside a fine-tune."""
    other = {name.removeprefix(VAE): value + 1 for name, value in original_vae(made("sd1").models["vae"]).items()}
    save_file(other, tmp_path / "vae.safetensors")
    (tmp_path / "work").mkdir()
    asked = Asked(None, None, {"vae": tmp_path / "vae.safetensors"}, None, None)
    found = unpack_all(made("sd1").path, tmp_path / "work", None, None, asked)
    assert found.single and found.source.weights("vae").folder.parent.parent == tmp_path / "work" / ".checkpoint"
    vae = found.source.replace(found.components).weights("vae").read()
    due = made("sd1").models["vae"].state_dict()
    assert vae.keys() == due.keys() and all(torch.equal(vae[name], due[name] + 1) for name in due)
    save_file({**other, "decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight has the shape \[64, 16, 3, 3\], the check"):
        unpack_all(made("sd1").path, tmp_path / "work", None, None, asked)


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_single_file_without_its_autoencoder_takes_another(made, tmp_path, name):
    whole, bare = made(name), tmp_path / "bare.safetensors"
    save_file({key: each for key, each in whole.tensors.items() if not key.startswith(VAE)}, bare)
    own = {key.removeprefix(VAE): each for key, each in whole.tensors.items() if key.startswith(VAE)}
    save_file(own, tmp_path / "vae.safetensors")
    whole.models["vae"].save_pretrained(tmp_path / "vae")
    expected = SingleFile.open(whole.path).setup

    def found(vae):
        work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
        work.mkdir()
        return unpack_all(bare, work, None, None, Asked(None, None, {} if vae is None else {"vae": vae}, None, None))

    for vae in (tmp_path / "vae.safetensors", tmp_path / "vae"):
        assert SingleFile.open(bare, vae=vae).setup["unet"] == expected["unet"]
    unpacked = found(tmp_path / ("vae.safetensors" if name == "sd1" else "vae"))
    source = unpacked.source.replace(unpacked.components)
    for part in ("unet", "vae"):
        held, due = source.weights(part).read(), whole.models[part].state_dict()
        assert held.keys() == due.keys() and all(torch.equal(held[key], due[key]) for key in due)
    with pytest.raises(CheckpointError, match=r"without first_stage_model\.\*: use .*, or give its autoenc"):
        found(None)
    with pytest.raises(CheckpointError, match=r"is no folder: give the diffusers folder of the component 'v"):
        found(tmp_path / "none")
    (tmp_path / "vae" / "config.json").write_text('{"latent_channels": "4"}')
    with pytest.raises(CheckpointError, match=r"says no sizes of an autoencoder"):
        found(tmp_path / "vae")
    save_file(whole.models["vae"].state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"no vae under the names of the original authors.*--config FOLDER"):
        found(tmp_path / "vae.safetensors")


XL = {
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
}
PUBLISHED: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "sd1": ("AAAR", (320, 640, 1280, 1280), {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "small-sd": ("AAA", (320, 640, 1280), {"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 1}),
    "sdxl": ("RAA", (320, 640, 1280), {**XL, "transformer_layers_per_block": [1, 2, 10]}),
    "ssd-1b": (
        "RAA",
        (320, 640, 1280),
        {
            **XL,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_give_the_published_configurations(name):
    """Of shapes alone, with which the whole models take no memory."""
    levels, widths, options = PUBLISHED[name]
    with torch.device("meta"):
        model = unet(levels, widths, **options)
        tensors = {**original_unet(model), **original_vae(small_vae())}
        first = CLIPTextModel(clip(768, 12, intermediate_size=3072))
        if "addition_embed_type" in options:
            second = CLIPTextModelWithProjection(clip(1280, 32, intermediate_size=5120))
            tensors |= original_clip(first, "conditioner.embedders.0.transformer.")
            tensors |= original_open_clip(second, "conditioner.embedders.1.model.")
        else:
            tensors |= original_clip(first, "cond_stage_model.transformer.")
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    weights = Weights(Path(name), shapes, dict.fromkeys(shapes, "F16"), {}, None, lambda _: {})
    setup = built_in(weights, recognise(weights), None)
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(setup["unet"])
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert {**options, **setup["unet"]} == {**setup["unet"], **options}
    assert setup["text_encoder"]["num_hidden_layers"] == 12
    assert setup["text_encoder"]["intermediate_size"] == 3072


def test_a_folder_of_somebody_else_stays(made, tmp_path):
    """A process that ended may have had the number of this one."""
    other = tmp_path / f".out.{os.getpid()}.part"
    other.mkdir()
    (other / "work").touch()
    unpack(made("sd1").path, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"] and (other / "work").is_file()


def test_a_unet_without_blocks_is_refused(made, tmp_path):
    blocks = (f"{UNET}input_blocks.", f"{UNET}output_blocks.")
    gone = [name for name in made("sd1").tensors if name.startswith(blocks)]
    path = changed(made("sd1"), tmp_path, lambda kept: [kept.pop(name) for name in gone])
    assert "its U-Net has no " in refused(path, tmp_path)


def assert_computed_alike(found, due):
    """Equal weights give equal values but for the last bits, which on some processors follow where the weights lie."""
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner"])
def test_pipelines_load_it_and_compute_the_same(kind, made, tmp_path):
    file = made(kind)
    unpack(file.path, tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(loaded).__name__ == KINDS[kind][2] and type(loaded.scheduler).__name__ == KINDS[kind][3]
    for name, model in file.models.items():
        again = getattr(loaded, name)
        assert type(again) is type(model)
        for found, due in zip(outputs(again), outputs(model), strict=True):
            assert_computed_alike(found, due)
    assert loaded.vae.config.scaling_factor == file.models["vae"].config.scaling_factor


@pytest.mark.parametrize("kind", ["sd1-lcm", "sdxl-distilled"])
def test_unusual_unets_compute_the_same(kind, made, tmp_path):
    unpack(made(kind).path, tmp_path / "out")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert_computed_alike(outputs(again)[0], outputs(made(kind).models["unet"])[0])


def test_diffusers_reads_the_same_weights_from_the_file(made, tmp_path):
    unpack(made("sdxl").path, tmp_path / "out")
    for folder, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        due = model.from_single_file(str(made("sdxl").path), config=str(tmp_path / "out"), subfolder=folder)
        found = load_file(tmp_path / "out" / folder / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, found[key].to(value.dtype)) for key, value in due.state_dict().items())


@pytest.fixture(scope="module")
def single_pico(tmp_path_factory):
    """pico as one file in the original layout."""
    text = CLIPTextModel.from_pretrained(PICO / "text_encoder")
    unet_model = UNet2DConditionModel.from_pretrained(PICO / "unet", torch_dtype=torch.float16)
    vae = AutoencoderKL.from_pretrained(PICO / "vae", torch_dtype=torch.float16)
    tensors = {**original_unet(unet_model), **original_vae(vae), **original_clip(text, "cond_stage_model.transformer.")}
    path = tmp_path_factory.mktemp("single") / "pico.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_pico_compiled_from_one_file_draws_the_identical_image(single_pico, tmp_path, bundle_of):
    bundle = diffoundry.compile(single_pico, tmp_path / "b", config=PICO, tasks=["txt2img"])
    assert bundle.manifest.source["name"] == "pico"
    assert not list(tmp_path.glob(".*"))
    options = {"steps": 4, "seed": 7, "count": 2}
    prompt = "a large red star at the left on a navy background"
    found, due = (diffoundry.load(root)(prompt, **options) for root in (bundle.root, bundle_of("pico")))
    np.testing.assert_array_equal(found.latents, due.latents)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found.images, due.images, strict=True))


def test_pico_with_its_folder_as_configuration(single_pico, tmp_path):
    unpack(single_pico, tmp_path / "out", config=PICO)
    for path in (path for name in ("text_encoder", "unet", "vae") for path in PICO.glob(f"{name}/*.safetensors")):
        due, found = load_file(path), load_file(tmp_path / "out" / path.relative_to(PICO))
        assert due.keys() == found.keys() and all(torch.equal(due[key], found[key]) for key in due)
        assert all(due[key].dtype == found[key].dtype for key in due)
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((PICO / name).read_text())
    for path in (PICO / "tokenizer").iterdir():
        assert (tmp_path / "out" / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 77


def test_the_tokenizer_is_that_of_clip(made, tmp_path):
    unpack(made("sdxl").path, tmp_path / "out")
    first, second = (CLIPTokenizer.from_pretrained(tmp_path / "out" / name) for name in ("tokenizer", "tokenizer_2"))
    for tokenizer, pad in ((first, 49407), (second, 0)):
        ids = tokenizer("a photo of a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
        assert len(tokenizer) == TOKENS and len(set(tokenizer.get_vocab().values())) == TOKENS
    # The ids that CLIP's own code gives.
    due = [709, 7255, 127, 253, 324, 267, 48338, 21078, 361, 261, 274, 1973, 268, 5068, 15304, 568, 4310, 256]
    assert first("Größe, 東京 & 3rd-rate café's 🎉!").input_ids == [49406, *due, 49407]


def stated(out: Path) -> tuple[str, str, int]:
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    return (
        scheduler["_class_name"],
        scheduler["prediction_type"],
        json.loads((out / "vae" / "config.json").read_text())["sample_size"],
    )


@pytest.mark.parametrize(
    ("kind", "metadata", "extra", "override", "due"),
    [
        ("sd2", {}, {}, None, ("DDIMScheduler", "v_prediction", 768)),
        ("sd2", {}, {"global_step": torch.tensor(875000)}, None, ("PNDMScheduler", "epsilon", 512)),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, {}, None, ("PNDMScheduler", "epsilon", 512)),
        ("sd2", {}, {}, "epsilon", ("PNDMScheduler", "epsilon", 512)),
        ("sd1", {"modelspec.prediction_type": "v"}, {}, None, ("PNDMScheduler", "v_prediction", 512)),
        ("sd1", {"modelspec.prediction_type": "v"}, {}, "sample", ("PNDMScheduler", "sample", 512)),
        ("sdxl", {}, {"v_pred": torch.zeros(0)}, None, ("EulerDiscreteScheduler", "v_prediction", 1024)),
    ],
)
def test_what_the_network_predicts(kind, metadata, extra, override, due, made, tmp_path):
    save_file({**made(kind).tensors, **extra}, tmp_path / "m.safetensors", metadata=metadata)
    unpack(tmp_path / "m.safetensors", tmp_path / "out", prediction_type=override)
    assert stated(tmp_path / "out") == due


def saying(made: Made, metadata: dict[str, str], marks: str = "") -> Weights:
    """The weights of a file with more metadata, and empty tensors of the names in `marks`."""
    weights = open_weights(made.path)
    return replace(weights, metadata=metadata, shapes={**weights.shapes, **dict.fromkeys(marks.split(), (0,))})


@pytest.mark.parametrize(
    ("kind", "metadata", "marks", "due"),
    [
        ("sd1", {"modelspec.prediction_type": "velocity"}, "", ("v_prediction", False)),
        ("sd1", {"modelspec.prediction_type": "v-prediction"}, "", ("v_prediction", False)),
        ("sd1", {"modelspec.prediction_type": "V_Prediction "}, "", ("v_prediction", False)),
        ("sd1", {"modelspec.prediction_type": "x0"}, "", ("sample", False)),
        ("sd1", {"modelspec.predict_key": "v"}, "", ("v_prediction", False)),
        ("sd1", {"prediction_type": "v_prediction"}, "", ("v_prediction", False)),
        ("sd1", {"ss_v_parameterization": "True"}, "", ("v_prediction", False)),
        ("sd2", {"ss_v_parameterization": "False"}, "", ("epsilon", False)),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, "", ("epsilon", False)),
        ("sd1", {"modelspec.prediction_type": "None", "ss_v_parameterization": "None"}, "", ("epsilon", False)),
        ("sd1", {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, "", ("v_prediction", True)),
        ("sdxl", {"modelspec.architecture": "Some-Merge"}, "v_pred ztsnr", ("v_prediction", True)),
    ],
)
def test_what_the_file_says_of_its_training(kind, metadata, marks, due, made):
    weights = saying(made(kind), metadata, marks)
    scheduler = built_in(weights, recognise(weights), None)["scheduler"]
    assert (scheduler["prediction_type"], scheduler.get("rescale_betas_zero_snr", False)) == due


@pytest.mark.parametrize(
    ("metadata", "marks", "what"),
    [
        ({"modelspec.prediction_type": "flow"}, "", "says that it predicts 'flow' .*say it with --prediction-type"),
        ({"prediction_type": "rectified"}, "", "predicts 'rectified' .prediction_type., unknown here"),
        ({"ss_v_parameterization": "maybe"}, "", "neither true nor false: say it with --prediction-type"),
        (
            {"modelspec.prediction_type": "epsilon"},
            "v_pred",
            "epsilon by modelspec.prediction_type and v_prediction by",
        ),
        ({"modelspec.noise_process": "flow"}, "", "for the process 'flow'"),
    ],
)
def test_what_is_not_understood_is_refused_and_can_be_said(metadata, marks, what, made):
    weights = saying(made("sd1"), metadata, marks)
    with pytest.raises(CheckpointError, match=what):
        built_in(weights, SD1, None)
    assert built_in(weights, SD1, "v_prediction")["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("metadata", "marks", "what"),
    [
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
            "",
            "says that it is 'stable-diffusion-xl-v1-base'",
        ),
        ({"modelspec.architecture": "Flux-1-dev"}, "", "its tensors are those of Stable Diffusion 1"),
        ({"ss_zero_terminal_snr": "False"}, "ztsnr", "contradicts itself in ss_zero_terminal_snr and the tensor ztsnr"),
        ({"ss_zero_terminal_snr": "?"}, "", "neither true nor false"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(metadata, marks, what, made):
    with pytest.raises(CheckpointError, match=f"{what}.*--config"):
        built_in(saying(made("sd1"), metadata, marks), SD1, None)


def test_what_is_refused_in_a_file_opens_with_what_the_error_names(made, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(made("sd1").tensors, path, metadata={"modelspec.prediction_type": "flow"})
    assert "say it with --prediction-type" in refused(path, tmp_path)
    assert SingleFile.open(path, prediction_type="epsilon").setup["scheduler"]["prediction_type"] == "epsilon"
    save_file(made("sd1").tensors, path, metadata={"modelspec.architecture": "stable-diffusion-v2-512"})
    assert "(--config)" in refused(path, tmp_path)
    unpack(made("sd1").path, tmp_path / "config")
    assert SingleFile.open(path, config=tmp_path / "config").layout is SD1


def test_what_a_file_cannot_do_is_said_before_it_is_unpacked(made, called, tmp_path, monkeypatch):
    written: list[str] = []
    real = SingleFile.write
    monkeypatch.setattr(
        SingleFile, "write", lambda single, target: (written.append(str(target)), real(single, target))[1]
    )
    for options, what in (
        (("--tasks", "upscale"), "cannot do the task upscale: choose from "),
        (("--component", f"prior={tmp_path}"), "has no component 'prior' to replace"),
        (("--default-steps", "0"), "steps"),
    ):
        done = called("compile", made("sd1").path, "-o", tmp_path / "b", *options)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and what in done.stderr, done.stderr
        assert "diffoundry-" not in done.stderr
    assert not written and not list(tmp_path.iterdir())


def test_names_of_wrappers_are_seen_through(made, tmp_path):
    save_file({f"module.{name}": value for name, value in made("sd1").tensors.items()}, tmp_path / "m.safetensors")
    unpack(tmp_path / "m.safetensors", tmp_path / "out")
    unpack(made("sd1").path, tmp_path / "due")
    for path in (tmp_path / "due").glob("*/*.safetensors"):
        due, found = load_file(path), load_file(tmp_path / "out" / path.relative_to(tmp_path / "due"))
        assert due.keys() == found.keys() and all(torch.equal(due[key], found[key]) for key in due)


def test_the_prediction_type_overrides_the_configuration_too(made, tmp_path):
    unpack(made("sd1").path, tmp_path / "first")
    unpack(made("sd1").path, tmp_path / "second", config=tmp_path / "first", prediction_type="v_prediction")
    assert stated(tmp_path / "second") == ("PNDMScheduler", "v_prediction", 512)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_with_their_wrapper_and_without_their_averages(zipped, made, tmp_path):
    file = made("sd2")
    averages = {f"model_ema.{i}": torch.zeros(3) for i in range(200)}
    content = {"state_dict": {**file.tensors, **averages}, "global_step": 875000, "epoch": 3}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    unpack(tmp_path / "m.ckpt", tmp_path / "out")
    assert stated(tmp_path / "out")[1] == "epsilon"
    unpack(file.path, tmp_path / "due")
    for path in (tmp_path / "due").glob("*/*.safetensors"):
        due, found = load_file(path), load_file(tmp_path / "out" / path.relative_to(tmp_path / "due"))
        assert due.keys() == found.keys() and all(torch.equal(due[key], found[key]) for key in due)


def test_names_without_text_model_are_those_of_old_merges(made, tmp_path):
    old = {
        name.replace("transformer.text_model.", "transformer."): value for name, value in made("sd1").tensors.items()
    }
    save_file(old, tmp_path / "m.safetensors")
    unpack(tmp_path / "m.safetensors", tmp_path / "out")
    unpack(made("sd1").path, tmp_path / "due")
    due, found = (load_file(tmp_path / name / "text_encoder" / "model.safetensors") for name in ("due", "out"))
    assert due.keys() == found.keys() and all(torch.equal(due[key], found[key]) for key in due)


class Code:
    """Unpickles by making a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    """The one line that `unpack` refuses with, having left nothing behind."""
    out = tmp_path / "folder" / "out"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        unpack(source, out, **options)
    assert not list(out.parent.iterdir())
    text = str(caught.value)
    assert "\n" not in text and str(source) in text
    return text


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(zipped, tmp_path):
    content = {"state_dict": {"a": torch.zeros(2)}, "x": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    text = refused(tmp_path / "m.ckpt", tmp_path)
    assert "holds code, not only weights (posix.mkdir" in text and "convert it to .safetensors" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02" + bytes(range(256)), b"\x80\x04\x95" + bytes(99), pickle.dumps({"a": 1}), b"\x80\x02}q\x00."],
)
def test_bytes_that_are_no_checkpoint_hold_no_code(content, tmp_path):
    (tmp_path / "m.ckpt").write_bytes(content)
    assert "truncated or no checkpoint" in refused(tmp_path / "m.ckpt", tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_plain_pickle_is_named(protocol, tmp_path):
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps(Code(tmp_path / "ran"), protocol))
    assert "holds code, not only weights (posix.mkdir)" in refused(tmp_path / "m.ckpt", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_scripts_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.pt"))
    assert "holds code" in refused(tmp_path / "m.pt", tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_truncated_files(suffix, kept, made, tmp_path):
    path = tmp_path / f"m{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": made("sd1").tensors}, path)
    else:
        path.write_bytes(made("sd1").path.read_bytes())
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in refused(path, tmp_path)


def test_a_pickle_that_holds_itself_ends(tmp_path):
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "cycle.ckpt")
    assert "cycle.ckpt" in refused(tmp_path / "cycle.ckpt", tmp_path)


def test_pickles_of_something_else(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "one list" in refused(tmp_path / "list.pt", tmp_path)
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    assert "is a web page, not weights" in refused(tmp_path / "page.ckpt", tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=2))
    assert "no checkpoint" in refused(tmp_path / "plain.pt", tmp_path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_x.alpha"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora.down.weight"], "a LoRA"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["first_stage_model.decoder.up.0.block.0.conv1.weight"], "a VAE alone"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "a Stable Diffusion 3 model"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a U-Net in the diffusers layout"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a VAE in the diffusers layout"),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "a U-Net without text encoder"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder alone"),
        (["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"], "a text encoder alone"),
        (["emb_params"], "a textual inversion"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.proj.weight"], "a motion module"),
        (["model.diffusion_model.out.2.weight.absmax"], "weights quantized by bitsandbytes: give the checkpoint"),
        (["model.diffusion_model.out.2.scale_weight", "scaled_fp8"], "weights in fp8 with scales beside them"),
        (["model.diffusion_model.out.2.base_layer.weight"], "a LoRA that was not merged"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder alone"),
        (["b", "a"], "its tensors are a, b"),
        ([], "its tensors are none"),
    ],
)
def test_other_files_are_named(names, what, tmp_path):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "m.safetensors")
    assert what in refused(tmp_path / "m.safetensors", tmp_path)


def changed(made: Made, tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = dict(made.tensors)
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_names_are_those_of_the_file(kind, made):
    """Errors name what is missing by these: each must be the name that the weight has in a whole file."""
    file = made(kind)
    unet_model, vae = file.models["unet"], file.models["vae"]
    named = {UNET + name for name in unet_names(unet_model.state_dict(), unet_model.config.layers_per_block).values()}
    named |= {VAE + name for name in vae_names(vae.state_dict(), len(vae.config.block_out_channels)).values()}
    assert named == {name for name in file.tensors if name.startswith((UNET, VAE))}
    for folder, prefix in PREFIXES[kind.split("-")[0]].items():
        names = [published(name) for name in file.models[folder].state_dict()]
        found = {prefix + name for name in clip_names(names, open_clip=prefix.endswith("model.")).values()}
        spare = ("logit_scale", "position_ids", *(("text_projection", ".2.") if kind.startswith("sd2") else ()))
        due = {name for name in file.tensors if name.startswith(prefix)}
        assert found == {name for name in due if not any(part in name.removeprefix(prefix) for part in spare)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd1", f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"),
        ("sd1", f"{VAE}decoder.up.2.block.0.norm1.bias"),
        ("sd1", f"{VAE}quant_conv.weight"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
        ("refiner", f"{UNET}label_emb.0.2.weight"),
        ("sd1", f"{UNET}input_blocks.0.0.weight"),
    ],
)
def test_a_missing_weight_is_named(kind, name, made, tmp_path):
    text = refused(changed(made(kind), tmp_path, lambda kept: kept.pop(name)), tmp_path)
    assert f"lacks {name}" in text and "incomplete" in text


def test_many_missing_weights_are_counted(made, tmp_path):
    gone = [name for name in made("sdxl").tensors if ".output_blocks.2." in name or "up.1.block.0" in name]
    path = changed(made("sdxl"), tmp_path, lambda kept: [kept.pop(name) for name in gone])
    text = refused(path, tmp_path)
    assert f"({len(gone)} in all)" in text and "incomplete" in text
    assert sum(name in text for name in gone) == 3


@pytest.mark.parametrize("prefix", [VAE, "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."])
def test_a_missing_part_is_named(prefix, made, tmp_path):
    gone = [name for name in made("sdxl").tensors if name.startswith(prefix)]
    path = changed(made("sdxl"), tmp_path, lambda kept: [kept.pop(name) for name in gone])
    assert f"without {prefix}*" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        (f"{UNET}input_blocks.1.0.in_layers.0.bias", torch.zeros(8), "gives [8] where [32] is due"),
        (f"{UNET}middle_block.1.proj_in.bias", torch.zeros(()), "gives [] where [64] is due"),
        (f"{VAE}encoder.mid.attn_1.q.weight", torch.zeros(3), "gives [3] where"),
        (f"{UNET}input_blocks.0.0.weight", torch.zeros(32, 8, 3, 3), "takes 8 channels for latents of 4"),
        (f"{UNET}input_blocks.0.0.weight", torch.zeros(32), "has the shape [32]"),
        (f"{UNET}input_blocks.1.0.out_layers.3.weight", torch.zeros(40, 40, 3, 3), "40 channels do not divide"),
        (f"{UNET}out.2.bias", torch.zeros(4).to(torch.float8_e4m3fn), "out.2.bias (F8_E4M3)"),
        (f"{UNET}out.2.bias", torch.zeros(4, dtype=torch.int8), "out.2.bias (I8)"),
        (f"{UNET}position_net.null_feature", torch.zeros(4), "does not name: model.diffusion_model.position_net"),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            torch.zeros(700, 64),
            "knows 700 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_named(name, tensor, what, made, tmp_path):
    assert what in refused(changed(made("sd1"), tmp_path, lambda kept: kept.update({name: tensor})), tmp_path)


def test_heads_that_cannot_be_told_need_a_configuration(made, tmp_path):
    vae = made("sd1").models["vae"]
    text = made("sd2").models["text_encoder"]
    odd = unet("AR", (96, 96), cross_attention_dim=64, attention_head_dim=2, use_linear_projection=True)
    texts = original_open_clip(text, "cond_stage_model.model.")
    save_file({**original_unet(odd), **original_vae(vae), **texts}, tmp_path / "m.safetensors")
    assert "96 channels are no multiple of 64" in refused(tmp_path / "m.safetensors", tmp_path)


def stated_class(tmp_path: Path) -> str:
    return str(json.loads((tmp_path / "of-index/scheduler/scheduler_config.json").read_text())["_class_name"])


def test_configurations_that_are_not_of_the_weights(made, tmp_path):
    for kind, config, what in (
        ("sdxl", PICO, "has text_encoder, the weights are of Stable Diffusion XL"),
        ("sd2", PICO, "lacks first_stage_model.encoder.down.2.downsample.conv.weight.*the configuration, not "),
        ("sd1", tmp_path / "nowhere", "is no folder"),
    ):
        with pytest.raises(CheckpointError, match=what):
            unpack(made(kind).path, tmp_path / "out", config=config)
    unpack(made("sd1").path, tmp_path / "config")
    index = json.loads((tmp_path / "config" / "model_index.json").read_text())
    for name, stated in (("vae", "AsymmetricAutoencoderKL"), ("text_encoder", "BertModel")):
        changed_index = {**index, name: [index[name][0], stated]}
        (tmp_path / "config" / "model_index.json").write_text(json.dumps(changed_index))
        with pytest.raises(CheckpointError, match=f"has {stated} for its {name}"):
            unpack(made("sd1").path, tmp_path / "out", config=tmp_path / "config")
    scheduler = {**index, "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    (tmp_path / "config" / "model_index.json").write_text(json.dumps(scheduler))
    unpack(made("sd1").path, tmp_path / "of-index", config=tmp_path / "config")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "config").scheduler).__name__ == stated_class(tmp_path)
    path = tmp_path / "config" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 32}))
    assert "gives [32, 64] where [32, 32] is due" in refused(made("sd1").path, tmp_path, config=tmp_path / "config")


def test_the_options_are_checked(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiffoundryError, match="choose one of epsilon, v_prediction, sample"):
        unpack(made("sd1").path, tmp_path / "out", prediction_type="v")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nowhere.safetensors"):
        assert not is_single_file(path)
    assert is_single_file(made("sd1").path)
