"""Pictures beside the text: as transformers prepares them, in a batch with others, on a device, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

import diffoundry
from diffoundry import Control, ImagePrompt, Request
from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError, CheckpointError, DiffoundryError, RequestError
from diffoundry.export.graphs import trace
from diffoundry.export.ip_adapter import IPAdapterFile
from diffoundry.parity.pipelines import PICO, mask, picture
from diffoundry.runtime.pictures.clip import clip_pixels
from diffoundry.runtime.pictures.preprocess import mask_pixels
from diffoundry.runtime.pictures.region import mask_of_queries
from diffoundry.runtime.refine import generate_refined

NEAR = 1e-5


@pytest.fixture(scope="module")
def prompted(bundle_of):
    return bundle_of(PICO)


@pytest.fixture(scope="module")
def pipe(prompted):
    return diffoundry.load(prompted)


def drawn(pipe, *prompts, **options):
    asked = {"seed": 3, "steps": 5, "guidance": 3.0, "width": 64, "height": 64, "output": "latent", **options}
    return pipe("a large red star", image_prompt=prompts, **asked).latents


def plus(**options):
    return ImagePrompt("plus", picture(50, 40), **options)


@pytest.mark.parametrize("size", [(90, 70), (70, 91), (32, 32), (20, 31), (333, 64)])
def test_pixels_are_those_of_transformers(size):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=mean, image_std=std
    )
    for image in (picture(*size), picture(*size).convert("L").convert("RGB")):
        wanted = processor(image, return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(clip_pixels(image, 32, mean, std), wanted, atol=1e-5)


def test_rows_with_an_image_with_a_control_and_with_neither_share_a_batch(pipe):
    def request(i, **options):
        return Request("a blue ring", seed=i, steps=4 + i, guidance=3.0, width=64, height=64, **options)

    requests = [
        request(0, image_prompt=(plus(),)),
        request(1, control=(Control("edge", picture(64, 64)),)),
        request(2),
        request(3, image_prompt=(plus(scale=0.4, interval=(0.0, 0.6)),), control=(Control("depth", picture(64, 64)),)),
    ]
    alone = [pipe.generate(each).latents for each in requests]
    for found, wanted in zip(pipe.generate_many(requests), alone, strict=True):
        np.testing.assert_allclose(found.latents, wanted, atol=NEAR)
    plain = pipe.generate(request(0)).latents
    assert np.abs(alone[0] - plain).max() > 0.05 and np.abs(alone[1] - pipe.generate(request(1)).latents).max() > 0.05


def test_without_an_image_nothing_of_it_is_loaded(prompted, bundle_of):
    pipe = diffoundry.load(prompted)
    found = drawn(pipe)
    assert not {"image_encoder", "ip_adapter_plus", "unet_controlled"} & set(pipe.loaded)
    assert np.array_equal(found, drawn(diffoundry.load(bundle_of("pico"))))
    drawn(pipe, plus())
    assert {"image_encoder", "ip_adapter_plus", "unet_controlled"} <= set(pipe.loaded)
    assert not any(name.startswith("controlnet") for name in pipe.loaded)
    pipe.generate(Request("a star", steps=1, image_prompt=(plus(),), output="latent"), low_memory=True)
    assert pipe.loaded == []


def test_scales_are_of_layers_and_of_steps(pipe):
    layers = pipe.bundle.manifest.wiring.image_prompts["plus"].layers
    bare, whole = drawn(pipe), drawn(pipe, plus())
    np.testing.assert_allclose(drawn(pipe, plus(scale=0.0)), bare, atol=NEAR)
    np.testing.assert_allclose(drawn(pipe, plus(scale=(1.0,) * layers)), whole, atol=NEAR)
    ways = [drawn(pipe, plus(scale=tuple(float(i == k) for i in range(layers)))) for k in range(layers)]
    ways += [whole, bare, drawn(pipe, plus(interval=(0.0, 0.4)))]
    assert min(np.abs(a - b).max() for i, a in enumerate(ways) for b in ways[:i]) > 1e-3
    with pytest.raises(RequestError, match=f"is read by {layers} cross-attentions, found 2 scales"):
        drawn(pipe, plus(scale=(1.0, 0.5)))


def test_embeddings_take_the_place_of_images(pipe):
    wired = pipe.bundle.manifest.wiring.image_prompts["plus"]
    pixels = np.stack([clip_pixels(picture(50, 40), wired.side, wired.mean, wired.std)])
    embeds = pipe.engine("image_encoder")({"pixel_values": pixels})[wired.output]
    np.testing.assert_allclose(drawn(pipe, ImagePrompt("plus", embeds=embeds)), drawn(pipe, plus()), atol=NEAR)
    with pytest.raises(
        RequestError, match=r"embeds of the IP-Adapter plus must be \(images, 17, 32\), found \(1, 24\)"
    ):
        drawn(pipe, ImagePrompt("plus", embeds=np.zeros((1, 24), np.float32)))


def test_a_negative_image_is_read_by_the_half_of_the_negative_prompt(pipe):
    own, other = picture(50, 40), picture(30, 60)
    alone = drawn(pipe, plus(), guidance=1.0)
    same = drawn(pipe, plus(negative=own), negative_prompt="a large red star")  # so that both halves are alike
    np.testing.assert_allclose(same, alone, atol=1e-4)
    ways = [drawn(pipe, plus()), drawn(pipe, plus(negative=own)), drawn(pipe, plus(negative=other)), alone]
    assert min(np.abs(a - b).max() for i, a in enumerate(ways) for b in ways[:i]) > 1e-3
    for count, negative in ((2, other), (2, [own, other])):
        drawn(pipe, ImagePrompt("plus", [own, other][:count], negative=negative), steps=1)
    with pytest.raises(RequestError, match="negative image of the IP-Adapter plus has no effect without guidance"):
        drawn(pipe, plus(negative=own), guidance=1.0)
    with pytest.raises(RequestError, match="takes one negative image, or as many as images, 1 in all, found 2"):
        plus(negative=[own, other])


def test_masks_part_the_drawing(pipe):
    pictures = [picture(50, 40), picture(40, 70)]
    left, right = (np.tile((np.arange(64) // 32 == side).astype(np.uint8) * 255, (64, 1)) for side in (0, 1))
    both = drawn(pipe, ImagePrompt("plus", pictures, mask=[left, right]))
    np.testing.assert_allclose(drawn(pipe, ImagePrompt("plus", pictures[::-1], mask=[right, left])), both, atol=NEAR)
    whole = np.full((64, 64), 255, np.uint8)
    np.testing.assert_allclose(drawn(pipe, plus(mask=whole)), drawn(pipe, plus()), atol=NEAR)
    np.testing.assert_allclose(drawn(pipe, plus(mask=0 * whole)), drawn(pipe), atol=NEAR)
    ways = [both, drawn(pipe, ImagePrompt("plus", pictures)), drawn(pipe, plus(mask=left)), drawn(pipe, plus())]
    assert min(np.abs(a - b).max() for i, a in enumerate(ways) for b in ways[:i]) > 1e-3
    device = diffoundry.load(pipe.bundle.root, loop="device")
    found = drawn(device, ImagePrompt("plus", pictures, mask=[left, right]), scheduler="euler")
    wanted = drawn(pipe, ImagePrompt("plus", pictures, mask=[left, right]), scheduler="euler")
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    many = [Request("a ring", image_prompt=(ImagePrompt("plus", pictures, mask=own),)) for own in (None, [left, right])]
    with pytest.raises(RequestError, match="as many images for the IP-Adapter plus, found 2 as one, 2 with masks"):
        pipe.generate_many(many)
    with pytest.raises(RequestError, match="takes a mask for each image, 1 in all, found 2"):
        plus(mask=[left, right])
    with pytest.raises(RequestError, match=r"the mask of the IP-Adapter plus 'none\.png' does not exist"):
        drawn(pipe, plus(mask="none.png"))


@pytest.mark.parametrize("size", [(64, 64), (72, 56), (104, 72), (32, 96), (328, 64)])
def test_masks_have_the_sizes_of_diffusers(size):
    own = mask_pixels(mask(90, 70), *size)
    wanted = IPAdapterMaskProcessor().preprocess(mask(90, 70), height=size[1], width=size[0])
    np.testing.assert_array_equal(own, wanted[0].numpy())
    for halving in range(4):
        height, width = (-(-side // 8 // 2**halving) for side in size[::-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = IPAdapterMaskProcessor.downsample(wanted[:, 0], 1, height * width, 1)
        np.testing.assert_allclose(mask_of_queries(own[0], height, width).ravel(), theirs.numpy().ravel(), atol=1e-5)


def test_on_a_device_it_is_what_it_is_on_the_host(prompted, pipe):
    device = diffoundry.load(prompted, loop="device")
    for options in ({}, {"control": (Control("edge", picture(64, 64), interval=(0.0, 0.6)),)}):
        for prompt in (plus(), plus(scale=0.5, interval=(0.3, 0.9))):
            found = drawn(device, prompt, scheduler="euler", **options)
            np.testing.assert_allclose(found, drawn(pipe, prompt, scheduler="euler", **options), atol=1e-4)


@pytest.mark.slow
def test_graphs_for_cuda_take_images(prompted, tmp_path, simulated_sessions, simulated_cuda):
    copy = shutil.copytree(prompted, tmp_path / "b")
    diffoundry.build(copy, engine="onnxruntime:cuda")
    wanted = drawn(diffoundry.load(prompted), plus(), scheduler="euler")
    pipe = diffoundry.load(copy)
    for _ in range(3):
        np.testing.assert_allclose(drawn(pipe, plus(), scheduler="euler"), wanted, atol=5e-3)
    assert any("steps of 2x4x8x8" in each for each in pipe.info()["captured"])


@pytest.mark.slow
def test_an_adapter_is_added_without_anything_else_being_traced(checkpoint_of, bundle_of, tmp_path, monkeypatch):
    out = shutil.copytree(bundle_of("pico"), tmp_path / "b")
    before = {name: part.key for name, part in Bundle.open(out).manifest.components.items()}
    traced, own = [], trace.trace

    def watched(spec, *rest, **options):
        traced.append(spec.name)
        own(spec, *rest, **options)

    monkeypatch.setattr(trace, "trace", watched)
    file = checkpoint_of("pico+image-plain") / "ip_adapter.safetensors"
    nested = {}  # as published .bin files hold it
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = tensor
    torch.save(nested, tmp_path / "ip.bin")
    more = {"ip_adapters": {"look": tmp_path / "ip.bin"}, "image_encoder": file.parent / "image_encoder"}
    made = diffoundry.compile(checkpoint_of("pico"), out, **more)
    assert traced == ["image_encoder", "ip_adapter_look"]
    assert {name: part.key for name, part in made.manifest.components.items() if name in before} == before
    pipe = diffoundry.load(out)
    look = ImagePrompt("", [picture(40, 40), picture(30, 60)])  # of the only adapter
    assert np.abs(drawn(pipe, look) - drawn(pipe)).max() > 0.01
    shutil.rmtree(out)  # of the same files in the other layout, the graph is the same
    shutil.copytree(bundle_of("pico"), out)
    again = diffoundry.compile(checkpoint_of("pico"), out, ip_adapters={"look": file})
    assert np.array_equal(drawn(diffoundry.load(out), look), drawn(pipe, look))
    key = made.manifest.components["unet_controlled"].variants
    assert again.manifest.components["unet_controlled"].variants == key


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": 3}, "the name of an IP-Adapter must be a text"),
        ({"image": None}, "takes an image, or embeds in its place"),
        ({"embeds": np.zeros((1, 24))}, "takes an image, or embeds in its place"),
        ({"image": []}, "takes from 1 to 64 images, found 0"),
        ({"scale": float("nan")}, "must be from 0 to 100, or one such number for each cross-attention, found nan"),
        ({"scale": ()}, "must be from 0 to 100"),
        ({"interval": (0.9, 0.1)}, "the interval of the IP-Adapter look must be two numbers"),
        (
            {"image": None, "embeds": np.full((1, 3), np.nan)},
            "embeds of the IP-Adapter look have numbers that are not finite",
        ),
    ],
)
def test_an_image_prompt_that_cannot_be_is_refused(options, problem):
    with pytest.raises(RequestError, match=problem):
        ImagePrompt(**{"name": "look", "image": picture(8, 8), **options})


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        (("plus",), "image_prompt takes a list of diffoundry.ImagePrompt"),
        ((plus(), plus()), "the IP-Adapter plus is given twice: give all its images in one"),
        (
            (ImagePrompt("face", picture(8, 8)),),
            "has no IP-Adapter 'face', it has plus: .*--ip-adapter face=F",
        ),
        ((ImagePrompt("plus", "missing.png"),), "the image of the IP-Adapter plus 'missing.png' does not exist"),
        ((ImagePrompt("plus", Image.new("RGB", (0, 4))),), "has no pixels"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_is_loaded(prompted, prompts, problem):
    pipe = diffoundry.load(prompted)
    with pytest.raises(RequestError, match=problem):
        pipe("a star", image_prompt=prompts)
    assert pipe.loaded == []


def test_the_requests_of_a_batch_have_as_many_images(pipe, bundle_of):
    pair = [Request("a star", image_prompt=(ImagePrompt("plus", [picture(8, 8)] * n),)) for n in (1, 2)]
    with pytest.raises(RequestError, match="as many images for the IP-Adapter plus, found 1, 2"):
        pipe.generate_many(pair)
    with pytest.raises(RequestError, match=r"has no IP-Adapter: compile the checkpoint again with --ip-adapter NAME=F"):
        diffoundry.load(bundle_of("pico"))("a star", image_prompt=ImagePrompt("", picture(8, 8)))


def test_adapters_that_cannot_be_are_refused(checkpoint_of, tmp_path):
    folder = checkpoint_of("pico+image-plain")
    tensors = load_file(folder / "ip_adapter.safetensors")

    def changed(name, content):
        save_file(content, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    face = {name: each for name, each in tensors.items() if not name.startswith("image_proj.proj")}
    lora = {**tensors, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 8)}
    half = {name: each for name, each in tensors.items() if name != "ip_adapter.1.to_k_ip.weight"}
    (tmp_path / "cut.safetensors").write_bytes((folder / "ip_adapter.safetensors").read_bytes()[:500])
    (tmp_path / "code.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    wide = {name: torch.zeros(each.shape[0], 9) if "to_" in name else each for name, each in tensors.items()}
    cases = [
        ({"look": tmp_path / "none"}, {}, "does not exist"),
        ({"look": checkpoint_of("pico") / "unet"}, {}, "holds no IP-Adapter"),
        ({"look": changed("face", face)}, {}, "is an IP-Adapter of an unknown kind: give one of the kinds plain"),
        ({"look": changed("lora", lora)}, {}, "is an IP-Adapter FaceID with a LoRA, which is not supported"),
        (
            {"look": changed("half", half)},
            {},
            "lacks a key or a value of layer 1",
        ),
        ({"look": changed("whole", tensors)}, {}, "needs the image encoder .*--image-encoder FOLDER"),
        ({"look": tmp_path / "cut.safetensors"}, {}, "truncated or damaged"),
        ({"look": tmp_path / "code.bin"}, {}, "code|unpickle|not weights|damaged"),
        ({"a b": folder}, {}, "the name of an IP-Adapter has letters"),
        ({"look": folder}, {"image_encoder": checkpoint_of("pico") / "unet"}, "is not supported as an image encoder"),
        ({}, {"image_encoder": folder}, "an image encoder goes with IP-Adapters"),
        ({"look": changed("wide", wide)}, {"image_encoder": folder / "image_encoder"}, "makes tokens of width 9, this"),
    ]
    for adapters, more, problem in cases:
        with pytest.raises(DiffoundryError, match=problem):
            diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", ip_adapters=adapters, **more)
    assert not (tmp_path / "out").exists()
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        save_file(tensors, two / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 files that may be an IP-Adapter"):
        IPAdapterFile.open(two, None)


def edited(bundle, folder, change):
    """A bundle of the same files with another manifest."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    text = json.loads((bundle / "bundle.json").read_text())
    change(text)
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").write_text(json.dumps(text))
    return folder


