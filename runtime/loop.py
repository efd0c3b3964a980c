"""The denoising loop: scale, call the U-Net, guide, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bundle import EngineError, StoppedError
from ..engines import Array, Bound, Engine
from .guidance import Guidance
from .noise import TorchGenerator
from .schedulers import Table
from .step import step

Callback = Callable[[int, int, Array], object]
"""`callback(step, total, latents)` after each step; returning False stops the run."""


@dataclass(slots=True)
class _Call:
    """A U-Net call of a fixed number of rows: its bound buffers."""

    sample: Array
    timestep: Array
    bound: Bound
    output: str = field(default="out_sample")

    def __call__(self, x: Array, timestep: float) -> Array:
        for copy in range(len(self.sample) // len(x)):
            self.sample[copy * len(x) : (copy + 1) * len(x)] = x
        self.timestep[...] = timestep
        return self.bound("sample", "timestep")[self.output]


class Denoiser:
    """The guided model: binds the U-Net's buffers once for a batch and prompt, then predicts step after step."""

    def __init__(
        self, unet: Engine, shape: tuple[int, ...], prompt: Array, negative: Array | None, guidance: Guidance
    ) -> None:
        """shape: (N, C, H, W) of the latents; prompt, negative: (N, tokens, width)."""
        self._unet, self._shape, self._guidance = unet, shape, guidance
        self._prompt, self._negative = prompt, negative
        self._calls: dict[str, _Call] = {}

    def __call__(self, x: Array, timestep: float, guided: bool) -> Array:
        """The guided model output, float32 (N, C, H, W). x: the scaled model input."""
        if not guided:
            return np.array(self._call("prompt")(x, timestep), np.float32)
        if self._guidance.mode == "joint":
            both = self._call("joint")(x, timestep)
            negative, prompt = both[: len(x)], both[len(x) :]
        else:
            negative = self._call("negative")(x, timestep)
            prompt = self._call("prompt")(x, timestep)
        difference: Array = np.subtract(prompt, negative, dtype=np.float32)
        difference *= np.float32(self._guidance.scale)
        difference += negative
        return difference

    def _call(self, kind: str) -> _Call:
        if kind not in self._calls:
            self._calls[kind] = self._bind(kind)
        return self._calls[kind]

    def _bind(self, kind: str) -> _Call:
        halves = {"prompt": (self._prompt,), "negative": (self._negative,), "joint": (self._negative, self._prompt)}
        embeddings = np.concatenate([half for half in halves[kind] if half is not None])
        specs = {tensor.name: tensor for tensor in self._unet.inputs}
        missing = {"sample", "timestep", "encoder_hidden_states"} - set(specs)
        if missing:
            raise EngineError(f"unet: the model has no input {', '.join(sorted(missing))}: it is of another family")
        rows = len(embeddings)
        # ours takes one timestep a row; exports of other tools take a scalar, or one for all rows
        timestep_shape = (
            (rows,) if specs["timestep"].shape == specs["sample"].shape[:1] else (1,) * len(specs["timestep"].shape)
        )
        sample = np.zeros((rows, *self._shape[1:]), specs["sample"].dtype)
        timestep = np.zeros(timestep_shape, specs["timestep"].dtype)
        feeds: Mapping[str, Array] = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": np.ascontiguousarray(embeddings, specs["encoder_hidden_states"].dtype),
        }
        return _Call(sample, timestep, self._unet.bind(feeds), self._unet.outputs[0].name)


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
