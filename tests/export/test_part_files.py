"""FLUX.1, Stable Diffusion 3 and Z-Image in single files: parts alone, all in one, in eight bits, what is refused.

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
            tensors.setdefault("text_projection.weight", torch.eye(32))  # of the whole CLIP; FLUX.1 does without
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
    times = {name: made.components[name].stat().st_mtime_ns for name in files}
    files["vae"] = file(tmp_path / "other.safetensors", stored(folder, "vae"))
    again = unpacked(made.source.root, tmp_path / "work", **files)
    assert_same(folder, again, files)
    kept = {name for name in files if again.components[name].stat().st_mtime_ns == times[name]}
    assert kept == files.keys() - {"vae"} and not made.components["vae"].exists()


@pytest.mark.parametrize(("size", "vae"), [(FLUX, "vae."), (SD3, "first_stage_model.")])
def test_a_checkpoint_in_one_file_with_the_configuration_of_a_folder(
    size, vae, checkpoint_of, parts_of, bare, tmp_path
):
    folder, parts, config = checkpoint_of(size), parts_of(size), bare(size)
    whole = file(tmp_path / "whole.safetensors", all_in_one(parts, size, vae))
    made = unpacked(whole, tmp_path / "work", config)
    assert made.single and made.components.keys() == parts.keys()
    assert_same(folder, made, parts)
    assert sorted(path.name for path in (tmp_path / "work").rglob("*.part")) == []


def test_what_a_file_lacks_comes_from_components_or_from_the_folder(checkpoint_of, parts_of, bare, tmp_path):
    folder, parts = checkpoint_of(FLUX), parts_of(FLUX)
    alone = file(tmp_path / "flux1-dev.safetensors", parts["transformer"])
    config = bare(FLUX, "transformer", "vae", "text_encoder")
    with pytest.raises(
        CheckpointError, match=r"holds no (\w+), and .*bare.* give it with --component \1=FILE"
    ) as refused:
        unpacked(alone, tmp_path / "work", config)
    assert str(refused.value).count("\n") == 0 and not list((tmp_path / "work").iterdir())
    texts = {name.removeprefix("text_model."): each for name, each in parts["text_encoder"].items()}
    given = {"vae": parts["vae"], "text_encoder": texts}
    files = {name: file(tmp_path / f"{name}.sft", tensors) for name, tensors in given.items()}
    made = unpacked(alone, tmp_path / "work", config, **files)
    assert made.components.keys() == {"transformer", *files}
    assert_same(folder, made, parts)


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


def part(path, tensors, component, library, kind, config):
    return PartFile.of(open_weights(file(path, tensors)), component, library, kind, config)


def test_open_clip_names_a_missing_projection_and_old_names_of_attention(checkpoint_of, parts_of, tmp_path):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextModelWithProjection

    source = Checkpoint.open(checkpoint_of(SD3))
    second = stored(source.root, "text_encoder_2")
    made = {}
    for name, old in clip_names(second, open_clip=True).items():
        made.setdefault(old, []).append((("q_proj" in name, "k_proj" in name, "v_proj" in name), second[name]))
    made = {
        old: torch.cat([each for _, each in sorted(rows, key=lambda row: row[0])[::-1]]) for old, rows in made.items()
    }
    made["text_projection"] = made["text_projection"].T
    config, kind = source.config("text_encoder_2"), "CLIPTextModelWithProjection"
    theirs = convert_open_clip_checkpoint(
        CLIPTextModelWithProjection.from_pretrained(source.root / "text_encoder_2"),
        {f"conditioner.embedders.1.model.{name}": each for name, each in made.items()},
        "conditioner.embedders.1.model.",
    )
    for prefix in ("", "conditioner.embedders.1.model."):
        tensors = {prefix + name: each for name, each in {**made, "logit_scale": torch.tensor(4.6)}.items()}
        part(tmp_path / "g.safetensors", tensors, "text_encoder_2", "transformers", kind, config).write(tmp_path / "g")
        found = written(tmp_path / "g")
        assert found.keys() == second.keys() and all(torch.equal(found[name], second[name]) for name in second)
    assert all(torch.equal(found[name], each) for name, each in theirs.items() if "attn" in name or "ln" in name)

    first, config = dict(parts_of(SD3)["text_encoder"]), source.config("text_encoder")
    width = first["text_model.final_layer_norm.weight"].shape[0]
    first.pop("text_projection.weight")
    with pytest.raises(CheckpointError, match=r"lacks the weights text_projection\.weight"):
        part(tmp_path / "l.safetensors", first, "text_encoder", "transformers", kind, config)  # 24 of 32
    square = {**config, "projection_dim": width}
    part(tmp_path / "l.safetensors", first, "text_encoder", "transformers", kind, square).write(tmp_path / "l")
    assert torch.equal(written(tmp_path / "l")["text_projection.weight"], torch.eye(width))

    vae, config = stored(source.root, "vae"), source.config("vae")
    old = {part_names._of_old(name): each for name, each in vae.items()}
    assert any(".query." in name for name in old)
    part(tmp_path / "vae.safetensors", old, "vae", "diffusers", "AutoencoderKL", config).write(tmp_path / "vae")
    found = written(tmp_path / "vae")
    (tmp_path / "old").mkdir()
    file(tmp_path / "old" / "diffusion_pytorch_model.safetensors", old)
    shutil.copy(source.root / "vae" / "config.json", tmp_path / "old")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "old").state_dict()
    assert all(torch.equal(found[name], each) and torch.equal(vae[name], each) for name, each in theirs.items())


def written(folder):
    [index] = folder.glob("*.index.json")
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def test_eight_bits_in_text_encoders_become_bfloat16(checkpoint_of, parts_of, tmp_path):
    source, kind = Checkpoint.open(checkpoint_of(FLUX)), "T5EncoderModel"
    config, tensors = source.config("text_encoder_2"), parts_of(FLUX)["text_encoder_2"]
    linear = [name for name in tensors if name.endswith(("q.weight", "wo.weight", "wi_0.weight"))]
    narrow = {name: each.to(torch.float8_e4m3fn) if name in linear else each.half() for name, each in tensors.items()}
    scales = {name: torch.rand(len(tensors[name]) if "wo" in name else 1) + 0.5 for name in linear}
    [wide] = [name for name in tensors if name.endswith("block.1.layer.0.SelfAttention.k.weight")]
    scales[wide] = torch.tensor(2.0)  # of one that was left in half precision

    def read(more):
        made = part(tmp_path / "t5.safetensors", {**narrow, **more}, "text_encoder_2", "transformers", kind, config)
        made.write(tmp_path / "t5")
        found = written(tmp_path / "t5")
        assert {each.dtype for each in found.values()} == {torch.bfloat16}
        assert sum(each.nbytes for each in found.values()) == made.size
        return found

    plain = read({})
    for name, each in plain.items():
        assert torch.equal(each, narrow[name].to(torch.bfloat16))
    for end, marks in ((".scale_weight", {"scaled_fp8": torch.zeros(0)}), (".weight_scale", {})):
        bases = [name.removesuffix(".weight") for name in linear]
        quant = {f"{base}.comfy_quant": torch.zeros(3, dtype=torch.uint8) for base in bases} if not marks else {}
        given = {f"{name.removesuffix('.weight')}{end}": scale for name, scale in scales.items()}
        found = read({**marks, **quant, **given, f"{bases[0]}.input_scale": torch.ones(1)})
        for name, each in found.items():
            scale = scales[name].reshape(-1, 1) if name in scales else 1.0
            assert torch.equal(each, (narrow[name].float() * scale).to(torch.bfloat16))
        given.pop(f"{bases[0]}{end}")
        with pytest.raises(CheckpointError, match=r"in fp8 without its scale .*scale_weight\): download it again"):
            read({**marks, **quant, **given})
    odd = {f"{linear[0].removesuffix('.weight')}.scale_weight": torch.ones(5)}
    with pytest.raises(CheckpointError, match="scale_weight of 5 numbers, where fp8 has one"):
        read(odd)


def test_a_part_of_a_model_with_a_unet(checkpoint_of, tmp_path):
    """An autoencoder in one file in place of a checkpoint's, in the original layout, and a whole file lending parts."""
    pico = checkpoint_of("pico")
    vae = {name: each + 1 for name, each in stored(pico, "vae").items()}
    levels = len(Checkpoint.open(pico).config("vae")["block_out_channels"])
    old = {old: vae[name] for name, old in vae_names(vae, levels).items()} | {"loss.logvar": torch.zeros(())}
    text = {f"cond_stage_model.transformer.{name}": each for name, each in stored(pico, "text_encoder").items()}
    made = unpacked(
        pico,
        tmp_path / "work",
        vae=file(tmp_path / "vae-ft.safetensors", old),
        text_encoder=file(tmp_path / "whole.safetensors", {**text, "model.diffusion_model.out.0.bias": torch.zeros(1)}),
    )
    assert_same(pico, made, ["text_encoder"])
    found = made.source.replace(made.components).weights("vae").read()
    assert found.keys() == vae.keys() and all(torch.equal(found[name], vae[name]) for name in vae)
    unet = file(tmp_path / "unet.safetensors", stored(pico, "unet"))
    assert_same(pico, unpacked(pico, tmp_path / "work", unet=unet), ["unet"])


