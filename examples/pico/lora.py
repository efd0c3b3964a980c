"""Train two LoRAs for pico that bring what it never drew: `python -m diffoundry.examples.pico.lora`.

`moon` is a shape, `twice` a place: two of a small shape beside each other. No caption and no picture of pico's training
has either. Each goes on where it was stopped:

- rank 8 in every linear layer and convolution of the U-Net and in every linear layer of the text encoder (Hu et al.
  2021); pico's own weights stay as they are;
- half the pictures show the new thing, with captions that name all or some of it; the others are of pico's world, with
  their own captions, so that nothing is forgotten. No picture shows two moons;
- the loss, its weights and the dropout of captions are those of `train`.

The result is in the layout of diffusers' `save_lora_weights`, in fp16, with the six largest directions of each pair of
factors, which loses nothing that the scorer sees. One CPU core, shared with other work, took 15 minutes for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from .train import BETAS, _pictures, _save, _Training
from .world import BACKGROUNDS, COLORS, NEW_SHAPES, PLACES, SHAPES, SIZES, TWICE, Scene, random_caption, split_scenes

PICO = Path(__file__).parent
LORAS: dict[str, dict[str, Any]] = {"moon": {"shape": NEW_SHAPES}, "twice": {"place": (TWICE,), "size": ("small",)}}
"""By the names of their files: what each brings, by attribute."""
_RANK, _KEPT = 8, 6
_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def new_scenes(name: str) -> list[Scene]:
    """All scenes with what the LoRA `name` brings, and nothing else that is new."""
    values: dict[str, Any] = {
        "size": SIZES,
        "color": COLORS,
        "shape": SHAPES,
        "place": PLACES,
        "background": BACKGROUNDS,
    }
    values |= LORAS[name]
    return [
        Scene(size, color, shape, place, background)
        for size in values["size"]
        for color in values["color"]
        for shape in values["shape"]
        for place in values["place"]
        for background in values["background"]
    ]


def split_new(name: str, held_out: int = 100) -> tuple[list[Scene], list[Scene]]:
    """Those for training, and `held_out` that no training picture shows."""
    scenes = new_scenes(name)
    order = np.random.default_rng(2025).permutation(len(scenes))
    shuffled = [scenes[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def encode(vae: AutoencoderKL, work: Path, name: str, count: int) -> tuple[torch.Tensor, list[Scene]]:
    """Scaled latents (count, 4, 8, 8) and the scenes that they show: new ones and old ones in turn."""
    path = work / f"lora-{name}-{count}.pt"
    rng = np.random.default_rng((12, len(name)))
    pools = split_new(name)[0], split_scenes()[0]
    scenes = [pools[i % 2][rng.integers(0, len(pools[i % 2]))] for i in range(count)]
    if not path.exists():
        parts = []
        with torch.no_grad():
            for i in range(0, count, 128):
                mean = vae.encode(_pictures(scenes[i : i + 128], rng)).latent_dist.mean
                parts.append(mean * vae.config["scaling_factor"])
        _save(path, {"latents": torch.cat(parts)})
    return torch.load(path, weights_only=True)["latents"], scenes


def train_lora(work: Path, pico: Path, name: str, steps: int, batch: int, pictures: int, rate: float) -> Any:
    """The pipeline with the trained LoRA in it."""
    torch.manual_seed(13)
    pipeline = StableDiffusionPipeline.from_pretrained(pico, torch_dtype=torch.float32)
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    latents, scenes = encode(pipeline.vae, work, name, pictures)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    targets = [key for key, module in unet.named_modules() if isinstance(module, layers)]
    unet.requires_grad_(False).add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=targets))
    text_encoder.requires_grad_(False).add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_TEXT))
    trained = [each for part in (unet, text_encoder) for each in part.parameters() if each.requires_grad]
    both = torch.nn.ParameterList(trained)
    noiser = DDPMScheduler(**BETAS)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((14, step))
        rows = rng.integers(0, pictures, batch)
        captions = ["" if rng.random() < 0.1 else random_caption(scenes[row], rng) for row in rows]
        generator = torch.Generator().manual_seed(step)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, BETAS["num_train_timesteps"], (batch,), generator=generator)
        predicted = unet(noiser.add_noise(clean, noise, timesteps), timesteps, text_encoder(tokens)[0]).sample
        weights = compute_snr(noiser, timesteps).rsqrt().clamp(max=15.0) / 3
        return ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weights).mean()

    _Training(work / f"lora-{name}-state.pt", {"model": both}, trained, rate, steps).run(loss_of)
    return pipeline


def smaller(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The nearest factors of the rank that is kept (Eckart and Young 1936), in fp16."""
    made = {}
    for name, down in tensors.items():
        if ".lora.down." in name or ".lora_A." in name or "_layer.down." in name:
            other = name.replace(".down.", ".up.").replace("lora_A", "lora_B")
            up = tensors[other]
            left, sizes, right = torch.linalg.svd(up.flatten(1).float() @ down.flatten(1).float(), full_matrices=False)
            roots = sizes[:_KEPT].sqrt()
            made[name] = (roots[:, None] * right[:_KEPT]).reshape(-1, *down.shape[1:]).half().contiguous()
            made[other] = (left[:, :_KEPT] * roots).reshape(len(up), -1, *up.shape[2:]).half().contiguous()
    return made


def save(pipeline: Any, out: Path, name: str) -> None:
    """Write the LoRA as `out/name.safetensors`, in fp16."""
    parts = {
        part: smaller(convert_state_dict_to_diffusers(get_peft_model_state_dict(module)))
        for part, module in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder))
    }
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        weight_name=f"{name}.safetensors",
    )


@click.command()
@click.option(
    "--pico", type=click.Path(exists=True, path_type=Path), default=PICO, help="The model.  [default: this folder]"
)
@click.option("--out", type=click.Path(path_type=Path), default=PICO / "lora", help="[default: lora in this folder]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/pico-lora"),
    show_default=True,
    help="Training state, to resume from.",
)
@click.option("--name", "names", multiple=True, type=click.Choice(list(LORAS)), help="[default: both]")
@click.option("--steps", default=2500, type=click.IntRange(1), show_default=True)
@click.option("--batch", default=64, type=click.IntRange(1), show_default=True)
@click.option("--pictures", default=12288, type=click.IntRange(1), show_default=True, help="Pictures to encode.")
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
def main(
    pico: Path, out: Path, work: Path, names: tuple[str, ...], steps: int, batch: int, pictures: int, rate: float
) -> None:
    """Train the LoRAs, or go on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    for name in names or LORAS:
        save(train_lora(work, pico, name, steps, batch, pictures, rate), out, name)
        print(f"wrote {out / name}.safetensors", flush=True)


if __name__ == "__main__":
    main()
