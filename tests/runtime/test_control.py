"""Pictures that steer the drawing: in a batch, for a part of the steps, on a device, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file

import diffoundry
from diffoundry import Control, Request
from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError, CheckpointError, DiffoundryError, EngineError, RequestError
from diffoundry.engines import controlled
from diffoundry.engines.controlled import ControlledEngine
from diffoundry.engines.onnxruntime import OrtHostBinding
from diffoundry.engines.runnable import check_runnable
from diffoundry.engines.verify import verify
from diffoundry.examples.random_checkpoint import make_t2i_adapter
from diffoundry.export.graphs import trace
from diffoundry.export.graphs.controlled import write_controlled
from diffoundry.export.single_file.controlnet import ControlNetFile, _original_names
from diffoundry.families.control import intrablocks, residuals
from diffoundry.parity.pipelines import PICO, mask, picture
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pictures.edges import canny

STEPS = 5
NEAR = 1e-5


@pytest.fixture(scope="module")
def steered(bundle_of):
    return bundle_of(PICO)


@pytest.fixture(scope="module")
def pipe(steered):
    return diffoundry.load(steered)


def drawn(pipe, *controls, **options):
    asked = {"seed": 3, "steps": STEPS, "guidance": 3.0, "width": 64, "height": 64, "output": "latent", **options}
    return pipe("a large red star", control=controls, **asked).latents


def edge(**options):
    return Control("edge", picture(64, 64), **options)


def union(mode, i=0, **options):
    return Control("union", picture(64, 64).rotate(90 * i), mode=mode, **options)


def test_rows_with_and_without_controls_share_a_batch(pipe):
    def request(i, *controls):
        return Request("a blue ring", seed=i, steps=4 + i, guidance=3.0, width=64, height=64, control=controls)

    requests = [
        request(0, edge()),
        request(1),
        request(2, Control("depth", picture(64, 64).rotate(90), 0.5, (0.2, 0.7)), edge(scale=0.3)),
        request(3, edge(guess_mode=True)),
        request(4, union("canny", scale=0.5), union(1, 2, interval=(0.0, 0.5))),
        request(5, union("5"), union("openpose", 1, scale=0.3), edge()),
    ]
    alone = [pipe.generate(each).latents for each in requests]
    for batch in (4, 2):
        together = pipe.generate_many(requests, batch=batch)
        for found, wanted in zip(together, alone, strict=True):
            np.testing.assert_allclose(found.latents, wanted, atol=NEAR)
    assert np.abs(alone[0] - pipe.generate(request(0)).latents).max() > 0.05


def test_without_a_control_nothing_of_it_is_loaded_and_the_image_is_that_of_the_plain_bundle(steered, bundle_of):
    pipe = diffoundry.load(steered)
    found = drawn(pipe)
    assert not {"unet_controlled", "controlnet_edge", "controlnet_depth"} & set(pipe.loaded)
    assert np.array_equal(found, drawn(diffoundry.load(bundle_of("pico"))))
    drawn(pipe, edge())
    assert {"unet_controlled", "controlnet_edge"} <= set(pipe.loaded) and "controlnet_depth" not in pipe.loaded
    pipe.release_all()
    assert pipe.loaded == []
    pipe.generate(Request("a star", steps=1, control=(edge(),), output="latent"), low_memory=True)
    assert pipe.loaded == []


def test_a_scale_of_zero_changes_nothing_and_each_part_of_the_steps_does(pipe):
    bare = drawn(pipe)
    np.testing.assert_allclose(drawn(pipe, edge(scale=0.0)), bare, atol=NEAR)
    found = {part: drawn(pipe, edge(interval=part)) for part in ((0.0, 1.0), (0.0, 0.4), (0.4, 1.0))}
    for one, other in ((found[0.0, 1.0], bare), (found[0.0, 0.4], bare), (found[0.4, 1.0], found[0.0, 0.4])):
        assert np.abs(one - other).max() > 0.02
    np.testing.assert_allclose(drawn(pipe, edge(interval=(0.41, 0.59))), bare, atol=NEAR)  # no step lies within


def test_a_control_that_is_not_on_is_not_run(steered, monkeypatch):
    calls = []
    run = OrtHostBinding.__call__
    monkeypatch.setattr(
        OrtHostBinding, "__call__", lambda own, *names: (calls.append(own._component), run(own, *names))[1]
    )
    drawn(diffoundry.load(steered, threads=1), edge(interval=(0.0, 0.4)))
    assert calls.count("controlnet_edge") == 2 and calls.count("unet_controlled") == STEPS


@pytest.mark.parametrize("sampler", ["euler", "dpm++2m", "euler_a"])
def test_on_a_device_it_is_what_it_is_on_the_host(steered, pipe, sampler):
    device = diffoundry.load(steered, loop="device")
    for control in (edge(), edge(scale=0.5, interval=(0.3, 0.9)), edge(guess_mode=True)):
        for _ in range(2):
            found = drawn(device, control, scheduler=sampler)
            np.testing.assert_allclose(found, drawn(pipe, control, scheduler=sampler), atol=1e-4)
    several = edge(scale=0.5), Control("depth", picture(64, 64), interval=(0.0, 0.6)), union("canny"), union("depth")
    for controls in (several[:2], several):
        found = drawn(device, *controls, scheduler=sampler)
        np.testing.assert_allclose(found, drawn(pipe, *controls, scheduler=sampler), atol=1e-4)
    split = drawn(pipe, edge(), guidance=Guidance(3.0, mode="split"))
    np.testing.assert_allclose(split, drawn(pipe, edge()), atol=1e-4)


def test_of_too_many_controls_residuals_are_added_up_on_the_host(steered, pipe, monkeypatch):
    both = edge(scale=0.5), Control("depth", picture(64, 64), interval=(0.0, 0.6))
    wanted = drawn(pipe, *both)
    monkeypatch.setattr(controlled, "MOST_SLOTS", 1)
    np.testing.assert_allclose(drawn(diffoundry.load(steered), *both), wanted, atol=1e-4)
    device = diffoundry.load(steered, loop="device")
    np.testing.assert_allclose(drawn(device, edge()), drawn(pipe, edge()), atol=1e-4)
    with pytest.raises(RequestError, match="a few controls"):
        drawn(device, *both)


def test_pictures_of_a_union_act_together(pipe):
    whole = drawn(pipe, union("canny"), union("depth", 1))
    np.testing.assert_allclose(drawn(pipe, union("depth", 1), union(3)), whole, atol=NEAR)
    ways = [whole, drawn(pipe), drawn(pipe, union("canny")), drawn(pipe, union("depth"))]
    ways += [drawn(pipe, union("canny", scale=0.5), union("depth", 1)), drawn(pipe, union("canny", guess_mode=True))]
    assert min(np.abs(a - b).max() for i, a in enumerate(ways) for b in ways[:i]) > 1e-3
    for controls, problem in (
        ([union(None)], "found no mode: say which one the picture is of, openpose, depth, softedge, canny, normal"),
        ([union("tile")], "found the mode 'tile'"),
        ([union(6)], "found the mode 6"),
        ([union("-1")], "found the mode '-1'"),
        ([edge(mode="canny")], "the control edge has no modes, found 'canny': leave the mode out"),
        ([union("canny"), union(3)], "is given two pictures of one mode"),
        ([union("canny"), union("canny")], "the control union is given twice"),
        ([union("canny"), union("depth", guess_mode=True)], "differ in guess_mode"),
    ):
        with pytest.raises(RequestError, match=problem):
            drawn(pipe, *controls)
    with pytest.raises(RequestError, match="the mode of the control union must be a whole number from 0 to 64"):
        union(1.5)
    with pytest.raises(RequestError, match="give the name 'union' and mode='depth'"):
        drawn(pipe, Control("union:depth", picture(64, 64)))
    np.testing.assert_array_equal(drawn(pipe, union(np.int64(3))), drawn(pipe, union("canny")))
    many = [Request("a ring", control=own, width=64, height=64) for own in ([union(0)], [union(0), union(1)])]
    with pytest.raises(RequestError, match="must have as many pictures for the control union, found 1, 2: run them"):
        pipe.generate_many(many)


def test_a_union_of_one_file_is_that_of_the_folder(checkpoint_of, tmp_path):
    folder = checkpoint_of("pico+union-union")
    config = json.loads((checkpoint_of("pico") / "unet" / "config.json").read_text())
    found = ControlNetFile(folder / "diffusion_pytorch_model.safetensors", config).config
    wanted = json.loads((folder / "config.json").read_text())
    same = ("_class_name", "num_control_type", "num_trans_channel", "num_proj_channel", "num_trans_layer")
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


def test_a_union_that_cannot_be_is_refused(checkpoint_of, tmp_path):
    folder = checkpoint_of("pico+union-union")
    tensors, config = load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "config.json"
    several = {name for name in tensors if name.startswith("transformer_layes.")}
    for name, content, problem in (
        ("narrow", {**tensors, "task_embedding": torch.zeros(6, 7)}, "does not fit the checkpoint|do not go together"),
        ("flat", {name: each for name, each in tensors.items() if name not in several}, "lacks transformer_layes"),
        ("tasks", {name: each for name, each in tensors.items() if name != "task_embedding"}, "lacks task_embedding"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        files = {"union": tmp_path / f"{name}.safetensors"}
        with pytest.raises(CheckpointError, match=problem):
            diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", controlnets=files)
    for key, value, due in (
        ("num_control_type", 65, "must be from 1 to 64"),
        ("num_control_type", True, "must be from 1 to 64"),
        ("num_trans_channel", 32, "must be 48"),
        ("num_trans_head", 7, "must be otherwise"),
        ("addition_time_embed_dim", None, "must be otherwise"),
    ):
        copy = shutil.copytree(folder, tmp_path / f"{key}-{value}")
        (copy / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        with pytest.raises(CheckpointError, match=f"says {key} {value} in its config.json, where it {due}"):
            diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", controlnets={"union": copy})
    assert not (tmp_path / "out").exists()


def test_a_control_lies_over_the_image_where_the_part_around_a_mask_is_drawn(pipe):
    image = picture(120, 96)
    edit = {"image": image, "mask": mask(120, 96), "padding_mask_crop": 8, "strength": 1.0}
    ways = [Control("edge", image, 3.0), ()]
    found, other = (np.asarray(pipe("a star", steps=3, seed=1, control=way, **edit).images[0], float) for way in ways)
    assert found.shape == (96, 120, 3) and np.abs(found - other).max() > 5
    with pytest.raises(RequestError, match="it is 64x64 and the image 120x96, give one of this size"):
        pipe("a star", control=edge(), **edit)


def test_graphs_for_cuda_take_controls(steered, tmp_path, simulated_sessions, simulated_cuda):
    copy = shutil.copytree(steered, tmp_path / "b")
    built = diffoundry.build(copy, engine="onnxruntime:cuda")
    checks = list(verify(built, engine="onnxruntime:cuda", precision="fp32"))
    assert {check.component for check in checks} == set(built.manifest.components) and all(c.passed for c in checks)
    wanted = drawn(diffoundry.load(steered), edge(interval=(0.0, 0.7)), scheduler="euler")
    pipe = diffoundry.load(copy)
    for _ in range(4):
        np.testing.assert_allclose(drawn(pipe, edge(interval=(0.0, 0.7)), scheduler="euler"), wanted, atol=5e-3)
    assert any("steps of 2x4x8x8" in each for each in pipe.info()["captured"])
    several = edge(), Control("depth", picture(64, 64))
    np.testing.assert_allclose(drawn(pipe, *several), drawn(diffoundry.load(steered), *several), atol=5e-3)


@pytest.mark.slow
def test_another_control_is_added_without_anything_else_being_traced(checkpoint_of, bundle_of, tmp_path, monkeypatch):
    out = shutil.copytree(bundle_of("pico"), tmp_path / "b")
    before = {name: part.key for name, part in Bundle.open(out).manifest.components.items()}
    traced = []
    own = trace.trace
    monkeypatch.setattr(
        trace, "trace", lambda spec, *rest, **options: (traced.append(spec.name), own(spec, *rest, **options))
    )
    file = in_the_original_layout(checkpoint_of("pico+control-edge"), tmp_path / "edge.safetensors")
    made = diffoundry.compile(checkpoint_of("pico"), out, controlnets={"edge": file})
    assert traced == ["controlnet_edge"]
    assert {name: part.key for name, part in made.manifest.components.items() if name in before} == before
    assert list(made.manifest.wiring.controls) == ["edge"]
    weights = [json.loads((out / name / "weights.json").read_text()) for name in ("unet", "unet_controlled")]
    assert weights[0] == weights[1]
    found, wanted = (drawn(diffoundry.load(each), edge()) for each in (out, bundle_of(PICO)))
    np.testing.assert_allclose(found, wanted, atol=NEAR)


def in_the_original_layout(folder, path, prefix="control_model."):
    """A ControlNet as its authors store it, which diffusers reads as the same."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    original = {prefix + old: tensors[name] for name, old in _original_names(tensors, config).items()}
    save_file(original, path)
    read = convert_controlnet_checkpoint(load_file(path), config)
    assert read.keys() == tensors.keys() and all(bool((read[name] == tensors[name]).all()) for name in tensors)
    return path


