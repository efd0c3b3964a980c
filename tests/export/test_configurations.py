"""What diffusers' pipeline classes do with configurations, and what configurations tell before any work is done."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import diffoundry
from diffoundry.common.errors import CheckpointError, DiffoundryError, RequestError
from diffoundry.examples import random_checkpoint
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.modules.unet import unet
from diffoundry.export.reading import described
from diffoundry.families import FAMILIES
from diffoundry.families.stable_diffusion import drawn_side
from diffoundry.runtime.request import Request
from diffoundry.runtime.schedulers import SAMPLERS

PROMPT = "a red fox"
UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "sample_size": 16,
    "norm_num_groups": 8,
}
FIXED = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (32, 32),
}
VAE = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 32,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 77,
}
OLD = {"steps_offset": 0, "clip_sample": True}


def micro(out, **unet):
    """A Stable Diffusion checkpoint of a few hundred kilobytes, with weights that let every input show."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(7)
    tokenizer = random_checkpoint._tokenizer(1000, "<|endoftext|>")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    models = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT, **ids)),
        "unet": diffusers.UNet2DConditionModel(**{**UNET, **unet}),
        "vae": diffusers.AutoencoderKL(**VAE),
    }
    for model in models.values():
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    diffusers.StableDiffusionPipeline(
        **models,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    return out


def edit(path, drop=(), **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return micro(tmp_path_factory.mktemp("micro") / "checkpoint")


@pytest.fixture(scope="module")
def compiled(source, tmp_path_factory):
    return diffoundry.compile(source, tmp_path_factory.mktemp("micro") / "out.bundle").root


@pytest.fixture
def pair(source, compiled, tmp_path):
    """A copy of the checkpoint, and of its bundle, of which a compile takes over what is finished."""
    return shutil.copytree(source, tmp_path / "checkpoint"), shutil.copytree(compiled, tmp_path / "out.bundle")


def options_of(task):
    generator = np.random.default_rng(1)
    if task == "txt2img":
        return {}
    image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    if task == "img2img":
        return {"image": image, "strength": 0.6}
    mask = Image.fromarray(np.repeat([[0, 255]], 16, 1).repeat(32, 0).astype(np.uint8))
    return {"image": image, "mask": mask, "strength": 0.6}


def theirs(checkpoint, task, scheduler=None, family="StableDiffusion"):
    import diffusers

    kind = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[task]
    pipe = getattr(diffusers, f"{family}{kind}Pipeline").from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options = options_of(task)
    if "mask" in options:
        options["mask_image"] = options.pop("mask")
    size = {} if task == "img2img" else {"height": 32, "width": 32}
    generator = torch.Generator().manual_seed(3)
    return pipe(
        PROMPT, num_inference_steps=5, guidance_scale=7.5, generator=generator, output_type="latent", **size, **options
    ).images


def same_latents(checkpoint, bundle, task, scheduler=None, family="StableDiffusion"):
    pipe = diffoundry.load(bundle)
    size = {} if task == "img2img" else {"height": 32, "width": 32}
    ours = pipe(PROMPT, steps=5, seed=3, guidance=7.5, scheduler=scheduler, **size, **options_of(task)).latents
    np.testing.assert_allclose(ours, theirs(checkpoint, task, scheduler, family).numpy(), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_each_task_changes_the_scheduler_as_its_class_does(pair, name):
    checkpoint, bundle = pair
    edit(checkpoint / "model_index.json", scheduler=["diffusers", name])
    edit(checkpoint / "scheduler/scheduler_config.json", ("_class_name",), **OLD, skip_prk_steps=False)
    diffoundry.compile(checkpoint, bundle)
    for task in ("txt2img", "img2img", "inpaint"):
        same_latents(checkpoint, bundle, task)
    same_latents(checkpoint, bundle, "inpaint", "DDPMScheduler")


def test_what_the_file_leaves_out_is_not_handed_on_to_another_scheduler(pair):
    checkpoint, bundle = pair
    edit(checkpoint / "scheduler/scheduler_config.json", ("steps_offset", "clip_sample"))
    diffoundry.compile(checkpoint, bundle)
    same_latents(checkpoint, bundle, "txt2img")
    same_latents(checkpoint, bundle, "txt2img", "DDPMScheduler")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL", "LatentConsistencyModel"])
def test_the_rules_are_those_of_the_pipeline_classes(family, kind):
    """Each scheduler with its defaults, and with what old configurations say, given to the class itself."""
    import diffusers

    pipeline = getattr(diffusers, f"{family}{kind}Pipeline", None)
    if pipeline is None:
        assert (family, kind) == ("LatentConsistencyModel", "Inpaint")
        return
    ours = {
        "StableDiffusion": "stable-diffusion",
        "StableDiffusionXL": "stable-diffusion-xl",
        "LatentConsistencyModel": "latent-consistency",
    }[family]
    task = {"": "txt2img", "Img2Img": "img2img", "Inpaint": "inpaint"}[kind]
    parts = ["vae", "text_encoder", "tokenizer", "unet"]
    parts += ["text_encoder_2", "tokenizer_2"] if family.endswith("XL") else ["safety_checker", "feature_extractor"]
    flags = {} if family.endswith("XL") else {"requires_safety_checker": False}
    names = sorted({sampler.class_name for sampler in SAMPLERS.values()})
    for name, config in itertools.product(names, ({}, {**OLD, "skip_prk_steps": False})):
        scheduler = getattr(diffusers, name).from_config(config)
        before = dict(scheduler.config)
        after = pipeline(**dict.fromkeys(parts), scheduler=scheduler, **flags).scheduler.config
        changed = {key: value for key, value in after.items() if key in before and before[key] != value}
        assert FAMILIES[ours].scheduler_changes([task], before).get(task, {}) == changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [None, "0.2.4", "0.8.1", "0.9.0.dev0", "0.9.0", "0.35.1"])
@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_small_sizes_of_old_unets_are_taken_as_the_classes_take_them(kind, version):
    import diffusers

    unet = diffusers.UNet2DConditionModel(**UNET)
    if version:
        unet.register_to_config(_diffusers_version=version)
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"])
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**parts, unet=unet, requires_safety_checker=False)
    told = {} if version is None else {"_diffusers_version": version}
    assert drawn_side({"sample_size": 16, **told}) == pipeline.unet.config.sample_size


@pytest.mark.slow
def test_numbers_of_the_autoencoder_that_the_classes_do_not_read_change_nothing(pair):
    checkpoint, bundle = pair
    edit(checkpoint / "vae/config.json", latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 2, 0.7, 1.2])
    edit(checkpoint / "vae/config.json", shift_factor=3.0)
    latents = diffoundry.compile(checkpoint, bundle).manifest.latents
    assert (latents.mean, latents.std, latents.shift_factor) == ((), (), 0.0)
    same_latents(checkpoint, bundle, "img2img")


