"""The transformer of Z-Image, with rotations by tables of real numbers and rows of text that may differ in length."""

from __future__ import annotations

import math
from typing import Any

import torch

_PATCH, _KEY = 2, "2-1"
"""Latents a side of a token, and what the layers for these, of one frame, are called."""
_MULTIPLE = 32
"""Tokens of text, and of the picture, are filled up to a multiple of it; those that fill them are read, too."""
_STEPS, _PERIOD = 1000, 10000


class ZImage(torch.nn.Module):
    """`ZImageTransformer2DModel` for one picture a row.

    The hidden states of a row's text that stand for no token are what it learnt to fill gaps with, up to a multiple of
    32 tokens; those after that are not read.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.axes = len(model.axes_dims)
        embed = model.rope_embedder
        for i, table in enumerate(embed.precompute_freqs_cis(embed.axes_dims, embed.axes_lens, embed.theta)):
            self.register_buffer(f"cos_{i}", table.real.contiguous(), persistent=False)
            self.register_buffer(f"sin_{i}", table.imag.contiguous(), persistent=False)
        half = model.t_embedder.frequency_embedding_size // 2
        exponent = -math.log(_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(exponent / half), persistent=False)
        object.__setattr__(model.t_embedder, "timestep_embedding", self._waves)  # in the place of a static method
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            block.attention.set_processor(Attention())

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
    ) -> torch.Tensor:
        model = self.model
        height, width = sample.shape[2] // _PATCH, sample.shape[3] // _PATCH
        told = model.t_embedder((_STEPS - timestep) / _STEPS * model.t_scale)
        counts = encoder_hidden_states_mask.sum(1)[:, None]
        filled = ((counts + (_MULTIPLE - 1)) / _MULTIPLE).floor() * _MULTIPLE

        picture, place = self._picture(sample, filled)
        for block in model.noise_refiner:
            picture = block(picture, None, place, told)

        text = model.cap_embedder(encoder_hidden_states)
        text = torch.where(encoder_hidden_states_mask[..., None] > 0, text, model.cap_pad_token)
        tokens = torch.arange(text.shape[1], device=text.device)
        read, positions = tokens < filled, (tokens + 1).expand(text.shape[0], -1)
        of_text = self._rotations(positions, torch.zeros_like(positions), torch.zeros_like(positions))
        for block in model.context_refiner:
            text = block(text, read, of_text)

        both = torch.cat([picture, text], 1)
        seen = torch.cat([torch.ones_like(place[0][:, :, 0], dtype=torch.bool), read], 1)
        where = tuple(torch.cat([a, b], 1) for a, b in zip(place, of_text, strict=True))
        for block in model.layers:
            both = block(both, seen, where, told)
        made = model.all_final_layer[_KEY](both, c=told)[:, : height * width]
        rows, channels = made.shape[0], made.shape[2] // _PATCH**2
        made = made.reshape(rows, height, width, _PATCH, _PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        return -made.reshape(rows, channels, height * _PATCH, width * _PATCH)

    def _waves(self, timestep: torch.Tensor, width: int) -> torch.Tensor:
        """The timestep as torch itself turns it into waves, to the last bit."""
        angles = timestep[:, None].float() * self.frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], -1)

    def _picture(
        self, sample: torch.Tensor, first: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The tokens of a picture, filled up, and their rotations. first: (rows, 1), how many tokens the text has."""
        rows, channels, height, width = sample.shape
        height, width = height // _PATCH, width // _PATCH
        count = height * width
        patches = sample.reshape(rows, channels, height, _PATCH, width, _PATCH).permute(0, 2, 4, 3, 5, 1)
        tokens = self.model.all_x_embedder[_KEY](patches.reshape(rows, count, channels * _PATCH**2))
        places = torch.arange((count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE, device=sample.device)
        own, nearest, zero = places < count, places.clamp(max=count - 1), torch.zeros_like(places)
        tokens = torch.where(own[None, :, None], tokens[:, nearest], self.model.x_pad_token)
        down = torch.arange(height, device=sample.device)[:, None].expand(height, width).reshape(-1)
        across = torch.arange(width, device=sample.device)[None].expand(height, width).reshape(-1)
        at = [torch.where(own, each[nearest], zero)[None].expand(rows, -1) for each in (down, across)]
        return tokens, self._rotations(torch.where(own[None], first.to(places.dtype) + 1, zero[None]), *at)

    def _rotations(self, *positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions on each axis, each (rows, tokens): (rows, tokens, half of a head)."""
        cos, sin = (
            torch.cat([getattr(self, f"{name}_{i}")[each] for i, each in enumerate(positions)], -1)
            for name in ("cos", "sin")
        )
        return cos, sin


class Attention:
    """The attention of a block, in real numbers: each pair of a head's numbers is turned by the angle of its token."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """freqs_cis: cosines and sines, (rows, tokens, half of a head). attention_mask: (rows, tokens), those read."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if freqs_cis is not None:
            query, key = (turned(each, *freqs_cis) for each in (query, key))
        mask = None if attention_mask is None else attention_mask[:, None, None]
        made = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        result: torch.Tensor = attn.to_out[0](made.transpose(1, 2).flatten(2))
        return result


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads (rows, tokens, heads, width), each pair of numbers turned by its angle (Su et al. 2021)."""
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
