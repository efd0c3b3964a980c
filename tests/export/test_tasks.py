"""`compile` with tasks, replaced components, a tiny autoencoder and single files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import diffoundry
from diffoundry import DiffoundryError
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.modules.autoencoder import preview
from diffoundry.export.reading import described
from diffoundry.families.flux import FAMILY as FLUX

PROMPT = "a large red star at the left on a navy background"


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """A small `AutoencoderTiny` of pico's downscale, as a folder."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    folder = tmp_path_factory.mktemp("taesd")
    AutoencoderTiny(**blocks, **counts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_tiny(tmp_path_factory, bundle_of, checkpoint_of, tiny_vae):
    """pico with a second decoder; what the pico bundle holds is taken over."""
    target = shutil.copytree(bundle_of("pico"), tmp_path_factory.mktemp("tiny") / "pico.bundle")
    diffoundry.compile(checkpoint_of("pico"), target, components={"vae_tiny": tiny_vae})
    return diffoundry.load(target)


@pytest.fixture(scope="module")
def tiny_pipeline(checkpoint_of, tiny_vae):
    """diffusers' pico with the tiny autoencoder in the place of its own."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    tiny = AutoencoderTiny.from_pretrained(tiny_vae)
    return StableDiffusionPipeline.from_pretrained(checkpoint_of("pico"), vae=tiny)


def test_the_tasks_decide_which_components_are_there(tmp_path, bundle_of, checkpoint_of):
    target = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    before = {path.name: path.stat().st_mtime_ns for path in (target / "unet").iterdir()}
    bundle = diffoundry.compile(checkpoint_of("pico"), target, tasks=["txt2img"])
    assert bundle.manifest.tasks == ("txt2img",)
    assert "vae_encoder" not in bundle.manifest.components
    assert not (target / "vae_encoder").exists()
    assert {path.name: path.stat().st_mtime_ns for path in (target / "unet").iterdir()} == before
    pipe = diffoundry.load(target)
    assert len(pipe(PROMPT, steps=1, seed=1).images) == 1
    with pytest.raises(DiffoundryError, match=r"does not hold the task img2img.*--tasks txt2img,img2img"):
        pipe(PROMPT, image=Image.new("RGB", (64, 64)))
    bundle = diffoundry.compile(checkpoint_of("pico"), target)
    assert bundle.manifest.tasks == ("txt2img", "img2img", "inpaint")
    assert "vae_encoder" in bundle.manifest.components


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["upscale"]}, "cannot do the task upscale: choose from txt2img, img2img, inpaint"),
        ({"tasks": []}, "cannot do the task"),
        ({"components": {"unett": "."}}, r"no component 'unett' to replace: it has .*unet.*vae_tiny"),
        ({"components": {"unet": "/does/not/exist"}}, "is no folder"),
        ({"components": {"unet": "tests"}}, "config"),
        ({"config": "examples/pico"}, "the config goes with a single file"),
        ({"prediction_type": "epsilon"}, "goes with a single file"),
        ({"default_steps": 0}, "steps"),
        ({"default_steps": 2000}, "the model has 1000 timesteps, 2000 steps by default are more"),
        ({"default_guidance": -1}, "guidance"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, checkpoint_of, options, message):
    with pytest.raises(DiffoundryError, match=message):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_of_another_shape_is_refused(tmp_path, checkpoint_of):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "taef1")
    with pytest.raises(DiffoundryError, match="no AutoencoderTiny for 4 latent channels"):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "b", components={"vae_tiny": tmp_path / "taef1"})


def test_the_tiny_decoder_gives_what_diffusers_gives_with_it(with_tiny, tiny_pipeline):
    result = with_tiny(PROMPT, steps=2, seed=3, decoder="tiny")
    with torch.no_grad():
        expected = tiny_pipeline.vae.decode(torch.from_numpy(result.latents)).sample.numpy()
    np.testing.assert_allclose(with_tiny.decode(result.latents, "tiny"), expected, atol=1e-4, rtol=1e-2)
    assert np.abs(expected - with_tiny.decode(result.latents)).max() > 0.1
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(with_tiny.preview(result.latents)[0]))


def test_the_tiny_decoder_works_in_tiles(with_tiny, tiny_pipeline):
    latents = np.random.default_rng(0).standard_normal((1, 4, 80, 72)).astype(np.float32)
    vae = tiny_pipeline.vae
    vae.enable_tiling()
    with torch.no_grad():
        expected = vae.decode(torch.from_numpy(latents)).sample.numpy()
    vae.disable_tiling()
    np.testing.assert_allclose(with_tiny.decode(latents, "tiny", tiled=True), expected, atol=1e-4, rtol=1e-2)


def test_a_bundle_says_which_decoders_it_has(with_tiny, bundle_of):
    assert with_tiny.abilities()["decoders"] == ["full", "tiny"]
    assert diffoundry.load(bundle_of("pico")).abilities()["decoders"] == ["full"]


def test_a_bundle_without_a_tiny_decoder_says_how_to_get_one(bundle_of):
    pipe = diffoundry.load(bundle_of("pico"))
    with pytest.raises(DiffoundryError, match=r"no tiny decoder: .*--component vae_tiny=FOLDER"):
        pipe(PROMPT, decoder="tiny")
    with pytest.raises(DiffoundryError, match="no tiny decoder"):
        pipe.preview(np.zeros((1, 4, 8, 8), np.float32))


def test_a_checkpoint_may_have_a_tiny_autoencoder_for_its_own(
    tmp_path, bundle_of, checkpoint_of, tiny_vae, tiny_pipeline
):
    from diffusers import StableDiffusionImg2ImgPipeline

    target = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    bundle = diffoundry.compile(checkpoint_of("pico"), target, components={"vae": tiny_vae})
    assert bundle.manifest.components["vae_encoder"].outputs[0].name == "latent_sample"
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 80, 3), dtype=np.uint8))
    pipeline = StableDiffusionImg2ImgPipeline(**tiny_pipeline.components, requires_safety_checker=False)
    options = {"num_inference_steps": 4, "strength": 0.5, "generator": torch.Generator().manual_seed(5)}
    expected = pipeline(PROMPT, image=image, output_type="latent", **options).images.numpy()
    found = diffoundry.load(target)(PROMPT, image=image, steps=4, strength=0.5, seed=5, guidance=7.5)
    np.testing.assert_allclose(found.latents, expected, atol=1e-4, rtol=1e-2)


@pytest.fixture(scope="module")
def taef1(tmp_path_factory):
    """A small `AutoencoderTiny` of 16 latent channels, as a folder."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    folder = tmp_path_factory.mktemp("taef1")
    AutoencoderTiny(latent_channels=16, **blocks, **counts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("scaling", "shift"), [(1.0, 0.0), (0.5, 0.25)])
def test_a_tiny_decoder_beside_one_with_a_shift_has_the_scale_and_shift_of_its_own(
    scaling, shift, tmp_path, taef1, checkpoint_of
):
    """As `latents / vae.config.scaling_factor + vae.config.shift_factor` of the pipelines, of the tiny one."""
    from diffusers import AutoencoderTiny

    folder = shutil.copytree(taef1, tmp_path / "taef1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": scaling, "shift_factor": shift}))
    source = Checkpoint.open(checkpoint_of("flux-dev-small")).replace({"vae_tiny": folder})
    pipeline = described(source, FLUX)
    own = pipeline.latents
    assert own.shift_factor and own.scaling_factor != 1
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = preview(source, "vae_tiny_decoder", pipeline).load()(latents / own.scaling_factor + own.shift_factor)
        expected = AutoencoderTiny.from_pretrained(folder).decode(latents / scaling + shift).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux-dev-small", "sd3-small", "z-image-small"])
