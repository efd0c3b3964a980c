"""The denoising loop: scale, call the U-Net, guide, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..bundle import EngineError, StoppedError, Tensor
from ..engines import Array, Bound, Engine
from .guidance import Guidance
from .noise import TorchGenerator
from .schedulers import Table
from .step import step

Callback = Callable[[int, int, Array], object]
"""`callback(step, total, latents)` after each step; returning False stops the run."""


@dataclass(slots=True)
class _Call:
    """One call of the U-Net: its bound buffers, and the batch row that each of its rows comes from."""

    rows: Array
    sample: Array
    timestep: Array
    bound: Bound
    output: str

    def __call__(self, x: Array, timestep: float) -> Array:
        self.sample[...] = x[self.rows]
        self.timestep[...] = timestep
        return self.bound("sample", "timestep")[self.output]


class Denoiser:
    """The guided model: binds the U-Net's buffers once for a batch and prompt, then predicts step after step.

    With a `pool` of w threads the rows of a call are shared among w + 1 calls that run at once, which is faster than
    sharing each operator where the operators are small; the engine should then have one thread of its own.
    """

    def __init__(
        self,
        unet: Engine,
        shape: tuple[int, ...],
        prompt: Array,
        negative: Array | None,
        guidance: Guidance,
        pool: ThreadPoolExecutor | None = None,
        workers: int = 0,
    ) -> None:
        """shape: (N, C, H, W) of the latents; prompt, negative: (N, tokens, width); workers: threads of the pool."""
        self._unet, self._shape, self._guidance = unet, shape, guidance
        self._prompt, self._negative = prompt, negative
        self._pool, self._workers = pool, workers
        self._calls: dict[str, list[_Call]] = {}

    def __call__(self, x: Array, timestep: float, guided: bool) -> Array:
        """The guided model output, float32 (N, C, H, W). x: the scaled model input."""
        if not guided:
            return np.array(self._run("prompt", x, timestep), np.float32)
        if self._guidance.mode == "joint":
            both = self._run("joint", x, timestep)
            negative, prompt = both[: len(x)], both[len(x) :]
        else:
            negative = self._run("negative", x, timestep)
            prompt = self._run("prompt", x, timestep)
        difference: Array = np.subtract(prompt, negative, dtype=np.float32)
        difference *= np.float32(self._guidance.scale)
        difference += negative
        return difference

    def _run(self, kind: str, x: Array, timestep: float) -> Array:
        if kind not in self._calls:
            self._calls[kind] = self._bind(kind)
        first, *others = self._calls[kind]
        if not others or self._pool is None:
            return first(x, timestep)
        waiting = [self._pool.submit(call, x, timestep) for call in others]
        return np.concatenate([first(x, timestep), *(future.result() for future in waiting)])

    def _bind(self, kind: str) -> list[_Call]:
        halves = {"prompt": (self._prompt,), "negative": (self._negative,), "joint": (self._negative, self._prompt)}
        embeddings = np.concatenate([half for half in halves[kind] if half is not None])
        specs = {tensor.name: tensor for tensor in self._unet.inputs}
        missing = {"sample", "timestep", "encoder_hidden_states"} - set(specs)
        if missing:
            raise EngineError(f"unet: the model has no input {', '.join(sorted(missing))}: it is of another family")
        at_once = 1 if self._pool is None else self._workers + 1
        parts = np.array_split(np.arange(len(embeddings)), min(at_once, len(embeddings)))
        return [self._bind_rows(specs, embeddings, part) for part in parts]

    def _bind_rows(self, specs: Mapping[str, Tensor], embeddings: Array, part: Array) -> _Call:
        # ours takes one timestep a row; exports of other tools take a scalar, or one for all rows
        a_row = specs["timestep"].shape == specs["sample"].shape[:1]
        timestep_shape = (len(part),) if a_row else (1,) * len(specs["timestep"].shape)
        sample = np.zeros((len(part), *self._shape[1:]), specs["sample"].dtype)
        timestep = np.zeros(timestep_shape, specs["timestep"].dtype)
        feeds: Mapping[str, Array] = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": np.ascontiguousarray(embeddings[part], specs["encoder_hidden_states"].dtype),
        }
        bound = self._unet.bind(feeds)
        return _Call(part % self._shape[0], sample, timestep, bound, self._unet.outputs[0].name)


def denoise(
    denoiser: Denoiser,
    table: Table,
    latents: Array,
    guidance: Guidance,
    generators: Sequence[TorchGenerator],
    callback: Callback | None = None,
) -> Array:
    """Run every row of `table` from `latents` (float32 (N, C, H, W), already scaled) and return the final latents.

    generators: one a batch row, from which stochastic samplers draw.
    Raises `StoppedError` when the callback returns False, `EngineError` when the latents are no longer finite.
    """
    registers = np.zeros((table.registers, *latents.shape), np.float32)
    registers[0] = latents
    for k in range(table.steps):
        model_input = registers[0] * np.float32(table.input_scale[k])
        output = denoiser(model_input, float(table.timesteps[k]), guidance.at(k, table.steps))
        noise = draw(generators, latents.shape[1:]) if table.c[k].any() else None
        registers = step(table, k, registers, output, noise)
        answer = None if callback is None else callback(k + 1, table.steps, registers[0])
        if isinstance(answer, (bool, np.bool_)) and not answer:
            raise StoppedError(f"stopped by the callback after step {k + 1} of {table.steps}")
    if not np.isfinite(registers[0]).all():
        raise EngineError(
            "the final latents are not finite (NaN or infinity): the model overflowed; "
            "lower the guidance or use a bundle of higher precision"
        )
    final: Array = registers[0]
    return final


def draw(generators: Sequence[TorchGenerator], shape: tuple[int, ...]) -> Array:
    """Standard normal float32 (N, *shape), row i from generator i."""
    return np.concatenate([generator.randn(1, *shape) for generator in generators])
