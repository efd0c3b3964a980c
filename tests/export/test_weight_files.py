"""The weights that are read are those that the libraries read, whatever else lies in the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import diffoundry
from diffoundry.common.errors import CheckpointError
from diffoundry.export.checkpoint import Checkpoint
from diffoundry.export.loading import load_pretrained
from diffoundry.export.weight_files import find

PICO = Path(__file__).resolve().parents[2] / "examples" / "pico"
VAE, TEXT = "diffusion_pytorch_model", "model"
Make = Callable[[Path], None]


def model(library: str, scale: float) -> Any:
    """A small model of a library, all of whose weights are `scale` and fractions that half precision cannot hold."""
    if library == "diffusers":
        made: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    else:
        made = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=20,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=7,
            )
        )
    with torch.no_grad():
        for i, weight in enumerate(made.parameters()):
            weight.copy_(scale + torch.arange(weight.numel()).reshape(weight.shape) / 3 + i / 7)
    return made


def save(folder: Path, library: str, scale: float, kind: str = "safetensors", variant: str | None = None) -> None:
    """A file, or shards of it (kind ends with `*`), in half precision where the variant says so."""
    made = model(library, scale)
    made = {"fp16": made.half, "bf16": made.bfloat16}.get(variant or "", made.float)()
    size = "1KB" if kind.endswith("*") else "1GB"
    if library == "diffusers":
        beside = folder.with_name("beside")  # diffusers removes shards of an earlier save
        made.save_pretrained(beside, variant=variant, max_shard_size=size, safe_serialization=kind[0] == "s")
        for path in beside.iterdir():
            path.replace(folder / path.name)
    elif kind[0] == "s":
        beside = folder.with_name("beside")
        made.save_pretrained(beside, variant=variant, max_shard_size=size)
        for path in beside.iterdir():
            path.replace(folder / path.name)
    else:
        torch.save(made.state_dict(), folder / f"pytorch_model.{f'{variant}.' if variant else ''}bin")


def old_index(folder: Path) -> None:
    """The index of a sharded variant as diffusers once spelt it."""
    path = folder / f"{VAE}.safetensors.index.fp16.json"
    path.rename(folder / f"{VAE}.safetensors.fp16.index.json")


LAYOUTS: dict[str, tuple[str, list[tuple[Any, ...]], dict[str, Any], str]] = {
    # name: library, what is saved, how the library is asked, the one file or index that is read
    "plain beside fp16": ("diffusers", [(1,), (2, "s", "fp16")], {}, f"{VAE}.safetensors"),
    "fp32 .bin beside fp16": ("diffusers", [(1, "bin"), (2, "s", "fp16")], {}, f"{VAE}.bin"),
    "fp16": ("diffusers", [(1, "s", "fp16")], {"variant": "fp16"}, f"{VAE}.fp16.safetensors"),
    "ema": ("diffusers", [(1, "s", "ema")], {"variant": "ema"}, f"{VAE}.ema.safetensors"),
    "fp16 in .bin": ("diffusers", [(1, "bin", "fp16")], {"variant": "fp16"}, f"{VAE}.fp16.bin"),
    "fp32 and fp16": (
        "diffusers",
        [(1, "s", "fp32"), (2, "s", "fp16")],
        {"variant": "fp32"},
        f"{VAE}.fp32.safetensors",
    ),
    "shards beside a file": ("diffusers", [(1, "s*"), (2,)], {}, f"{VAE}.safetensors.index.json"),
    "shards of fp16": ("diffusers", [(1, "s*", "fp16")], {"variant": "fp16"}, f"{VAE}.safetensors.index.fp16.json"),
    "shards of .bin": ("diffusers", [(1, "bin*")], {"use_safetensors": False}, f"{VAE}.bin.index.json"),
    "a file beside shards of .bin": ("diffusers", [(1, "bin"), (2, "bin*")], {}, f"{VAE}.bin"),
    "text: fp32 .bin beside fp16": ("transformers", [(1, "bin"), (2, "s", "fp16")], {}, "pytorch_model.bin"),
    "text: a file beside shards": ("transformers", [(1,), (2, "s*")], {}, f"{TEXT}.safetensors"),
    "text: bf16": ("transformers", [(1, "s", "bf16")], {"variant": "bf16"}, f"{TEXT}.bf16.safetensors"),
    "text: shards of fp16": (
        "transformers",
        [(1, "s*", "fp16")],
        {"variant": "fp16"},
        f"{TEXT}.safetensors.index.fp16.json",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_read_is_the_one_that_the_library_reads(layout, tmp_path):
    library, saves, asked, due = LAYOUTS[layout]
    folder = tmp_path / "m"
    folder.mkdir()
    for each in saves:
        save(folder, library, *each)
    (folder / f"._{Path(due).stem}.safetensors").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(90))
    found = find(folder, library)
    assert (found.index or found.files[0]).name == due
    kind = type(model(library, 0))
    theirs = kind.from_pretrained(folder, torch_dtype=torch.float32, **asked).state_dict()
    ours = load_pretrained(kind, folder)
    ours = {
        name.replace("parametrizations.", "").replace(".original", ""): value for name, value in ours.named_parameters()
    }
    assert ours.keys() == {name for name in theirs if not name.endswith("position_ids")}
    assert all(torch.equal(value.float(), theirs[name]) for name, value in ours.items())


def test_an_index_of_a_variant_as_it_was_spelt_is_read(tmp_path):
    (tmp_path / "m").mkdir()
    save(tmp_path / "m", "diffusers", 1, "s*", "fp16")
    old_index(tmp_path / "m")
    assert find(tmp_path / "m", "diffusers").half == "F16"
    load_pretrained(AutoencoderKL, tmp_path / "m")


def test_fp8_without_scales_is_widened_without_loss(tmp_path):
    (tmp_path / "m").mkdir()
    save(tmp_path / "m", "diffusers", 1)
    path = tmp_path / "m" / f"{VAE}.safetensors"
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(path).items()}
    save_file(tensors, path)
    made = load_pretrained(AutoencoderKL, tmp_path / "m").state_dict()
    assert all(torch.equal(made[name], value.float()) for name, value in tensors.items())


def test_the_hash_is_of_what_is_read(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save(folder, "diffusers", 1, "bin")
    before = find(folder, "diffusers").sha256()
    save(folder, "diffusers", 2, "s", "fp16")
    (folder / ".DS_Store").write_bytes(b"1")
    assert find(folder, "diffusers").sha256() == before
    (folder / f"{VAE}.bin").unlink()
    assert find(folder, "diffusers").sha256() != before
    save(folder, "diffusers", 1)
    whole = find(folder, "diffusers").sha256()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert find(folder, "diffusers").sha256() != whole


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Make:
    def make(folder: Path) -> None:
        path = folder / f"{VAE}.safetensors"
        save_file(change(load_file(path)), path)

    return make


def written(content: bytes, name: str = f"{VAE}.safetensors") -> Make:
    return lambda folder: (folder / f"{VAE}.safetensors").unlink() or (folder / name).write_bytes(content)  # type: ignore[func-returns-value,return-value]


def beside(name: str, value: torch.Tensor | None = None) -> Make:
    return edited(lambda tensors: {**tensors, name: torch.zeros(2) if value is None else value})


def sharded(change: Callable[[Path, dict[str, Any]], object], plain: bool = False) -> Make:
    def make(folder: Path) -> None:
        save(folder, "diffusers", 1, "s*")
        if not plain:
            (folder / f"{VAE}.safetensors").unlink()
        path = folder / f"{VAE}.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index)
        path.write_text(json.dumps(index))

    return make


def two_variants(folder: Path) -> None:
    (folder / f"{VAE}.safetensors").unlink()
    save(folder, "diffusers", 1, "s", "ema")
    save(folder, "diffusers", 1, "s", "non_ema")


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))


def whole_module(folder: Path) -> None:
    (folder / f"{VAE}.safetensors").unlink()
    torch.save(model("diffusers", 1), folder / f"{VAE}.bin")


def training_state(folder: Path) -> None:
    (folder / f"{VAE}.safetensors").unlink()
    torch.save({"state_dict": model("diffusers", 1).state_dict(), "epoch": 3}, folder / f"{VAE}.bin")


def pickled(folder: Path) -> None:
    torch.save(model("diffusers", 1).state_dict(), folder / f"{VAE}.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n"
REFUSED: dict[str, tuple[Make, str]] = {
    "two variants": (two_variants, "the variants ema, non_ema and no weights without a variant: give a copy"),
    "a pointer": (written(LFS), "is a git-lfs pointer, not the weights: run `git lfs pull`"),
    "a pointer to a .bin": (written(LFS, f"{VAE}.bin"), "is a git-lfs pointer, not the weights: run `git lfs pull`"),
    "a web page": (written(b"\n<!DOCTYPE html><html>"), "is a web page, not weights"),
    "a JSON text": (written(b'{"error": "gated"}'), "is a JSON text, not weights"),
    "GGUF": (written(b"GGUF\x03\0\0\0" + bytes(40)), "is a GGUF file"),
    "7z": (written(b"7z\xbc\xaf'\x1c" + bytes(40)), "is an archive: unpack it"),
    "empty": (written(b""), "truncated to nothing"),
    "truncated": (written(b"\x40\0\0\0\0\0\0\0{"), "is truncated"),
    "a pickle": (pickled, "is a pickle of torch: give it the suffix .ckpt, or .bin"),
    "code": (whole_module, "holds code, not only weights"),
    "a training": (training_state, "holds no weights by name, but 'state_dict', 'epoch': save the model's"),
    "another name": (
        written(b"1", "vae.safetensors"),
        "under a name that diffusers reads .* but vae.safetensors: rename",
    ),
    "ONNX": (written(b"1", "model.onnx"), "holds no weights .* but an ONNX model: give the checkpoint"),
    "nothing": (lambda folder: (folder / f"{VAE}.safetensors").unlink(), "incomplete, download it again"),
    "LoRA": (beside("encoder.to_q.base_layer.weight"), "PEFT's base_layer.*fuse_lora.*unload_lora_weights"),
    "NF4": (beside("encoder.conv_in.weight.absmax"), "quantized by bitsandbytes: give the checkpoint"),
    "fp8": (beside("encoder.conv_in.scale_weight"), "fp8 with scales beside them"),
    "int8": (
        beside("encoder.extra.weight", torch.zeros(2, dtype=torch.int8)),
        r"encoder.extra.weight .I8., a weight that",
    ),
    "stated": (quantized, "says that its weights are quantized by bitsandbytes"),
    "a trainer's": (
        edited(lambda tensors: {f"vae.{name}": value for name, value in tensors.items()}),
        "every weight is below 'vae', as a module that holds the model",
    ),
    "twice": (
        edited(lambda tensors: {**tensors, **{f"_orig_mod.{name}": value.clone() for name, value in tensors.items()}}),
        "holds weights twice",
    ),
    "no shard": (
        sharded(lambda folder, _: next(iter(folder.glob("*-of-*"))).unlink()),
        "which is not there: download it and its shards again",
    ),
    "an old index": (
        sharded(lambda folder, _: next(iter(folder.glob("*-of-*"))).unlink(), plain=True),
        f"which is not there: remove the index if {VAE}.safetensors holds the weights",
    ),
    "another save": (
        sharded(lambda _, index: index["weight_map"].update({"lost": sorted(index["weight_map"].values())[0]})),
        "are not of one save .lost is not in ",
    ),
    "a shard elsewhere": (
        sharded(lambda _, index: index["weight_map"].update({"lost": "../a.safetensors"})),
        "which is no file beside it",
    ),
    "no map": (sharded(lambda _, index: index.pop("weight_map")), "names no shards"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_said_with_its_cause(name, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save(folder, "diffusers", 1)
    make, what = REFUSED[name]
    make(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        find(folder, "diffusers")
    assert "\n" not in str(caught.value)


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "in parallel and compiled": lambda name: f"module._orig_mod.{name}",
    "FSDP of parts": lambda name: name.replace(".0.", ".0._fsdp_wrapped_module.", 1),
    "Lightning": lambda name: f"_forward_module.{name}",
}


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_names_of_wrappers_are_seen_through(wrapper, library, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save(folder, library, 1, variant="fp16")
    (path,) = folder.glob("*.safetensors")
    tensors = {WRAPPED[wrapper](name): value for name, value in load_file(path).items()}
    save_file(tensors, folder / path.name.replace(".fp16", ""), metadata={"format": "pt"})
    made = load_pretrained(type(model(library, 0)), folder)
    due = model(library, 1).half().state_dict()
    found = {
        name.replace("parametrizations.", "").replace(".original", ""): value for name, value in made.named_parameters()
    }
    assert found.keys() == due.keys() and all(torch.equal(value, due[name]) for name, value in found.items())
    del tensors[next(iter(tensors))]
    save_file(tensors, folder / path.name.replace(".fp16", ""), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights .*\(1 in all\)"):
        load_pretrained(type(made), folder)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few hundred kilobytes with the tokenizer of pico."""
    torch.manual_seed(0)
    root = Path(shutil.copytree(PICO, tmp_path_factory.mktemp("micro") / "checkpoint"))
    config = CLIPTextConfig.from_pretrained(root / "text_encoder")
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4})
    models = {
        "text_encoder": CLIPTextModel(config),
        "unet": UNet2DConditionModel(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=32,
            norm_num_groups=8,
            sample_size=16,
        ),
        "vae": AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4),
    }
    for name, made in models.items():
        shutil.rmtree(root / name)
        made.save_pretrained(root / name)
    return root


