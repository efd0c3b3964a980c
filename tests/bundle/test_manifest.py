"""The manifest survives a round trip and refuses what is wrong, naming the field; old ones are read."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffoundry.bundle import (
    SCHEMA_VERSION,
    Bundle,
    Component,
    Latents,
    Manifest,
    Tensor,
    TextEncoder,
    Tokenizer,
    Variant,
    Wiring,
)
from diffoundry.bundle.manifest import from_json, to_json
from diffoundry.common.errors import BundleError
from diffoundry.common.files import inside

SHA = "0" * 64
GOLDEN = Path(__file__).parent / "golden"
MANIFEST = Manifest(
    family="stable-diffusion",
    tasks=("txt2img",),
    precision="fp32",
    components={
        "text_encoder": Component("text", variants={"fp32/onnx": Variant("t.onnx", {"t.onnx": SHA})}),
        "unet": Component(
            "denoiser",
            (Tensor("sample", "float32", ("batch_size", 4, "height", "width")),),
            (Tensor("out_sample", "float32", ("batch_size", 4, "height", "width")),),
            {"fp32/onnx": Variant("unet/model.onnx", {"unet/model.onnx": SHA})},
            {"unet/config.json": SHA},
            "key",
        ),
    },
    wiring=Wiring((TextEncoder("text_encoder", "tokenizer"),), {"sample": "latents"}),
    latents=Latents(4, 8, 0.18215),
    tokenizers={"tokenizer": Tokenizer(77, 1, 2, 2)},
    files={"scheduler/scheduler_config.json": SHA},
    default_width=64,
    default_height=48,
    source={"name": "pico"},
    versions={"torch": "2"},
)


def as_json(manifest: Manifest = MANIFEST) -> Any:
    return json.loads(json.dumps(to_json(manifest)))


def test_round_trip():
    assert from_json(as_json(), "x") == MANIFEST
    assert next(iter(as_json())) == "schema_version"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), SCHEMA_VERSION + 1, "upgrade diffoundry"),
        (("schema_version",), "1", "no schema_version"),
        (("schema_version",), 0, "never existed"),
        (("family",), 3, "family must be a text, found 3"),
        (("latents", "downscale"), 0, "latents.downscale must be from 1 to 256, found 0"),
        (("latents", "downscale"), True, "latents.downscale must be a whole number, found True"),
        (("latents", "scaling_factor"), float("nan"), "latents.scaling_factor must be a finite number"),
        (("latents", "scaling_factor"), 0, "latents.scaling_factor must be a number other than zero"),
        (("latents", "scaling_factor"), 10**400, "latents.scaling_factor must be a finite number"),
        (("latents", "channels"), 2**31, "latents.channels must be from 1 to 4096"),
        (("latents", "mean"), [0.0] * 4, "latents: mean and std must both be empty"),
        (("latents", "mean"), [0.0], "latents: mean and std"),
        (("latents", "tile"), 0, "latents.tile must be at least 1"),
        (("latents", "encoded"), "pixels", "latents.encoded must be one of parameters, sample"),
        (("components", "unet", "variants", "fp32/onnx", "model"), "o.onnx", "has no hash for the model 'o.onnx'"),
        (("components", "unet", "variants", "fp32/onnx", "per_prompt"), "p.onnx", "has no hash for the model 'p.onnx'"),
        (("components", "unet", "variants", "fp32/onnx", "files", "x"), "short", "files.x must be a SHA-256 hash"),
        (("components", "unet", "variants"), {}, "components.unet.variants is empty"),
        (("components", "unet", "variants"), {"fp16/onnx": 1}, "variants.fp16/onnx must be an object, found 1"),
        (("components", "unet", "inputs"), [{"name": "x"}], r"inputs\[0\].dtype is missing"),
        (("components", "unet", "inputs", 0, "shape", 1), 1.5, r"inputs\[0\].shape\[1\] must be a text, found 1.5"),
        (("components", "unet", "role"), "king", "components.unet.role must be one of text, denoiser"),
        (("components",), {}, "components must not be empty"),
        (("tokenizers", "tokenizer", "max_length"), True, "tokenizer.max_length must be a whole number"),
        (("tokenizers", "tokenizer", "bos_token_id"), -1, "bos_token_id must be from 0"),
        (("wiring", "text", 0, "component"), "other", "wiring.text names 'other'"),
        (("wiring", "text", 0, "text"), 3, r"wiring.text\[0\].text must be one of 0, 1, 2"),
        (("tasks",), [1], r"tasks\[0\] must be a text"),
        (("tasks",), [], "tasks must not be empty"),
        (("files",), [], "files must be an object"),
        (("engine",), None, "engine must be a text, found None"),
        (("scheduler",), {"txt2img": {"x": "y"}}, "scheduler.txt2img.x must be a whole number"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    broken = as_json()
    part = broken
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(BundleError, match=message):
        from_json(broken, "bundle.json")


DEFAULTS = {"default_steps": 20, "default_guidance": 7.5, "engine": "onnxruntime", "scheduler": {}}
_OPTIONAL = ("schema_version", "wiring", "source", "versions", *DEFAULTS)


@pytest.mark.parametrize("name", [key for key in as_json() if key not in _OPTIONAL])
def test_a_missing_field_is_named(name):
    broken = as_json()
    del broken[name]
    with pytest.raises(BundleError, match=f"{name} is missing"):
        from_json(broken, "bundle.json")


def test_what_is_left_out_has_its_default():
    shorter = {name: value for name, value in as_json().items() if name not in DEFAULTS}
    assert {name: getattr(from_json(shorter, "x"), name) for name in DEFAULTS} == DEFAULTS


def test_the_second_schema_is_what_it_was():
    value = json.loads((GOLDEN / "schema2.json").read_text())
    manifest = from_json(value, "x")
    assert json.loads(json.dumps(to_json(manifest))) == value
    assert manifest.wiring.inputs == {
        "sample": "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "text.hidden",
    }
    assert {name: part.role for name, part in manifest.components.items()} == {
        "text_encoder": "text",
        "vae_encoder": "encoder",
        "vae_decoder": "decoder",
        "unet": "denoiser",
        "step": "step",
    }


def test_the_first_schema_says_the_same():
    """Of one checkpoint, compiled by the version that wrote the first schema."""
    old, new = (from_json(json.loads((GOLDEN / f"schema{version}.json").read_text()), "x") for version in (1, 2))
    assert old.schema_version == 1
    assert (old.wiring, old.tokenizers, old.tasks) == (new.wiring, new.tokenizers, new.tasks)
    assert old.latents == replace(new.latents, multiple=1)
    for name, part in new.components.items():
        found = old.components[name]
        assert (found.role, found.inputs, found.outputs) == (part.role, part.inputs, part.outputs)
        assert found.variants.keys() == part.variants.keys()
    whole = json.loads((GOLDEN / "schema1.json").read_text())
    listed = dict(whole["files"])
    for part in whole["components"].values():
        listed.update(part["files"])
    assert old.all_files() == listed


def test_a_bundle_of_the_first_schema_runs(bundle_of, tmp_path):
    import shutil

    import diffoundry

    bundle = shutil.copytree(bundle_of("pico"), tmp_path / "old.bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    old = json.loads((GOLDEN / "schema1.json").read_text())
    for part in manifest["components"].values():
        for variant in part["variants"].values():
            if variant["per_prompt"]:  # as it was called then
                (bundle / variant["per_prompt"]).rename(bundle / "unet/hoisted.onnx")
                variant["files"]["unet/hoisted.onnx"] = variant["files"].pop(variant["per_prompt"])
    for name, part in old["components"].items():
        for path in part["files"]:
            part["files"][path] = found(manifest["components"][name], path)
    (bundle / "bundle.json").write_text(json.dumps({**old, "files": manifest["files"]}))
    ours, theirs = (
        diffoundry.load(each)("a large red star", steps=3, seed=3).latents for each in (bundle, bundle_of("pico"))
    )
    assert (ours == theirs).all()


def found(component, path):
    """The hash that a manifest of today has for a file."""
    return {
        **component["files"],
        **{k: v for part in component["variants"].values() for k, v in part["files"].items()},
    }[path]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
def test_anything_in_any_place_is_read_or_refused_in_one_line(version, data):
    value = json.loads((GOLDEN / f"schema{version}.json").read_text())
    part: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], (dict, list)) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    if isinstance(part, dict) and data.draw(st.booleans()):
        del part[key]
    else:
        part[key] = data.draw(JSON)
    try:
        manifest = from_json(value, "bundle.json")
    except BundleError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert from_json(copy.deepcopy(as_json(manifest)), "bundle.json") == manifest
    assert "\n" not in refusal and len(refusal) < 400


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\x", "C:/x", "a\0b"])
def test_paths_out_of_the_bundle_are_refused(tmp_path, path):
    with pytest.raises(BundleError, match="leaves the bundle"):
        inside(tmp_path, path)


def test_links_out_of_the_bundle_are_refused(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="through a link"):
        inside(tmp_path / "bundle", "link/secret")


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="it is not a bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_damaged_manifest_is_one_clear_error(tmp_path, text):
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path)
