"""The manifest survives a round trip and refuses what is wrong, naming the field."""

from __future__ import annotations

import copy
import json

import pytest

from diffoundry.bundle import SCHEMA_VERSION, Bundle, Component, Latents, Manifest, Prompt, Tensor
from diffoundry.bundle.manifest import from_json, to_json
from diffoundry.common.errors import BundleError
from diffoundry.common.files import inside

SHA = "0" * 64
MANIFEST = Manifest(
    family="stable-diffusion",
    tasks=("txt2img",),
    precision="fp32",
    components={
        "unet": Component(
            "unet/model.onnx",
            "float32",
            {"unet/model.onnx": SHA},
            (Tensor("sample", "float32", ("batch_size", 4, "height", "width")),),
            (Tensor("out_sample", "float32", ("batch_size", 4, "height", "width")),),
            "key",
        )
    },
    files={"scheduler/scheduler_config.json": SHA},
    latents=Latents(4, 8, 0.18215),
    prompts={"text_encoder": Prompt("tokenizer", 77, 1, 2, 2)},
    default_width=64,
    default_height=48,
    source={"name": "pico"},
    versions={"torch": "2"},
)


def test_round_trip():
    value = json.loads(json.dumps(to_json(MANIFEST)))
    assert from_json(value, "x") == MANIFEST
    assert next(iter(value)) == "schema_version"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), SCHEMA_VERSION + 1, "upgrade diffoundry"),
        (("schema_version",), "1", "no schema_version"),
        (("schema_version",), 0, "never existed"),
        (("family",), 3, "'family' must be of type str"),
        (("latents", "downscale"), 0, "'latents.downscale' must be at least 1"),
        (("latents", "scaling_factor"), float("nan"), "'latents.scaling_factor' must be a finite number"),
        (("components", "unet", "model"), "other.onnx", "does not vouch for the model"),
        (("components", "unet", "files"), {"unet/model.onnx": "short"}, "must map paths to SHA-256"),
        (("components", "unet", "inputs"), [{"name": "x"}], "shape"),
        (("prompts", "text_encoder", "max_length"), True, "must be of type int"),
        (("tasks",), [1], "must be a list of strings"),
        (("files",), [], "must be of type dict"),
        (("latents", "mean"), [0.0] * 4, "must go with latents.mean"),
        (("latents", "mean"), [0.0], "one number a channel"),
        (("latents", "tile"), 0, "at least 1"),
        (("options",), {"a": 1}, "true or false"),
        (("engine",), None, "'engine' must be of type str"),
        (("components", "unet", "typed"), {"fp16": {"model": "a", "files": {}}}, "does not vouch for the model 'a'"),
        (("components", "unet", "typed"), {"fp16": {"files": {}}}, "typed.fp16.model' is missing"),
        (("components", "unet", "typed"), {"fp16": 1}, "is missing"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    broken = json.loads(json.dumps(to_json(MANIFEST)))
    part = broken
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(BundleError, match=message):
        from_json(broken, "bundle.json")


DEFAULTS = {"default_steps": 20, "default_guidance": 7.5, "engine": "onnxruntime", "options": {}, "scheduler": {}}


@pytest.mark.parametrize("name", [key for key in to_json(MANIFEST) if key not in ("schema_version", *DEFAULTS)])
def test_a_missing_field_is_named(name):
    broken = copy.deepcopy(to_json(MANIFEST))
    del broken[name]
    with pytest.raises(BundleError, match=f"'{name}' is missing"):
        from_json(json.loads(json.dumps(broken)), "bundle.json")


def test_what_older_manifests_lack_has_its_old_meaning():
    older = copy.deepcopy(to_json(MANIFEST))
    for name in DEFAULTS:
        del older[name]
    for name in ("tile", "mean", "std"):
        del older["latents"][name]
    for prompt in older["prompts"].values():
        for name in ("hidden", "skips", "pooled"):
            del prompt[name]
    for component in older["components"].values():
        del component["typed"]
    read = from_json(json.loads(json.dumps(older)), "bundle.json")
    assert {name: getattr(read, name) for name in DEFAULTS} == DEFAULTS
    assert {prompt.hidden for prompt in read.prompts.values()} == {"last_hidden_state"}


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