@pytest.mark.slow
def test_the_weights_of_a_bundle_are_those_of_the_files_bit_for_bit(micro, tmp_path):
    """fp32 in .bin beside fp16, shards of a variant, and the names of wrappers, in one checkpoint."""
    checkpoint = Path(shutil.copytree(micro, tmp_path / "checkpoint"))
    text = checkpoint / "text_encoder/model.safetensors"
    tensors = load_file(text)
    save_file(
        {k: v.half() for k, v in tensors.items()}, text.with_suffix(".fp16.safetensors"), metadata={"format": "pt"}
    )
    torch.save(tensors, text.with_name("pytorch_model.bin"))
    text.unlink()
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").bfloat16()
    shutil.rmtree(checkpoint / "unet")
    unet.save_pretrained(checkpoint / "unet", variant="bf16", max_shard_size="100KB")
    vae = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    decoder = {f"module.{name}": value for name, value in load_file(vae).items()}
    save_file(decoder, vae)
    bundle = diffoundry.compile(checkpoint, tmp_path / "bundle", tasks=["txt2img"])
    held = {
        "text_encoder": tensors,
        "unet": {name: value.float() for name, value in unet.state_dict().items()},
        "vae_decoder": {name: value for name, value in decoder.items() if ".decoder." in name},
    }
    for component, weights in held.items():
        graph = onnx.load(bundle.root / component / "model.onnx").graph
        stored = {onnx.numpy_helper.to_array(each).tobytes() for each in graph.initializer}
        stored |= {onnx.numpy_helper.to_array(each).T.tobytes() for each in graph.initializer if len(each.dims) == 2}
        large = {name: value for name, value in weights.items() if value.numel() > 500 and value.dim() in (2, 4)}
        lost = [name for name, value in large.items() if value.numpy().tobytes() not in stored]
        assert len(large) > 3 and not lost


