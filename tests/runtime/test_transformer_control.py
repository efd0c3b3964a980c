"""ControlNets of transformers: where residuals are added, what a picture becomes, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import diffoundry
from diffoundry import Control, Request
from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError, CheckpointError, RequestError
from diffoundry.engines.runnable import check_runnable
from diffoundry.engines.verify import verify
from diffoundry.examples.random_transformer import _FLUX, _SD3, make_controlnet
from diffoundry.export.graphs import trace
from diffoundry.export.modules.transformer import Flux, StableDiffusion3, packed, positions, text_positions
from diffoundry.export.modules.transformer_control import FluxControl, taking_residuals
from diffoundry.families.transformer_control import layout, residuals
from diffoundry.parity.pipelines import BESIDE, STEERED, mask, picture

SIZE = {"width": 64, "height": 64}
ROWS, TOKENS = 2, 16


def inputs(transformer, seed=0):
    """Of a wrapper of a transformer of this configuration."""
    generator = torch.Generator().manual_seed(seed)
    skips = (
        {} if "pos_embed_max_size" not in transformer else {"kept_layers": torch.ones(ROWS, transformer["num_layers"])}
    )
    return {
        **skips,
        "sample": torch.randn(ROWS, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(ROWS, 5, transformer["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(ROWS, transformer["pooled_projection_dim"], generator=generator),
    }


def taken(wrapped, layouts, transformer):
    made = [each for one in layouts for each in residuals(one, transformer, 2)]
    return taking_residuals(wrapped, layouts, made), [each.name for each in made]


@pytest.mark.parametrize(("made", "singles", "in_turn"), [(2, 2, False), (3, 0, False), (4, 1, False), (2, 0, True)])
def test_residuals_are_added_where_the_class_of_flux_adds_them(made, singles, in_turn):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    own = {**_FLUX, "num_layers": 5, "num_single_layers": 3, "_class_name": "FluxTransformer2DModel"}
    model = FluxTransformer2DModel(**{name: value for name, value in own.items() if name != "_class_name"}).eval()
    config = {
        "num_layers": made,
        "num_single_layers": singles,
        "conditioning_embedding_channels": 16 if in_turn else None,
    }
    values = [[torch.randn(ROWS, TOKENS, 32) for _ in range(count)] for count in (made, singles)]
    plain = Flux(model)
    theirs = {
        "controlnet_block_samples": values[0],
        "controlnet_single_block_samples": values[1] or None,
        "controlnet_blocks_repeat": in_turn,
    }
    with torch.no_grad():
        expected = plain(**inputs(own), added=theirs)
        one = layout(config, own)
        module, names = taken(plain, [one], own)
        read = [values[k][i] for k, numbers in enumerate(one.numbers()) for i in numbers]
        assert torch.equal(module(**inputs(own), **dict(zip(names, read, strict=True))), expected)
        doubled = {f"{name}.1": value for name, value in zip(names, read, strict=True)}  # of a second slot
        both = module(**inputs(own), **dict.fromkeys(names, torch.zeros(1)), **doubled)
        assert torch.equal(both, expected)


@pytest.mark.parametrize("made", [1, 2, 3, 4, 5, 7])
def test_residuals_are_added_where_the_class_of_stable_diffusion_3_adds_them(made):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    own = {**_SD3, "num_layers": 5, "_class_name": "SD3Transformer2DModel"}
    model = SD3Transformer2DModel(**{name: value for name, value in own.items() if name != "_class_name"}).eval()
    values, plain = [torch.randn(ROWS, TOKENS, 32) for _ in range(made)], StableDiffusion3(model)
    others = [torch.randn(ROWS, TOKENS, 32) for _ in range(2)]
    with torch.no_grad():
        expected = plain(**inputs(own), added={"block_controlnet_hidden_states": values})
        one, other = layout({"num_layers": made}, own), layout({"num_layers": 2}, own)
        module, names = taken(copy.deepcopy(plain), [one], own)
        given = dict(zip(names, [values[i] for i in one.numbers()[0]], strict=True))
        assert torch.equal(module(**inputs(own), **given), expected)
        if made != 2:  # of two ControlNets the sum, each spread by itself
            module, _ = taken(copy.deepcopy(plain), [one, other], own)
            given |= dict(zip(other.residuals, [others[i] for i in other.numbers()[0]], strict=True))
            sums = [values[int(i / (5 / made))] + others[int(i / 2.5)] for i in range(5)]
            expected = plain(**inputs(own), added={"block_controlnet_hidden_states": sums})
            torch.testing.assert_close(module(**inputs(own), **given), expected, atol=1e-6, rtol=0)


def test_pictures_of_a_union_are_added_up_as_diffusers_does(tmp_path):
    from diffusers import FluxControlNetModel, FluxMultiControlNetModel

    own = {**_FLUX, "_class_name": "FluxTransformer2DModel"}
    make_controlnet(own, tmp_path, "union")
    config = json.loads((tmp_path / "config.json").read_text())
    given, modes, strengths = inputs(own), [3, 7], [0.5, 1.2]
    pictures = torch.randn(ROWS, 2, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    several = FluxMultiControlNetModel([FluxControlNetModel.from_pretrained(tmp_path)])
    text = given["encoder_hidden_states"]
    with torch.no_grad():
        expected, _ = several(
            packed(given["sample"], 2),
            [packed(pictures[:, i], 2) for i in range(2)],
            [torch.tensor([mode] * ROWS) for mode in modes],
            strengths,
            encoder_hidden_states=text,
            pooled_projections=given["pooled_projections"],
            timestep=given["timestep"] / 1000,
            img_ids=positions(4, 4, "cpu").float(),
            txt_ids=text_positions(text).float(),
            guidance=torch.tensor([3.5, 3.5]),
            return_dict=False,
        )
        ours = FluxControl(FluxControlNetModel.from_pretrained(tmp_path), layout({**config}, own))
        found = ours(
            given["sample"],
            given["timestep"],
            text,
            given["pooled_projections"],
            pictures,
            torch.tensor([[1.0, 1.0], [0.3, 1.0]]),
            guidance=torch.tensor([3.5, 3.5]),
            control_type=torch.eye(10)[modes].expand(ROWS, 2, 10),
            strength=torch.tensor(strengths).expand(ROWS, 2),
        )
    torch.testing.assert_close(found[0] / torch.tensor([1.0, 0.3])[:, None, None], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


def test_what_no_block_reads_is_not_made():
    of_flux = {"_class_name": "FluxTransformer2DModel", "num_layers": 19, "num_single_layers": 38}
    union = layout({"num_layers": 6, "num_single_layers": 0}, of_flux)
    assert union.numbers() == ([0, 1, 2, 3, 4], []) and union.blocks[4] == 1  # by steps of four
    of_sd3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 24}
    assert layout({"num_layers": 12}, of_sd3).numbers()[0] == list(range(12))
    assert layout({"num_layers": 24}, of_sd3).numbers()[0] == list(range(23))  # the last block takes none
    ends = layout({"num_layers": 12}, of_sd3).ends()
    assert ends.blocks == (0, None) and ends.residuals == ("controlnet_block_sample_0_of_12",)


def net(folder, kind, **options):
    """A folder that has no weights: what is refused by its configuration is refused before they are looked for."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **options}))
    return folder


