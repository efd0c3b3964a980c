"""The denoising loop with its latents on the device: the `step` graph runs between the calls of the U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engines import Array, Engine, Placed
from .loop import Callback, Row, check_finite, stop_if_asked
from .step import State


@dataclass(slots=True)
class _Phase:
    """Steps in which the same rows run and the same of them are guided, so that every shape stays."""

    rows: tuple[int, ...]
    guided: tuple[bool, ...]
    steps: int


def phases(rows: Sequence[Row]) -> list[_Phase]:
    """The run of `rows` cut where one finishes or where the guidance of one is switched."""
    result: list[_Phase] = []
    for k in range(max(row.table.steps for row in rows)):
        here = tuple(i for i, row in enumerate(rows) if k < row.table.steps)
        guided = tuple(rows[i].guidance.at(k, rows[i].table.steps) for i in here)
        if result and (result[-1].rows, result[-1].guided) == (here, guided):
            result[-1].steps += 1
        else:
            result.append(_Phase(here, guided, 1))
    return result


def can_link(unet: Engine, rows: Sequence[Row]) -> bool:
    """Whether the `step` graph can feed this U-Net with these rows.

    It can with joint guidance, float32 latents, one float32 timestep a row, and nothing to be kept or seen of an image.
    """
    if any(row.kept is not None or row.channels is not None for row in rows):
        return False
    if any(row.guidance.active and row.guidance.mode == "split" for row in rows):
        return False
    specs = {tensor.name: tensor for tensor in (*unet.inputs, *unet.outputs[:1])}
    if not {"sample", "timestep", "encoder_hidden_states"} <= set(specs):
        return False
    a_row = specs["timestep"].shape == specs["sample"].shape[:1]
    return a_row and {specs[name].dtype for name in ("sample", "timestep", unet.outputs[0].name)} == {"float32"}


def denoise_on_device(unet: Engine, step: Engine, rows: Sequence[Row], callback: Callback | None = None) -> Array:
    """As `loop.denoise`, with two engines linked on one device; see `can_link`.

    Within a phase only drawn noise goes to the device, and the latents come back only for a callback or a change of
    rows. Guidance is joint: both halves are rows of one call.
    """
    latents = np.stack([row.latents for row in rows])
    state = State([row.table for row in rows], latents)
    total = max(row.table.steps for row in rows)
    active = tuple(range(len(rows)))
    done = 0
    for phase in phases(rows):
        if phase.rows != active:
            state.keep([active.index(row) for row in phase.rows])
            active = phase.rows
        linked = _LinkedStep(unet, step, [rows[i] for i in active], phase.guided, state)
        for _ in range(phase.steps):
            linked.advance()
            done += 1
            if callback is not None:
                latents[list(active)] = linked.registers()[:, 0]
                stop_if_asked(callback(done, total, latents.copy()), done, total)
        state.jump(linked.registers(), phase.steps)
        latents[list(active)] = state.x
    check_finite(latents)
    return latents


class _LinkedStep:
    """The tensors of one phase on the device, and both engines bound to them.

    Registers and positions lie twice, and the step reads one and writes the other, turn by turn.
    """

    def __init__(self, unet: Engine, step: Engine, rows: Sequence[Row], guided: tuple[bool, ...], state: State) -> None:
        on = [i for i, is_guided in enumerate(guided) if is_guided]
        source = np.array([*on, *range(len(rows))])
        told = [rows[i].negative or {} for i in on] + [row.prompt for row in rows]
        prompt_row = np.arange(len(rows)) + len(on)
        negative_row = prompt_row.copy()
        negative_row[on] = np.arange(len(on))
        scales = [row.guidance.scale or 0.0 for row in rows]
        rescales = [row.guidance.rescale * is_guided for row, is_guided in zip(rows, guided, strict=True)]
        place = step.place
        sample = state.model_input()[source]
        shared = {
            "model_output": place(np.zeros_like(sample)),
            "noise": place(np.zeros_like(state.x)),
            "prompt_row": place(prompt_row),
            "negative_row": place(negative_row),
            "source": place(source),
            "guidance": place(np.array(scales, np.float32)),
            "rescale": place(np.array(rescales, np.float32)),
            "sample": place(sample),
            "timestep": place(state.timesteps[source].astype(np.float32)),
            **{name: place(array) for name, array in state.columns().items()},
        }
        self._registers = [place(state.registers), place(np.zeros_like(state.registers))]
        self._positions = [place(np.array(state.positions)), place(np.zeros(len(rows), np.int64))]
        self._unet = unet.link(
            {
                "sample": shared["sample"],
                "timestep": shared["timestep"],
                **{name: place(np.stack([each[name] for each in told])) for name in told[0]},
                unet.outputs[0].name: shared["model_output"],
            }
        )
        self._steps = [
            step.link(
                {
                    **shared,
                    "registers": self._registers[turn],
                    "next_registers": self._registers[1 - turn],
                    "position": self._positions[turn],
                    "next_position": self._positions[1 - turn],
                }
            )
            for turn in (0, 1)
        ]
        self._noise: Placed = shared["noise"]
        self._drawn = np.zeros_like(state.x)
        self._rows, self._start, self._done = list(rows), state.positions, 0

    def advance(self) -> None:
        """One step of every row."""
        draws = [row.table.draws[k + self._done] for row, k in zip(self._rows, self._start, strict=True)]
        for i in np.flatnonzero(draws):
            self._drawn[i] = self._rows[i].generator.randn(1, *self._drawn.shape[1:])[0]
        if any(draws):
            self._noise.update_inplace(self._drawn)
        self._unet()
        self._steps[self._done % 2]()
        self._done += 1

    def registers(self) -> Array:
        """All registers now, (N, K, C, H, W)."""
        return self._registers[self._done % 2].numpy()