def put(*path):
    """Sets what stands at a path of keys to the last of `path`; None takes it away."""

    def change(text):
        *keys, last, value = path
        for key in keys:
            text = text[key]
        if value is None:
            del text[last]
        else:
            text[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("wiring", "image_prompts", {}),
        put("wiring", "image_prompts", "plus", "output", "nope"),
        put("wiring", "image_prompts", "plus", "component", "unet"),
        put("wiring", "image_prompts", "plus", "encoder", "ip_adapter_plus"),
        put("wiring", "image_prompts", "plus", "tokens", ""),
        put("wiring", "image_prompts", "plus", "layers", 10**12),
        put("wiring", "image_prompts", "plus", "side", 10**6),
        put("wiring", "image_prompts", "plus", "std", [1.0, 0.0, 1.0]),
        put("wiring", "controls", "edge", "residuals", 10**12),
        put("wiring", "controls", "edge", "channels", 7),
        put("wiring", "controls", "edge", "component", "missing"),
        put("wiring", "controls", "edge", "component", "vae_encoder"),
        put("wiring", "controls", "a\nb/../x", {"component": "controlnet_edge", "residuals": 5}),
        put("components", "ip_adapter_plus", "outputs", []),
        put("components", "ip_adapter_plus", "outputs", 0, "shape", ["a", "b", "c"]),
        put("components", "unet_controlled", None),
        put("components", "unet_controlled", "role", "control"),
    ],
)
def test_a_manifest_whose_parts_do_not_agree_is_refused_when_it_is_loaded(change, prompted, tmp_path):
    with pytest.raises(BundleError, match=r"compile (it|the bundle) again"):
        diffoundry.load(edited(prompted, tmp_path / "b", change))