@pytest.mark.slow
def test_configurations_are_read_through_their_classes(pair):
    """A whole CLIP's configuration, keys left at their defaults, and one that no class knows."""
    checkpoint, bundle = pair
    text = json.loads((checkpoint / "text_encoder/config.json").read_text())
    whole = {"model_type": "clip", "text_config": text, "vision_config": {}}
    (checkpoint / "text_encoder/config.json").write_text(json.dumps(whole))
    edit(checkpoint / "unet/config.json", ("in_channels", "out_channels", "addition_embed_type"), unheard_of=1)
    edit(checkpoint / "vae/config.json", ("in_channels", "out_channels", "latent_channels", "scaling_factor"))
    diffoundry.compile(checkpoint, bundle)
    same_latents(checkpoint, bundle, "img2img")


REFUSED = {
    "another autoencoder": ("model_index.json", {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "AutoencoderKL or "),
    "a BERT": ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "a BertModel, .*CLIPTextModel is"),
    "BERT's configuration": ("text_encoder/config.json", {"model_type": "bert"}, "of the type 'bert'"),
    "a tokenizer": ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "a T5Tokenizer, .*CLIPTok"),
    "someone's U-Net": ("model_index.json", {"unet": ["my_unet", "Unet"]}, "a my_unet.Unet, .*UNet2DConditionModel is"),
    "no U-Net": ("model_index.json", {"unet": [None, None]}, "has no unet, which a StableDiffusionPipeline needs"),
    "someone's pipeline": ("model_index.json", {"_class_name": ["mine", "Mine"]}, "is a mine.Mine; the pipeline cl"),
    "text width": ("unet/config.json", {"cross_attention_dim": 48}, "gives 32 numbers a token, the U-Net takes 48"),
    "latents": ("vae/config.json", {"latent_channels": 8}, "has 8 latent channels, the U-Net takes 4"),
    "embeddings": ("text_encoder/config.json", {"vocab_size": 500}, "token 999 .* 500"),
    "no scale": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor in the vae's config.json .*other than 0"),
    "dual attention": ("unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention"),
    "unknown blocks": ("unet/config.json", {"down_block_types": ["Nothing2D"]}, "unet cannot be built .*Nothing2D"),
    "no such groups": ("vae/config.json", {"norm_num_groups": 7}, "vae_encoder cannot be built"),
    "no such heads": (
        "text_encoder/config.json",
        {"num_attention_heads": 5},
        "no CLIP text encoder's|text_encoder cannot be",
    ),
    "a mask of padding": ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_tells_is_refused_before_any_work(name, source, tmp_path):
    file, changes, message = REFUSED[name]
    checkpoint = shutil.copytree(source, tmp_path / "checkpoint")
    edit(checkpoint / file, **changes)
    told = []
    with pytest.raises(CheckpointError, match=message):
        diffoundry.compile(checkpoint, tmp_path / "b", progress=lambda stage, done, total: told.append(stage))
    assert told == [], "the first thing that is told is that the weights are hashed"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_part_of_another_make_is_refused_and_one_that_fits_is_taken(pair, source, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    checkpoint, bundle = pair
    CLIPTextModel(CLIPTextConfig(**{**TEXT, "hidden_size": 48})).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="--component text_encoder=FOLDER"):
        diffoundry.compile(checkpoint, bundle, components={"text_encoder": tmp_path / "other"})
    edit(checkpoint / "model_index.json", text_encoder=["transformers", "BertModel"])
    diffoundry.compile(checkpoint, bundle, components={"text_encoder": source / "text_encoder"}).check()


