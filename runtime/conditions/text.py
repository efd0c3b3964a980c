"""Prompts and negative prompts, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...bundle import Bundle, Role
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines import Engine
from ..job import Job
from ..request import Request
from ..text.encoders import Embedding, PromptSpec, TextEncoders
from .condition import Fed

_PROMPT = ("prompt", "prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True, slots=True)
class _Pair:
    """What the prompt and the negative prompt of one job are: texts to encode, or None."""

    prompt: PromptSpec | None
    negative: PromptSpec | None


class Text:
    """Hidden states and pooled embeddings of the prompts; see `condition.Condition`."""

    loads: Role | None = "text"

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine]) -> None:
        manifest = bundle.manifest
        self.encoders = TextEncoders(bundle, engine)
        self._zeros = manifest.wiring.empty_negative_is_zeros
        self._second = any(encoder.text == 1 for encoder in manifest.wiring.text)
        inputs = bundle.component(manifest.named("denoiser")).inputs
        sources = manifest.wiring.inputs
        self._widths = {sources.get(tensor.name, ""): tensor.shape[-1] for tensor in inputs if tensor.shape}

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Embeddings take the place of their texts and of what is done to these."""
        names = {"prompt_embeds", *(["pooled_prompt_embeds"] if self.encoders.pooled else [])}
        if request.prompt_embeds is None:
            names |= {"prompt", "clip_skip", "weights", "windows", *(["prompt_2"] if self._second else [])}
        if guided:
            names |= {f"negative_{name}" for name in _PROMPT if name in names or name == "prompt"}
            names |= {"negative_prompt_2"} if self._second else set()
        return frozenset(names)

    def check(self, jobs: Sequence[Job]) -> None:
        """The prompts of a batch must take as many tokens each, and embeddings be as wide as the model reads them."""
        for job in jobs:
            self._check_embeds(job.request)
            spec = _spec(job.request)
            self.encoders.check(spec)
        lengths = sorted({length for job in jobs for length in self._lengths(job)})
        if len(lengths) > 1:
            raise RequestError(
                f"the prompts and negative prompts of a batch must take as many tokens, found {lengths}: "
                "give embeddings of one length, and run longer prompts on their own"
            )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """Encode the prompts of all jobs, one call for each text encoder."""
        pairs = [self._pair(job) for job in jobs]
        specs = list(dict.fromkeys(spec for pair in pairs for spec in (pair.prompt, pair.negative) if spec is not None))
        made = dict(zip(specs, self.encoders.embed(specs), strict=True)) if specs else {}
        return [self._fed(job, pair, made) for job, pair in zip(jobs, pairs, strict=True)]

    def embeddings(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """The hidden states of prompts, (len(prompts), tokens, width), and what of each did not fit."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("encode takes a list of texts, one at least")
        made = self.encoders.embed([PromptSpec((prompt, prompt)) for prompt in prompts])
        return np.stack([each.hidden for each in made]), [max(each.truncated, key=len) for each in made]

    def _check_embeds(self, request: Request) -> None:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            for given, source in ((name, "text.hidden"), (pooled, "text.pooled")):
                value, width = getattr(request, given), self._widths.get(source)
                if value is not None and isinstance(width, int) and value.shape[-1] != width:
                    raise RequestError(f"{given} must be {width} wide for this model, found shape {value.shape}")
            if getattr(request, name) is not None and self.encoders.pooled and getattr(request, pooled) is None:
                raise RequestError(f"this model needs {pooled} beside {name}")

    def _pair(self, job: Job) -> _Pair:
        """Layers are skipped for the prompt alone, as in diffusers."""
        request = job.request
        prompt = None if request.prompt_embeds is not None else _spec(request)
        none = request.negative_prompt is None and self._zeros
        if not job.guidance.active or request.negative_prompt_embeds is not None or none:
            return _Pair(prompt, None)
        text = request.negative_prompt or ""
        second = text if request.negative_prompt_2 is None else request.negative_prompt_2
        return _Pair(prompt, PromptSpec((text, second), 0, request.weights, request.windows))

    def _lengths(self, job: Job) -> list[int]:
        """The tokens that the prompt and the negative prompt of a job take, as `_fed` makes them."""
        request, pair = job.request, self._pair(job)
        lengths = [self.encoders.tokens(spec) for spec in (pair.prompt, pair.negative) if spec is not None]
        given = (request.prompt_embeds, request.negative_prompt_embeds if job.guidance.active else None)
        lengths += [len(value) for value in given if value is not None]
        return [max(lengths)] if request.windows and request.prompt_embeds is None else lengths

    def _fed(self, job: Job, pair: _Pair, made: dict[PromptSpec, Embedding]) -> Fed:
        request = job.request
        prompt = _embedding(request.prompt_embeds, request.pooled_prompt_embeds, pair.prompt, made)
        if prompt is None:
            raise RequestError("a prompt is missing: give one")
        if not job.guidance.active:
            return Fed(prompt.sources(), {}, _truncated(prompt=prompt))
        given = request.negative_prompt_embeds, request.negative_pooled_prompt_embeds
        negative = _embedding(*given, pair.negative, made) or prompt.zeros()
        if request.windows:
            prompt, negative = self.encoders.level([prompt, negative])
        return Fed(prompt.sources(), negative.sources(), _truncated(prompt=prompt, negative_prompt=negative))


def _embedding(
    hidden: Array | None, pooled: Array | None, spec: PromptSpec | None, made: dict[PromptSpec, Embedding]
) -> Embedding | None:
    """The embedding that a request brings, else the one made of its text; None where there is neither."""
    if hidden is not None:
        return Embedding(hidden, pooled)
    return None if spec is None else made[spec]


def _truncated(**named: Embedding) -> dict[str, str]:
    texts = {name: max(each.truncated, key=len, default="") for name, each in named.items()}
    return {name: text for name, text in texts.items() if text}


def _spec(request: Request) -> PromptSpec:
    """What the text encoders are given for the prompt."""
    texts = (request.prompt, request.prompt if request.prompt_2 is None else request.prompt_2)
    return PromptSpec(texts, request.clip_skip or 0, request.weights, request.windows)
