"""The LoRAs that a pipeline and its requests ask for: opened once, held against the bundle, and made into factors."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..bundle import Bundle
from ..bundle.wiring import MOST_RANK, LoraInputs
from ..common.arrays import Array
from ..common.errors import LoraError, RequestError
from ..engines.changed import weights_in
from ..engines.fusion.lora import group_of
from ..engines.lora_denoiser import LoraDenoiser
from ..families.lora import Change, LoraFile, Sum, Weights, combined
from ..families.lora.tensors import file_of
from .lora import Lora, as_loras, open_lora, weights_of

_MOST_KEPT = 64
"""Files, and sets, that are kept open."""
_Opened = list[tuple[LoraFile, Mapping[str, float]]]
_Kept = TypeVar("_Kept")


class LoraSets:
    """Sets of LoRAs by what they are: their files, as they are now, and strengths. Several threads may ask."""

    def __init__(self, bundle: Bundle, denoiser: LoraDenoiser) -> None:
        """denoiser: that which takes them as inputs."""
        self._bundle, self._denoiser = bundle, denoiser
        self.base: tuple[Lora, ...] = ()
        """What every request is drawn with, as inputs."""
        self._pinned: dict[Lora, tuple[Hashable, LoraFile]] = {}
        self._lock = threading.RLock()
        _ALL.add(self)
        self._weights: Weights | None = None
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def weights(self) -> Weights:
        """What a LoRA may change in the bundle. Raises `BundleError` for one that does not say of what it was made."""
        with self._lock:
            if self._weights is None:
                self._weights = weights_of(self._bundle)
            return self._weights

    def inputs(self, layout: int) -> LoraInputs:
        """The inputs of the denoiser that takes them; see `LoraDenoiser` of layouts."""
        return self._denoiser.inputs(layout)

    def layout(self, loras: Sequence[Lora]) -> int:
        """The layout of the denoiser that takes these; 0 of none. Raises `LoraError` for forms that are no inputs."""
        if not loras:
            return 0
        with self._lock:  # a layout is made once
            return self._denoiser.layout_for(self._keep(("groups", self.key(loras)), lambda: self._groups(loras)))

    def of(self, loras: Sequence[Lora]) -> tuple[Lora, ...]:
        """The set of a request that asks for `loras`, checked: the pipeline's own and these.

        Raises `RequestError` where the bundle takes none as inputs, `LoraError` for what cannot be read or taken.
        """
        both = as_loras((*self.base, *loras)) if loras else self.base
        if loras and self._denoiser.lacks:
            raise RequestError(
                f"{self._denoiser.lacks}, or draw all with the same ones, which `set_loras` and `run --lora` do"
            )
        if both:
            self.factors(both)
        return both

    def set_base(self, loras: Sequence[Lora]) -> None:
        """Let every request be drawn with these, as their files are now, whatever becomes of them."""
        pinned = {lora: (_state(lora), self._file(lora)) for lora in loras}
        self.base, self._pinned = tuple(loras), pinned

    @contextmanager
    def reading_again(self) -> Iterator[None]:
        """Let the files of the base be read as they are now; where the block fails, the base stays what it was."""
        before, self._pinned = self._pinned, {}
        try:
            yield
        except BaseException:
            self._pinned = before
            raise

    def opened(self, loras: Sequence[Lora]) -> _Opened:
        """The files, each with its strengths by component. Raises `LoraError`."""
        return [(self._file(lora), lora.strengths(self.weights)) for lora in loras]

    def changes(self, loras: Sequence[Lora]) -> dict[str, dict[str, Sum]]:
        """What they change together, by component and weight. Raises `LoraError`."""
        return combined(self.opened(loras))

    def key(self, loras: Sequence[Lora]) -> Hashable:
        """Equal for sets that are the same."""
        return tuple((self._state(lora), lora.strength, lora.text_strength, lora.approximate) for lora in loras)

    def text_changes(self, loras: Sequence[Lora]) -> dict[str, dict[str, Sum]]:
        """Of these the changes of text encoders."""
        return {name: each for name, each in self.changes(loras).items() if name != self.weights.denoiser}

    def factors(self, loras: Sequence[Lora], layout: int | None = None) -> tuple[Array, Array]:
        """Both inputs of the denoiser for this set, (rows, rank). The same set gives the same arrays.

        Raises `LoraError` for what is no product of two factors, of a weight that takes none, or above the rank.
        """
        layout = self.layout(loras) if layout is None else layout
        return self._keep(("factors", self.key(loras), layout), lambda: self._factors(loras, layout))

    def padded(self, loras: Sequence[Lora], rank: int, layout: int) -> tuple[Array, Array]:
        """The same, brought to a rank with zeros; of no LoRA they are zeros."""

        def make() -> tuple[Array, Array]:
            made = self.factors(loras, layout) if loras else self._empty(1, layout)
            down, up = (np.pad(each, ((0, 0), (0, rank - each.shape[1]))) for each in made)
            return down, up

        return self._keep(("padded", self.key(loras), rank, layout), make)

    def _changes(self, loras: Sequence[Lora]) -> Iterator[tuple[str, Change, float, Lora]]:
        """What they change in the denoiser: the weight, by what, how much, and of which LoRA. Raises `LoraError`."""
        for lora, opened in zip(loras, self.opened(loras), strict=True):
            for name, total in combined([opened]).get(self.weights.denoiser, {}).items():
                for change, strength in total.parts:
                    if not change.low_rank and not lora.approximate:
                        what = f"{change.form}{' with a magnitude' if 'dora_scale' in change.parts else ''}"
                        raise LoraError(
                            f"{lora.file} changes {name} by a {what}, no product of two factors, which cannot be an "
                            "input: draw all with it, by set_loras(…, as_inputs=False) or `run --lora`, or bring it to "
                            "the rank with --lora-approximate"
                        )
                    yield name, change, strength, lora

    def _groups(self, loras: Sequence[Lora]) -> frozenset[int]:
        return frozenset(group_of(name) for name, *_ in self._changes(loras))

    def _factors(self, loras: Sequence[Lora], layout: int) -> tuple[Array, Array]:
        rows, inputs = self._rows(layout), self.inputs(layout)
        found: dict[str, list[tuple[Array, Array]]] = {}
        others: list[tuple[str, Change, float, Lora]] = []
        for name, change, strength, lora in self._changes(loras):
            if name not in rows:
                raise LoraError(
                    f"{lora.file} changes {name}, which takes no factors in {self._bundle.root}: "
                    f"{self._remedy(inputs.rank, ' --lora-layers all')}"
                )
            if change.low_rank:
                found.setdefault(name, []).append(change.factors(strength))
            else:
                others.append((name, change, strength, lora))
        self._approximate(others, found, inputs.rank)
        rank = max((sum(len(down) for down, _ in own) for own in found.values()), default=1)
        if rank > inputs.rank:
            raise LoraError(
                f"these LoRAs have the rank {rank} together, {self._bundle.root} takes {inputs.rank}: "
                f"{self._remedy(rank)}"
            )
        down, up = self._empty(rank, layout)
        for name, own in found.items():
            (first, reads), (second, gives) = rows[name]
            at = 0
            for own_down, own_up in own:
                end = at + len(own_down)
                down[first : first + reads, at:end] = own_down.reshape(len(own_down), -1).T
                up[second : second + gives, at:end] = own_up
                at = end
        return down, up

    def _remedy(self, rank: int, layers: str = "") -> str:
        """What takes LoRAs of this rank, in these layers."""
        if not self._denoiser.built or rank > MOST_RANK:
            return "draw all with them, by set_loras(…, as_inputs=False) or `run --lora`"
        return f"run `diffoundry build {self._bundle.root} --lora-rank {rank}{layers}`"

    def _approximate(
        self,
        others: Sequence[tuple[str, Change, float, Lora]],
        found: dict[str, list[tuple[Array, Array]]],
        rank: int,
    ) -> None:
        """Add to `found` the factors nearest to changes of other forms, and tell what is lost."""
        if not others:
            return
        values = weights_in(self._bundle, self.weights.denoiser, {name for name, *_ in others})
        lost: dict[str, float] = {}
        taken_of = {name: sum(len(down) for down, _ in own) for name, own in found.items()}
        for name, change, strength, lora in others:
            taken = taken_of.get(name, 0)
            beside = sum(other == name for other, *_ in others)
            room = (rank - taken) // beside if taken < rank else 0
            if not room or len(change.shape) < 2:
                raise LoraError(
                    f"{lora.file}: no rank is left for {name}: draw all with it, by `run --lora` without it"
                )
            down, up, share = change.nearest(values[name], strength, room)
            found.setdefault(name, []).append((down, up))
            lost[str(lora.file)] = max(lost.get(str(lora.file), 0.0), share)
        for file, share in lost.items():
            warnings.warn(
                f"{file} was brought to rank {rank}: up to {100 * share:.1f} % of a layer's change is lost",
                RuntimeWarning,
                stacklevel=2,
            )

    def _empty(self, rank: int, layout: int) -> tuple[Array, Array]:
        """Factors of this rank that add nothing."""
        sizes = [sum(sizes) for sizes in zip(*((r[1], g[1]) for r, g in self._rows(layout).values()), strict=True)]
        down, up = (np.zeros((size, rank), np.float32) for size in sizes)
        return down, up

    def _rows(self, layout: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """For each weight that takes factors where its rows begin in both inputs, and how many they are."""

        def make() -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
            shapes, made, first, second = self.weights.shapes[self.weights.denoiser], {}, 0, 0
            for name in self.inputs(layout).weights:
                if name not in shapes:
                    raise LoraError(
                        f"{self._bundle.root}: {name:.100} takes factors and is no weight: compile it again"
                    )
                gives, reads = shapes[name][0], int(np.prod(shapes[name][1:]))
                made[name] = (first, reads), (second, gives)
                first, second = first + reads, second + gives
            if (first, second) != self._denoiser.sizes(layout):
                raise LoraError(
                    f"{self._bundle.root}: the weights that take factors are not those of its graph: build again"
                )
            return made

        return self._keep(("rows", layout), make)

    def _state(self, lora: Lora) -> Hashable:
        return self._pinned[lora][0] if lora in self._pinned else _state(lora)

    def _file(self, lora: Lora) -> LoraFile:
        if lora in self._pinned:
            return self._pinned[lora][1]
        return self._keep(("file", _state(lora)), lambda: open_lora(lora, self.weights))

    def _keep(self, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            found: _Kept = self._kept[key]
            return found


def _state(lora: Lora) -> Hashable:
    """A file as it is now."""
    path = Path(lora.file)
    try:
        path = file_of(path)
        stat = path.stat()
    except OSError:
        return str(path), lora.ignore_unused
    return str(path), stat.st_mtime_ns, stat.st_size, lora.ignore_unused


_ALL: weakref.WeakSet[LoraSets] = weakref.WeakSet()


def _start_in_child() -> None:
    """In a forked process another thread may hold a lock that nobody gives back."""
    for sets in list(_ALL):
        sets._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_start_in_child)
