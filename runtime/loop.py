"""The denoising loop: scale, call the U-Net, guide, step. Rows of one batch may differ in all but their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..bundle import Tensor
from ..common.arrays import Array
from ..common.errors import EngineError, OverflowedError, StoppedError
from ..engines import Bound, Engine
from .guidance import Guidance, combine
from .noise import Generator
from .schedulers import Table
from .step import State

Callback = Callable[[int, int, Array], object]
"""`callback(step, total, latents)` after each step; returning False stops the run."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps of an image: after each step, all that the mask is 0 at, noised as the step is.

    mask: float32 (1, H, W), 1 where the image is drawn anew. image, noise: latents, (C, H, W).
    """

    mask: Array
    image: Array
    noise: Array

    def blend(self, x: Array, table: Table, k: int) -> Array:
        """The latents after step k of `table`, with the kept part of the image in its place."""
        alpha, sigma = table.levels[k + 1].astype(np.float32) if k + 1 < table.steps else (1.0, 0.0)
        kept = alpha * self.image + sigma * self.noise
        blended: Array = (1 - self.mask) * kept + self.mask * x
        return blended


@dataclass(frozen=True, slots=True)
class Row:
    """One image to be: its schedule, guidance and noise, its text, and the latents that it starts from.

    prompt, negative: the U-Net's inputs beside sample and timestep, without their row axis; negative is needed where
    the guidance is active. latents: float32 (C, H, W). kept: for inpainting. channels: float32 (c, H, W), what the
    U-Net sees beside the latents at every step.
    """

    table: Table
    guidance: Guidance
    generator: Generator
    prompt: Mapping[str, Array]
    negative: Mapping[str, Array] | None
    latents: Array
    kept: Kept | None = None
    channels: Array | None = None


@dataclass(slots=True)
class _Call:
    """One call of the U-Net: its bound buffers, and the batch row that each of its rows comes from."""

    source: Array
    sample: Array
    timestep: Array
    bound: Bound
    output: str

    def __call__(self, x: Array, timesteps: Array) -> Array:
        self.sample[:, : x.shape[1]] = x[self.source]
        if self.timestep.shape == self.source.shape:
            self.timestep[...] = timesteps[self.source]
        else:  # a graph of another tool, with one timestep for all rows
            told = np.unique(timesteps[self.source])
            if len(told) > 1:
                raise EngineError(
                    "unet: this model takes one timestep for all rows, so all must be at the same step: "
                    "give them one scheduler and step count, or compile the checkpoint with diffoundry"
                )
            self.timestep[...] = told[0]
        return self.bound("sample", "timestep")[self.output]


class Denoiser:
    """The guided model over the rows of a batch: it binds the U-Net's buffers once for each set of rows.

    With a `pool` of w threads the rows of a call are shared among w + 1 calls that run at once, which is faster than
    sharing each operator where the operators are small; the engine should then have one thread of its own.
    """

    def __init__(
        self, unet: Engine, rows: Sequence[Row], pool: ThreadPoolExecutor | None = None, workers: int = 0
    ) -> None:
        """workers: threads of the pool."""
        self._unet, self._rows = unet, list(rows)
        self._split = any(row.guidance.active and row.guidance.mode == "split" for row in rows)
        self._pool, self._workers = pool, workers
        self._calls: dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Call]] = {}
        self._bound_rows: tuple[int, ...] = ()

    def __call__(self, x: Array, timesteps: Array, rows: tuple[int, ...], guided: tuple[bool, ...]) -> Array:
        """The guided model output, float32 (n, C, H, W).

        x: the scaled model input, (n, C, H, W); timesteps: (n,); rows: which rows of the batch these are; guided:
        which of them are guided in this step.
        """
        on = [i for i, is_guided in enumerate(guided) if is_guided]
        everyone = tuple(range(len(rows)))
        if not on:
            return np.array(self._run((), everyone, rows, x, timesteps), np.float32)
        if self._split:
            negative = np.array(self._run(tuple(on), (), rows, x, timesteps))
            prompt = self._run((), everyone, rows, x, timesteps)
        else:
            both = self._run(tuple(on), everyone, rows, x, timesteps)
            negative, prompt = both[: len(on)], both[len(on) :]
        guidances = [self._rows[rows[i]].guidance for i in on]
        if len(on) == len(rows):
            return combine(prompt, negative, guidances)
        result: Array = np.array(prompt, np.float32)
        result[on] = combine(prompt[on], negative, guidances)
        return result

    def _run(
        self, negative: tuple[int, ...], prompt: tuple[int, ...], rows: tuple[int, ...], x: Array, timesteps: Array
    ) -> Array:
        """One call: rows with the negative prompt, then rows with the prompt, both as places in `rows`."""
        if rows != self._bound_rows:  # some have finished: the places of the others have changed
            self._calls.clear()
            self._bound_rows = rows
        key = (negative, prompt)
        if key not in self._calls:
            self._calls[key] = self._bind(rows, negative, prompt, x.shape[1:])
        first, *others = self._calls[key]
        if not others or self._pool is None:
            return first(x, timesteps)
        waiting = [self._pool.submit(call, x, timesteps) for call in others]
        return np.concatenate([first(x, timesteps), *(future.result() for future in waiting)])

    def _bind(
        self, rows: tuple[int, ...], negative: tuple[int, ...], prompt: tuple[int, ...], shape: tuple[int, ...]
    ) -> list[_Call]:
        told = [self._rows[rows[i]].negative or {} for i in negative] + [self._rows[rows[i]].prompt for i in prompt]
        source = np.array([*negative, *prompt])
        channels = [self._rows[rows[i]].channels for i in source]
        inputs = {name: np.stack([each[name] for each in told]) for name in told[0]}
        specs = self._specs(shape, channels, inputs)
        at_once = 1 if self._pool is None else self._workers + 1
        parts = np.array_split(np.arange(len(source)), min(at_once, len(source)))
        calls = []
        for part in parts:
            beside = [channels[i] for i in part]
            own = {name: array[part] for name, array in inputs.items()}
            calls.append(self._bind_rows(specs, source[part], own, shape, beside))
        return calls

    def _specs(
        self, shape: tuple[int, ...], channels: Sequence[Array | None], inputs: Mapping[str, Array]
    ) -> dict[str, Tensor]:
        """The U-Net's inputs by name. Raises `EngineError` when they are not what the rows hold."""
        specs = {tensor.name: tensor for tensor in self._unet.inputs}
        held = {"sample", "timestep", *inputs}
        if set(specs) != held:
            wrong = sorted(set(specs) ^ held)
            raise EngineError(f"unet: the model and the pipeline do not agree on {', '.join(wrong)}: compile it again")
        wanted = specs["sample"].shape[1]
        beside = {0 if each is None else len(each) for each in channels}
        if isinstance(wanted, int) and {shape[0] + count for count in beside} != {wanted}:
            raise EngineError(f"unet: the model takes {wanted} channels, the latents have {shape[0]}: compile it again")
        return specs

    def _bind_rows(
        self,
        specs: Mapping[str, Tensor],
        source: Array,
        inputs: Mapping[str, Array],
        shape: tuple[int, ...],
        channels: Sequence[Array | None],
    ) -> _Call:
        # ours takes one timestep a row; exports of other tools take a scalar, or one for all rows
        a_row = specs["timestep"].shape == specs["sample"].shape[:1]
        timestep_shape = source.shape if a_row else (1,) * len(specs["timestep"].shape)
        beside = np.stack([each for each in channels if each is not None]) if channels[0] is not None else None
        count = shape[0] + (0 if beside is None else beside.shape[1])
        sample = np.zeros((len(source), count, *shape[1:]), specs["sample"].dtype)
        if beside is not None:
            sample[:, shape[0] :] = beside
        timestep = np.zeros(timestep_shape, specs["timestep"].dtype)
        feeds: Mapping[str, Array] = {
            "sample": sample,
            "timestep": timestep,
            **{name: np.asarray(array, specs[name].dtype, order="C") for name, array in inputs.items()},
        }
        return _Call(source, sample, timestep, self._unet.bind(feeds), self._unet.outputs[0].name)