def test_a_language_model_as_text_encoder_with_its_head_and_without(checkpoint_of, tmp_path):
    folder = checkpoint_of("z-image-small")
    tensors = qwen(folder)
    assert all(name.startswith("model.") for name in tensors)
    for more in ({}, {"lm_head.weight": torch.zeros(4, 4)}):
        text = file(tmp_path / "qwen_3_4b.safetensors", tensors | more)
        assert_same(folder, unpacked(folder, tmp_path / "work", text_encoder=text), ["text_encoder"])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_z_image_in_one_file_with_and_without_its_other_parts(checkpoint_of, bare, tmp_path, prefix):
    folder = checkpoint_of("z-image-small")
    transformer = original_transformer("ZImageTransformer2DModel", stored(folder, "transformer"))
    assert {"layers.0.attention.qkv.weight", "final_layer.linear.weight", "cap_pad_token"} <= transformer.keys()
    alone = {prefix + name: each for name, each in transformer.items()} | {f"{prefix}norm_final.weight": torch.ones(4)}
    texts = {f"text_encoders.qwen3_4b.transformer.{name}": each for name, each in qwen(folder).items()}
    whole = {**alone, **texts, **{f"vae.{name}": each for name, each in original_vae(stored(folder, "vae")).items()}}
    names, empty = ["transformer", "vae", "text_encoder"], bare("z-image-small")
    made = unpacked(file(tmp_path / "whole.safetensors", whole), tmp_path / "one", empty)
    assert made.single
    assert_same(folder, made, names)
    one = file(tmp_path / "alone.safetensors", alone)
    assert_same(folder, unpacked(one, tmp_path / "two", folder), names[:1])
    assert_same(folder, unpacked(folder, tmp_path / "three", transformer=one), names)
    with pytest.raises(CheckpointError, match=r"alone\.safetensors holds no .*give it with --component .*=FILE"):
        unpacked(one, tmp_path / "four", empty)
    with pytest.raises(CheckpointError, match=r"a Z-Image checkpoint, goes with a Qwen3, whose tokenizer is not built"):
        unpacked(one, tmp_path / "five")