OF_FLUX = {**_FLUX, "num_layers": 1, "num_single_layers": 0}
OF_SD3 = {**_SD3, "num_layers": 2}


@pytest.mark.parametrize(
    ("checkpoint", "kind", "options", "problem"),
    [
        ("flux-dev-small", "ControlNetModel", {}, "ControlNetModel, which was made for another kind of model; this"),
        ("flux-dev-small", "SD3ControlNetModel", {}, "takes a FluxControlNetModel: give one that was trained with it"),
        ("sd35-small", "FluxControlNetModel", {}, "this checkpoint takes a SD3ControlNetModel"),
        ("pico", "FluxControlNetModel", {}, "takes a ControlNetModel or a ControlNetUnionModel: give one"),
        (
            "flux-dev-small",
            "UNet2DModel",
            {},
            "is not supported as a control; FluxControlNetModel is: --controlnet takes",
        ),
        (
            *("flux-dev-small", "FluxControlNetModel", {**OF_FLUX, "num_attention_heads": 4}),
            "has tokens of width 64, this checkpoint 32: it was made for another model",
        ),
        (
            *("flux-dev-small", "FluxControlNetModel", {**OF_FLUX, "in_channels": 128}),
            "takes numbers a token 128, this checkpoint 64",
        ),
        (
            *("flux-dev-small", "FluxControlNetModel", {**OF_FLUX, "joint_attention_dim": 4096}),
            "reads text of width 4096, this checkpoint 96",
        ),
        (
            "flux-dev-small",
            "FluxControlNetModel",
            {**OF_FLUX, "num_mode": 0},
            "num_mode 0 in its config.json, where it",
        ),
        ("flux-dev-small", "FluxControlNetModel", {**OF_FLUX, "num_layers": 0}, r"has no layers \(num_layers\)"),
        (
            *("flux-dev-small", "FluxControlNetModel", {**OF_FLUX, "conditioning_embedding_channels": 16}),
            "makes numbers of a token of pixels 16, this checkpoint 64",
        ),
        (
            "sd35-small",
            "SD3ControlNetModel",
            {**OF_SD3, "extra_conditioning_channels": 2},
            "takes 2 channels beside the",
        ),
        ("sd35-small", "SD3ControlNetModel", {**OF_SD3, "pos_embed_max_size": 4}, "knows 4 positions a side"),
        ("sd35-small", "SD3ControlNetModel", {**OF_SD3, "patch_size": 1}, "has patches of 1, this checkpoint 2"),
        (
            "z-image-small",
            "FluxControlNetModel",
            OF_FLUX,
            "ControlNets of a ZImageTransformer2DModel are not supported",
        ),
        ("flux-fill-small", "FluxControlNetModel", OF_FLUX, "sees a picture by itself: they do not go together"),
        ("flux-kontext-small", "FluxControlNetModel", OF_FLUX, "sees a picture by itself: they do not go together"),
    ],
)
def test_controlnets_that_cannot_be_are_refused(checkpoint, kind, options, problem, checkpoint_of, tmp_path):
    with pytest.raises(CheckpointError, match=problem):
        diffoundry.compile(
            checkpoint_of(checkpoint), tmp_path / "out", controlnets={"edge": net(tmp_path / "net", kind, **options)}
        )
    assert not (tmp_path / "out").exists()