def denoise(denoiser: Denoiser, rows: Sequence[Row], callback: Callback | None = None) -> Array:
    """Run each row to the end of its table and return the final latents, float32 (N, C, H, W).

    Rows that have fewer steps than others leave the batch when they are done.
    Raises `StoppedError` when the callback returns False, `OverflowedError` when the latents are no longer finite.
    """
    state = State([row.table for row in rows], np.stack([row.latents for row in rows]))
    latents = np.stack([row.latents for row in rows])
    active = tuple(range(len(rows)))
    total = max(row.table.steps for row in rows)
    for done in range(1, total + 1):
        here = [rows[i] for i in active]
        guided = tuple(row.guidance.at(k, row.table.steps) for row, k in zip(here, state.positions, strict=True))
        output = denoiser(state.model_input(), state.timesteps, active, guided)
        shape = (1, *latents.shape[1:])
        noise = [row.generator.randn(*shape) if draws else None for row, draws in zip(here, state.draws, strict=True)]
        made = state.positions
        state.advance(output, noise)
        for i, (row, k) in enumerate(zip(here, made, strict=True)):
            if row.kept is not None:
                state.x[i] = row.kept.blend(state.x[i], row.table, k)
        finished = state.finished()
        if callback is not None or any(finished):
            latents[list(active)] = state.x
        if callback is not None:
            stop_if_asked(callback(done, total, latents.copy()), done, total)
        if any(finished) and not all(finished):
            going = [i for i, ended in enumerate(finished) if not ended]
            state.keep(going)
            active = tuple(active[i] for i in going)
    check_finite(latents)
    return latents


def stop_if_asked(answer: object, done: int, total: int) -> None:
    """Raise `StoppedError` when a callback's answer is False."""
    if isinstance(answer, (bool, np.bool_)) and not answer:
        raise StoppedError(f"stopped by the callback after step {done} of {total}")


def check_finite(latents: Array) -> None:
    """Raise `OverflowedError` when final latents are NaN or infinite."""
    if not np.isfinite(latents).all():
        raise OverflowedError(
            "the final latents are not finite (NaN or infinity): the model overflowed; "
            "lower the guidance or use a bundle of higher precision"
        )
