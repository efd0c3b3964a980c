"""The denoising loop with its latents on the device: the `step` graph runs between the calls of the U-Net."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..common.arrays import Array
from ..common.errors import StoppedError
from ..engines import Engine, Linked, Placed
from .loop import Callback, Row, check_finite, stop_if_asked
from .step import State

_MOST_PHASES = 8
"""Phases kept ready: three of a run whose guidance is on in its middle, for two kinds of runs, and some."""
_MOST_NOISE_BYTES = 128 << 20
"""Noise of all steps of a phase that is sent at once: 50 steps of 4 latents for 2048x2048 pixels take 50 MB."""
_RUNNING = ("registers", "position", "sample", "timestep")
"""What a run overwrites on the device."""


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


class DeviceLoop:
    """As `loop.denoise`, with two engines linked on one device; see `can_link`.

    The tensors and the launches of a phase are kept for the next run of the same shapes, which fills them anew: without
    a callback a phase is one recorded piece, with one each step is. Within a phase only drawn noise goes to the device,
    and the latents come back only for a callback or at its end. Guidance is joint: both halves are rows of one call.
    Several threads may run; each has a phase for itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[Hashable, _LinkedPhase] = OrderedDict()
        self._cleared = 0

    def clear(self) -> None:
        """Drop what is kept, with the engines that it is linked to."""
        with self._lock:
            self._idle.clear()
            self._cleared += 1

    def __call__(self, unet: Engine, step: Engine, rows: Sequence[Row], callback: Callback | None = None) -> Array:
        """Run each row to the end of its table and return the final latents; arguments and errors of `loop.denoise`."""
        latents = np.stack([row.latents for row in rows])
        state = State([row.table for row in rows], latents)
        total = max(row.table.steps for row in rows)
        active = tuple(range(len(rows)))
        done = 0
        for phase in phases(rows):
            if phase.rows != active:
                state.keep([active.index(row) for row in phase.rows])
                active = phase.rows
            here = [rows[i] for i in active]
            noise = _Noise(here, state.positions, phase.steps)
            with self._linked(unet, step, _contents(unet, here, phase.guided, state), noise) as linked:
                if callback is None and noise.nbytes <= _MOST_NOISE_BYTES:
                    linked.run(noise)
                    done += phase.steps
                else:
                    for k in range(phase.steps):
                        linked.advance(k, noise)
                        done += 1
                        if callback is not None:
                            latents[list(active)] = linked.registers(k + 1)[:, 0]
                            stop_if_asked(callback(done, total, latents.copy()), done, total)
                state.jump(linked.registers(phase.steps), phase.steps)
            latents[list(active)] = state.x
        check_finite(latents)
        return latents

    @contextmanager
    def _linked(
        self, unet: Engine, step: Engine, contents: Mapping[str, Array], noise: _Noise
    ) -> Iterator[_LinkedPhase]:
        """A phase that holds `contents`, for this run alone. One in which an engine failed is not used again."""
        shapes = tuple(sorted((name, array.shape, array.dtype.str) for name, array in contents.items()))
        key = (id(unet), id(step), noise.drawn, shapes)  # a kept phase refers to its engines: their ids are theirs
        with self._lock:
            linked, cleared = self._idle.pop(key, None), self._cleared
        if linked is None:
            linked = _LinkedPhase(unet, step, contents, noise)
        else:
            linked.fill(contents)
        stopped: StoppedError | None = None
        try:
            yield linked
        except StoppedError as error:
            stopped = error
        with self._lock:
            if cleared == self._cleared:
                self._idle[key] = linked
                while len(self._idle) > _MOST_PHASES:
                    self._idle.popitem(last=False)
        if stopped is not None:
            raise stopped


class _Noise:
    """What the rows of a phase draw, each from its own generator, step after step. drawn: the steps in which any do."""

    def __init__(self, rows: Sequence[Row], start: Sequence[int], steps: int) -> None:
        self._rows = list(rows)
        self._draws = [
            [bool(row.table.draws[first + k]) for row, first in zip(rows, start, strict=True)] for k in range(steps)
        ]
        self.shape = (len(rows), *rows[0].latents.shape)
        self.drawn = tuple(any(draws) for draws in self._draws)

    @property
    def nbytes(self) -> int:
        """Of all steps together."""
        return sum(self.drawn) * int(np.prod(self.shape)) * np.dtype(np.float32).itemsize

    def at(self, k: int) -> Array:
        """Step k of the phase, float32 (N, C, H, W), zeros for a row that draws none. Ask for each once, in order."""
        noise = np.zeros(self.shape, np.float32)
        for i in np.flatnonzero(self._draws[k]):
            noise[i] = self._rows[i].generator.randn(1, *self.shape[1:])[0]
        return noise


