"""An engine in two graphs: one for what the prompt alone decides, run once, and one for what each step decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..bundle import Tensor
from ..common.arrays import Array
from ..common.errors import EngineError
from .engine import Bound, Engine, Linked, Placed, check_feeds


class HoistedEngine:
    """`once` makes some inputs of `every`; the two together have the inputs of the model that they were cut from."""

    def __init__(self, component: str, once: Engine, every: Engine) -> None:
        self.component = component
        self._once, self._every = once, every
        hoisted = {tensor.name for tensor in once.outputs}
        own = {tensor.name for tensor in every.inputs}
        if not hoisted <= own:
            raise EngineError(f"{component}: its two graphs do not fit together; compile the bundle again")
        self.inputs: tuple[Tensor, ...] = (
            *(tensor for tensor in every.inputs if tensor.name not in hoisted),
            *(tensor for tensor in once.inputs if tensor.name not in own),
        )
        self.outputs = every.outputs

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `engine.Engine`."""
        check_feeds(self.component, self.inputs, feeds)
        return self._every(self._all_feeds(feeds))

    def bind(self, feeds: Mapping[str, Array]) -> Bound:
        """See `engine.Engine`; what the prompt decides is computed here."""
        check_feeds(self.component, self.inputs, feeds)
        return _HoistedBound(self._once, self._every, feeds, self._all_feeds(feeds))

    def place(self, array: Array) -> Placed:
        """See `engine.Engine`."""
        return self._every.place(array)

    def link(self, tensors: Mapping[str, Placed]) -> Linked:
        """See `engine.Engine`; what the prompt decides is computed here, and by `prepare` when the prompt changes."""
        missing = {tensor.name for tensor in self.inputs} - set(tensors)
        if missing:
            raise EngineError(f"{self.component}: nothing was linked to {', '.join(sorted(missing))}")
        return _HoistedLinked(self._once, self._every, tensors)

    def rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `engine.Engine`."""
        own = {tensor.name for tensor in self._once.inputs}
        return self._once.rows({name: shape for name, shape in shapes.items() if name in own})

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """See `engine.Engine`."""
        return self._every.record(launches)

    def _all_feeds(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        made = self._once({tensor.name: feeds[tensor.name] for tensor in self._once.inputs})
        kept = {tensor.name: feeds[tensor.name] for tensor in self._every.inputs if tensor.name in feeds}
        return {**kept, **{name: np.asarray(array, order="C") for name, array in made.items()}}


class _HoistedBound:
    """Both graphs bound; the first runs again only when an input of its own was changed."""

    def __init__(self, once: Engine, every: Engine, feeds: Mapping[str, Array], all_feeds: dict[str, Array]) -> None:
        self._once, self._bound, self._arrays = once, every.bind(all_feeds), all_feeds
        self._own = {tensor.name: feeds[tensor.name] for tensor in once.inputs}

    def __call__(self, *changed: str) -> dict[str, Array]:
        """See `engine.Bound`."""
        if self._own.keys().isdisjoint(changed):
            return self._bound(*changed)
        made = self._once(self._own)
        for name, array in made.items():
            self._arrays[name][...] = array
        return self._bound(*changed, *made)


class _HoistedLinked:
    """The second graph linked to what the first made of the tensors that the prompt is in."""

    def __init__(self, once: Engine, every: Engine, tensors: Mapping[str, Placed]) -> None:
        self._once = once
        self._own = {tensor.name: tensors[tensor.name] for tensor in once.inputs}
        self._made = {name: every.place(array) for name, array in self._compute().items()}
        self._linked = every.link({**tensors, **self._made})

    def __call__(self) -> None:
        """See `engine.Linked`."""
        self._linked()

    def prepare(self, *changed: str) -> None:
        """See `engine.Linked`."""
        if not self._own.keys().isdisjoint(changed):
            for name, array in self._compute().items():
                self._made[name].update_inplace(np.asarray(array, order="C"))
        self._linked.prepare(*changed)

    def _compute(self) -> dict[str, Array]:
        return self._once({name: tensor.numpy() for name, tensor in self._own.items()})