def test_a_file_is_refused_where_a_folder_is_due(checkpoint_of, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="of a ControlNet of a transformer give the diffusers folder"):
        diffoundry.compile(checkpoint_of("flux-dev-small"), tmp_path / "out", controlnets={"edge": file})


def test_a_bundle_without_them_says_how_it_gets_them(bundle_of):
    pipe = diffoundry.load(bundle_of("flux-dev-small"))
    control = Control("edge", picture(64, 64))
    with pytest.raises(RequestError, match="it has none: compile the checkpoint again with --controlnet edge=FOLDER"):
        pipe.check(Request("a star", control=(control,), **SIZE))


# ------------------------------------------------------------------------------------------------- compiled bundles


@pytest.fixture(scope="module")
def steered(bundle_of):
    return bundle_of(f"flux-dev-small{STEERED}{'-'.join(BESIDE['flux-dev-small'])}")


@pytest.fixture(scope="module")
def pipe(steered):
    return diffoundry.load(steered)


def shown(name, i=0, **options):
    return Control(name, picture(64, 64).rotate(90 * i), **options)


def drawn(pipe, *controls, **options):
    asked = {"seed": 3, "steps": 4, "output": "latent", **SIZE, **options}
    return pipe("a large red star", control=controls, **asked).latents


@pytest.mark.slow
def test_rows_with_and_without_controls_share_a_batch(pipe):
    def request(i, *controls):
        return Request("a blue ring", seed=i, steps=3 + i, count=1 + i % 2, control=controls, **SIZE)

    requests = [
        request(0, shown("edge")),
        request(1),
        request(2, shown("depth", 1, scale=0.5, interval=(0.2, 0.7)), shown("edge", scale=0.3)),
        request(3, shown("union", mode="canny"), shown("union", 2, mode=4, interval=(0.0, 0.5))),
        request(4, shown("pixels", 3), shown("union", mode="tile"), shown("union", 1, mode="depth")),
    ]
    alone = [pipe.generate(each).latents for each in requests]
    for batch in (4, 2):
        for found, wanted in zip(pipe.generate_many(requests, batch=batch), alone, strict=True):
            np.testing.assert_allclose(found.latents, wanted, atol=1e-4)
    assert np.abs(alone[0] - drawn(pipe, seed=0, steps=3)).max() > 0.05


