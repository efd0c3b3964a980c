"""Prompts and negative prompts, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ...bundle import Bundle, Role
from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines import Engine
from ..lora import Lora
from ..lora_sets import LoraSets
from ..request import Request
from ..text.encoders import PromptSpec, TextEncoders
from ..text.weighting import Embedding
from .condition import Condition, Fed, Job


class Text(Condition):
    """Hidden states and pooled embeddings of the prompts; see `condition.Condition`."""

    loads: Role | None = "text"

    def __init__(
        self,
        bundle: Bundle,
        engine: Callable[[str], Engine],
        loras: LoraSets,
        adapted: Callable[[str, Sequence[Lora]], Engine],
    ) -> None:
        """engine: loads a component by its name. adapted: the same, with its weights changed by `loras`."""
        manifest = bundle.manifest
        self.encoders, self._loras, self._adapted = TextEncoders(bundle, engine), loras, adapted
        self._zeros = manifest.wiring.empty_negative_is_zeros
        self._more = {f"prompt_{each.text + 1}" for each in manifest.wiring.text if each.text}
        inputs = bundle.component(manifest.named("denoiser")).inputs
        sources = manifest.wiring.inputs
        self._widths = {sources.get(tensor.name, ""): tensor.shape[-1] for tensor in inputs if tensor.shape}

    def heeds(self, request: Request, guided: bool) -> frozenset[str]:
        """Embeddings take the place of their texts and of what is done to these."""
        embeds = {"prompt_embeds", *(["pooled_prompt_embeds"] if self.encoders.pooled else [])}
        texts = {"prompt", *self._more}
        how = {"clip_skip"} if self.encoders.skippable else set()
        how |= {"weights", "windows"} if self.encoders.weighted else set()
        how |= {"max_sequence_length"} if self.encoders.longest else set()
        names = embeds if request.prompt_embeds is not None else {*embeds, *texts, *how}
        return frozenset({*names, *(f"negative_{name}" for name in embeds | texts if guided)})

    def check(self, jobs: Sequence[Job]) -> None:
        """The prompts of a batch must take as many tokens each, and embeddings be as wide as the model reads them."""
        lengths: set[int] = set()
        for job in jobs:
            self._check_embeds(job.request)
            self.encoders.check_skip(job.request.clip_skip or 0)
            length, most = job.request.max_sequence_length, self.encoders.longest
            if length is not None and most and length > most:
                raise RequestError(f"max_sequence_length must be at most {most} with this model, found {length}")
            lengths |= set() if self.encoders.bucket else self._lengths(job)
        if len(lengths) > 1:
            if len({job.request.max_sequence_length for job in jobs}) > 1:
                raise RequestError("the requests of a batch must have one max_sequence_length: run others on their own")
            raise RequestError(
                f"the prompts and negative prompts of a batch must take as many tokens, found {sorted(lengths)}: "
                "give embeddings of one length, and run longer prompts on their own"
            )

    def feed(self, jobs: Sequence[Job]) -> list[Fed]:
        """Encode the prompts of all jobs, one call for each text encoder and each set of LoRAs that changes it."""
        alike: dict[Hashable, list[int]] = {}
        for i, job in enumerate(jobs):
            changes = bool(job.loras) and bool(self._loras.text_changes(job.loras))
            alike.setdefault(self._loras.key(job.loras) if changes else None, []).append(i)
        made: dict[int, list[Embedding]] = {}
        for key, places in alike.items():
            own = [jobs[i] for i in places]
            encoders = self.encoders if key is None else self._encoders_of(own[0].loras)
            made |= zip(places, self._encoded(own, encoders), strict=True)
        if self.encoders.bucket:
            level = iter(self.encoders.level([each for halves in made.values() for each in halves]))
            made = {i: [next(level) for _ in halves] for i, halves in made.items()}
        return [_fed(*made[i]) for i in range(len(jobs))]

    def _encoders_of(self, loras: Sequence[Lora]) -> TextEncoders:
        """The text encoders, with what this set changes in them."""
        if not loras or not self._loras.text_changes(loras):
            return self.encoders
        return self.encoders.with_engines(partial(self._engine_of, loras))

    def _engine_of(self, loras: Sequence[Lora], name: str) -> Engine:
        return self._adapted(name, loras)

    def _encoded(self, jobs: Sequence[Job], encoders: TextEncoders) -> list[list[Embedding]]:
        """Of each job the embedding of its prompt, and that of its negative prompt where it is guided."""
        pairs = [self._pair(job) for job in jobs]
        specs = list(dict.fromkeys(half for pair in pairs for half in pair if isinstance(half, PromptSpec)))
        made = dict(zip(specs, encoders.embed(specs), strict=True)) if specs else {}
        halves = []
        for job, (prompt, negative) in zip(jobs, pairs, strict=True):
            first = made[prompt] if isinstance(prompt, PromptSpec) else prompt
            if not job.guidance.active:
                halves.append([first])
                continue
            second = made[negative] if isinstance(negative, PromptSpec) else negative or first.zeros()
            halves.append(encoders.level([first, second]) if job.request.windows else [first, second])
        return halves

    def embeddings(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """The hidden states of prompts, (len(prompts), tokens, width), and what of each did not fit."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("encode takes a list of texts, one at least")
        specs = [PromptSpec((prompt,) * 3) for prompt in prompts]
        encoders = self._encoders_of(self._loras.base)
        encoders.tokens(specs[0])
        made = [replace(each, hidden=each.hidden[: each.tokens]) for each in encoders.embed(specs)]
        if len({len(each.hidden) for each in made}) > 1:
            raise RequestError("these prompts have as many hidden states as they have tokens: encode one at a time")
        return np.stack([each.hidden for each in made]), [each.truncated for each in made]

    def _check_embeds(self, request: Request) -> None:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            for given, source in ((name, "text.hidden"), (pooled, "text.pooled")):
                value, width = getattr(request, given), self._widths.get(source)
                if value is not None and isinstance(width, int) and value.shape[-1] != width:
                    raise RequestError(f"{given} must be {width} wide for this model, found shape {value.shape}")
            value, most = getattr(request, name), self.encoders.most
            if value is not None and most and len(value) > most:
                raise RequestError(f"{name} may have {most} tokens at most with this model, found {len(value)}")
            if value is not None and self.encoders.pooled and getattr(request, pooled) is None:
                raise RequestError(f"this model needs {pooled} beside {name}")

    def _pair(self, job: Job) -> tuple[PromptSpec | Embedding, PromptSpec | Embedding | None]:
        """The prompt and the negative prompt: what to encode, or what was given in its place, None for zeros or none.

        Layers are skipped for the prompt alone, as in diffusers.
        """
        request, prompt, negative = job.request, job.request.prompt, job.request.negative_prompt or ""
        length = request.max_sequence_length
        first: PromptSpec | Embedding
        if request.prompt_embeds is not None:
            first = Embedding(request.prompt_embeds, request.pooled_prompt_embeds)
        else:
            texts = (prompt, *(prompt if each is None else each for each in (request.prompt_2, request.prompt_3)))
            first = PromptSpec(texts, request.clip_skip or 0, request.weights, request.windows, length)
        if not job.guidance.active:
            return first, None
        if request.negative_prompt_embeds is not None:
            return first, Embedding(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
        if request.negative_prompt is None and self._zeros:
            return first, None
        others = (request.negative_prompt_2, request.negative_prompt_3)
        texts = (negative, *(negative if each is None else each for each in others))
        return first, PromptSpec(texts, 0, request.weights, request.windows, length)

    def _lengths(self, job: Job) -> set[int]:
        """The tokens that the prompt and the negative prompt of a job take, as `_fed` makes them."""
        halves = [half for half in self._pair(job) if half is not None]
        lengths = {len(h.hidden) if isinstance(h, Embedding) else self.encoders.tokens(h) for h in halves}
        return {max(lengths)} if job.request.windows and job.request.prompt_embeds is None else lengths


def _fed(prompt: Embedding, negative: Embedding | None = None) -> Fed:
    """What the rows of a job are fed. negative: where it is guided."""
    halves = {"prompt": prompt, "negative_prompt": negative} if negative is not None else {"prompt": prompt}
    truncated = {name: half.truncated for name, half in halves.items() if half.truncated}
    return Fed(prompt.sources(), {} if negative is None else negative.sources(), truncated)