def qwen(folder):
    [path] = (folder / "text_encoder").glob("*.safetensors")
    return load_file(path)


WIDTHS = {
    "sd3-medium": {"num_attention_heads": 24, "pos_embed_max_size": 192},
    "sd35-large": {"num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    "sd35-medium": {
        "num_attention_heads": 24,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0, 1],
    },
}


def published_sd3(options):
    """A configuration, and the shapes of a file with three layers of such a Stable Diffusion 3."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = 64 * options["num_attention_heads"]
    fixed = {"caption_projection_dim": width, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    channels = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "attention_head_dim": 64, "sample_size": 128}
    config = {**fixed, **channels, "num_layers": 3, **options}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config).state_dict()
        first = CLIPTextConfig(vocab_size=49408, hidden_size=768, projection_dim=768, intermediate_size=3072)
        texts = {"clip_l": CLIPTextModelWithProjection(first).state_dict()}
        made = {f"model.diffusion_model.{k}": v for k, v in original_transformer(KINDS[SD3], transformer).items()}
    made |= {PREFIXES["clip_l"] + name: each for name, each in texts["clip_l"].items()}
    return config, {name: tuple(each.shape) for name, each in made.items()}


@pytest.mark.parametrize("name", WIDTHS)
def test_published_widths_of_stable_diffusion_3_are_read_off_the_shapes(name, tmp_path):
    config, shapes = published_sd3(WIDTHS[name])
    weights = Weights(tmp_path / name, shapes, dict.fromkeys(shapes, "F16"), {}, None, lambda _: {})
    vae, second = tmp_path / "vae", tmp_path / "clip_g"
    vae.mkdir()
    second.mkdir()
    FlowFile.of(weights).write_outline(tmp_path, {"vae": vae, "text_encoder_2": second})
    found = json.loads((tmp_path / "transformer" / "config.json").read_text())
    due = {"dual_attention_layers": [], "qk_norm": None, **config}
    assert {key: found[key] for key in due} == due
    text = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    due = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
    assert {key: text[key] for key in due} == due
    assert json.loads((tmp_path / "tokenizer_2" / "tokenizer_config.json").read_text())["pad_token"] == "!"


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory):
    """A file with Stable Diffusion 3 without T5 and the projection of CLIP-L, and what is in it by component."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def clip(width):
        sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
        config = CLIPTextConfig(vocab_size=49408, num_attention_heads=width // 64, num_hidden_layers=2, **sizes)
        return CLIPTextModelWithProjection(config).state_dict()

    torch.manual_seed(0)
    fixed = {"joint_attention_dim": 192, "pooled_projection_dim": 192, "caption_projection_dim": 64}
    transformer = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=1, pos_embed_max_size=16, qk_norm="rms_norm", out_channels=16, **fixed
    )
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = AutoencoderKL(block_out_channels=[32] * 4, latent_channels=16, layers_per_block=1, **levels, **plain)
    first = {name: each for name, each in clip(64).items() if name != "text_projection.weight"}
    parts = {
        "transformer": original_transformer(KINDS[SD3], transformer.state_dict()),
        "vae": original_vae(vae.state_dict()),
        "text_encoder": first,
        "text_encoder_2": clip(128),
    }
    return file(tmp_path_factory.mktemp("sd3") / "sd3.safetensors", all_in_one(parts, SD3)), parts


