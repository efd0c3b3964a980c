"""Transformers in one file: in the layout of the original authors, of diffusers, whole or in eight bits."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffoundry.common.errors import CheckpointError, LoraError
from diffoundry.examples.random_transformer import _FLUX, _SD3, _Z_IMAGE
from diffoundry.export.single_file.parts import PartFile
from diffoundry.export.single_file.weights import open_weights
from diffoundry.families.lora import LoraFile, Weights
from diffoundry.families.original_transformer import originals

CONFIGS = {
    "flux": {"_class_name": "FluxTransformer2DModel", **_FLUX, "guidance_embeds": True},
    "sd3": {"_class_name": "SD3Transformer2DModel", **_SD3},
    "sd35": {"_class_name": "SD3Transformer2DModel", **_SD3, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
    "z-image": {"_class_name": "ZImageTransformer2DModel", **_Z_IMAGE},
}


def model(config):
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if k[0] != "_"})


def write_transformer(path, config, target):
    PartFile.of(open_weights(path), "transformer", "diffusers", config["_class_name"], config).write(target)


def original(config, tensors, prefix="model.diffusion_model."):
    """The same weights in the original layout."""
    rows = {}
    for name, found in originals(config["_class_name"], tensors).items():
        rows.setdefault(found.name, []).append((found.order, tensors[name], found.swapped))
    made = {}
    for name, parts in rows.items():
        whole = torch.cat([each for _, each, _ in sorted(parts, key=lambda part: part[0])])
        made[prefix + name] = torch.cat(list(reversed(whole.chunk(2)))) if parts[0][2] else whole
    return made


def theirs(config, tensors):
    """What diffusers makes of a file in the original layout; it knows one width of FLUX."""
    from diffusers.loaders import single_file_utils

    name = {"Fl": "flux", "SD": "sd3", "ZI": "z_image"}[config["_class_name"][:2]]
    function = f"convert_{name}_transformer_checkpoint_to_diffusers"
    scope = dict(vars(single_file_utils))
    exec(inspect.getsource(getattr(single_file_utils, function)).replace("3072", "32"), scope)
    return scope[function](dict(tensors))


def written(folder):
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    return {name: tensor for shard in set(index.values()) for name, tensor in load_file(folder / shard).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_layout_is_read_as_diffusers_reads_it(tmp_path, name):
    config = CONFIGS[name]
    tensors = dict(model(config).state_dict())
    stored = original(config, tensors)
    expected = theirs(config, stored)
    if name == "z-image":  # the published file has a norm that nothing reads
        stored["model.diffusion_model.norm_final.weight"] = torch.zeros(4)
    beside = {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    for i, content in enumerate((stored, {**stored, **beside}, tensors)):
        save_file(content, tmp_path / "file.safetensors")
        write_transformer(tmp_path / "file.safetensors", config, tmp_path / str(i))
        found = written(tmp_path / str(i))
        assert found.keys() == tensors.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) and torch.equal(found[key], tensors[key]) for key in found)


def test_eight_bits_become_bfloat16_with_their_scales(tmp_path):
    config, file = CONFIGS["flux"], tmp_path / "file.safetensors"
    stored = original(config, dict(model(config).state_dict()), "")
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items()}
    save_file(narrow, file)
    write_transformer(file, config, tmp_path / "plain")
    found = written(tmp_path / "plain")["proj_out.weight"]
    assert torch.equal(found, narrow["final_layer.linear.weight"].to(torch.bfloat16))
    marked = {**narrow, "scaled_fp8": torch.zeros(0)}
    save_file(marked, file)
    with pytest.raises(CheckpointError, match=r"in fp8 without its scale .*scale_weight\): download it again"):
        write_transformer(file, config, tmp_path / "none")
    scales = {f"{name.removesuffix('.weight')}.scale_weight": torch.tensor(2.0) for name in narrow}
    save_file({**marked, **scales}, file)
    write_transformer(file, config, tmp_path / "scaled")
    assert torch.equal(written(tmp_path / "scaled")["proj_out.weight"], 2 * found)
    assert not (tmp_path / "none").exists()


def test_a_file_for_another_transformer_is_refused_by_name(tmp_path):
    config, file = CONFIGS["flux"], tmp_path / "file.safetensors"
    stored = original(config, dict(model(config).state_dict()))
    cases = {
        "has no place for": {**stored, "model.diffusion_model.distilled_guidance_layer.x": torch.zeros(1)},
        "lacks the weights .*txt_in.bias": {k: v for k, v in stored.items() if not k.endswith("txt_in.bias")},
        r"asks for \[32\]": {**stored, "model.diffusion_model.txt_in.bias": torch.zeros(7)},
        "holds no weights of FluxTransformer2DModel": {"down_blocks.0.weight": torch.zeros(1)},
    }
    for message, content in cases.items():
        save_file(content, file)
        with pytest.raises(CheckpointError, match=message):
            write_transformer(file, config, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_by_the_original_names_changes_the_rows_of_each(tmp_path, name, prefix):
    """As if it had changed the weights of the original layout, before they were read as diffusers'."""
    config = CONFIGS[name]
    tensors = {key: value.detach() for key, value in model(config).state_dict().items()}
    stored, lora = original(config, tensors, ""), {}
    torch.manual_seed(1)
    for key, weight in list(stored.items()):
        if key.endswith(".weight") and weight.ndim == 2:
            down, up, alpha = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3), torch.tensor(1.5)
            module = key.removesuffix(".weight")
            kohya = prefix == "lora_unet_"
            names = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
            place = prefix + (module.replace(".", "_") if kohya else module)
            lora |= {f"{place}.{names[0]}.weight": down, f"{place}.{names[1]}.weight": up, f"{place}.alpha": alpha}
            stored[key] = weight + 0.5 * up @ down
    save_file(stored, tmp_path / "changed.safetensors")
    write_transformer(tmp_path / "changed.safetensors", config, tmp_path / "changed")
    save_file(lora, tmp_path / "lora.safetensors")
    shapes = {"transformer": {key: tuple(value.shape) for key, value in tensors.items()}}
    weights = Weights(shapes, "transformer", 0, kind=config["_class_name"])
    changes = LoraFile.open(tmp_path / "lora.safetensors", weights).changes["transformer"]
    expected = written(tmp_path / "changed")
    assert changes.keys() == {key for key in tensors if not torch.equal(tensors[key], expected[key])}
    for key, change in changes.items():
        found = tensors[key].numpy() + change.added(tensors[key].numpy(), 1.0)
        np.testing.assert_allclose(found, expected[key].numpy(), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_lora_by_xlabs_names_changes_what_diffusers_changes(tmp_path, prefix):
    from diffusers import FluxPipeline

    config = CONFIGS["flux"]
    tensors = {key: value.detach() for key, value in model(config).state_dict().items()}
    stored, lora = original(config, tensors, ""), {}
    torch.manual_seed(1)

    def put(name, outputs, inputs):
        lora[f"{prefix}{name}.down.weight"], lora[f"{prefix}{name}.up.weight"] = (
            torch.randn(3, inputs),
            torch.randn(outputs, 3),
        )

    for i in range(2):
        for stream, number in (("img", 1), ("txt", 2)):
            for part in ("qkv", "proj"):
                whole = stored[f"double_blocks.{i}.{stream}_attn.{part}.weight"]
                put(f"double_blocks.{i}.processor.{part}_lora{number}", *whole.shape)
        width = tensors["proj_out.weight"].shape[1]
        put(f"single_blocks.{i}.processor.qkv_lora", 3 * width, width)
        put(f"single_blocks.{i}.processor.proj_lora", *stored[f"single_blocks.{i}.linear2.weight"].shape)
    save_file(lora, tmp_path / "lora.safetensors")
    shapes = {"transformer": {key: tuple(value.shape) for key, value in tensors.items()}}
    weights = Weights(shapes, "transformer", 0, kind=config["_class_name"])
    file = LoraFile.open(tmp_path / "lora.safetensors", weights)
    theirs = FluxPipeline.lora_state_dict(dict(lora))
    modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in theirs}
    assert not file.unused and file.changes["transformer"].keys() == {f"{name}.weight" for name in modules}
    for name in modules:
        down, up = (theirs[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        weight = tensors[f"{name}.weight"].numpy()
        found = file.changes["transformer"][f"{name}.weight"].added(weight, 1.0)
        np.testing.assert_allclose(found, (up @ down).numpy(), atol=1e-5)
    lora[f"{prefix}single_blocks.0.processor.proj_lora2.up.weight"] = torch.zeros(32, 3)
    save_file(lora, tmp_path / "twice.safetensors")
    with pytest.raises(LoraError, match=r"keys that change nothing in this model: .*proj_lora2\.up"):
        LoraFile.open(tmp_path / "twice.safetensors", weights)