def test_refusals_leave_nothing_and_come_before_the_work(micro, called, tmp_path):
    checkpoint = Path(shutil.copytree(micro, tmp_path / "checkpoint"))
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").write_bytes(LFS)
    done = called("compile", checkpoint, "-o", tmp_path / "b")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "run `git lfs pull`" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_weights_of_another_configuration_are_named(micro, tmp_path):
    folder = Path(shutil.copytree(micro / "text_encoder", tmp_path / "text_encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    with pytest.raises(CheckpointError, match=r"position_embedding.weight has the shape \(77, \d+\).* asks for \(60"):
        load_pretrained(CLIPTextModel, folder)


@pytest.mark.parametrize("made", ["bundle.json", "unet/model.onnx"])
def test_what_was_made_of_a_checkpoint_is_not_taken_for_one(micro, tmp_path, made):
    (tmp_path / "made/unet").mkdir(parents=True)
    shutil.copy(micro / "model_index.json", tmp_path / "made")
    (tmp_path / "made" / made).write_text("{}")
    with pytest.raises(CheckpointError, match="were made of a checkpoint: give the checkpoint itself; `diffoundry run"):
        Checkpoint.open(tmp_path / "made")


def test_what_is_no_checkpoint_is_named(micro, tmp_path):
    (tmp_path / "repo/inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="it is the folder of one model, give the one that it lies in"):
        Checkpoint.open(micro / "unet")
    (tmp_path / "repo/inner/model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"give the folder .*inner in it"):
        Checkpoint.open(tmp_path / "repo")
    (tmp_path / "repo/m.safetensors").write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"give the file .*m.safetensors where"):
        Checkpoint.open(tmp_path / "repo")
    for name, content, what in (
        ("m.gguf", b"GGUF\3\0\0\0", "is a GGUF file"),
        ("m.7z", b"7z\xbc\xaf'\x1c", "is an archive"),
        ("m.onnx", b"\x08\x0a\x12\x07pytorch", "is an ONNX model"),
        (
            "m.bin",
            (micro / "vae/diffusion_pytorch_model.safetensors").read_bytes(),
            "give it the suffix .safetensors",
        ),
        ("m.txt", b"hello", "is a file of an unknown kind"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            Checkpoint.open(tmp_path / name)
