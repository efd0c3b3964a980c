"""A batch that is stepped: rows come and go between steps, each with its own sampler, steps, guidance and seed."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping

import numpy as np

from ...common.arrays import Array
from ...common.errors import OverflowedError, RequestError
from .device import DeviceStepper
from .host import HostStepper
from .sample import Row, Sample


class Batch:
    """Rows that one denoiser steps together, on the host or on a device. It belongs to one thread at a time.

        handles = [batch.add(sample) for sample in samples]
        while batch:
            batch.step()
        latents = [batch.take(handle) for handle in handles]

    A row goes the way that it goes alone, whatever is added or dropped beside it. On the host, the loop's own
    arithmetic (guidance, step, noise, kept region) is that of the row alone bit for bit. The denoiser is an engine,
    which may round a row otherwise in calls of other sizes (ONNX Runtime and TensorRT promise nothing), and so is the
    `step` graph of a device; where they do not, the row is the same bit for bit there as well.
    An engine that fails ends the batch.
    """

    def __init__(self, stepper: HostStepper | DeviceStepper) -> None:
        self._stepper = stepper
        self._handles = itertools.count()
        self._running: list[Row] = []
        self._done: dict[int, Row] = {}

    def __len__(self) -> int:
        """The rows that have steps left."""
        return len(self._running)

    @property
    def on_host(self) -> bool:
        """Whether its rows are stepped on the host: a step that fails there leaves them as they were."""
        return isinstance(self._stepper, HostStepper)

    @property
    def done(self) -> tuple[int, ...]:
        """The handles of the rows that have made all their steps and were not taken yet."""
        return tuple(self._done)

    def add(self, sample: Sample) -> int:
        """Let `sample` run along from the next step on. Returns the handle of its row.

        Raises `RequestError` for a sample that cannot run beside the others, or not on this device.
        """
        return self.resume(Row(-1, sample))

    def drop(self, handle: int) -> None:
        """Forget a row, done or not. Raises `RequestError` when the batch has none of this handle."""
        row = self._row(handle)
        if self._done.pop(handle, None) is None:
            self._running.remove(row)

    def pause(self, handle: int) -> Row:
        """Take out a row that has steps left, as it stands. `resume` lets it go on, here or in another batch like this.

        Raises `RequestError` when the batch has none of this handle, or it is done.
        """
        row = self._row(handle)
        if handle in self._done:
            raise RequestError(f"row {handle} has made all its steps: take it")
        self._stepper.synchronize()
        self._running.remove(row)
        return row

    def resume(self, row: Row) -> int:
        """Let a row that was paused run along from the next step on. Returns its handle, which is a new one.

        Raises `RequestError` as `add` does.
        """
        self._check(row.sample)
        self._stepper.check(row.sample)
        row.handle = next(self._handles)
        self._running.append(row)
        return row.handle

    def step(self, most: int | None = 1) -> int:
        """Make a step of every row. Rows that made their last one are then `done`. Returns the number of steps made.

        most: how many to make at once, None for any number: a device runs the steps in which the same rows run, and
        the same of them are guided, as one piece. There is always one such step, unless the batch is empty.
        Raises `EngineError` when an engine fails.
        """
        if not self._running:
            return 0
        steps = _alike(self._running, most)
        self._stepper.advance(self._running, steps)
        if any(not row.state.remaining for row in self._running):
            self._stepper.synchronize()
            self._done |= {row.handle: row for row in self._running if not row.state.remaining}
            self._running = [row for row in self._running if row.state.remaining]
        return steps

    def latents(self, handle: int) -> Array:
        """A copy of the latents of a row as they are now, float32 (C, …). Raises `RequestError` for other handles."""
        row = self._row(handle)
        if handle not in self._done:
            self._stepper.synchronize()
        return row.state.x.copy()

    def take(self, handle: int) -> Array:
        """The final latents of a row that is done, float32 (C, …); the batch forgets it.

        Raises `RequestError` when it has steps left, `OverflowedError` when its latents are not finite.
        """
        row = self._row(handle)
        if row.state.remaining:
            raise RequestError(f"row {handle} has {row.state.remaining} steps left: step the batch until it is done")
        del self._done[handle]
        if not np.isfinite(row.state.x).all():
            raise OverflowedError(
                "the final latents are not finite (NaN or infinity): the model overflowed; "
                "lower the guidance or use a bundle of higher precision"
            )
        return row.state.x

    def close(self) -> None:
        """Forget all rows, and give back what they ran in. The batch can be used again."""
        self._stepper.close()
        self._running, self._done = [], {}

    def _row(self, handle: int) -> Row:
        for row in (*self._running, *self._done.values()):
            if row.handle == handle:
                return row
        raise RequestError(f"the batch has no row {handle!r}: it was dropped or taken, or is of another batch")

    def _check(self, sample: Sample) -> None:
        """Raise `RequestError` unless every array of `sample` is of the shape that it is of in the other rows."""
        if sample.guidance.active and sample.negative is None:
            raise RequestError("a guided sample needs the inputs of its negative prompt: give them")
        own = _shapes(sample, sample.prompt)
        if sample.negative is not None and _shapes(sample, sample.negative) != own:
            raise RequestError("a prompt and its negative must be of one size: give embeddings of one length")
        for row in self._running[:1]:
            others = _shapes(row.sample, row.sample.prompt)
            for name in {**others, **own}:
                if others.get(name) != own.get(name):
                    raise RequestError(
                        f"the rows of one batch must be of one size: {name} is {others.get(name)} in the batch and "
                        f"{own.get(name)} in the new row: run it in a batch of its own"
                    )


def likeness(sample: Sample) -> Hashable:
    """Equal for samples whose rows a batch steps together: those of one size."""
    return tuple(sorted(_shapes(sample, sample.prompt).items()))


def _shapes(sample: Sample, text: Mapping[str, Array]) -> dict[str, tuple[int, ...] | None]:
    beside = None if sample.channels is None else sample.channels.shape
    changing = {name: values.shape[1:] for name, values in sample.prompt_steps.items()}
    fixed = {name: array.shape for name, array in text.items()}
    return {"latents": sample.latents.shape, "channels": beside, **fixed, **changing}


def _alike(rows: list[Row], most: int | None) -> int:
    """The number of steps from here, up to `most`, in which the same rows run, guided and given the same."""
    last = min(row.state.remaining for row in rows)
    last = last if most is None else min(last, max(most, 1))
    if last == 1:
        return 1
    now = [row.phase() for row in rows]
    changes = (k for k in range(1, last) if [row.phase(k) for row in rows] != now)
    return next(changes, last)