def of_diffusers(whole, config):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_single_file(
        str(whole), config=str(config), text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )


def test_stable_diffusion_3_without_a_configuration_is_what_diffusers_loads(without_t5, tmp_path):
    whole, parts = without_t5
    made = unpacked(whole, tmp_path / "work")
    theirs = of_diffusers(whole, made.source.root)
    checkpoint = made.source.replace(made.components)
    for name in parts:
        found, due = checkpoint.weights(name).read(), getattr(theirs, name).state_dict()
        due = {name: each for name, each in due.items() if not name.endswith("position_ids")}
        assert found.keys() == due.keys() and all(torch.equal(found[key], due[key]) for key in due)
    assert theirs.vae.config.scaling_factor == 1.5305 and theirs.scheduler.config.shift == 3.0
    assert theirs.tokenizer_2.pad_token == "!"


REFUSED = {
    "a VAE for a T5": ("text_encoder_2", "vae", {}, "holds no weights of T5EncoderModel, .*looks like a VAE alone"),
    "a CLIP for a VAE": ("vae", "text_encoder", {}, "holds no weights of AutoencoderKL, .*like a text encoder alone"),
    "another width": (
        "text_encoder",
        "text_encoder",
        {"text_model.final_layer_norm.weight": torch.zeros(48)},
        r"final_layer_norm.weight has the shape \[48\], the checkpoint's text_encoder asks for \[32\]: give a file",
    ),
    "too much": ("vae", "vae", {"encoder.extra.weight": torch.zeros(1)}, "has no place for: encoder.extra.weight"),
    "too little": ("vae", "vae", {"decoder.conv_out.bias": None}, "lacks the weights decoder.conv_out.bias: it is of"),
    "integers": ("vae", "vae", {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int8)}, r"conv_out.bias \(I8\)"),
    "quantized": ("vae", "vae", {"conv.absmax": torch.zeros(1)}, "weights quantized by bitsandbytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_the_part_is_refused_in_one_line(case, checkpoint_of, parts_of, tmp_path):
    name, given, change, message = REFUSED[case]
    tensors = {key: each for key, each in {**parts_of(FLUX)[given], **change}.items() if each is not None}
    path = file(tmp_path / "part.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as refused:
        unpacked(checkpoint_of(FLUX), tmp_path / "work", **{name: path})
    assert "\n" not in str(refused.value) and not list((tmp_path / "work").iterdir())


def test_files_that_cannot_be_read_are_refused_in_one_line(checkpoint_of, parts_of, tmp_path):
    flux = checkpoint_of(FLUX)
    whole = file(tmp_path / "whole.safetensors", parts_of(FLUX)["vae"]).read_bytes()
    content = {
        "truncated.safetensors": (whole[:-100], "is truncated or damaged"),
        "empty.safetensors": (b"", r"truncated to nothing \(0 bytes\): download it again"),
        "none.safetensors": (b"\x02" + bytes(7) + b"{}", "its tensors are none"),
        "part.gguf": (b"GGUF" + bytes(60), "is a GGUF file"),
        "part.bin": (b"what" * 20, "is no folder: give the diffusers folder .*, or a file that ends in .safetensors"),
    }
    for name, (text, message) in content.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(CheckpointError, match=message) as refused:
            compile(flux, tmp_path / "b", components={"vae": tmp_path / name})
        assert "\n" not in str(refused.value) and not list(tmp_path.glob(".b*")) + list(tmp_path.glob("b"))
    torch.save({"a": shutil.rmtree}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="holds code, not only weights"):
        unpacked(flux, tmp_path / "work", vae=tmp_path / "code.ckpt")
    torch.save(parts_of(FLUX)["vae"], tmp_path / "vae.ckpt")
    assert_same(flux, unpacked(flux, tmp_path / "work", vae=tmp_path / "vae.ckpt"), ["vae"])


def test_whole_files_that_do_not_go_with_what_is_given(checkpoint_of, parts_of, tmp_path):
    flux = file(tmp_path / "flux.safetensors", parts_of(FLUX)["transformer"])
    both = file(tmp_path / "sd3.safetensors", all_in_one(parts_of(SD3), SD3))
    alone = file(tmp_path / "alone.safetensors", parts_of(SD3)["transformer"])
    folder = checkpoint_of(SD3)
    cases = [
        (flux, None, "goes with a T5, whose tokenizer is not built in: .* with --config FOLDER"),
        (both, None, "goes with a T5, whose tokenizer is not built in"),
        (alone, None, "alone.safetensors holds no vae: give it with --component vae=FILE"),
        (flux, folder, "is FLUX.1, the configuration .* is that of a StableDiffusion3Pipeline: give a folder"),
        (flux, checkpoint_of("pico"), "is FLUX.1, the configuration .* is that of a StableDiffusionPipeline"),
        (flux, tmp_path / "nowhere", "is no folder: the configuration must be"),
    ]
    for path, config, message in cases:
        with pytest.raises(CheckpointError, match=message) as refused:
            unpacked(path, tmp_path / "work", config)
        assert "\n" not in str(refused.value) and not list((tmp_path / "work").rglob("*.safetensors"))
    with pytest.raises(DiffoundryError, match=r"the prediction type is a U-Net's, .* is FLUX\.1: leave it out"):
        unpack(flux, tmp_path / "work", folder, "epsilon", Asked(None, None, {}, None, None))
    with pytest.raises(DiffoundryError, match="cannot do the task upscale"):
        unpack(both, tmp_path / "work", folder, None, Asked(None, ["upscale"], {}, None, None))


@pytest.mark.slow
@pytest.mark.parametrize("size", [FLUX, SD3])
def test_a_checkpoint_in_one_file_draws_the_same_picture(size, bundle_of, parts_of, bare, tmp_path):
    whole = file(tmp_path / "whole.safetensors", all_in_one(parts_of(size), size))
    bundle = compile(whole, tmp_path / "b", config=bare(size))
    assert bundle.manifest.source["name"] == "whole" and not list(tmp_path.glob(".b*"))
    options = {"steps": 2, "seed": 3, "width": 64, "height": 64}
    found, due = (load(root)("a red star", **options) for root in (bundle.root, bundle_of(size)))
    np.testing.assert_array_equal(found.latents, due.latents)
    assert found.images[0].tobytes() == due.images[0].tobytes()


@pytest.mark.slow
def test_stable_diffusion_3_without_a_configuration_draws_what_diffusers_draws(without_t5, tmp_path):
    whole, _ = without_t5
    bundle = compile(whole, tmp_path / "b")
    theirs = of_diffusers(whole, unpacked(whole, tmp_path / "work").source.root)
    options = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "latent"}
    drawn = theirs("a red star", generator=torch.Generator().manual_seed(3), **options)
    found = load(bundle.root)("a red star", steps=3, seed=3, width=64, height=64)
    np.testing.assert_allclose(found.latents[0], drawn.images[0].numpy(), atol=1e-4)