def test_a_controlnet_in_one_file_is_what_it_is_in_a_folder(checkpoint_of, tmp_path):
    folder = checkpoint_of("pico+control-edge")
    unet = json.loads((checkpoint_of("pico") / "unet" / "config.json").read_text())
    plain = folder / "diffusion_pytorch_model.safetensors"
    wanted = load_file(plain)
    for i, path in enumerate((in_the_original_layout(folder, tmp_path / "a.safetensors"), plain)):
        file = ControlNetFile(path, unet)
        stated = json.loads((folder / "config.json").read_text())
        assert {name: stated[name] for name in file.config} == json.loads(json.dumps(file.config))
        file.write(tmp_path / f"{i}")
        found = load_file(tmp_path / f"{i}" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys() and all(bool((found[name] == wanted[name]).all()) for name in wanted)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"lllite_unet.a": 1}, "holds a ControlNet-LLLite, which is not supported"),
        ({"body.0.a": 1}, "holds a T2I-Adapter"),
        ({"x": 1}, "holds no ControlNet that is known"),
        ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet, lacks conv_in.weight"),
        (
            {"controlnet_cond_embedding.conv_in.weight": (16,)},
            r"conv_in.weight has the shape \[16\], and 4 axes are due",
        ),
        ({"control_model.input_hint_block.0.weight": (16, 3, 0, 3)}, r"is damaged: control_model.* \[16, 3, 0, 3\]"),
        (
            {
                "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
                "controlnet_cond_embedding.blocks.0.weight": (),
            },
            r"blocks.0.weight has the shape \[\]",
        ),
        (
            {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "task_embedding": ()},
            r"task_embedding has the shape \[\], and 2 axes",
        ),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tensors, problem, checkpoint_of, tmp_path):
    unet = json.loads((checkpoint_of("pico") / "unet" / "config.json").read_text())
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=problem):
        ControlNetFile(path, unet)


