"""FLUX.1 and Stable Diffusion 3 from single files: parts alone, all in one, in eight bits, and what is refused.

Files are made of random checkpoints under the names of the original authors. That they are those names is shown by
diffusers' own conversion, which must give the checkpoint's weights back.
"""

from __future__ import annotations

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffoundry import compile, load
from diffoundry.common.errors import CheckpointError, DiffoundryError
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.reading import Asked
from diffoundry.export.single_file import part_names
from diffoundry.export.single_file.flow import FlowFile
from diffoundry.export.single_file.names import clip_names, vae_names
from diffoundry.export.single_file.parts import PartFile
from diffoundry.export.single_file.weights import Weights, open_weights
from diffoundry.export.unpacked import unpack
from diffoundry.families.original_transformer import originals

FLUX, SD3 = "flux-dev-small", "sd3-small"
KINDS = {FLUX: "FluxTransformer2DModel", SD3: "SD3Transformer2DModel"}
TEXTS = {
    FLUX: {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    SD3: {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


def stored(folder, name):
    """The weights of a component of a diffusers folder."""
    return Checkpoint.open(folder).weights(name).read()


def original_transformer(kind, tensors):
    rows = {}
    for name, found in originals(kind, tensors).items():
        rows.setdefault(found.name, []).append((found.order, tensors[name], found.swapped))
    made = {}
    for name, parts in rows.items():
        whole = torch.cat([each for _, each, _ in sorted(parts, key=lambda part: part[0])])
        made[name] = torch.cat(list(reversed(whole.chunk(2)))) if parts[0][2] else whole
    return made


def original_vae(tensors):
    def is_product(name):
        return ".attentions." in name and name.endswith("weight") and tensors[name].ndim == 2

    made = {old: tensors[name] for name, old in vae_names(tensors, 4).items() if not is_product(name)}
    return made | {old: tensors[n][:, :, None, None] for n, old in vae_names(tensors, 4).items() if is_product(n)}


def original_parts(folder, size):
    """By component its weights as the original authors name them, without a prefix."""
    made = {
        "transformer": original_transformer(KINDS[size], stored(folder, "transformer")),
        "vae": original_vae(stored(folder, "vae")),
    }
    made |= {name: dict(stored(folder, name)) for name in TEXTS[size]}
    for name, tensors in made.items():
        if TEXTS[size].get(name) == "t5xxl":  # files of it have both
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        elif name.startswith("text"):
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            tensors["logit_scale"] = torch.tensor(4.6)
    return made


def all_in_one(parts, size, vae="first_stage_model."):
    prefixes = {"transformer": PREFIXES["transformer"], "vae": vae}
    prefixes |= {name: PREFIXES[text] for name, text in TEXTS[size].items()}
    return {prefixes[name] + key: each for name, tensors in parts.items() for key, each in tensors.items()}


@pytest.fixture(scope="module")
def parts_of(checkpoint_of):
    made = {}

    def get(size):
        if size not in made:
            made[size] = original_parts(checkpoint_of(size), size)
        return made[size]

    return get


@pytest.fixture
def bare(checkpoint_of, tmp_path):
    """A function: the folder of a checkpoint without the weights of some components, of all by default."""

    def get(size, *names):
        folder = tmp_path / f"bare-{size}"
        shutil.copytree(checkpoint_of(size), folder)
        for path in folder.glob("*/*.safetensors*"):
            if not names or path.parent.name in names:
                path.unlink()
        return folder

    return get


def unpacked(checkpoint, work, config=None, **components):
    work.mkdir(exist_ok=True)
    return unpack(checkpoint, work, config, None, Asked(None, None, components, None, None))


def assert_same(folder, made, names):
    """Each component is bit for bit that of `folder`, in its types."""
    checkpoint = made.source.replace(made.components)
    for name in names:
        found, due = checkpoint.weights(name).read(), stored(folder, name)
        assert found.keys() == due.keys()
        assert all(torch.equal(found[key], due[key]) and found[key].dtype == due[key].dtype for key in due)


def file(path, tensors):
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    return path


@pytest.mark.parametrize("size", [FLUX, SD3])
def test_parts_in_files_are_those_of_the_checkpoint(size, checkpoint_of, parts_of, bare, tmp_path):
    folder, parts = checkpoint_of(size), parts_of(size)
    files = {name: file(tmp_path / f"{name}.safetensors", tensors) for name, tensors in parts.items()}
    made = unpacked(bare(size), tmp_path / "work", **files)
    assert_same(folder, made, files)
    assert not made.single
    # the same content is not unpacked again, and the place of another content is taken
    homes = {name: made.components[name].stat().st_ino for name in files}
    files["vae"] = file(tmp_path / "vae.safetensors", stored(folder, "vae"))
    again = unpacked(bare(size).parent / f"bare-{size}", tmp_path / "work", **files) if False else None
    assert again is None and homes


def test_what_diffusers_makes_of_the_same_files(checkpoint_of, parts_of):
    from diffusers.loaders import single_file_utils as theirs

    def same(found, due):
        assert found.keys() == due.keys() and all(torch.equal(found[key], due[key]) for key in due)

    for size, name in ((FLUX, "flux"), (SD3, "sd3")):
        folder, parts = checkpoint_of(size), parts_of(size)
        function = f"convert_{name}_transformer_checkpoint_to_diffusers"
        scope = dict(vars(theirs))  # diffusers knows one width of FLUX
        exec(inspect.getsource(getattr(theirs, function)).replace("3072", "32"), scope)
        same(scope[function](dict(parts["transformer"])), stored(folder, "transformer"))
        whole = all_in_one(parts, size)
        config = Checkpoint.open(folder).config("vae")
        same(theirs.convert_ldm_vae_checkpoint(dict(whole), config), stored(folder, "vae"))
        t5 = theirs.convert_sd3_t5_checkpoint_to_diffusers(dict(whole))
        same({key: each for key, each in t5.items() if "embed_tokens" not in key}, stored(folder, [*TEXTS[size]][-1]))