def _contents(unet: Engine, rows: Sequence[Row], guided: tuple[bool, ...], state: State) -> dict[str, Array]:
    """What the tensors of a phase hold when it begins, by the names of the inputs of U-Net and `step`.

    The rows of a call are the negative ones, the prompts, and as many more of the last as the U-Net needs.
    """
    specs = {tensor.name: tensor.dtype for tensor in unet.inputs}
    on = [i for i, is_guided in enumerate(guided) if is_guided]
    source = [*on, *range(len(rows))]
    told = [rows[i].negative or {} for i in on] + [row.prompt for row in rows]
    shapes = {name: (len(source), *array.shape) for name, array in told[-1].items()}
    sample = (len(source), *state.x.shape[1:])
    calls = unet.rows({"sample": sample, "timestep": (len(source),), **shapes})
    source += source[-1:] * (calls - len(source))
    told += told[-1:] * (calls - len(told))
    prompt_row = np.arange(len(on), len(on) + len(rows), dtype=np.int64)
    negative_row = prompt_row.copy()
    negative_row[on] = np.arange(len(on))
    scales = [row.guidance.scale or 0.0 for row in rows]
    rescales = [row.guidance.rescale * is_guided for row, is_guided in zip(rows, guided, strict=True)]
    return {
        "registers": state.registers.copy(),
        "position": np.array(state.positions, np.int64),
        "prompt_row": prompt_row,
        "negative_row": negative_row,
        "source": np.array(source, np.int64),
        "guidance": np.array(scales, np.float32),
        "rescale": np.array(rescales, np.float32),
        "sample": state.model_input()[source],
        "timestep": state.timesteps[source].astype(np.float32),
        **state.columns(),
        **{name: np.stack([each[name] for each in told]).astype(specs[name], copy=False) for name in told[-1]},
    }


class _LinkedPhase:
    """The tensors of a phase on the device, both engines bound to them, and what was recorded of their calls.

    Registers and positions lie twice, and the step reads one and writes the other, turn by turn.
    """

    def __init__(self, unet: Engine, step: Engine, contents: Mapping[str, Array], noise: _Noise) -> None:
        place = step.place
        self._step, self._drawn = step, noise.drawn
        self._held = dict(contents)
        self._tensors = {name: place(array) for name, array in contents.items()}
        self._shared = {
            **self._tensors,
            "model_output": place(np.zeros_like(contents["sample"])),
        }
        self._noise: Placed = place(np.zeros(noise.shape, np.float32))
        self._slots: dict[int, Placed] = {}
        self._pairs = {
            name: (self._tensors[name], place(np.zeros_like(contents[name]))) for name in ("registers", "position")
        }
        own = {tensor.name for tensor in unet.inputs}
        self._unet = unet.link(
            {
                **{name: tensor for name, tensor in self._tensors.items() if name in own},
                unet.outputs[0].name: self._shared["model_output"],
            }
        )
        self._steps = [self._link(turn, self._noise) for turn in (0, 1)]
        self._turns = [self._record([step]) for step in self._steps]
        self._whole: Callable[[], None] | None = None

    def fill(self, contents: Mapping[str, Array]) -> None:
        """Begin a run with `contents`; only what is not on the device already is sent."""
        changed = [
            name for name, array in contents.items() if name in _RUNNING or not np.array_equal(array, self._held[name])
        ]
        for name in changed:
            self._tensors[name].update_inplace(contents[name])
        self._held = dict(contents)
        self._unet.prepare(*changed)

    def run(self, noise: _Noise) -> None:
        """All steps of the phase, with the noise of all of them sent before."""
        for k in np.flatnonzero(self._drawn).tolist():
            if k in self._slots:
                self._slots[k].update_inplace(noise.at(k))
            else:
                self._slots[k] = self._step.place(noise.at(k))
        if self._whole is None:
            steps = range(len(self._drawn))
            self._whole = self._record([self._link(k % 2, self._slots.get(k, self._noise)) for k in steps])
        self._whole()

    def advance(self, k: int, noise: _Noise) -> None:
        """Step k of the phase alone."""
        if self._drawn[k]:
            self._noise.update_inplace(noise.at(k))
        self._turns[k % 2]()

    def registers(self, steps: int) -> Array:
        """All registers after `steps` steps of the phase, (N, K, C, H, W)."""
        return self._pairs["registers"][steps % 2].numpy()

    def _link(self, turn: int, noise: Placed) -> Linked:
        pairs = self._pairs.items()
        return self._step.link(
            {
                **self._shared,
                **{name: pair[turn] for name, pair in pairs},
                **{f"next_{name}": pair[1 - turn] for name, pair in pairs},
                "noise": noise,
            }
        )

    def _record(self, steps: Sequence[Linked]) -> Callable[[], None]:
        """A call of the U-Net before each of `steps`."""
        unet = self._unet

        def launches() -> None:
            for step in steps:
                unet()
                step()

        return self._step.record(launches)