@pytest.mark.slow
def test_on_a_device_it_is_what_it_is_on_the_host_and_what_is_not_on_changes_nothing(steered, pipe):
    device = diffoundry.load(steered, loop="device")
    several = (
        shown("edge", scale=0.5),
        shown("depth", 1, interval=(0.0, 0.6)),
        shown("union", mode="lq"),
        shown("pixels"),
    )
    for controls in (several[:1], several):
        np.testing.assert_allclose(drawn(device, *controls), drawn(pipe, *controls), atol=1e-4)
    bare = drawn(diffoundry.load(steered))
    assert np.abs(drawn(pipe, *several) - bare).max() > 0.05
    np.testing.assert_allclose(drawn(pipe, shown("pixels", scale=0.0)), bare, atol=1e-5)


@pytest.mark.slow
def test_its_recorded_outputs_are_verified_and_what_it_lacks_is_said(steered, pipe, tmp_path):
    assert verify(Bundle.open(steered))
    for control, problem in (
        (shown("edge", mode="canny"), "the control edge has no modes"),
        (shown("union"), "found no mode: say which one the picture is of, canny, tile, depth, blur, pose, gray, lq, 7"),
        (shown("union", mode="openpose"), "found the mode 'openpose': say which one"),
        (shown("edge", guess_mode=True), "guess_mode has no effect on edge, a ControlNet of a transformer"),
        (shown("edge", mask=mask(64, 64)), "a mask has no effect on the control edge"),
    ):
        with pytest.raises(RequestError, match=problem):
            pipe.check(Request("a star", control=(control,), **SIZE))
    manifest = json.loads((steered / "bundle.json").read_text())
    del manifest["components"]["vae_encoder"]
    manifest["tasks"] = ["txt2img"]
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no encoder among its components, which encodes the pictures of the control"):
        check_runnable(Bundle.open(tmp_path))


@pytest.mark.slow
def test_of_one_task_it_still_has_the_encoder_and_a_twin_takes_residuals(checkpoint_of, tmp_path, monkeypatch):
    from diffusers import SD3Transformer2DModel

    folder = tmp_path / "half"
    shutil.copytree(checkpoint_of("sd3-small"), folder)
    whole = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    whole.save_pretrained(folder / "transformer")
    nets = {name: checkpoint_of(f"sd3-small{STEERED}{name}") for name in ("edge", "inpaint")}
    monkeypatch.setattr(trace, "_EXTERNAL_FROM_BYTES", 0)  # as if the weights were large
    made = diffoundry.compile(folder, tmp_path / "b", tasks=["txt2img"], controlnets=nets, validate="twin")
    plain, own = tmp_path / "b" / "transformer", tmp_path / "b" / "transformer_controlled"
    assert (own / "plain.onnx_data").samefile(plain / "model.onnx_data")
    assert (own / "model.onnx").stat().st_size < 2 * (plain / "model.onnx").stat().st_size
    assert not (own / "model.onnx_data").exists()
    assert made.manifest.with_role("encoder") == ["vae_encoder"] and made.manifest.tasks == ("txt2img",)
    pipe = diffoundry.load(tmp_path / "b")
    masked = Control("inpaint", picture(64, 64), mask=mask(64, 64))
    found = [drawn(pipe, *controls) for controls in ((), (masked,), (masked, shown("edge")))]
    assert all(np.abs(one - other).max() > 0.02 for one, other in itertools.pairwise(found))
    with pytest.raises(RequestError, match="the control inpaint inpaints: give it a mask"):
        drawn(pipe, shown("inpaint"))
    with pytest.raises(RequestError, match="the mask of the control inpaint is 32x32 and its picture 64x64"):
        drawn(pipe, shown("inpaint", mask=mask(32, 32)))