def test_a_file_for_another_model_is_refused(checkpoint_of, tmp_path):
    path = checkpoint_of("pico+control-edge") / "diffusion_pytorch_model.safetensors"
    unet = json.loads((checkpoint_of("pico") / "unet" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"does not fit the checkpoint: .* it was made for another model"):
        ControlNetFile(path, {**unet, "cross_attention_dim": 768})
    with pytest.raises(CheckpointError, match="is a JSON text, not weights"):
        ControlNetFile(checkpoint_of("pico") / "model_index.json", unet)


def test_a_graph_that_is_built_in_another_way_takes_no_controls(bundle_of, tmp_path):
    config = json.loads((bundle_of("pico") / "unet" / "config.json").read_text())
    more = residuals({**config, "layers_per_block": 3})
    with pytest.raises(CheckpointError, match="joins 4 values on its way up where its configuration tells 8"):
        write_controlled(bundle_of("pico") / "unet" / "model.onnx", tmp_path, more)
    assert list(tmp_path.iterdir()) == []


def test_engines_that_do_not_fit_together_are_refused(pipe):
    denoiser, control = pipe.engine("unet_controlled"), pipe.engine("controlnet_edge")
    plain = {tensor.name for tensor in pipe.engine("unet").inputs}
    with pytest.raises(EngineError, match="controlnet_edge and unet do not fit together"):
        ControlledEngine(pipe.engine("unet"), {"controlnet_edge": control}, plain)
    both = ControlledEngine(denoiser, {"controlnet_edge": control}, plain)
    assert {"controlnet_edge.controlnet_cond", "controlnet_edge.scale"} == {t.name for t in both.inputs} - plain


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": ""}, "the name of a control must be a text"),
        ({"image": None}, "needs an image"),
        ({"scale": float("nan")}, "the scale of the control edge must be from 0 to 100, found nan"),
        ({"scale": -1}, "must be from 0 to 100"),
        ({"interval": (0.5, 0.5)}, "must be two numbers 0 <= start < end <= 1"),
        ({"interval": 0.5}, "must be two numbers"),
        ({"guess_mode": 1}, "guess_mode must be true or false"),
    ],
)
def test_a_control_that_cannot_be_is_refused(options, problem):
    with pytest.raises(RequestError, match=problem):
        Control(**{"name": "edge", "image": picture(8, 8), **options})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"control": ("edge",)}, "control takes a list of diffoundry.Control"),
        ({"control": (edge(), edge())}, "the control edge is given twice"),
        (
            {"control": (Control("pose", picture(8, 8)),)},
            "has no control 'pose', it has edge, depth",
        ),
        ({"control": (Control("edge", "missing.png"),)}, "the image of the control edge 'missing.png' does not exist"),
        ({"control": (Control("edge", np.full((8, 8, 3), np.nan)),)}, "must hold floats from 0 to 1, found nan"),
    ],
)
def test_a_request_with_a_control_that_cannot_be_is_refused_before_anything_is_loaded(steered, options, problem):
    pipe = diffoundry.load(steered)
    with pytest.raises(RequestError, match=problem):
        pipe("a star", **options)
    assert pipe.loaded == []