def test_what_one_refiner_lacks_is_for_the_first_model_alone(pipe, bundle_of):
    refiner = diffoundry.load(bundle_of("pico"))
    request = Request("a star", seed=1, steps=6, width=64, height=64, control=(Control("edge", picture(64, 64)),))
    found = generate_refined(pipe, refiner, replace(request, image_prompt=(plus(),)), part=0.5)
    bare = generate_refined(pipe, refiner, replace(request, control=()), part=0.5)
    assert np.abs(found.latents - bare.latents).max() > 0.01 and len(found.request["control"]) == 1


def test_one_adapter_under_two_names_is_refused(pipe):
    with pytest.raises(RequestError, match="the IP-Adapter plus is given twice"):
        drawn(pipe, plus(), ImagePrompt("", picture(9, 9)))
    with pytest.raises(RequestError, match=r"again with --controlnet edge=FOLDER --controlnet depth=F.* --ip-ad"):
        drawn(pipe, ImagePrompt("face", picture(9, 9)))
    with pytest.raises(RequestError, match="too narrow for an image encoder: crop it first"):
        drawn(pipe, ImagePrompt("plus", np.zeros((1, 3_000_000, 3), np.uint8)))


@pytest.mark.parametrize("wrong", [{"image_std": [0, 0, 0]}, {"image_mean": [1e999] * 3}, {"do_normalize": False}])
def test_pictures_that_are_prepared_in_another_way_are_refused(wrong, checkpoint_of, tmp_path):
    folder = shutil.copytree(checkpoint_of("pico+image-plain"), tmp_path / "ip")
    (folder / "image_encoder" / "preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(DiffoundryError, match=f"says {next(iter(wrong))}|preprocessor"):
        diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", ip_adapters={"look": folder})
    assert not (tmp_path / "out").exists()
