"""Train pico from nothing: `python -m diffoundry.examples.pico.train --out examples/pico`.

Four stages, each resumable from the checkpoints in `--work`:

1. tokenizer: byte-pair encoding over every caption of the world, in CLIP's layout;
2. autoencoder: L1 reconstruction with a small KL term (Rombach et al. 2022, section 3.1);
3. diffusion: text encoder and U-Net together, noise-prediction loss (Ho et al. 2020, equation 14) with
   weights 1/√SNR (Yu et al. 2023, "Debias the training of diffusion models"), 10 % caption dropout for
   classifier-free guidance (Ho & Salimans 2022) and an exponential moving average of the weights;
4. decoder: the decoder alone once more, on latents with a little noise.

On 2 CPU cores the whole recipe takes between one and three hours.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..random_checkpoint import name_as_of_old
from .world import Scene, all_scenes, caption, random_caption, render, split_scenes

BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_DECODER_NOISE = 0.08
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary from the captions and write it to `folder` as a CLIP tokenizer."""
    from tokenizers import Regex

    learner = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator((caption(scene) for scene in all_scenes()), trainer)
    merges = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return tokenizer


def make_autoencoder() -> AutoencoderKL:
    channels = (32, 32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _save(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)


def _to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) to float32 (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pictures(scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    return _to_tensor(np.stack([render(scene, rng) for scene in scenes]))


class _Training:
    """One stage: its optimizer and learning rate, and the file that it goes on from."""

    def __init__(self, path: Path, parts: dict[str, Any], weights: list[Any], rate: float, steps: int) -> None:
        """parts: what is saved beside the optimizer, each with a state_dict. rate: the peak, of a one-cycle."""
        self.path, self.steps, self.weights = path, steps, weights
        self.optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-2, betas=(0.9, 0.99))
        self.parts = {**parts, "optimizer": self.optimizer}
        self.start = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.start = state["step"]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=max(steps, self.start + 1), pct_start=0.05, final_div_factor=100
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not made these steps: an earlier run has
            for _ in range(self.start):
                self.schedule.step()

    def run(self, loss_of: Callable[[int], torch.Tensor], after: Callable[[], None] = lambda: None) -> None:
        """Minimise `loss_of(step)` to the last step, logging every 100 and saving every 500."""
        since, running = time.time(), 0.0
        for step in range(self.start, self.steps):
            loss = loss_of(step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.schedule.step()
            after()
            running += loss.item()
            done = step + 1
            if done % 100 == 0:
                elapsed = time.time() - since
                print(f"{self.path.stem} step {done}/{self.steps} loss {running / 100:.5f} {elapsed:.0f} s", flush=True)
                running = 0.0
            if done % 500 == 0 or done == self.steps:
                _save(self.path, {**{name: part.state_dict() for name, part in self.parts.items()}, "step": done})


def _shape_weights(images: torch.Tensor) -> torch.Tensor:
    """Loss weights (n, 1, 64, 64) that favour the shape and its rim: the plain background is learnt soon."""
    background = images[:, :, :1, :1]
    shape = ((images - background).abs().amax(1, keepdim=True) > 0.15).float()
    weights = 1 + 6 * torch.nn.functional.max_pool2d(shape, 5, stride=1, padding=2)
    return weights / weights.mean()


def train_autoencoder(work: Path, steps: int, batch: int = 16) -> AutoencoderKL:
    """Stage 2. Returns the trained autoencoder with its `scaling_factor` set to 1 / std(latents)."""
    torch.manual_seed(0)
    vae = make_autoencoder()
    train, _ = split_scenes()

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        images = _pictures([train[i] for i in rng.integers(0, len(train), batch)], rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float())
        return (_shape_weights(images) * (output.float() - images).abs()).mean() + 3e-4 * kl.mean()

    _Training(work / "autoencoder.pt", {"model": vae}, list(vae.parameters()), 8e-4, steps).run(loss_of)
    vae.eval()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        latents = vae.encode(_pictures([train[i] for i in rng.integers(0, len(train), 512)], rng)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def train_decoder(work: Path, vae: AutoencoderKL, steps: int, batch: int = 16) -> AutoencoderKL:
    """Stage 4. Sharpen the decoder alone on latents with a little noise, as the U-Net leaves it: latents stay."""
    torch.manual_seed(2)
    train, _ = split_scenes()

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((5, step))
        images = _pictures([train[i] for i in rng.integers(0, len(train), batch)], rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean
                latents = latents + _DECODER_NOISE * torch.randn_like(latents)
            output = vae.decode(latents).sample
        return (_shape_weights(images) * (output.float() - images).abs()).mean()

    weights = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    _Training(work / "decoder.pt", {"model": vae}, weights, 6e-4, steps).run(loss_of)
    return vae.eval()


def encode_world(vae: AutoencoderKL, work: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 4, 8, 8), scaled, of randomly jittered training pictures, and their scene indices."""
    path = work / f"latents-{count}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["latents"], state["scenes"]
    train, _ = split_scenes()
    rng = np.random.default_rng(4)
    indices = rng.integers(0, len(train), count)
    parts = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, count, 128):
            images = _pictures([train[j] for j in indices[i : i + 128]], rng)
            parts.append(vae.encode(images).latent_dist.mean.float() * vae.config["scaling_factor"])
    state = {"latents": torch.cat(parts), "scenes": torch.from_numpy(indices)}
    _save(path, state)
    return state["latents"], state["scenes"]


def train_diffusion(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, batch: int = 64, pictures: int = 61440
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Stage 3. Returns the averaged text encoder and U-Net."""
    torch.manual_seed(1)
    latents, scenes = encode_world(vae, work, pictures)
    train, _ = split_scenes()
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    both = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    both.train()
    noiser = DDPMScheduler(**BETAS)
    ema = EMAModel(both.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((2, step))
        rows = rng.integers(0, len(latents), batch)
        captions = ["" if rng.random() < 0.1 else random_caption(train[int(scenes[row])], rng) for row in rows]
        generator = torch.Generator().manual_seed(step)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, BETAS["num_train_timesteps"], (batch,), generator=generator)
        noisy = noiser.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, text_encoder(tokens)[0]).sample
        # the place of the shape is decided while there is almost only noise, where the plain loss hardly sees it
        weights = compute_snr(noiser, timesteps).rsqrt().clamp(max=15.0) / 3
        return ((predicted - noise).pow(2).mean(dim=(1, 2, 3)) * weights).mean()

    training = _Training(work / "diffusion.pt", {"model": both, "ema": ema}, list(both.parameters()), 1e-3, steps)
    training.run(loss_of, after=lambda: ema.step(both.parameters()))
    ema.copy_to(both.parameters())
    both.eval()
    return text_encoder, unet


def write_checkpoint(
    out: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> None:
    """Write the diffusers folder: autoencoder and U-Net stored in fp16, the small text encoder in fp32."""
    # the last two are for the samplers that a user may choose instead, as in the published Stable Diffusion 1.5
    others = {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = DPMSolverMultistepScheduler.from_config({**BETAS, "steps_offset": 1, **others})
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    name_as_of_old(out / "text_encoder")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(tokenizer.name_or_path) / name, out / "tokenizer" / name)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/pico"),
    show_default=True,
    help="Where to write the checkpoint.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/pico-train"),
    show_default=True,
    help="Training state, to resume from.",
)
@click.option("--vae-steps", default=9000, show_default=True)
@click.option("--steps", default=8000, show_default=True, help="Steps of the diffusion stage.")
@click.option("--decoder-steps", default=3000, show_default=True)
def main(out: Path, work: Path, vae_steps: int, steps: int, decoder_steps: int) -> None:
    """Train pico, or go on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():  # equally frequent pairs come in any order, and the weights know one
        make_tokenizer(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = train_autoencoder(work, vae_steps)
    text_encoder, unet = train_diffusion(work, vae, tokenizer, steps)
    vae = train_decoder(work, vae, decoder_steps)
    write_checkpoint(out, vae, text_encoder, unet, tokenizer)
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
