"""What the real loop showed of the values that layers read: ranges and histograms, by stretch of timesteps."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ...common.arrays import Array
from ...common.errors import DiffoundryError, reason
from ...common.files import check_regular, replacing
from ...engines.fusion.attention import ATTENTION
from ...engines.fusion.graph import weight_of
from ..graph import key, read_blocked
from ..sessions import OnCall, RecordedEngine, start
from .attention import Attention
from .histogram import BINS, count
from .layers import Group
from .probes import Probes

STRETCHES = 4
"""Parts of the timesteps that are told from one another: ranges drift from noise to picture."""
REVISION = 4
"""Raise it when the same run would give other statistics."""
_SAMPLE = 1 << 15
"""Elements of a value that are counted in a call, those of an odd step through it; its range is of all."""
_TIMESTEPS = 1000
_LARGEST_FILE = 256 << 20
OTHERS = "products of values"
_HIGH, _LOW, _MEAN, _SOME, _SIZE, _WORK = ":highest", ":lowest", ":mean", ":some", ":size", ":operations"
_LARGEST = ":largest"
_SUFFIXES = (_HIGH, _LOW, _MEAN, _SOME, _SIZE, _WORK, _LARGEST)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the values that the layers of one model read.

    model: the hash of the model. values: their names. counts: int64 (values, stretches, `BINS`), see `histogram`, of
    every other call: scales are judged by the others. high, low: float32 (values, stretches), of all calls; 0 in a
    stretch without any. calls: of the model. peaks, means: of each channel that layers add up over, the largest
    magnitude and the mean of all calls, float32 (channels,) by value. amax: the largest magnitude in what attentions
    are made of, by the names of the projections. sizes: elements that a layer makes in a call, by its name; operations
    of an attention, by its value, and how many keys it has, by `Attention.keys`; by `OTHERS` the operations of all
    products of two values, which no layer is.
    """

    model: str
    values: tuple[str, ...]
    counts: Array
    high: Array
    low: Array
    calls: int
    peaks: dict[str, Array]
    means: dict[str, Array]
    amax: dict[str, float]
    sizes: dict[str, int]

    @classmethod
    def empty(cls, model: str, values: Sequence[str]) -> Statistics:
        """Of no call."""
        shape = (len(values), STRETCHES)
        counts = np.zeros((*shape, BINS), np.int64)
        ranges = np.zeros((2, *shape), np.float32)
        return cls(model, tuple(values), counts, ranges[0], ranges[1], 0, {}, {}, {}, {})

    def largest(self) -> dict[str, float]:
        """max |x| of each value."""
        found = np.maximum(np.abs(self.high), np.abs(self.low)).max(axis=1)
        return dict(zip(self.values, map(float, found), strict=True))

    def of(self, value: str) -> Array:
        """The counts of a value, int64 (stretches, `BINS`)."""
        return np.asarray(self.counts[self.values.index(value)])

    def plus(self, other: Statistics) -> Statistics:
        """Of the calls of both, which are of one model."""
        if not (self.calls and other.calls):
            return self if self.calls else other
        calls = self.calls + other.calls
        return Statistics(
            self.model,
            self.values,
            self.counts + other.counts,
            np.maximum(self.high, other.high),
            np.minimum(self.low, other.low),
            calls,
            {value: np.maximum(peak, other.peaks[value]) for value, peak in self.peaks.items()},
            {
                value: np.asarray((self.calls * mean + other.calls * other.means[value]) / calls, np.float32)
                for value, mean in self.means.items()
            },
            {name: max(amax, other.amax[name]) for name, amax in self.amax.items()},
            self.sizes,
        )

    def save(self, path: Path) -> None:
        """Write them to `path`, the same bytes for the same statistics. Raises `DiffoundryError` on a full disk."""
        head = {"revision": REVISION, "model": self.model, "values": self.values, "sizes": self.sizes}
        head |= {
            "amax": self.amax,
            "calls": self.calls,
            "channels": [len(self.peaks.get(value, ())) for value in self.values],
        }
        used = np.flatnonzero(self.counts.any(axis=(0, 1)))
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        file = io.BytesIO()
        text = np.frombuffer(json.dumps({**head, "first": first}, sort_keys=True).encode(), np.uint8)
        counts = self.counts[..., first:last]
        by_channel = np.zeros((2, 0), np.float32)
        if self.calls:
            by_channel = np.stack([np.concatenate([of[v] for v in self.values]) for of in (self.peaks, self.means)])
        np.savez_compressed(file, head=text, counts=counts, high=self.high, low=self.low, channels=by_channel)
        with replacing(path) as part:
            part.write_bytes(file.getvalue())

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises `DiffoundryError` for anything else."""
        check_regular(path, "the calibration file", _LARGEST_FILE)
        try:
            with np.load(path, allow_pickle=False) as found:
                head = json.loads(found["head"].tobytes())
                values, first, kept = tuple(map(str, head["values"])), head["first"], found["counts"]
                shape = (len(values), STRETCHES, BINS)
                if head["revision"] != REVISION or kept.shape[:2] != shape[:2] or kept.dtype != np.int64:
                    raise ValueError("it is of another version")
                counts = np.zeros(shape, np.int64)
                counts[..., first : first + kept.shape[2]] = kept
                high, low = found["high"], found["low"]
                ranges = np.stack([high, low])
                if ranges.shape != (2, *shape[:2]) or ranges.dtype != np.float32 or not np.isfinite(ranges).all():
                    raise ValueError("its ranges are damaged")
                edges = np.cumsum([0, *map(int, head["channels"])])
                channels = found["channels"]
                if channels.shape != (2, edges[-1]) or channels.dtype != np.float32 or len(edges) != len(values) + 1:
                    raise ValueError("its channels are damaged")
                peaks, means = (
                    {value: each[a:b] for value, a, b in zip(values, edges, edges[1:], strict=False) if b > a}
                    for each in channels
                )
                if not np.isfinite(channels).all() or (peaks and len(peaks) != len(values)):
                    raise ValueError("its channels are damaged")
                sizes = {str(name): int(size) for name, size in head["sizes"].items()}
                calls = int(head["calls"])
                amax = {str(name): float(each) for name, each in head["amax"].items()}
                if not all(0 <= each < np.inf for each in amax.values()):
                    raise ValueError("its largest magnitudes are damaged")
                if (counts < 0).any() or (high < low).any() or calls < 0:
                    raise ValueError("its counts or ranges are damaged")
                if not all(each > 0 or name == OTHERS for name, each in sizes.items()):
                    raise ValueError("its sizes are damaged")
                return cls(str(head["model"]), values, counts, high, low, calls, peaks, means, amax, sizes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            foreign = "pickle" in str(error) or "numpy.ndarray" in str(error)
            raise DiffoundryError(
                f"{path} is no calibration file of this version of diffoundry "
                f"({'it is no NumPy archive' if foreign else reason(error)}): leave it out, and it is measured anew"
            ) from None


class Observer:
    """Gathers the statistics of a component while the loop runs; of values, no more than a sample leaves the graph."""

    def __init__(
        self,
        path: Path,
        component: str,
        groups: Sequence[Group],
        attentions: Sequence[Attention],
        model: str,
        timestep: str,
    ) -> None:
        """path: of the fp32 model, whose hash is `model`. timestep: the name of the input that takes it, or ""."""
        self._path, self._component, self._groups, self._timestep = path, component, groups, timestep
        self._attentions = attentions
        self._values = [group.value for group in groups]
        self._model = model
        self._begin()

    def _begin(self) -> None:
        self._calls, self._gathered = 0, Statistics.empty(self._model, self._values)
        self._peaks: dict[str, Array] = {}
        self._sums: dict[str, Array] = {}

    def restart(self) -> Statistics:
        """What was gathered since the last time; it begins anew."""
        means = {name: np.asarray(total / self._calls, np.float32) for name, total in self._sums.items()}
        found = replace(self._gathered, calls=self._calls, peaks=self._peaks, means=means)
        self._begin()
        return found

    def engine(self, on_call: OnCall) -> RecordedEngine:
        """An engine of the component that gathers as it runs, and calls `on_call` after each call."""
        model = read_blocked(self._path)
        outputs = len(model.graph.outputs)
        _probe(model, self._groups, self._attentions)
        inner = start(model, self._path.parent, self._component)

        def gather(feeds: Mapping[str, Array], made: Mapping[str, Array]) -> None:
            self._add(feeds, made)
            on_call(feeds, {name: each for name, each in made.items() if not name.endswith(_SUFFIXES)})

        return RecordedEngine(inner, gather, outputs)

    def _add(self, feeds: Mapping[str, Array], made: Mapping[str, Array]) -> None:
        at = float(np.max(feeds[self._timestep])) if self._timestep else 0.0
        stretch = min(max(int(at * STRETCHES / _TIMESTEPS), 0), STRETCHES - 1)
        found = self._gathered
        for i, name in enumerate(self._values):
            highs, lows = made[name + _HIGH], made[name + _LOW]
            high, low = float(highs.max()), float(lows.min())
            if not (np.isfinite(high) and np.isfinite(low) and np.isfinite(made[name + _SOME]).all()):
                reader = self._groups[i].layers[0].name
                raise DiffoundryError(
                    f"{self._component}: {name}, which {reader} reads, is infinity or NaN in fp32 at timestep {at:g}: "
                    "scan other prompts, or check the checkpoint"
                )
            peaks = np.maximum(np.abs(highs), np.abs(lows))
            self._peaks[name] = np.maximum(self._peaks[name], peaks) if name in self._peaks else peaks
            self._sums[name] = self._sums.get(name, 0) + made[name + _MEAN].astype(np.float64)
            if self._calls % 2 == 0:
                found.counts[i, stretch] += count(made[name + _SOME])
            found.high[i, stretch] = max(found.high[i, stretch], high)
            found.low[i, stretch] = min(found.low[i, stretch], low)
        if not found.sizes:
            layers = [layer.name for group in self._groups for layer in group.layers]
            found.sizes.update({name: int(made[name + _SIZE]) for name in layers})
            work = {name.removesuffix(_WORK): int(each) for name, each in made.items() if name.endswith(_WORK)}
            found.sizes[OTHERS] = sum(work.values())
            found.sizes.update({each.value: work[each.made] for each in self._attentions})
            found.sizes.update({each.keys: int(made[each.keys + _SIZE]) for each in self._attentions})
        for name in dict.fromkeys(name for each in self._attentions for name, _ in each.sources):
            largest = float(made[name + _LARGEST])
            if not np.isfinite(largest):
                raise DiffoundryError(
                    f"{self._component}: {name}, which an attention reads, is infinity or NaN in fp32 at timestep "
                    f"{at:g}: scan other prompts, or check the checkpoint"
                )
            found.amax[name] = max(found.amax.get(name, 0.0), largest)
        self._calls += 1


def _probe(model: Any, groups: Sequence[Group], attentions: Sequence[Attention]) -> None:
    """Let a model give the range and a sample of each value, how many elements each layer makes, and what attentions
    read at most.
    """
    import onnx_ir

    graph = model.graph
    probes, nodes = Probes(graph), {key(node): node for node in graph}
    number, whole = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64
    for group in groups:
        value = probes.values[group.value]
        after = value.producer()
        axes = [i for i in range(len(value.shape)) if i != group.channel_axis(value)]
        others = probes.constant(f"{group.value}:others", axes)
        for op, suffix in (("ReduceMax", _HIGH), ("ReduceMin", _LOW), ("ReduceMean", _MEAN)):
            probes.give(group.value + suffix, after, partial(_reduced, op, [value, others]), number, [None])
        probes.give(group.value + _SOME, after, partial(probes.sample, value, [-1], _SAMPLE), number, [None])
        for layer in group.layers:
            node = nodes[layer.name]
            probes.give(layer.name + _SIZE, node, partial(_size, node.outputs[0]), whole, [])
    for node in nodes.values():
        if node.op_type == ATTENTION or (node.op_type == "MatMul" and weight_of(node.inputs[1]) is None):
            probes.give(key(node) + _WORK, node, partial(_work, probes, node), whole, [])
    for each in attentions:
        value = probes.values[each.sources[1][0]]
        probes.give(each.keys + _SIZE, value.producer(), partial(_length, probes, value), whole, [])
    for name in dict.fromkeys(name for each in attentions for name, _ in each.sources):
        value = probes.values[name]
        probes.give(name + _LARGEST, value.producer(), partial(_largest, value), number, [])


def _reduced(op: str, inputs: Sequence[Any], tape: Any, output: Any) -> None:
    tape.op(op, inputs, {"keepdims": 0}, output=output)


def _size(value: Any, tape: Any, output: Any) -> None:
    tape.op("Size", [value], output=output)


def _length(probes: Probes, value: Any, tape: Any, output: Any) -> None:
    tape.op("Gather", [tape.op("Shape", [value]), probes.constant("length:axis", 1)], {"axis": 0}, output=output)


def _largest(value: Any, tape: Any, output: Any) -> None:
    _reduced("ReduceMax", [tape.op("Abs", [value])], tape, output)


def _work(probes: Probes, node: Any, tape: Any, output: Any) -> None:
    """Two for each product: every element of the first is multiplied with a row of what comes out."""
    blocked = node.op_type == ATTENTION  # two products, of each query with each key
    shape = tape.op("Shape", [node.inputs[1] if blocked else node.outputs[0]])
    last = tape.op("Gather", [shape, probes.constant(f"{key(node)}:last", 1 if blocked else -1)], {"axis": 0})
    times = probes.constant("work:four", 4) if blocked else probes.constant("work:two", 2)
    tape.op("Mul", [tape.op("Mul", [tape.op("Size", [node.inputs[0]]), last]), times], output=output)
