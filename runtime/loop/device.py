"""The loop on a device: the latents stay there, and the `step` graph runs between the calls of the denoiser."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from ...common.arrays import Array
from ...common.errors import RequestError
from ...engines import DeviceArray, DeviceBinding, Engine
from .host import rows_of
from .sample import Ports, Row, Sample
from .step import step_inputs

_MOST_PHASES = 8
"""Phases kept ready: three of a run whose guidance is on in its middle, for two kinds of runs, and some."""
_MOST_CAPTURED = 8
"""Sequences of steps that a phase keeps captured: two of single steps, and those of some whole runs."""
_MOST_NOISE_BYTES = 128 << 20
"""Noise of all steps of a phase that is sent at once: 50 steps of 4 latents for 2048x2048 pixels take 50 MB."""
_RUNNING = ("registers", "position", "sample", "timestep")
"""What a run overwrites on the device."""
HOST_ONLY = (
    "the loop on the device takes joint guidance and float32 latents, a few controls at most, and neither inpaints nor "
    "skips layers: use the loop 'host'"
)


class DeviceStepper:
    """Steps the rows of a batch with two engines bound on one device.

    What runs, with the same rows and the same of them guided, is a phase: its tensors, and the launches that were
    captured of its steps. It comes from `phases`, filled anew. Within a phase only drawn noise goes to the device, and
    the latents come back when they are asked for or the rows change. Guidance is joint: both halves are rows of one
    call.
    """

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._phase: _Phase | None = None
        self._rows: list[Row] = []
        self._told: list[Hashable] = []

    def check(self, sample: Sample) -> None:
        """Raise `RequestError` for a sample that the device cannot step."""
        if not self._phases.fits(sample):
            raise RequestError(HOST_ONLY)

    def advance(self, rows: list[Row], steps: int) -> None:
        """Make `steps` steps of every row, in which the same of them are guided. Raises `EngineError`."""
        told = [row.phase() for row in rows]
        if self._phase is None or (self._rows, self._told) != (rows, told):
            self.close()
            self._phase, self._rows, self._told = self._phases.take(rows), list(rows), told
        phase, self._phase = self._phase, None  # one in which an engine failed is not used again
        drawn = [any(row.state.draws(k) for row in rows) for k in range(steps)]
        calls = [any(row.state.calls(k) for row in rows) for k in range(steps)]
        noise = (_noise(rows, k) if draws else None for k, draws in enumerate(drawn))
        if sum(drawn) * phase.noise_bytes <= _MOST_NOISE_BYTES:
            phase.run(list(noise), calls)
        else:
            for each, calls_model in zip(noise, calls, strict=True):
                phase.run([each], [calls_model])
        for row in rows:
            row.state.position += steps
        self._phase = phase

    def synchronize(self) -> None:
        """Bring the registers of the rows back."""
        if self._phase is not None and self._phase.ahead:
            for row, registers in zip(self._rows, self._phase.registers(), strict=True):
                row.state.registers[...] = registers[: row.state.table.registers]

    def close(self) -> None:
        """Bring the registers back and give the phase away."""
        self.synchronize()
        if self._phase is not None:
            self._phases.give_back(self._phase)
        self._phase, self._rows = None, []


def _noise(rows: Sequence[Row], ahead: int) -> Array:
    """What the rows draw in a step, float32 (N, C, …), zeros for a row that draws none. Ask once for each, in order."""
    none = np.zeros(rows[0].sample.latents.shape, np.float32)
    return np.stack([row.draw() if row.state.draws(ahead) else none for row in rows])


class Phases:
    """The phases of two engines: kept for the next run of the same shapes, for one thread at a time each."""

    def __init__(self, denoiser: Engine, step: Engine, ports: Ports | None = None) -> None:
        """step: the `step` graph, on the device of the denoiser."""
        self._denoiser, self._step, self._ports = denoiser, step, ports or Ports()
        self._lock = threading.Lock()
        self._idle: OrderedDict[Hashable, _Phase] = OrderedDict()

    def fits(self, sample: Sample) -> bool:
        """Whether the `step` graph can feed the denoiser with `sample`.

        It can with joint guidance, float32 latents, one float32 timestep a row, and no image to be kept or seen.
        """
        inputs = {tensor.name: tensor for tensor in self._denoiser.inputs}
        ports, output = self._ports, self._denoiser.outputs[0]
        named = {ports.sample, ports.timestep, *sample.prompt, *sample.prompt_steps}
        is_plain = (
            self._denoiser.binds_device
            and not sample.guidance.split
            and sample.kept is None
            and sample.channels is None
            and sample.skipping is None
        )
        if not is_plain or set(inputs) != named:
            return False
        latents, timestep = inputs[ports.sample], inputs[ports.timestep]
        return timestep.shape == latents.shape[:1] and {latents.dtype, timestep.dtype, output.dtype} == {"float32"}

    def take(self, rows: Sequence[Row]) -> _Phase:
        """A phase that stands before the next step of `rows`, for the caller alone."""
        contents, texts = _contents(self._denoiser, self._ports, rows)
        with self._lock:
            phase = self._idle.pop(_key(contents, texts), None)
        if phase is None:
            return _Phase(self._denoiser, self._step, self._ports, contents, texts)
        phase.refill(contents, texts)
        return phase

    def give_back(self, phase: _Phase) -> None:
        """Keep a phase that `take` gave."""
        with self._lock:
            self._idle[phase.key] = phase
            while len(self._idle) > _MOST_PHASES:
                self._idle.popitem(last=False)


def _key(*arrays: Mapping[str, Array]) -> Hashable:
    """What a phase is bound to: names, shapes and types."""
    return tuple((name, array.shape, array.dtype.str) for part in arrays for name, array in part.items())


def _contents(denoiser: Engine, ports: Ports, rows: Sequence[Row]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a phase holds when it begins: for the `step` graph, and in the denoiser's inputs that do not change.

    The rows of a call are the negative ones, the prompts, and as many more of the last as the denoiser needs.
    """
    on = [i for i, row in enumerate(rows) if row.guided()]
    source = [*on, *range(len(rows))]
    texts = [rows[i].inputs("negative") for i in on] + [row.inputs("prompt") for row in rows]
    shapes = {name: (len(source), *array.shape) for name, array in texts[-1].items()}
    shapes |= {ports.sample: (len(source), *rows[0].sample.latents.shape), ports.timestep: (len(source),)}
    more = denoiser.padded_rows(shapes) - len(source)
    source, texts = source + source[-1:] * more, texts + texts[-1:] * more
    prompt_row = np.arange(len(on), len(on) + len(rows), dtype=np.int64)
    negative_row = prompt_row.copy()
    negative_row[on] = np.arange(len(on))
    specs = {tensor.name: tensor for tensor in denoiser.inputs}
    contents = {
        **step_inputs([row.state for row in rows]),
        "prompt_row": prompt_row,
        "negative_row": negative_row,
        "source": np.array(source, np.int64),
        "guidance": np.array([row.sample.guidance.scale or 0.0 for row in rows], np.float32),
        "rescale": np.array([row.sample.guidance.rescale * row.guided() for row in rows], np.float32),
        "sample": np.stack([rows[i].state.model_input() for i in source]),
        "timestep": np.array([rows[i].state.timestep for i in source], np.float32),
    }
    return contents, {name: rows_of(texts, specs[name]) for name in texts[-1]}


