"""The loop on the host: scale, call the denoiser, guide, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError
from ...engines import Engine
from ...engines.fusion.lora import SETS
from .guidance import combine, skip_guidance
from .sample import Ports, Prediction, Row, Sample
from .step import State


class HostStepper:
    """Steps the rows of a batch on the host. It binds the denoiser's buffers once for each set of rows.

    With a `pool` of w threads the rows of a call are shared among w + 1 calls that run at once, which is faster than
    sharing each operator where the operators are small; the engine should then have one thread of its own.
    """

    def __init__(
        self, denoiser: Engine, ports: Ports | None = None, pool: ThreadPoolExecutor | None = None, workers: int = 0
    ) -> None:
        """workers: threads of the pool."""
        self._denoiser, self._ports = denoiser, ports or Ports()
        self._pool, self._at_once = pool, workers + 1
        self._rows: list[Row] = []
        self._calls: dict[tuple[tuple[int, ...], ...], list[_Call]] = {}

    def check(self, sample: Sample) -> None:
        """Any sample runs on the host."""

    def advance(self, rows: list[Row], steps: int) -> None:
        """Make `steps` steps of every row. Raises `EngineError` when the denoiser fails."""
        if self._rows != rows:
            self._rows, self._calls = list(rows), {}
        for _ in range(steps):
            calling = [row for row in rows if row.state.calls()]
            outputs = dict(zip((row.handle for row in calling), self.predict(calling), strict=True)) if calling else {}
            for row in rows:
                row.advance(outputs.get(row.handle))

    def predict(self, rows: Sequence[Row]) -> Array:
        """The guided model output for the next step of each row, float32 (n, C, …)."""
        skipping = [i for i, row in enumerate(rows) if row.skips()]
        skipped = self._call((), (), [rows[i] for i in skipping]).copy() if skipping else None
        on = [i for i, row in enumerate(rows) if row.guided()]
        guided = [rows[i] for i in on]
        if any(row.sample.guidance.split for row in guided):
            negative, prompt = self._call(guided, ()).copy(), self._call((), rows)
        else:
            both = self._call(guided, rows)
            negative, prompt = both[: len(on)], both[len(on) :]
        guidances = [row.sample.guidance for row in guided]
        if len(on) == len(rows):
            outputs = combine(prompt, negative, guidances)
        else:
            outputs = np.array(prompt, np.float32)
            if on:
                outputs[on] = combine(prompt[on], negative, guidances)
        if skipped is not None:
            scales = [each.scale for row in rows if row.skips() and (each := row.sample.skipping) is not None]
            outputs[skipping] += skip_guidance(prompt[skipping], skipped, scales)
        return outputs

    def synchronize(self) -> None:
        """The rows hold their latents already."""

    def close(self) -> None:
        """Forget the rows and their buffers."""
        self._rows, self._calls = [], {}

    def _call(self, negative: Sequence[Row], prompt: Sequence[Row], skipped: Sequence[Row] = ()) -> Array:
        """Rows with their negative prompt, with their prompt, and with this and without some layers, one after another.

        The next call may overwrite the outputs.
        """
        named: dict[Prediction, Sequence[Row]] = {"negative": negative, "prompt": prompt, "skipped": skipped}
        key = tuple(tuple(row.handle for row in part) for part in named.values())
        if key not in self._calls:
            rows = [(row, prediction) for prediction, part in named.items() for row in part]
            parts = np.array_split(np.arange(len(rows)), min(self._at_once, len(rows)))
            twice = len(parts) == 1 and not skipped and key[0] == key[1]
            self._calls[key] = [_Call(self._denoiser, self._ports, [rows[i] for i in part], twice) for part in parts]
        first, *others = self._calls[key]
        if not others or self._pool is None:
            return first()
        waiting = [self._pool.submit(call) for call in others]
        return np.concatenate([first(), *(future.result() for future in waiting)])


class _Call:
    """One call of the denoiser: its bound buffers, and the row of the batch that each of its rows comes from.

    Ours takes one timestep a row; exports of other tools take a scalar, or one for all rows.
    """

    def __init__(self, denoiser: Engine, ports: Ports, rows: Sequence[tuple[Row, Prediction]], twice: bool) -> None:
        """rows: each, and for which prediction.

        twice: whether the rows of the batch are those of the first half, then the same again.

        Raises `EngineError` when the inputs of the denoiser are not what the rows hold.
        """
        self._component, self._ports = denoiser.component, ports
        self._rows = [row for row, _ in rows]
        first, texts = self._rows[0].sample, [row.inputs(prediction) for row, prediction in rows]
        specs = {tensor.name: tensor for tensor in denoiser.inputs}
        wrong = sorted(set(specs) ^ {ports.sample, ports.timestep, *texts[0]})
        if wrong:
            raise EngineError(
                f"{self._component}: the model and the pipeline do not agree on {', '.join(wrong)}: compile it again"
            )
        self._channels = len(first.latents)
        count = self._channels + (0 if first.channels is None else len(first.channels))
        wanted = specs[ports.sample].shape[1]
        if isinstance(wanted, int) and wanted != count:
            raise EngineError(
                f"{self._component}: the model takes {wanted} channels, the latents have {self._channels}: "
                "compile it again"
            )
        self._sample = np.zeros((len(rows), count, *first.latents.shape[1:]), specs[ports.sample].dtype)
        if first.channels is not None:
            self._sample[:, self._channels :] = [row.sample.channels for row in self._rows]
        self._filled = [
            (row.state, buffer[: self._channels]) for row, buffer in zip(self._rows, self._sample, strict=True)
        ]
        timestep = specs[ports.timestep]
        self._each = timestep.shape == specs[ports.sample].shape[:1]
        self._timestep = np.zeros(len(rows) if self._each else (1,) * len(timestep.shape), timestep.dtype)
        feeds = {name: rows_of(texts, specs[name]) for name in texts[0]}
        self._stepped = [
            (name, feeds[name], [(row.state, row.changing(prediction)[name]) for row, prediction in rows])
            for name in rows[0][0].changing(rows[0][1])
        ]
        changing = {ports.sample: self._sample, ports.timestep: self._timestep}
        self._binding = denoiser.bind_host({**changing, **feeds}, tuple(changing) if twice else ())
        self._output = denoiser.outputs[0].name

    def __call__(self) -> Array:
        for state, buffer in self._filled:
            state.model_input(out=buffer)
        timesteps = [state.timestep for state, _ in self._filled]
        if not self._each and len(set(timesteps)) > 1:
            raise EngineError(
                f"{self._component}: this model takes one timestep for all rows, so all must be at the same step: "
                "give them one scheduler and step count, or compile the checkpoint with diffoundry"
            )
        self._timestep[...] = timesteps if self._each else timesteps[0]
        written = [name for name, buffer, values in self._stepped if _write(buffer, values)]
        return self._binding(self._ports.sample, self._ports.timestep, *written)[self._output]


def rows_of(texts: Sequence[Mapping[str, Array]], spec: Tensor) -> Array:
    """The input `spec` of the denoiser for rows that hold `texts`; one set of factors that is that of all, once."""
    first = texts[0][spec.name]
    if spec.shape[:1] == (SETS,) and all(text[spec.name] is first for text in texts):
        return np.asarray(first, spec.dtype)[None]
    return np.array([text[spec.name] for text in texts], spec.dtype)


def _write(buffer: Array, values: Sequence[tuple[State, Array]]) -> bool:
    """Give each row of `buffer` its value of the step. Returns whether one was another before."""
    changed = False
    for own, (state, of_steps) in zip(buffer, values, strict=True):
        if not np.array_equal(own, of_steps[state.position]):
            own[...], changed = of_steps[state.position], True
    return changed
