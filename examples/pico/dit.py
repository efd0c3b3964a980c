"""Train pico's transformer: `python -m diffoundry.examples.pico.dit`.

The same world and autoencoder as pico, drawn by a small multimodal transformer that is trained by flow matching (Esser
et al. 2024), in the layout of Stable Diffusion 3: two CLIP text encoders and no T5, in whose place there are zeros. It
goes on where it was stopped:

- text encoders and transformer are trained together on x = (1 - t) · image + t · noise, to predict noise - image, with
  t even between 0 and 1; a tenth of the captions are empty, for guidance;
- there are from 1 to 256 tokens of zeros, so that the pictures do not depend on how many a caller asks for;
- what is written is an exponential moving average of the weights, in fp16, without the tokens that no text has.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .train import _Training, encode_world
from .world import random_caption, split_scenes

PICO = Path(__file__).parent
_WINDOW = 24
_WIDTH = 64
_KEPT_POSITIONS = 8
_ZEROS = (1, 2, 4, 8, 16, 64, 256)
_SHARES = (0.3, 0.2, 0.2, 0.15, 0.08, 0.05, 0.02)
"""How many tokens of zeros a step has, and how often."""
_MANY = 64
"""With so many of them a step sees a quarter of the pictures, so that it does not take longer than others."""


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of the two, of the same size."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_WINDOW,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_transformer() -> SD3Transformer2DModel:
    """Its modulations and its output begin at zero, as those of a DiT (Peebles & Xie 2023, section 3.2)."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, weight in model.named_parameters():
        if name.startswith("proj_out.") or ".norm1.linear." in name or ".norm1_context.linear." in name:
            torch.nn.init.zeros_(weight)
    return model


class Model(torch.nn.Module):
    """What is trained: token ids, noisy latents and times to velocities."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = torch.nn.ModuleList([make_text_encoder(tokenizer) for _ in range(2)])
        self.transformer = make_transformer()

    def forward(self, tokens: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor, zeros: int) -> torch.Tensor:
        made = [encoder(tokens, output_hidden_states=True) for encoder in self.text]
        hidden = torch.cat([each.hidden_states[-2] for each in made], -1)
        hidden = torch.cat([hidden, hidden.new_zeros(len(hidden), zeros, hidden.shape[2])], 1)
        pooled = torch.cat([each.text_embeds for each in made], -1)
        velocity: torch.Tensor = self.transformer(noisy, hidden, pooled, 1000 * times, return_dict=False)[0]
        return velocity


def train(work: Path, pico: Path, steps: int, batch: int, pictures: int, rate: float) -> StableDiffusion3Pipeline:
    """The whole pipeline with the averaged weights."""
    torch.manual_seed(21)
    vae = AutoencoderKL.from_pretrained(pico / "vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(pico / "tokenizer", model_max_length=_WINDOW)
    latents, scenes = encode_world(vae, work, pictures)
    mean = latents.mean()
    vae.register_to_config(shift_factor=round(mean.item() / vae.config["scaling_factor"], 4))
    latents = latents - vae.config["shift_factor"] * vae.config["scaling_factor"]
    known, _ = split_scenes()
    model = Model(tokenizer)
    model.train()
    ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((22, step))
        zeros = int(rng.choice(_ZEROS, p=_SHARES))
        size = batch if zeros < _MANY else max(batch // 4, 1)
        rows = rng.integers(0, len(latents), size)
        captions = ["" if rng.random() < 0.1 else random_caption(known[int(scenes[row])], rng) for row in rows]
        generator = torch.Generator().manual_seed(step)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.rand(size, generator=generator)
        part = times[:, None, None, None]
        velocity = model(tokens, (1 - part) * clean + part * noise, times, zeros)
        return (velocity - (noise - clean)).pow(2).mean()

    training = _Training(work / "dit.pt", {"model": model, "ema": ema}, list(model.parameters()), rate, steps)
    training.run(loss_of, after=lambda: ema.step(model.parameters()))
    ema.copy_to(model.parameters())
    model.eval()
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text[0],
        tokenizer=tokenizer,
        text_encoder_2=model.text[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def reachable_tokens(tokenizer: CLIPTokenizer) -> list[str]:
    """The tokens that a text can have, in the order of their ids.

    A byte is no token where no character that the tokenizer keeps has it (it lower-cases, and bytes such as 0xFF are
    in no UTF-8), nor the end of a word where it is the last of no character.
    """
    backend = tokenizer.backend_tokenizer
    every = " ".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    pieces = {piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(every))}
    reachable = set().union(*pieces) | {piece[-1] + "</w>" for piece in pieces}
    single = {letter + end for letter in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")}
    vocab: dict[str, int] = tokenizer.get_vocab()
    return [token for token in sorted(vocab, key=vocab.__getitem__) if token in reachable or token not in single]


def drop_unreachable_tokens(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """A tokenizer without them; `encoder` gives what it gave before, for every text."""
    tokens = reachable_tokens(tokenizer)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    small = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in merges],
        model_max_length=tokenizer.model_max_length,
    )
    rows = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)]
    encoder.resize_token_embeddings(len(tokens)).weight.data = rows.detach().clone()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(encoder.config, name, getattr(small, name))
    return small


def write(pipeline: StableDiffusion3Pipeline, out: Path) -> None:
    """Write the diffusers folder, in fp16, as small as it can be read.

    Of the positions the middle ones alone are written, and of the tokens those that a text can have.
    """
    embed, kept = pipeline.transformer.pos_embed, _KEPT_POSITIONS
    first = (embed.pos_embed_max_size - kept) // 2
    grid = embed.pos_embed.reshape(embed.pos_embed_max_size, embed.pos_embed_max_size, -1)
    embed.pos_embed = grid[first : first + kept, first : first + kept].reshape(1, kept * kept, -1).clone()
    embed.pos_embed_max_size = kept
    pipeline.transformer.register_to_config(pos_embed_max_size=kept)
    for place in ("", "_2"):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{place}"), getattr(pipeline, f"tokenizer{place}")
        pipeline.register_modules(**{f"tokenizer{place}": drop_unreachable_tokens(encoder, tokenizer)})
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for path in out.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        layout = {"separators": (",", ":")} if path.name == "tokenizer.json" else {"indent": 2}
        path.write_text(json.dumps(content, ensure_ascii=False, **layout) + "\n", encoding="utf-8")


@click.command()
@click.option("--pico", type=click.Path(exists=True, path_type=Path), default=PICO, help="[default: this folder]")
@click.option("--out", type=click.Path(path_type=Path), default=PICO / "dit", help="[default: dit in this folder]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/pico-dit"),
    show_default=True,
    help="Training state, to resume from.",
)
@click.option("--steps", default=7000, type=click.IntRange(1), show_default=True)
@click.option("--batch", default=64, type=click.IntRange(1), show_default=True)
@click.option("--pictures", default=30720, type=click.IntRange(1), show_default=True, help="Pictures to encode.")
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
def main(pico: Path, out: Path, work: Path, steps: int, batch: int, pictures: int, rate: float) -> None:
    """Train pico's transformer, or go on where an earlier run stopped."""
    work.mkdir(parents=True, exist_ok=True)
    write(train(work, pico, steps, batch, pictures, rate), out)
    print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    main()