class _Phase:
    """The tensors of a phase on the device, both engines bound to them, and what was captured of their calls.

    Registers and positions lie there twice, and the step reads one and writes the other, turn by turn.
    ahead: whether steps were made since the registers were read.
    """

    def __init__(
        self,
        denoiser: Engine,
        step: Engine,
        ports: Ports,
        contents: Mapping[str, Array],
        texts: Mapping[str, Array],
    ) -> None:
        to_device = step.to_device
        self.key, self.ahead = _key(contents, texts), False
        self._step, self._ports, self._turn = step, ports, 0
        self._own, self._texts = _Mirror(contents, step), _Mirror(texts, step)
        own = self._own.tensors
        self._shared = {**own, "model_output": to_device(np.zeros_like(contents["sample"]))}
        self._pairs = {n: (own[n], to_device(np.zeros_like(contents[n]))) for n in ("registers", "position")}
        noise = np.zeros_like(contents["registers"][:, 0])
        self.noise_bytes = noise.nbytes
        self._noise = {0: to_device(noise)}
        self._denoiser = denoiser.bind_device(
            {
                **self._texts.tensors,
                ports.sample: own["sample"],
                ports.timestep: own["timestep"],
                denoiser.outputs[0].name: self._shared["model_output"],
            }
        )
        self._steps: dict[tuple[int, int], DeviceBinding] = {}
        self._captured: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    def refill(self, contents: Mapping[str, Array], texts: Mapping[str, Array]) -> None:
        """Begin again with other contents; only what is not on the device already is sent."""
        self._own.update(contents, _RUNNING)
        self._denoiser.refresh(self._ports.sample, self._ports.timestep, *self._texts.update(texts))
        self._turn, self.ahead = 0, False

    def run(self, noise: Sequence[Array | None], calls: Sequence[bool]) -> None:
        """A step for each of `noise`, which is what the rows draw, None where none does.

        calls: whether the denoiser runs before the step.
        """
        slots = tuple(0 if drawn is None else k for k, drawn in enumerate(noise))
        for slot, drawn in zip(slots, noise, strict=True):
            if drawn is not None and slot in self._noise:
                self._noise[slot].update_inplace(drawn)
            elif drawn is not None:
                self._noise[slot] = self._step.to_device(drawn)
        key = (self._turn, slots, tuple(calls))
        launch = self._captured.pop(key, None) or self._capture(slots, calls)
        self._captured[key] = launch
        while len(self._captured) > _MOST_CAPTURED:
            self._captured.popitem(last=False)
        launch()
        self._turn = (self._turn + len(noise)) % 2
        self.ahead = True

    def registers(self) -> Array:
        """All registers of each row as they are now, (N, K, C, …)."""
        self.ahead = False
        return self._pairs["registers"][self._turn].numpy()

    def _capture(self, slots: Sequence[int], calls: Sequence[bool]) -> Callable[[], None]:
        denoiser, steps = self._denoiser, [self._bind((self._turn + k) % 2, slot) for k, slot in enumerate(slots)]

        def launches() -> None:
            for step, calls_model in zip(steps, calls, strict=True):
                if calls_model:
                    denoiser()
                step()

        shape = "x".join(map(str, self._shared["model_output"].shape))
        return self._step.capture(launches, f"{len(steps)} steps of {shape}")

    def _bind(self, turn: int, slot: int) -> DeviceBinding:
        if (turn, slot) not in self._steps:
            pairs = self._pairs.items()
            self._steps[turn, slot] = self._step.bind_device(
                {
                    **self._shared,
                    **{name: pair[turn] for name, pair in pairs},
                    **{f"next_{name}": pair[1 - turn] for name, pair in pairs},
                    "noise": self._noise[slot],
                }
            )
        return self._steps[turn, slot]


class _Mirror:
    """Arrays of the host and their copies on the device, so that only what differs is sent."""

    def __init__(self, arrays: Mapping[str, Array], engine: Engine) -> None:
        self._held = dict(arrays)
        self.tensors: dict[str, DeviceArray] = {name: engine.to_device(array) for name, array in arrays.items()}

    def update(self, arrays: Mapping[str, Array], always: Sequence[str] = ()) -> list[str]:
        """Send what differs, and `always` what a run overwrites. Returns the names of what was sent."""
        sent = [n for n, array in arrays.items() if n in always or not np.array_equal(array, self._held[n])]
        for name in sent:
            self.tensors[name].update_inplace(arrays[name])
        self._held = dict(arrays)
        return sent
