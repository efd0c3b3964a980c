"""The step of the denoising loop as an ONNX graph, for engines whose latents stay on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...common.arrays import Array
from ...runtime.loop.step import STEP_INPUTS, STEP_OUTPUTS, State
from .validate import Case


def write_step(path: Path) -> None:
    """Write the step graph to `path`: the numbers of `runtime.loop.step.State`, for any batch, size and sampler."""
    import onnx
    from onnxscript import FLOAT, INT64, script
    from onnxscript import opset20 as op

    @script(default_opset=op)
    def step(  # type: ignore[no-untyped-def]
        model_output,
        registers,
        noise,
        position,
        prompt_row,
        negative_row,
        source,
        guidance,
        rescale,
        clip,
        weights,
        x0,
        input_scale,
        timesteps,
    ):
        zero, unit = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
        first, second = op.Constant(value_int=0), op.Constant(value_int=1)
        pixels = op.Constant(value_ints=[1, 2, 3])
        # guidance; a row that is not guided has its prompt row as negative row, and so a difference of zero
        prompt = op.Gather(model_output, prompt_row, axis=0)
        negative = op.Gather(model_output, negative_row, axis=0)
        plain = (prompt - negative) * op.Unsqueeze(guidance, pixels) + negative

        # guidance rescale: the part phi of the output gets the deviation of the prompt's half
        prompt_square = op.ReduceSumSquare(prompt - op.ReduceMean(prompt, pixels), pixels)
        plain_square = op.ReduceSumSquare(plain - op.ReduceMean(plain, pixels), pixels)
        phi = op.Unsqueeze(rescale, pixels)
        mixed = phi * op.Sqrt(prompt_square / plain_square) + (unit - phi)
        guided = plain * op.Where(phi > zero, mixed, unit)

        # row `position` of each row's own table
        index = op.Unsqueeze(position, [-1])
        p_and_q = op.Unsqueeze(op.GatherND(x0, index, batch_dims=1), [2, 3, 4])
        x = op.Gather(registers, first, axis=1)
        predicted = op.Gather(p_and_q, first, axis=1) * x + op.Gather(p_and_q, second, axis=1) * guided
        limit = op.Unsqueeze(clip, pixels)
        clipped = op.Min(op.Max(predicted, -limit), limit)

        # R' = weights * [R, m, noise, x0], as products and a sum: matrix products are rounded to TF32 on some devices
        m_term, noise_term, x0_term = op.Unsqueeze(guided, [1]), op.Unsqueeze(noise, [1]), op.Unsqueeze(clipped, [1])
        terms = op.Concat(registers, m_term, noise_term, x0_term, axis=1)
        row = op.Unsqueeze(op.GatherND(weights, index, batch_dims=1), [3, 4, 5])
        next_registers = op.ReduceSum(row * op.Unsqueeze(terms, [1]), [2], keepdims=0)

        # the next model input, one row for each row of the next call
        next_position = position + second
        next_index = op.Unsqueeze(next_position, [-1])
        scale = op.Unsqueeze(op.GatherND(input_scale, next_index, batch_dims=1), pixels)
        sample = op.Gather(op.Gather(next_registers, first, axis=1) * scale, source, axis=0)
        timestep = op.Gather(op.GatherND(timesteps, next_index, batch_dims=1), source, axis=0)
        return next_registers, sample, timestep, next_position

    kinds = {"float32": FLOAT, "int64": INT64}
    inputs, outputs = ([kinds[tensor.dtype][tensor.shape] for tensor in each] for each in (STEP_INPUTS, STEP_OUTPUTS))
    model = step.to_model_proto(input_types=inputs, output_types=outputs, ir_version=10, producer_name="diffoundry")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def step_cases() -> list[Case]:
    """Inputs of three shapes and what the host's step makes of them, guidance and model input included."""
    rng = np.random.default_rng(7)
    return [_case(rng, *sizes) for sizes in ((1, 1, 1, 4, 8), (3, 2, 5, 4, 16), (2, 4, 3, 16, 8))]


def _case(rng: np.random.Generator, batch: int, registers: int, steps: int, channels: int, side: int) -> Case:
    from ...runtime.loop.guidance import Guidance, combine
    from ...runtime.loop.step import step_inputs
    from ...runtime.schedulers import Table

    latents = (channels, side, side + 8)
    tables = [
        Table(
            timesteps=rng.uniform(0, 1000, steps),
            input_scale=rng.uniform(0.1, 1, steps),
            weights=rng.standard_normal((steps, registers, registers + 3)) * ([1.0] * (registers + 2) + [clips]),
            x0=rng.standard_normal((steps, 2)),
            draws=np.ones(steps, bool),
            alpha_sigma=np.ones((steps, 2)),
            clip=0.5 if clips else np.inf,
        )
        for clips in (i % 2 for i in range(batch))
    ]
    guidances = [Guidance(float(rng.uniform(1.5, 9)), rescale=0.7 * (i % 2)) for i in range(batch)]
    start, noise = (rng.standard_normal((batch, *latents)).astype(np.float32) for _ in range(2))
    output = rng.standard_normal((2 * batch, *latents)).astype(np.float32)
    states = [State(table, latents) for table, latents in zip(tables, start, strict=True)]
    feeds: dict[str, Array] = {
        "model_output": output,
        "noise": noise,
        "prompt_row": np.arange(batch, 2 * batch),
        "negative_row": np.arange(batch),
        "source": np.tile(np.arange(batch), 2),
        "guidance": np.array([guidance.scale for guidance in guidances], np.float32),
        "rescale": np.array([guidance.rescale for guidance in guidances], np.float32),
        **step_inputs(states),
    }
    guided = combine(output[batch:], output[:batch], guidances)
    for state, model_output, drawn in zip(states, guided, noise, strict=True):
        state.advance(model_output, drawn)
    more = steps > 1
    sample = np.stack([state.model_input() if more else state.x for state in states])
    timesteps = np.array([state.timestep if more else 0 for state in states], np.float32)
    expected = {
        "next_registers": np.stack([state.registers for state in states]),
        "sample": np.tile(sample, (2, 1, 1, 1)),
        "timestep": np.tile(timesteps, 2),
        "next_position": np.ones(batch, np.int64),
    }
    return feeds, expected