def test_the_multiple_that_a_unet_takes_is_found_without_weights(source, tmp_path):
    checkpoint = shutil.copytree(source, tmp_path / "checkpoint")
    assert units(checkpoint) == [1, 1]
    edit(checkpoint / "unet/config.json", **FIXED)
    assert units(checkpoint) == [2, 2]


def units(folder):
    """What the sides of latents must be multiples of."""
    checkpoint = Checkpoint.open(folder)
    axes = unet(checkpoint, "unet", described(checkpoint, FAMILIES["stable-diffusion"])).axes
    return [axes[side].unit for side in ("height", "width")]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_each_task_of_xl_reads_mean_and_deviation_as_its_class_does(task, xl_with_deviations):
    same_latents(*xl_with_deviations, task, family="StableDiffusionXL")
    import diffusers

    checkpoint, bundle = xl_with_deviations
    latents = diffoundry.load(bundle)(PROMPT, steps=2, seed=3, height=64, width=64)
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        unscaled = torch.from_numpy(latents.latents) * std / vae.config.scaling_factor + mean
        pixels = vae.decode(unscaled).sample.numpy()
    np.testing.assert_allclose(diffoundry.load(bundle).decode(latents.latents), pixels, atol=1e-4, rtol=1e-2)


@pytest.fixture(scope="module")
def xl_with_deviations(checkpoint_of, bundle_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    checkpoint = shutil.copytree(checkpoint_of("sdxl-small"), folder / "checkpoint")
    bundle = shutil.copytree(bundle_of("sdxl-small"), folder / "out.bundle")
    edit(checkpoint / "vae/config.json", latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 2.0, 0.7, 1.2])
    diffoundry.compile(checkpoint, bundle)
    return checkpoint, bundle


@pytest.mark.slow
def test_a_unet_that_takes_multiples_alone_draws_them_and_refuses_the_rest(tmp_path):
    checkpoint = micro(tmp_path / "checkpoint", **FIXED)
    bundle = diffoundry.compile(checkpoint, tmp_path / "out.bundle", tasks=["txt2img", "img2img"])
    assert bundle.manifest.latents.multiple == 2
    same_latents(checkpoint, bundle.root, "txt2img")
    pipe = diffoundry.load(bundle.root)
    with pytest.raises(RequestError, match=r"multiple of 4 .* found 34: try 32"):
        pipe.check(Request(PROMPT, width=34, height=32, steps=2))
    with pytest.raises(DiffoundryError, match="multiples of 2"):
        pipe.check(Request(PROMPT, image=np.zeros((1, 4, 15, 16), np.float32), steps=2))
