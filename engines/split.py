"""An engine in two graphs: one for what the prompt alone decides, run once, and one for what each step decides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from ..common.arrays import Array
from ..common.errors import EngineError
from .engine import DeviceArray, DeviceBinding, Engine, HostBinding


class SplitEngine(Engine):
    """`per_prompt` makes some inputs of `per_step`; together they have the inputs of the whole model."""

    def __init__(self, component: str, per_prompt: Engine, per_step: Engine, *, each_call: bool = False) -> None:
        """each_call: of engines bound to a device, the first runs in each call, too: what it reads changes there."""
        self._per_prompt, self._per_step, self._each_call = per_prompt, per_step, each_call
        made = {tensor.name for tensor in per_prompt.outputs}
        own = {tensor.name for tensor in per_step.inputs}
        if not made <= own:
            raise EngineError(f"{component}: its two graphs do not fit together; compile the bundle again")
        inputs = (
            *(tensor for tensor in per_step.inputs if tensor.name not in made),
            *(tensor for tensor in per_prompt.inputs if tensor.name not in own),
        )
        super().__init__(component, inputs, per_step.outputs)

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        return self._per_step.to_device(array)

    def padded_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `engine.Engine`."""
        own = {tensor.name for tensor in self._per_prompt.inputs}
        return self._per_prompt.padded_rows({name: shape for name, shape in shapes.items() if name in own})

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """See `engine.Engine`."""
        return self._per_step.capture(launches, what)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._per_step(self._all_feeds(feeds))

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        """Both graphs bound; the first runs again only when an input of its own was changed."""
        arrays = self._all_feeds(feeds)
        own = {tensor.name: feeds[tensor.name] for tensor in self._per_prompt.inputs}
        if twice and own.keys() <= set(twice):
            twice = {*twice, *(tensor.name for tensor in self._per_prompt.outputs)}
        per_step = self._per_step.bind_host(arrays, twice)

        def run(*changed: str) -> dict[str, Array]:
            if own.keys().isdisjoint(changed):
                return per_step(*changed)
            made = self._per_prompt(own)
            for name, array in made.items():
                arrays[name][...] = array
            return per_step(*changed, *made)

        return run

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        return _SplitDeviceBinding(self._per_prompt, self._per_step, tensors, self._each_call)

    def _all_feeds(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        made = self._per_prompt({tensor.name: feeds[tensor.name] for tensor in self._per_prompt.inputs})
        own = {tensor.name: feeds[tensor.name] for tensor in self._per_step.inputs if tensor.name in feeds}
        return {**own, **{name: np.asarray(array, order="C") for name, array in made.items()}}


class _SplitDeviceBinding:
    """The second graph bound to what the first made of the tensors that the prompt is in."""

    def __init__(
        self, per_prompt: Engine, per_step: Engine, tensors: Mapping[str, DeviceArray], each_call: bool
    ) -> None:
        self._per_prompt, self._each_call = per_prompt, each_call
        self._own = {tensor.name: tensors[tensor.name] for tensor in per_prompt.inputs}
        self._made = {name: per_step.to_device(array) for name, array in self._compute().items()}
        self._per_step = per_step.bind_device({**tensors, **self._made})

    def __call__(self) -> None:
        """See `engine.DeviceBinding`."""
        if self._each_call:
            self._update()
        self._per_step()

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`."""
        if not self._own.keys().isdisjoint(changed):
            self._update()
        self._per_step.refresh(*changed)

    def _update(self) -> None:
        for name, array in self._compute().items():
            self._made[name].update_inplace(np.asarray(array, order="C"))

    def _compute(self) -> dict[str, Array]:
        return self._per_prompt({name: tensor.numpy() for name, tensor in self._own.items()})
