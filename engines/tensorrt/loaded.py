"""A plan that is loaded on a GPU: its engine, its execution contexts, and the buffers that feed one from the host."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError
from ...common.files import replacing
from ..gpu.device import REMEDY
from ..gpu.gpu import DeviceTensor, Gpu
from .backend import BACKENDS, Log
from .plan import CACHE_NAME, Plan, Shape

_MOST_NAMED = 8
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|memory .*could not be allocated|not enough free memory", re.I)
"""What TensorRT says when a GPU has not enough memory."""


class LoadedPlan:
    """The engine of a plan; contexts of it share one runtime cache, where the module has such.

    cache_taken: whether what was compiled for this GPU before was taken over.
    """

    def __init__(
        self,
        plan: Plan,
        gpu: Gpu,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        onnx: Path | None = None,
        weight_budget: int | None = None,
    ) -> None:
        """inputs, outputs: those that it must have. onnx: the weights of a plan that was stripped of them.

        weight_budget: bytes of weights to be held on the GPU, for a plan with the flag `weight-streaming`; by default
        TensorRT chooses. Raises `EngineError` when the plan does not load or is not of these tensors.
        """
        backend = BACKENDS[plan.recipe.backend]
        self.plan, self.gpu = plan, gpu
        self.dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in (*inputs, *outputs)}
        self.outputs = [tensor.name for tensor in outputs]
        self.spoiled = self.cache_taken = False
        self.trt = backend.load()
        if backend.name not in gpu.kept:  # it has one logger in a process, whatever its objects were made with
            gpu.kept[backend.name] = Log(self.trt)
        self.log: Log = gpu.kept[backend.name]
        self._runtime = self.trt.Runtime(self.log.logger)
        if "version-compatible" in plan.recipe.flags:
            self._runtime.engine_host_code_allowed = True  # such plans bring their own runtime
        self.engine = self._deserialize()
        self._check_tensors()
        if "strip" in plan.recipe.flags:
            if onnx is None:
                raise EngineError(
                    f"{plan.component}: its plan holds no weights, and there is no ONNX model to take them of"
                )
            self.refit(onnx)
        if "weight-streaming" in plan.recipe.flags:
            self._stream_weights(weight_budget)
        self._written = b""
        self._config, self._cache = self._make_config()

    def context(self) -> Any:
        """A new execution context, without memory for activations. Raises `EngineError`."""
        self.log.errors.clear()
        how = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED if self._config is None else self._config
        context = self.engine.create_execution_context(how)
        if context is None:
            raise self.failed("no execution context could be made")
        return context

    def refit(self, onnx: Path) -> None:
        """Take over the weights of `onnx`, a model of the same graph. Contexts stay as they are.

        Raises `EngineError` naming what does not fit. A part of the weights may be changed then: load the plan anew.
        """
        with self.gpu.work() as device:
            device.synchronize()  # nothing may be running in it
            self._refit(onnx)
            self.gpu.invalidate_graphs()

    def spoil(self) -> None:
        """Let no context run it again: its weights may be those of two models."""
        self.spoiled = True
        self.gpu.invalidate_graphs()

    def keep_cache(self) -> None:
        """Write what was compiled for this GPU beside the plan, if it is more than before; on a read-only disk not."""
        if self._cache is None:
            return
        made = bytes(self._cache.serialize())
        digest = hashlib.sha256(made).digest()
        if digest == self._written:
            return
        self._written = digest
        with contextlib.suppress(OSError), replacing(self.plan.folder / CACHE_NAME) as beside:
            beside.write_bytes(made)

    def failed(self, what: str) -> EngineError:
        """The error to raise when TensorRT could not do something, with the reason it gave."""
        why = self.log.why()
        memory = f": {REMEDY}" if _OUT_OF_MEMORY.search(why) else ""
        return EngineError(f"{self.plan.component}: {what}: {why}{memory}")

    def _refit(self, onnx: Path) -> None:
        component, trt, log = self.plan.component, self.trt, self.log
        if not onnx.is_file():
            raise EngineError(
                f"{component}: {onnx}, whose weights its plan is to have, is missing; compile the bundle again"
            )
        log.errors.clear()
        refitter = trt.Refitter(self.engine, log.logger)
        parser = trt.OnnxParserRefitter(refitter, log.logger)
        fits = parser.refit_from_file(str(onnx))
        missing = sorted(name for name in refitter.get_missing_weights() if name)
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            named = ", ".join(missing[:_MOST_NAMED]) + more
            raise EngineError(f"{component}: {onnx} lacks weights that its plan has: {named}; is it another model?")
        if not fits:
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(f"{component}: the weights of {onnx} do not fit its plan: {log.why(*reasons)}")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"{component}: TensorRT did not take the weights of {onnx}: {log.why()}")

    def _deserialize(self) -> Any:
        plan = self.plan
        plan.check()
        self.log.errors.clear()
        try:
            with plan.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = self._runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise EngineError(f"{plan.component}: the plan {plan.path} cannot be read ({error})") from None
        if engine is not None:
            return engine
        recipe = plan.recipe
        built_for = recipe.device or ", ".join(recipe.archs)
        raise self.failed(
            f"the plan {plan.key} does not load: it was built by {recipe.backend} {recipe.version} for {built_for}, "
            f"this is {self.trt.__version__} on {self.gpu.device.name} ({self.gpu.device.arch}): "
            f"remove {plan.folder} and compile the bundle again"
        )

    def _check_tensors(self) -> None:
        found: dict[str, np.dtype[np.generic]] = {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            with contextlib.suppress(TypeError):  # a type that NumPy has not is in no bundle
                found[name] = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
        if found != self.dtypes:
            wrong = sorted(name for name in {*found, *self.dtypes} if found.get(name) != self.dtypes.get(name))
            raise EngineError(
                f"{self.plan.component}: the plan {self.plan.key} and the model do not agree on "
                f"{', '.join(wrong)}: remove {self.plan.folder} and compile the bundle again"
            )

    def _stream_weights(self, budget: int | None) -> None:
        engine = self.engine
        budget = engine.get_weight_streaming_automatic_budget() if budget is None else budget
        budget = min(budget, engine.streamable_weights_size)
        self.log.errors.clear()
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:
            raise self.failed(f"{budget} bytes cannot be the budget of its weights")

    def _make_config(self) -> tuple[Any, Any]:
        """How contexts are made: TensorRT for RTX has an object for it, and a cache of what it compiles."""
        if not hasattr(self.engine, "create_runtime_config"):
            return None, None
        trt, config, cache = self.trt, self.engine.create_runtime_config(), None
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "CudaGraphStrategy"):
            # launches are captured here, whole loops at once
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # a context keeps its shapes here; kernels that come later would not be in what was captured
            strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = strategy
        if hasattr(config, "create_runtime_cache"):
            cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                kept = (self.plan.folder / CACHE_NAME).read_bytes()
                self.cache_taken = bool(kept) and cache.deserialize(kept)  # not of another GPU or driver
                self._written = hashlib.sha256(kept).digest() if self.cache_taken else b""
            config.set_runtime_cache(cache)  # it does not own the cache: this object does
        return config, cache


class ShapedContext:
    """A context whose input shapes stay, so that what was captured of it stays true. outputs: the shapes it makes."""

    def __init__(self, loaded: LoadedPlan, shapes: Mapping[str, Shape]) -> None:
        """Raises `EngineError` when the plan does not take `shapes` or the GPU has no memory for it."""
        self.loaded, self.inputs = loaded, dict(shapes)
        self._context = loaded.context()
        self._generation = -1
        self._addresses: Mapping[str, int] | None = None
        self._ran = False
        loaded.log.errors.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise loaded.failed(f"its plan does not take the shape {shape} for {name!r}")
        unknown = self._context.infer_shapes()
        self.outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in loaded.outputs}
        if unknown or any(axis < 0 for shape in self.outputs.values() for axis in shape):
            raise loaded.failed("the shapes of its outputs do not follow from those of its inputs")
        # of these shapes; where TensorRT cannot tell, of the largest that the plan takes
        self._need = self._context.update_device_memory_size_for_shapes() or self._largest_need()
        self.buffers: Buffers | None = None
        self._lend_memory()

    def empty_outputs(self) -> dict[str, Array]:
        """Arrays of the host for its outputs."""
        return {name: np.empty(shape, self.loaded.dtypes[name]) for name, shape in self.outputs.items()}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueue a run that reads and writes at `addresses`, a mapping that is not changed later.

        Call it inside `Gpu.work`. Raises `EngineError` when TensorRT refuses.
        """
        if self.loaded.spoiled:
            component = self.loaded.plan.component
            raise EngineError(f"{component}: other weights were taken over in part: run it again to load its own")
        self._lend_memory()
        if addresses is not self._addresses:
            self._addresses = None
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self.loaded.failed(f"no address can be given to {name!r}")
            self._addresses = addresses
        if not self._context.execute_async_v3(self.loaded.gpu.device.stream):
            raise self.loaded.failed("TensorRT did not run it")
        if not self._ran:
            self._ran = True
            self.loaded.keep_cache()

    def _lend_memory(self) -> None:
        loaded = self.loaded
        arena, errors, component = loaded.gpu.arena, loaded.log.errors, loaded.plan.component
        errors.clear()
        arena.grow(self._need, component)
        if self._generation == arena.generation:
            return
        self._context.set_device_memory(arena.address, arena.size)
        if errors and arena.size < self._largest_need():
            errors.clear()
            self._need = self._largest_need()
            arena.grow(self._need, component)
            self._context.set_device_memory(arena.address, arena.size)
        if errors:
            raise loaded.failed(f"TensorRT did not take {arena.size} bytes for its activations")
        self._generation = arena.generation

    def _largest_need(self) -> int:
        return int(self.loaded.engine.get_device_memory_size_for_profile_v2(0))