def test_a_tiny_decoder_of_a_transformer_gives_what_the_pipeline_gives_with_it(
    name, tmp_path, taef1, bundle_of, checkpoint_of
):
    from diffusers import AutoencoderTiny, DiffusionPipeline

    target = shutil.copytree(bundle_of(name), tmp_path / "tiny.bundle")
    diffoundry.compile(checkpoint_of(name), target, components={"vae_tiny": taef1})
    pipe = diffoundry.load(target)
    result = pipe("a star", steps=2, seed=3, width=64, height=48, decoder="tiny")
    pipeline = DiffusionPipeline.from_pretrained(checkpoint_of(name))
    pipeline.vae = AutoencoderTiny.from_pretrained(taef1)
    options = {"num_inference_steps": 2, "guidance_scale": pipe.bundle.manifest.default_guidance, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        drawn = pipeline("a star", width=64, height=48, generator=generator, **options).images
    pixels = pipe.decode(result.latents, "tiny").transpose(0, 2, 3, 1) / 2 + 0.5
    np.testing.assert_allclose(np.clip(pixels, 0, 1), drawn, atol=1e-4, rtol=1e-2)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(pipe.preview(result.latents)[0]))


def test_large_pictures_go_through_the_autoencoder_in_tiles(bundle_of, checkpoint_of):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(checkpoint_of("pico"))
    pipeline.vae.enable_tiling()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 136, 3), dtype=np.uint8))
    options = {"num_inference_steps": 2, "strength": 1.0, "generator": torch.Generator().manual_seed(5)}
    expected = pipeline(PROMPT, image=image, output_type="latent", **options).images
    with torch.no_grad():
        pixels = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample.numpy()
    pipe = diffoundry.load(bundle_of("pico"))
    found = pipe(PROMPT, image=image, steps=2, strength=1.0, seed=5, guidance=7.5, tiled=True)
    np.testing.assert_allclose(found.latents, expected.numpy(), atol=1e-4, rtol=1e-2)
    np.testing.assert_allclose(pipe.decode(found.latents, tiled=True), pixels, atol=1e-4, rtol=1e-2)
    assert np.abs(pipe.decode(found.latents) - pixels).max() > 1e-3, "one call sees more than a tile"


def test_the_defaults_of_a_bundle_are_what_run_takes(tmp_path, bundle_of, checkpoint_of):
    target = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    diffoundry.compile(checkpoint_of("pico"), target, default_steps=3, default_guidance=2.5)
    pipe = diffoundry.load(target)
    result = pipe(PROMPT, seed=1)
    assert (result.request["steps"], result.request["guidance"]["scale"]) == (3, 2.5)
    np.testing.assert_array_equal(result.latents, pipe(PROMPT, seed=1, steps=3, guidance=2.5).latents)


def test_weights_in_half_precision_are_widened_without_loss(tmp_path, bundle_of, checkpoint_of):
    import onnx
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(checkpoint_of("pico"), tmp_path / "half")
    for path in source.glob("unet/*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    target = shutil.copytree(bundle_of("pico"), tmp_path / "pico.bundle")
    diffoundry.compile(source, target)
    graph = onnx.load(target / "unet" / "model.onnx").graph
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in graph.initializer}
    weights = {tensor.name for tensor in graph.initializer}
    assert not [node for node in graph.node if node.op_type == "Cast" and node.input[0] in weights]
    pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(2), "output_type": "latent"}
    expected = pipeline(PROMPT, **options).images.numpy()
    found = diffoundry.load(target)(PROMPT, steps=3, seed=2, guidance=7.5).latents
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-2)
