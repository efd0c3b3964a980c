"""What calls of engines take, and the figures that are made of seconds: percentiles, ratios, rates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..common.arrays import Array
from ..engines import DeviceArray, DeviceBinding, Engine, HostBinding
from .report import Ratio, Stages, Turn

PERCENTILES = (50, 90, 95, 99)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a component from `start` to `end`, in seconds of `time.perf_counter`.

    shapes: of its inputs. binds: whether arrays were bound to it, before calls of the same shapes.
    """

    component: str
    start: float
    end: float
    shapes: Shapes
    binds: bool = False


class Recorder:
    """The calls of all components, in the order in which they ended; several threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []

    def add(self, call: Call) -> None:
        """Keep a call."""
        with self._lock:
            self._calls.append(call)

    def take(self) -> list[Call]:
        """The calls since the last time, which are then forgotten."""
        with self._lock:
            calls, self._calls = self._calls, []
        return calls


class TimedEngine(Engine):
    """An engine whose calls on host arrays are recorded. What is bound on a GPU is only enqueued, and is not."""

    def __init__(self, name: str, engine: Engine, recorder: Recorder) -> None:
        """name: of the component, as it is recorded."""
        super().__init__(engine.component, engine.inputs, engine.outputs)
        self._name, self._engine, self._recorder = name, engine, recorder

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        return self._engine.to_device(array)

    def padded_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `engine.Engine`."""
        return self._engine.padded_rows(shapes)

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """See `engine.Engine`."""
        return self._engine.capture(launches, what)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        shapes, start = _shapes(feeds), time.perf_counter()
        made = self._engine(feeds)
        self._recorder.add(Call(self._name, start, time.perf_counter(), shapes))
        return made

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        shapes, start = _shapes(feeds), time.perf_counter()
        binding = self._engine.bind_host(feeds, twice)
        self._recorder.add(Call(self._name, start, time.perf_counter(), shapes, binds=True))

        def run(*changed: str) -> dict[str, Array]:
            began = time.perf_counter()
            made = binding(*changed)
            self._recorder.add(Call(self._name, began, time.perf_counter(), shapes))
            return made

        return run

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        return self._engine.bind_device(tensors)


def _shapes(feeds: Mapping[str, Array]) -> Shapes:
    return {name: array.shape for name, array in feeds.items()}


def merged(calls: Sequence[Call]) -> Call | None:
    """Calls that share the rows of one step, as one: from the first start to the last end, of all their rows.

    Bindings count for the time alone. None where nothing but bindings was called.
    """
    made = [call for call in calls if not call.binds]
    if not made:
        return None
    rows = sum(next(iter(call.shapes.values()))[0] for call in made)
    own = next(iter(made[0].shapes.values()))[0]
    shapes = {
        name: (rows, *shape[1:]) if shape and shape[0] == own and len(made) > 1 else shape
        for name, shape in made[0].shapes.items()
    }
    return Call(made[0].component, min(call.start for call in calls), max(call.end for call in calls), shapes)


def by_step(calls: Sequence[Call], ends: Sequence[float]) -> list[Call | None]:
    """What `calls` of the denoiser make in each step, merged. ends: of the steps."""
    starts = [float("-inf"), *ends][: len(ends)]
    return [
        merged([call for call in calls if start < call.end <= end]) for start, end in zip(starts, ends, strict=True)
    ]


def stages_of(
    calls: Sequence[Call], roles: Mapping[str, str], start: float, ends: Sequence[float], end: float, text: float | None
) -> Stages:
    """The stages of a turn from `start` to `end`. roles: of the components. ends: of the steps.

    text: seconds of all that was done to encode the prompts. Without calls of the denoiser, as with a loop on a GPU,
    little is told.
    """

    def spent(role: str) -> float | None:
        own = [call.end - call.start for call in calls if roles.get(call.component) == role]
        return sum(own) if own else None

    encoded = spent("text")
    told = Stages(
        after=end - ends[-1] if ends else None,
        tokenize=None if text is None or encoded is None else max(text - encoded, 0.0),
        text=encoded,
        image_encode=spent("encoder"),
        decode=spent("decoder"),
    )
    steps = by_step([call for call in calls if roles.get(call.component) == "denoiser"], ends)
    made = [call for call in steps if call is not None]
    if not ends or len(made) < len(ends):
        return told
    starts = [made[0].start, *ends[:-1]]
    whole = [late - early for early, late in zip(starts, ends, strict=True)]
    busy = [call.end - call.start for call in made]
    loop = [max(step - each, 0.0) for step, each in zip(whole, busy, strict=True)]
    return replace(
        told,
        before=max(starts[0] - start, 0.0),
        first_step=whole[0],
        steps=tuple(whole[1:]),
        denoiser=tuple(busy),
        loop=tuple(loop),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of `values` do not exceed, between two of them in proportion."""
    return float(np.percentile(np.array(values, np.float64), share))


def median(values: Sequence[float]) -> float:
    """As `percentile` of 50."""
    return percentile(values, 50)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio | None:
    """Their seconds over ours, pair by pair; None without pairs."""
    pairs = [a / b for a, b in zip(theirs, ours, strict=True) if b > 0]
    if not pairs:
        return None
    low, middle, high = (percentile(pairs, share) for share in (25, 50, 75))
    return Ratio(middle, low, high, tuple(pairs))


def further_step(turn: Turn) -> float | None:
    """The median further step of a turn, None where its system does not tell."""
    return median(turn.stages.steps) if turn.stages.steps else None


def images_per_s(turns: Sequence[Turn], count: int) -> float | None:
    """Pictures a second, by the median turn of `count` pictures."""
    return count / median([turn.seconds for turn in turns]) if turns else None


def rows_per_s(turns: Sequence[Turn], rows: int) -> float | None:
    """Rows of the denoiser a second, by the median further step. rows: of a step."""
    steps = [step for turn in turns if (step := further_step(turn))]
    return rows / median(steps) if steps else None
