"""An execution context at one set of input shapes, and the buffers that feed it from the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError
from .gpu import DeviceTensor, Gpu
from .loaded import LoadedPlan
from .plan import Shape


class ShapedContext:
    """A context whose input shapes stay, so that what was captured of it stays true. outputs: the shapes it makes."""

    def __init__(self, loaded: LoadedPlan, gpu: Gpu, shapes: Mapping[str, Shape], outputs: Sequence[Tensor]) -> None:
        """Raises `EngineError` when the plan does not take `shapes` or the GPU has no memory for it."""
        self.loaded = loaded
        self._gpu, self._component = gpu, loaded.plan.component
        self._context = loaded.context()
        self._generation = -1
        self._addresses: Mapping[str, int] | None = None
        self._ran = False
        loaded.log.errors.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise loaded.failed(f"its plan does not take the shape {shape} for {name!r}")
        unknown = self._context.infer_shapes()
        self.outputs = {tensor.name: tuple(self._context.get_tensor_shape(tensor.name)) for tensor in outputs}
        if unknown or any(axis < 0 for shape in self.outputs.values() for axis in shape):
            raise loaded.failed("the shapes of its outputs do not follow from those of its inputs")
        # of these shapes; where TensorRT cannot tell, of the largest that the plan takes
        self._need = self._context.update_device_memory_size_for_shapes() or self._largest_need()
        self.buffers: Buffers | None = None
        self._lend_memory()

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueue a run that reads and writes at `addresses`, a mapping that is not changed later.

        Call it inside `Gpu.work`. Raises `EngineError` when TensorRT refuses.
        """
        if self.loaded.spoiled:
            raise EngineError(f"{self._component}: other weights were taken over in part: run it again to load its own")
        self._lend_memory()
        if addresses is not self._addresses:
            self._addresses = None
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self.loaded.failed(f"no address can be given to {name!r}")
            self._addresses = addresses
        if not self._context.execute_async_v3(self._gpu.device.stream):
            raise self.loaded.failed("TensorRT did not run it")
        if not self._ran:
            self._ran = True
            self.loaded.keep_cache()

    def _lend_memory(self) -> None:
        arena, errors = self._gpu.arena, self.loaded.log.errors
        errors.clear()
        arena.grow(self._need, self._component)
        if self._generation == arena.generation:
            return
        self._context.set_device_memory(arena.address, arena.size)
        if errors and arena.size < self._largest_need():
            errors.clear()
            self._need = self._largest_need()
            arena.grow(self._need, self._component)
            self._context.set_device_memory(arena.address, arena.size)
        if errors:
            raise self.loaded.failed(f"TensorRT did not take {arena.size} bytes for its activations")
        self._generation = arena.generation

    def _largest_need(self) -> int:
        engine: Any = self.loaded.engine
        return int(engine.get_device_memory_size_for_profile_v2(0))


class Buffers:
    """Tensors on the GPU for the inputs and outputs of a context that is fed from the host and read there."""

    def __init__(
        self,
        context: ShapedContext,
        gpu: Gpu,
        shapes: Mapping[str, Shape],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """shapes: of the inputs, as the context has them. Raises `EngineError` when there is no memory for them."""
        self._gpu = gpu
        purpose = f"the inputs and outputs of {context.loaded.plan.component}"
        self._inputs = {t.name: gpu.tensor(shapes[t.name], t.dtype, purpose) for t in inputs}
        self._outputs = {t.name: gpu.tensor(context.outputs[t.name], t.dtype, purpose) for t in outputs}
        every: dict[str, DeviceTensor] = {**self._inputs, **self._outputs}
        self._addresses = {name: tensor.address for name, tensor in every.items()}

    def run(
        self, context: ShapedContext, feeds: Mapping[str, Array], outputs: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Upload `feeds`, run `context`, and return the outputs, in the arrays `outputs` where they are given.

        A feed with fewer rows than its input, one row for all included, is filled up with its last row.
        """
        made = dict(outputs or {name: np.empty(t.shape, t.dtype) for name, t in self._outputs.items()})
        with self._gpu.work() as device:
            sent = {
                name: np.asarray(fill_rows(array, self._inputs[name].shape), order="C") for name, array in feeds.items()
            }
            for name, array in sent.items():
                device.upload(self._addresses[name], array)
            context.enqueue(self._addresses)
            for name, array in made.items():
                device.download(array, self._addresses[name])
            device.synchronize()
        return made


def fill_rows(array: Array, shape: Shape) -> Array:
    """`array`, its last row repeated until it has `shape`. Raises `EngineError` when other axes differ."""
    if array.shape == shape:
        return array
    if not shape or array.shape[1:] != shape[1:] or len(array) > shape[0]:
        raise EngineError(f"an input of shape {array.shape} cannot be made one of {shape}")
    return np.concatenate([array, np.repeat(array[-1:], shape[0] - len(array), axis=0)])
