"""Train an IP-Adapter for pico that takes colour and shape from a picture:

python -m diffoundry.examples.pico.ip_adapter

It goes on where it was stopped. Two stages:

1. image encoder: a small CLIP vision model, taught to tell colour and shape of a rendered picture, whatever its place,
   size and background; the two layers that name them are then dropped;
2. adapter, of the form of Ye et al. 2023, "IP-Adapter": four tokens that follow from the encoder's embedding, and a
   second pair of key and value projections in each cross-attention. Embedding and U-Net stay as they are. The loss is
   the distance to what the U-Net predicts of a caption that names colour and shape as well: the noise itself, which
   Ye et al. have as target, depends on much that the reference does not tell, and that loss hardly falls. The reference
   is another picture of the same colour and shape as the one to draw, so that nothing else can be copied; captions name
   only what it does not decide; 1 of 10 embeddings is zero, for classifier-free guidance.

The result has the published layout, which diffusers' `load_ip_adapter` reads. The weights are stored in fp16. Two CPU
cores, shared with other work, took 14 minutes for each stage.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .control import PICO, Pool, embed, make_pool, some_of, vague_caption
from .train import BETAS, _Training
from .world import BACKGROUNDS, COLORS, SHAPES, SIDE

WEIGHTS = "ip_adapter.safetensors"
"""The adapter's file in its folder, beside `image_encoder`."""

_TOKENS = 4
_DROPPED = 0.1
_NOISE = 3.0


def make_image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
            hidden_act="quick_gelu",
        )
    )


