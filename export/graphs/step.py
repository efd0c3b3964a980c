"""The step of the denoising loop as an ONNX graph, for engines whose latents stay on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...runtime.loop.step import STEP_INPUTS, STEP_NAME, STEP_OUTPUTS, State
from .spec import OPSET
from .validate import Case

_BODY = """
    # guidance; a row that is not guided has its prompt row as negative row, and so a difference of zero
    one = Constant<value_ints = [1]>()
    pixels = Constant<value_ints = [1, 2, 3]>()
    prompt = Gather<axis = 0>(model_output, prompt_row)
    negative = Gather<axis = 0>(model_output, negative_row)
    difference = Sub(prompt, negative)
    scale = Unsqueeze(guidance, pixels)
    scaled = Mul(difference, scale)
    plain = Add(scaled, negative)

    # guidance rescale: the part phi of the output gets the deviation of the prompt's half
    prompt_mean = ReduceMean(prompt, pixels)
    prompt_centred = Sub(prompt, prompt_mean)
    prompt_square = ReduceSumSquare(prompt_centred, pixels)
    plain_mean = ReduceMean(plain, pixels)
    plain_centred = Sub(plain, plain_mean)
    plain_square = ReduceSumSquare(plain_centred, pixels)
    quotient = Div(prompt_square, plain_square)
    ratio = Sqrt(quotient)
    phi = Unsqueeze(rescale, pixels)
    unit = Constant<value_float = 1.0>()
    zero = Constant<value_float = 0.0>()
    rest = Sub(unit, phi)
    part = Mul(phi, ratio)
    mixed = Add(part, rest)
    on = Greater(phi, zero)
    factor = Where(on, mixed, unit)
    guided = Mul(plain, factor)

    # row `position` of each row's own table
    last = Constant<value_ints = [-1]>()
    index = Unsqueeze(position, last)
    row = GatherND<batch_dims = 1>(weights, index)
    x0_row = GatherND<batch_dims = 1>(x0, index)
    first = Constant<value_int = 0>()
    second = Constant<value_int = 1>()
    p_row = Gather<axis = 1>(x0_row, first)
    q_row = Gather<axis = 1>(x0_row, second)
    x = Gather<axis = 1>(registers, first)
    p = Unsqueeze(p_row, pixels)
    q = Unsqueeze(q_row, pixels)
    from_x = Mul(p, x)
    from_m = Mul(q, guided)
    predicted = Add(from_x, from_m)
    high = Unsqueeze(clip, pixels)
    low = Neg(high)
    above = Max(predicted, low)
    clipped = Min(above, high)

    # R' = weights * [R, m, noise, x0], as products and a sum: matrix products are rounded to TF32 on some devices
    m_term = Unsqueeze(guided, one)
    noise_term = Unsqueeze(noise, one)
    x0_term = Unsqueeze(clipped, one)
    terms = Concat<axis = 1>(registers, m_term, noise_term, x0_term)
    terms_of_each = Unsqueeze(terms, one)
    latent_axes = Constant<value_ints = [3, 4, 5]>()
    row_of_each = Unsqueeze(row, latent_axes)
    products = Mul(row_of_each, terms_of_each)
    term_axis = Constant<value_ints = [2]>()
    next_registers = ReduceSum<keepdims = 0>(products, term_axis)

    # the next model input, one row for each row of the next call
    increment = Constant<value_int = 1>()
    next_position = Add(position, increment)
    next_index = Unsqueeze(next_position, last)
    input_row = GatherND<batch_dims = 1>(input_scale, next_index)
    input_of_each = Unsqueeze(input_row, pixels)
    next_x = Gather<axis = 1>(next_registers, first)
    model_input = Mul(next_x, input_of_each)
    sample = Gather<axis = 0>(model_input, source)
    told = GatherND<batch_dims = 1>(timesteps, next_index)
    timestep = Gather<axis = 0>(told, source)
"""


def write_step(path: Path) -> None:
    """Write the step graph to `path`: the numbers of `runtime.loop.step.State`, for any batch, size and sampler."""
    import onnx
    from onnx import parser

    def declared(tensors: tuple[Tensor, ...]) -> str:
        kinds = {"float32": "float", "int64": "int64"}
        return ", ".join(f"{kinds[t.dtype]}[{', '.join(map(str, t.shape))}] {t.name}" for t in tensors)

    lines = (line for line in _BODY.splitlines() if not line.strip().startswith("#"))
    header = f'<ir_version: 10, opset_import: ["" : {OPSET}], producer_name: "diffoundry">'
    text = f"{header} {STEP_NAME} ({declared(STEP_INPUTS)}) => ({declared(STEP_OUTPUTS)}) {{ {chr(10).join(lines)} }}"
    model = parser.parse_model(text)
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