def test_the_size_is_that_of_the_picture_and_the_record_says_what_steered(pipe):
    result = pipe("a star", control=edge(scale=0.5), steps=1, output="latent")
    assert result.latents.shape[2:] == (8, 8)
    [told] = result.request["control"]
    assert told["image"].startswith("sha256:") and (told["scale"], told["interval"]) == (0.5, (0.0, 1.0))
    assert pipe("a star", control=Control("edge", picture(90, 50)), steps=1, output="latent").latents.shape[2:] == (
        6,
        11,
    )


def test_inspect_says_what_pictures_it_takes(steered, called):
    shown = called("inspect", steered).stdout
    assert "--control edge=PICTURE: a ControlNet, controlnet_edge" in shown
    assert "--ip-image plus=PICTURE: an IP-Adapter, ip_adapter_plus" in shown


def test_edges_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    photograph = picture(90, 70)
    assert np.array_equal(np.asarray(canny(photograph))[..., 0], cv2.Canny(np.asarray(photograph), 100, 200))
    with pytest.raises(RequestError, match="thresholds of edges must be 0 <= low <= high"):
        canny(photograph, 200, 100)


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--control", "edge"], 2, "--control takes NAME=PICTURE"),
        (["--control-scale", "edge=1"], 2, "--control-scale edge goes with --control edge=PICTURE"),
        (["--guess-mode"], 2, "--guess-mode goes with --control NAME=PICTURE"),
        (["--control", "edge=x.png", "--control-scale", "edge=much"], 2, "takes numbers, found 'much'"),
        (["--control", "edge=x.png", "--control-interval", "edge=0.5"], 2, "takes NAME=START:END"),
        (["--control", "edge=x.png", "--detect", "edge=openpose"], 1, "the detector openpose needs a model of its own"),
        (["--control", "edge=x.png", "--detect", "edge=what"], 1, "unknown detector 'what'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, code, problem, called, steered):
    done = called("run", steered, "a star", *options)
    assert (done.returncode, done.stdout) == (code, "") and problem in done.stderr.replace("\n", " ")


def test_controlnets_that_cannot_be_are_refused(checkpoint_of, bundle_of, tmp_path):
    folder = checkpoint_of("pico+control-edge")
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    cases = [
        ({"a b": folder}, "the name of a control has letters, digits and _"),
        ({"edge": tmp_path}, "is no ControlNet: give a diffusers folder"),
        ({"edge": checkpoint_of("pico") / "unet"}, "holds a UNet2DConditionModel, which is not supported as a control"),
    ]
    for changed, problem in (
        ({"cross_attention_dim": 768}, "reads text of width 768, this checkpoint 64: it was made for another model"),
        ({"block_out_channels": [48, 64]}, "gives residuals of"),
    ):
        path = shutil.copytree(other, tmp_path / next(iter(changed)))
        (path / "config.json").write_text(json.dumps({**config, **changed}))
        cases.append(({"edge": path}, problem))
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    cases.append(({"edge": other}, "truncated to nothing"))
    for nets, problem in cases:
        with pytest.raises(DiffoundryError, match=problem):
            diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", controlnets=nets)
    assert not (tmp_path / "out").exists()


def test_t2i_adapters_add_where_diffusers_adds():
    of_15 = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    of_15["down_block_types"] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    of_xl = {"block_out_channels": (320, 640, 1280), "layers_per_block": 2}
    of_xl["down_block_types"] = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2
    assert [(at, skip.channels, skip.halvings) for at, skip in intrablocks(of_15)] == [
        *((2, 320, 0), (5, 640, 1), (8, 1280, 2), (11, 1280, 3))
    ]
    assert [(at, skip.channels, skip.halvings) for at, skip in intrablocks(of_xl)] == [
        *((3, 320, 1), (5, 640, 1), (8, 1280, 2), (9, 1280, 2))
    ]


@pytest.mark.slow
def test_a_t2i_adapter_is_used_as_a_controlnet_is(checkpoint_of, bundle_of):
    pipe = diffoundry.load(bundle_of("sdxl-small+t2i"))
    sketch = Control("sketch", picture(128, 128), 0.7)
    size = {"width": 128, "height": 128}
    requests = [Request("a star", seed=i, steps=3, control=(sketch,) * (i % 2), **size) for i in range(3)]
    alone = [pipe.generate(each).latents for each in requests]
    for found, wanted in zip(pipe.generate_many(requests), alone, strict=True):
        np.testing.assert_allclose(found.latents, wanted, atol=1e-4)
    assert np.abs(alone[1] - pipe("a star", seed=1, steps=3, width=128, height=128).latents).max() > 0.05
    with pytest.raises(RequestError, match="takes sizes that are multiples of 16, found 136x128: try 128x128"):
        pipe("a star", control=sketch, width=136, height=128)
    with pytest.raises(RequestError, match="guess_mode has no effect on sketch, a T2I-Adapter"):
        pipe("a star", control=Control("sketch", picture(128, 128), guess_mode=True))


@pytest.mark.slow
def test_a_light_t2i_adapter_gives_what_it_gives_in_diffusers(checkpoint_of, tmp_path):
    folder = checkpoint_of("sd15-small")
    make_t2i_adapter(json.loads((folder / "unet" / "config.json").read_text()), tmp_path / "light", light=True)
    diffoundry.compile(folder, tmp_path / "b", t2i_adapters={"color": tmp_path / "light"}, tasks=["txt2img"])
    pipe, shown = diffoundry.load(tmp_path / "b"), np.random.default_rng(0).random((1, 3, 72, 88), np.float32)
    scale = np.linspace(0.5, 1, 4, dtype=np.float32)[None]
    found = pipe.engine("t2i_adapter_color")({"controlnet_cond": shown, "scale": scale})
    with torch.no_grad():
        wanted = T2IAdapter.from_pretrained(tmp_path / "light")(torch.from_numpy(shown))
    assert len(found) == len(wanted) == 4
    for i, (own, theirs) in enumerate(zip(found.values(), wanted, strict=True)):
        np.testing.assert_allclose(own, theirs.numpy() * scale[0, i], atol=1e-5)
    size, sketch = {"width": 88, "height": 72}, Control("color", picture(88, 72))
    drawn = [pipe("a star", seed=1, steps=2, control=each, **size).latents for each in ((), sketch)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01


def test_t2i_adapters_that_cannot_be_are_refused(checkpoint_of, tmp_path):
    net, halved = checkpoint_of("pico+control-edge"), checkpoint_of("pico+t2i-sketch")
    made = tmp_path / "made"
    make_t2i_adapter(
        {"block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 2}, made
    )
    for folders, more, problem in (
        ({"sketch": net}, {}, "holds a ControlNetModel, which is not supported as a control; T2IAdapter is"),
        ({"sketch": tmp_path}, {}, "is no T2I-Adapter: give a diffusers folder"),
        (
            {"sketch": made},
            {},
            r"gives residuals of .* \[\(8, 1\), \(16, 1\), \(16, 2\)\], this checkpoint takes \[\(48",
        ),
        ({"sketch": halved}, {}, r"\[\(48, 1\), \(96, 1\), \(96, 2\)\], .* takes \[\(48, 0\), \(96, 1\), \(96, 1\)\]"),
        ({"edge": made}, {"controlnets": {"edge": net}}, "a ControlNet is called edge already"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            diffoundry.compile(checkpoint_of("pico"), tmp_path / "out", t2i_adapters=folders, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("wiring", "image_prompts", "plus", "masks"), []),
        (("wiring", "image_prompts", "plus", "masks"), ["ip_mask_0"]),
        (("wiring", "image_prompts", "plus", "masks"), ["ip_mask_0", "ip_mask_0_2", "sample"]),
        (("wiring", "controls", "edge", "kind"), "adapter"),
        (("components", "controlnet_union", "controlnet_cond"), ["batch_size"]),
        (("wiring", "controls", "union", "modes"), 7),
        (("wiring", "controls", "union", "kind"), "controlnet"),
        (("components", "unet_controlled", "ip_mask_0"), ["batch_size", "ip_tokens_0_groups", "hei", "width"]),
        (("components", "unet_controlled", "ip_mask_0"), ["batch_size", 1, 8, 8]),
        (("components", "unet_controlled", "ip_mask_0"), ["batch_size", "ip_tokens_0_groups", "height_2", "width_2"]),
        (("components", "controlnet_union", "controlnet_cond"), ["batch_size", 1, 3, "sample_height", "sample_width"]),
    ],
)
def test_wiring_and_components_must_agree(path, value, steered, tmp_path):
    (tmp_path / "b").mkdir()
    manifest = json.loads((steered / "bundle.json").read_text())
    place = manifest
    if path[0] == "components":
        [place] = [each for each in manifest["components"][path[1]]["inputs"] if each["name"] == path[2]]
        path = ("shape",)
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"do not agree on|must have modes"):
        check_runnable(Bundle.open(tmp_path / "b"))