def make_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def references(pool: Pool, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """The pictures of a pool's rows, tinted and noisy a little, as the image encoder takes them: (n, 3, 64, 64)."""
    scenes = [pool.scenes[row] for row in rows]
    foreground = np.array([COLORS[scene.color] for scene in scenes]) + rng.uniform(-8, 8, (len(rows), 3))
    background = np.array([BACKGROUNDS[scene.background] for scene in scenes]) + rng.uniform(-6, 6, (len(rows), 3))
    masks = pool.masks[torch.from_numpy(rows)].numpy()[:, None] / 255.0
    pixels = background[..., None, None] * (1 - masks) + foreground[..., None, None] * masks
    pixels = (pixels + _NOISE * rng.standard_normal(pixels.shape)).round().clip(0, 255) / 255
    processor = make_image_processor()
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return torch.from_numpy((pixels - mean) / std).float()


def _labels(pool: Pool) -> torch.Tensor:
    """Number of the colour and of the shape of each row, (n, 2)."""
    colors = list(COLORS)
    return torch.tensor([[colors.index(scene.color), SHAPES.index(scene.shape)] for scene in pool.scenes])


def train_image_encoder(work: Path, pool: Pool, steps: int, batch: int = 64) -> CLIPVisionModelWithProjection:
    """Stage 1. Returns the encoder without the layers that name colour and shape."""
    torch.manual_seed(10)
    encoder = make_image_encoder().train()
    width = encoder.config.projection_dim
    heads = torch.nn.ModuleList([torch.nn.Linear(width, len(COLORS)), torch.nn.Linear(width, len(SHAPES))])
    both = torch.nn.ModuleDict({"encoder": encoder, "heads": heads})
    labels = _labels(pool)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((11, step))
        rows = rng.integers(0, len(pool.scenes), batch)
        embeddings = encoder(references(pool, rows, rng)).image_embeds
        wanted = labels[torch.from_numpy(rows)]
        losses = [cross_entropy(head(embeddings), wanted[:, i]) for i, head in enumerate(heads)]
        return torch.stack(losses).sum()

    _Training(work / "image_encoder.pt", {"model": both}, list(both.parameters()), 1e-3, steps).run(loss_of)
    return encoder.eval().requires_grad_(False)


def initial_weights(unet: UNet2DConditionModel, width: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights to begin with, as `load_ip_adapter` takes them: key and value projections are those of the text.

    width: of the image encoder's embedding.
    """
    tokens = unet.config.cross_attention_dim
    projection, norm = torch.nn.Linear(width, _TOKENS * tokens), torch.nn.LayerNorm(tokens)
    parts = {"proj": projection, "norm": norm}
    image_proj = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    ip_adapter = {}
    for number, name in enumerate(unet.attn_processors):  # self- and cross-attention in turn
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            ip_adapter[f"{number}.to_k_ip.weight"] = attention.to_k.weight.detach().clone()
            ip_adapter[f"{number}.to_v_ip.weight"] = attention.to_v.weight.detach().clone()
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def adapter_of(unet: UNet2DConditionModel) -> torch.nn.ModuleDict:
    """The modules of the adapter that a U-Net has loaded; they share their weights with it."""
    processors = {
        str(number): processor
        for number, (name, processor) in enumerate(unet.attn_processors.items())
        if name.endswith("attn2.processor")
    }
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    return torch.nn.ModuleDict({"image_proj": layer, "ip_adapter": torch.nn.ModuleDict(processors)})


def published(adapter: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
    """The weights of an adapter under the names of the published files."""
    names = {"image_proj.image_embeds.": "image_proj.proj.", "_ip.0.": "_ip."}
    renamed: dict[str, torch.Tensor] = {}
    for name, value in adapter.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def train_adapter(
    work: Path,
    pico: StableDiffusionPipeline,
    encoder: CLIPVisionModelWithProjection,
    pool: Pool,
    steps: int,
    batch: int,
    rate: float,
) -> torch.nn.ModuleDict:
    """Stage 2. Returns the averaged adapter."""
    torch.manual_seed(12)
    unet = pico.unet.eval().requires_grad_(False)
    teacher = copy.deepcopy(unet)
    unet._load_ip_adapter_weights([initial_weights(unet, encoder.config.projection_dim)], low_cpu_mem_usage=False)
    adapter = adapter_of(unet).train().requires_grad_(True)
    labels = _labels(pool)
    kinds = labels[:, 0] * len(SHAPES) + labels[:, 1]
    alike = [torch.nonzero(kinds == kind).flatten().numpy() for kind in range(len(COLORS) * len(SHAPES))]
    unmoved = np.flatnonzero(~pool.moved.numpy())
    noiser = DDPMScheduler(**BETAS)
    ema = EMAModel(adapter.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((13, step))
        rows = rng.choice(unmoved, batch)
        scenes = [pool.scenes[row] for row in rows]
        others = np.array([rng.choice(alike[int(kinds[row])]) for row in rows])
        given = rng.random(batch) >= _DROPPED
        with torch.no_grad():
            embeddings = encoder(references(pool, others, rng)).image_embeds * torch.from_numpy(given[:, None])
        named = [some_of(("size", "place", "background"), rng) for _ in rows]
        whole = [parts | {"color", "shape"} if there else parts for parts, there in zip(named, given, strict=True)]
        captions, wholes = (list(map(vague_caption, scenes, parts)) for parts in (named, whole))
        generator = torch.Generator().manual_seed(step)
        clean = pool.latents[torch.from_numpy(rows)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, BETAS["num_train_timesteps"], (batch,), generator=generator)
        noisy = noiser.add_noise(clean, noise, timesteps)
        with torch.no_grad():
            wanted = teacher(noisy, timesteps, embed(pico.tokenizer, pico.text_encoder, wholes)).sample
        prompts = embed(pico.tokenizer, pico.text_encoder, captions)
        predicted = unet(noisy, timesteps, prompts, added_cond_kwargs={"image_embeds": [embeddings[:, None]]}).sample
        weights = compute_snr(noiser, timesteps).rsqrt().clamp(max=15.0) / 3
        return ((predicted - wanted).pow(2).mean(dim=(1, 2, 3)) * weights).mean()

    weights = list(adapter.parameters())
    training = _Training(work / "ip_adapter.pt", {"model": adapter, "ema": ema}, weights, rate, steps)
    training.run(loss_of, after=lambda: ema.step(adapter.parameters()))
    ema.copy_to(adapter.parameters())
    return adapter.eval()


def write(out: Path, encoder: CLIPVisionModelWithProjection, adapter: torch.nn.ModuleDict) -> None:
    """Write `out`/ip_adapter.safetensors and `out`/image_encoder, stored in fp16."""
    encoder.half().save_pretrained(out / "image_encoder", safe_serialization=True)
    make_image_processor().save_pretrained(out / "image_encoder")
    weights = {name: value.detach().half().contiguous() for name, value in published(adapter).items()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})


@click.command()
@click.option(
    "--pico", type=click.Path(exists=True, path_type=Path), default=PICO, help="The model.  [default: this folder]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=PICO / "ip_adapter", help="[default: ip_adapter in this folder]"
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/pico-control"),
    show_default=True,
    help="Training state, to resume from, and pictures, which `control` leaves there too.",
)
@click.option("--encoder-steps", default=4000, type=click.IntRange(1), show_default=True)
@click.option("--steps", default=3000, type=click.IntRange(1), show_default=True, help="Steps of the adapter.")
@click.option("--batch", default=64, type=click.IntRange(1), show_default=True)
@click.option("--pictures", default=24576, type=click.IntRange(1), show_default=True, help="Pictures to encode.")
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate of the adapter.")
def main(
    pico: Path, out: Path, work: Path, encoder_steps: int, steps: int, batch: int, pictures: int, rate: float
) -> None:
    """Train image encoder and adapter, or go on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(pico)
    pool = make_pool(pipeline.vae, work, pictures)
    encoder = train_image_encoder(work, pool, encoder_steps)
    write(out, encoder, train_adapter(work, pipeline, encoder, pool, steps, batch, rate))
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