class Buffers:
    """Tensors on the GPU for the inputs and outputs of a context that is fed from the host and read there."""

    def __init__(self, context: ShapedContext) -> None:
        """Raises `EngineError` when there is no memory for them."""
        loaded = context.loaded
        purpose = f"the inputs and outputs of {loaded.plan.component}"
        self._tensors = {
            name: DeviceTensor(loaded.gpu, shape, loaded.dtypes[name], purpose)
            for name, shape in (context.inputs | context.outputs).items()
        }
        self._addresses = {name: tensor.address for name, tensor in self._tensors.items()}

    def run(self, context: ShapedContext, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Upload `feeds`, run `context`, and write its outputs into the arrays `outputs`.

        A feed with fewer rows than its input, one row for all included, is filled up with its last row.
        """
        with context.loaded.gpu.work() as device:
            sent = {name: _filled(array, context.inputs[name]) for name, array in feeds.items()}
            for name, array in sent.items():
                device.upload(self._addresses[name], array)
            context.enqueue(self._addresses)
            for name, array in outputs.items():
                device.download(array, self._addresses[name])
            device.synchronize()


def _filled(array: Array, shape: Shape) -> Array:
    """`array`, contiguous, its last row repeated until it has `shape`."""
    if array.shape == shape:
        return np.asarray(array, order="C")
    return np.concatenate([array, np.repeat(array[-1:], shape[0] - len(array), axis=0)])
