"""`OpenVinoEngine`: a model on a device of OpenVINO.

What a device computes in is the precision hint of its compiled model: all models are read from their float32 graphs.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError, reason
from ...common.machine import evicting
from ..engine import DeviceArray, DeviceBinding, Engine, HostBinding
from ..onnxruntime import NO_MEMORY_TO_LOAD
from .bindings import OvArray, OvDeviceBinding, OvHostBinding, OvRowsBinding, shared
from .cache import Cache
from .compiled import Compiled, Recipe
from .device import OTHERWISE, Device
from .halves import with_one_half

_MOST_STATIC = 8
"""Shapes of a small model that are kept compiled; a large one has one, which takes any shape from the second on."""
_OUT_OF_MEMORY = re.compile(r"bad_alloc|bad allocation|std::length_error|[Cc]annot allocate|out of memory|OUT_OF")


class Shapes(NamedTuple):
    """What a model is compiled for: the shapes of its inputs, and which of them hold the same rows twice."""

    of_inputs: tuple[tuple[int, ...], ...]
    twice: tuple[str, ...]


class OpenVinoEngine(Engine):
    """One ONNX model, compiled for the shapes that it is called with; see `engine.Engine` for the contract.

    With several streams the rows of a bound call are shared among them.
    """

    def __init__(
        self,
        model: Path,
        component: str,
        device: Device,
        recipe: Recipe,
        inputs: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
        cache: Cache | None = None,
        part: Callable[[Any], Any] = lambda model: model,
        rewrites: Sequence[Callable[[Any], Any]] = (),
    ) -> None:
        """inputs, outputs: as the manifest has them, with named axes; what it does not name is read off the model.

        cache: where compiled models are kept. part: makes of the model that was read the one to be compiled. rewrites:
        make it a faster one of the same inputs and outputs, once the sizes of its inputs are known.
        Raises `EngineError` when the model cannot be read.
        """
        self._path, self._device, self._recipe, self._cache = model, device, recipe, cache
        self._part, self._rewrites = part, tuple(rewrites)
        self.component = component
        with self.failing("cannot load"):
            self._read: Any = self._open()
        super().__init__(component, _tensors(self._read.inputs, inputs), _tensors(self._read.outputs, outputs))
        self._lock = threading.RLock()
        self._compiled: OrderedDict[Any, Compiled] = OrderedDict()

    @property
    def splits_rows(self) -> bool:
        """Whether a bound call shares its rows among the processors."""
        return self._recipe.streams > 1

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        with self.failing("failed"):
            return OvArray(self._device, np.array(array, order="C"))

    def shapes(self, arrays: Mapping[str, Any], twice: Collection[str] = ()) -> Shapes:
        """What `compiled` is asked for, by arrays or tensors that are fed. twice: see `bind_host`."""
        own = (tensor.name for tensor in self.inputs) if self._device.on_cpu else ()
        return Shapes(
            tuple(tuple(arrays[tensor.name].shape) for tensor in self.inputs),
            tuple(name for name in own if name in twice),
        )

    def compiled(self, key: Shapes) -> Compiled:
        """The model compiled for inputs of this kind. Raises `EngineError`."""
        with self._lock:
            found = self._compiled.get(key) or self._compiled.get(None)
            if found is None:
                any_shape = not self._recipe.small and bool(self._compiled) and self._device.on_cpu
                with self.failing("cannot compile"):
                    found = self._compile(None if any_shape else key)
                if any_shape:
                    self._compiled.clear()  # it holds the weights; the new one takes the old shape, too
                self._compiled[None if any_shape else key] = found
            else:
                self._compiled.move_to_end(key if key in self._compiled else None)
            while len(self._compiled) > (_MOST_STATIC if self._recipe.small else 1):
                self._compiled.popitem(last=False)
            return found

    def _open(self) -> Any:
        return self._part(self._device.core.read_model(str(self._path)))

    def _compile(self, key: Shapes | None) -> Compiled:
        """The model for inputs of this kind, None for any shapes."""
        device, recipe = self._device, self._recipe
        properties = recipe.properties() | (recipe.processor_properties() if device.on_cpu else {})
        cache = self._cache if key is not None and (recipe.small or not device.on_cpu) else None
        made_of = {
            "precision": recipe.precision,
            "shapes": key and key.of_inputs,
            **({"twice": key.twice} if key and key.twice else {}),
            "properties": properties,
            "device": device.full_name,
            "version": device.version,
        }
        if cache is not None and (blob := cache.find(made_of)) is not None:
            with contextlib.suppress(Exception):  # one that does not load is made again
                return Compiled(device.core.import_model(blob.read_bytes(), device.name, properties))
        model = self._read or self._open()
        self._read = None
        if key is not None:
            model.reshape({tensor.name: list(shape) for tensor, shape in zip(self.inputs, key.of_inputs, strict=True)})
            model = with_one_half(model, key.twice)
        for rewrite in self._rewrites:
            model = rewrite(model)
        with self._evicting():
            compiled = device.core.compile_model(model, device.name, properties)
        if cache is not None:
            cache.keep(made_of, compiled)
        return Compiled(compiled)

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Raise `EngineError` for what OpenVINO raises."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
                raise EngineError(f"{self.component}: {NO_MEMORY_TO_LOAD}") from None
            if not self._path.is_file():
                raise EngineError(f"{self.component}: {self._path} is missing; compile the bundle again") from None
            raise EngineError(
                f"{self.component}: OpenVINO {self._device.version} {what} {self._path.name}: {_reason(error)}; "
                f"upgrade OpenVINO, {OTHERWISE}"
            ) from None

    def infer(self, compiled: Compiled, request: Any) -> None:
        """Run a request of `compiled`, whose tensors are set. Raises what OpenVINO raises."""
        with contextlib.nullcontext() if compiled.warm else self._evicting():  # the first run may pack weights
            request.infer(share_outputs=True)
        compiled.warm = True

    def _evicting(self) -> contextlib.AbstractContextManager[None]:
        """Mapped weights of a large model are given back while it packs its own."""
        return contextlib.nullcontext() if self._recipe.small else evicting(self._path.parent)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        compiled = self.compiled(self.shapes(arrays))
        with self.failing("failed to run"), compiled.request() as request:
            for name, tensor in shared(arrays).items():
                request.set_tensor(name, tensor)
            self.infer(compiled, request)
            return {tensor.name: np.array(request.get_tensor(tensor.name).data) for tensor in self.outputs}

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        rows = min(self._recipe.streams if self._recipe.small else 1, len(next(iter(feeds.values()))) if feeds else 1)
        return OvHostBinding(self, feeds, twice) if rows <= 1 else OvRowsBinding(self, feeds, rows)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        return OvDeviceBinding(self, tensors)


def _tensors(ports: Sequence[Any], known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs or outputs of a model; of those that are known, with the names of their axes."""
    named = {tensor.name: tensor for tensor in known}
    result = []
    for port in ports:
        name = port.get_any_name()
        sizes = [axis.get_length() if axis.is_static else f"{name}_{i}" for i, axis in enumerate(port.partial_shape)]
        found = Tensor(name, np.dtype(port.element_type.to_dtype()).name, tuple(sizes))
        given = named.get(name)
        fits = given is not None and given.dtype == found.dtype and len(given.shape) == len(found.shape)
        result.append(given if given is not None and fits else found)
    return tuple(result)


def _reason(error: Exception) -> str:
    """What OpenVINO says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return reason(RuntimeError(" ".join(said))) if said else reason(error)
