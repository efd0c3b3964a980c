"""What the U-Net is told beside latents and timestep: the prompts, and whatever else its inputs ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..common.arrays import Array
from ..common.errors import BundleError, RequestError
from .conditioning import guidance_embedding
from .request import Request
from .text import Ask, Embedding, TextEncoders

_LEAST_AXES = {"timestep": 1, "guidance": 1}
Told = tuple[Embedding, Embedding | None]
"""The prompt and, where it is guided, the negative prompt."""


class Inputs:
    """The inputs of a bundle's U-Net and the text encoders that make some of them.

    widths: the inputs by name, and the size of each one's last axis. inpaints: whether it sees the mask and the masked
    image. scored: whether it is told an aesthetic score.
    """

    def __init__(self, bundle: Bundle, text: TextEncoders) -> None:
        manifest = bundle.manifest
        self._text = text
        wiring = manifest.wiring
        self._sources = wiring.inputs
        self._zeros = wiring.empty_negative_is_zeros
        self.second_text = any(encoder.text == 1 for encoder in wiring.text)
        self.encoders, self.pooled, self.check = text.names, text.pooled, text.check
        self.scored = bool(wiring.inputs_from("sizes.scored"))
        self.sized = self.scored or bool(wiring.inputs_from("sizes"))
        self.given_guidance = bool(wiring.inputs_from("guidance") or wiring.inputs_from("guidance.sinusoid"))
        taken = bundle.component(manifest.named("denoiser")).inputs
        flat = [part.name for part in taken if len(part.shape) < _LEAST_AXES.get(wiring.inputs.get(part.name, ""), 2)]
        if flat and not bundle.foreign:
            raise BundleError(f"{bundle.root}: the denoiser's input {flat[0]!r} has too few axes; compile it again")
        self.widths = {self._sources[part.name]: part.shape[-1] for part in taken if part.shape}
        self.inpaints = bool(wiring.inputs_from("latents.masked"))

    def embeddings(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """The hidden states of prompts, (len(prompts), tokens, width), and what was cut off each."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("encode takes a list of texts, one at least")
        made = self._text.embed([Ask((prompt, prompt)) for prompt in prompts])
        return np.stack([each.hidden for each in made]), [max(each.cut, key=len) for each in made]

    def tell(self, requests: Sequence[Request], guided: Sequence[bool]) -> list[Told]:
        """The prompts of each request as the text encoders give them, and the negative prompts of those guided.

        Raises `RequestError` when their lengths differ.
        """
        pairs = [_asks(request, on, self._zeros) for request, on in zip(requests, guided, strict=True)]
        asks = list(dict.fromkeys(ask for pair in pairs for ask in pair if ask is not None))
        made: dict[Ask | None, Embedding] = dict(zip(asks, self._text.embed(asks), strict=True)) if asks else {}
        told = []
        for request, on, (ask, negative_ask) in zip(requests, guided, pairs, strict=True):
            prompt = _given(request.prompt_embeds, request.pooled_prompt_embeds) or made[ask]
            negative = None
            if on:
                negative = _given(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
                negative = negative or (prompt.zeros() if negative_ask is None else made[negative_ask])
                if request.windows:
                    prompt, negative = self._text.level([prompt, negative])
            told.append((prompt, negative))
        lengths = sorted({len(text.hidden) for pair in told for text in pair if text is not None})
        if len(lengths) > 1:
            raise RequestError(
                f"the prompts and negative prompts of a batch must take as many tokens, found {lengths}: "
                "give embeddings of one length, and run longer prompts on their own"
            )
        return told

    def conditions(
        self, request: Request, size: tuple[int, int], text: Embedding, *, embedded: float | None, negative: bool
    ) -> dict[str, Array]:
        """The U-Net's inputs beside sample and timestep.

        size: width and height. embedded: the guidance that the U-Net is told. negative: for the negative prompt.
        """
        told = request.conditioning
        if negative and self.sized:
            from_image = request.task != "txt2img"
            told = told.negative(request.negative_conditioning, scored=self.scored, from_image=from_image)
        made: dict[str, Any] = {"text.hidden": text.hidden, "text.pooled": text.pooled}
        if self.sized:
            made["sizes"] = made["sizes.scored"] = told.time_ids(size[1], size[0], scored=self.scored)
        if embedded is not None:
            made["guidance"] = np.float32(embedded)
        if embedded is not None and "guidance.sinusoid" in self.widths:
            made["guidance.sinusoid"] = guidance_embedding(embedded, int(self.widths["guidance.sinusoid"]))
        return {name: made[source] for name, source in self._sources.items() if source in made}


def _given(hidden: Array | None, pooled: Array | None) -> Embedding | None:
    return None if hidden is None else Embedding(hidden, pooled)


def ask_of(request: Request) -> Ask:
    """What the text encoders are asked for the prompt."""
    texts = (request.prompt, request.prompt if request.prompt_2 is None else request.prompt_2)
    return Ask(texts, request.clip_skip or 0, request.weights, request.windows)


def _asks(request: Request, guided: bool, zeros: bool) -> tuple[Ask | None, Ask | None]:
    """What the text encoders are asked for the prompt and the negative prompt, if they are.

    zeros: whether no negative prompt means zeros. Layers are skipped for the prompt alone, as in diffusers.
    """
    prompt = None if request.prompt_embeds is not None else ask_of(request)
    none = request.negative_prompt is None and zeros
    if not guided or request.negative_prompt_embeds is not None or none:
        return prompt, None
    text = request.negative_prompt or ""
    second = text if request.negative_prompt_2 is None else request.negative_prompt_2
    return prompt, Ask((text, second), 0, request.weights, request.windows)


def cuts(texts: Told) -> dict[str, str]:
    """What was left out of each prompt, by the name of the prompt."""
    named = zip(("prompt", "negative_prompt"), texts, strict=True)
    cuts = {name: max(text.cut, key=len, default="") for name, text in named if text is not None}
    return {name: cut for name, cut in cuts.items() if cut}
