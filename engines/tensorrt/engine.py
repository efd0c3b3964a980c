"""A component as plans of TensorRT or TensorRT for RTX, on one GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array
from ...common.errors import EngineError
from ..engine import DeviceArray, Engine, HostBinding
from ..gpu.gpu import CapturedLaunches, DeviceTensor, Gpu
from .loaded import Buffers, LoadedPlan, ShapedContext
from .plan import Plan, Shape, closest

_TOKENS = "sequence_length"
_MOST_CONTEXTS = 8
"""Sets of shapes of a component that are kept ready. A context holds some MB, and takes up to seconds to be made."""


class TensorRTEngine(Engine):
    """One component; see `engine.Engine` for the contract. Plans are loaded when shapes ask for them first.

    chosen: the plan that served last, None before. Rows are the first axis of the first input.
    """

    def __init__(
        self,
        component: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        plans: Sequence[Plan],
        gpu: Gpu,
        *,
        onnx: Path | None = None,
        weight_budget: int | None = None,
        on_plan: Callable[[Plan], None] | None = None,
    ) -> None:
        """plans: at least one; each is held against its hash when it is loaded. onnx: the weights of plans without any.

        weight_budget: bytes of weights on the GPU, for plans that stream them; TensorRT's own choice by default.
        on_plan: called with the plan that serves, when that changes.
        Raises `EngineError` when there is no plan, or one is of other inputs.
        """
        if not plans:
            raise EngineError(f"{component}: no plan was built for it: compile the bundle for this engine")
        super().__init__(component, inputs, outputs)
        self.gpu = gpu
        self.chosen: Plan | None = None
        self._on_plan = on_plan or (lambda plan: None)
        self._plans = list(plans)
        for plan in self._plans:
            if set(plan.profile.shapes) != {tensor.name for tensor in self.inputs}:
                raise EngineError(
                    f"{component}: the plan {plan.key} is of other inputs than the model: "
                    f"remove {plan.folder} and compile the bundle again"
                )
        self._onnx, self._weight_budget = onnx, weight_budget
        self._refitted: Path | None = None
        self._loaded: dict[str, LoadedPlan] = {}
        self._contexts: OrderedDict[tuple[str, tuple[Shape, ...]], ShapedContext] = OrderedDict()
        first = self.inputs[0].shape
        axis = first[0] if first else None
        self._by_row = tuple(t.name for t in self.inputs if t.shape and t.shape[0] == axis and isinstance(axis, str))
        self._tokens = {t.name: t.shape.index(_TOKENS) for t in self.inputs if _TOKENS in t.shape}
        self._rows_out = tuple(t.name for t in self.outputs if t.shape and t.shape[0] == axis and isinstance(axis, str))

    def to_device(self, array: Array) -> DeviceTensor:
        """See `engine.Engine`."""
        return self.gpu.to_device(array)

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """See `engine.Engine`: a CUDA graph, from the second call on."""
        return CapturedLaunches(self.gpu, launches, what)

    def padded_rows(self, shapes: Mapping[str, Shape]) -> int:
        """See `engine.Engine`: a plan for two rows takes one row with a second one beside it."""
        asked = self._rows_of(shapes)
        if asked is None:
            return 1
        least = {plan.profile.shapes[self._by_row[0]][0][0] for plan in self._plans}
        for rows in sorted({asked, *(count for count in least if count > asked)}):
            if any(plan.profile.takes(self._with_rows(shapes, rows)) for plan in self._plans):
                return rows
        return asked

    def refit(self, onnx: Path) -> None:
        """Take over the weights of `onnx`, a model with the same graph, in all plans, those loaded later included.

        Raises `EngineError` when a plan was built without the flag `refit`, or the weights do not fit.
        """
        fixed = [plan for plan in self._plans if "refit" not in plan.recipe.flags]
        if fixed:
            raise EngineError(
                f"{self.component}: the plan {fixed[0].key} ({fixed[0].profile.name}) cannot take other weights: "
                "compile it with refit"
            )
        with self.gpu.work():
            try:
                for loaded in self._loaded.values():
                    loaded.refit(onnx)
            except EngineError:  # some have the new weights, one may have a part of them
                for loaded in self._loaded.values():
                    loaded.spoil()
                self._contexts.clear()
                self._loaded.clear()
                raise
            self._refitted = onnx

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """More rows than any plan takes are run in parts."""
        with self.gpu.work():
            shapes, rows = self._padded(feeds)
            most = self._most_rows(shapes)
            if rows is not None and rows > most > 0 and len(self._rows_out) == len(self.outputs):
                parts = [self(self._part(feeds, slice(at, at + most))) for at in range(0, rows, most)]
                return {name: np.concatenate([part[name] for part in parts]) for name in self._rows_out}
            context = self._context(shapes)
            if context.buffers is None:
                context.buffers = Buffers(context)
            outputs = context.empty_outputs()
            context.buffers.run(context, feeds, outputs)
            return self._without_padding(outputs, rows)

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        """What changed is uploaded, what did not is left on the GPU."""
        with self.gpu.work():
            shapes, rows = self._padded(feeds)
            context = self._context(shapes)
            buffers = Buffers(context)
        arrays, outputs = dict(feeds), context.empty_outputs()
        asked_for = self._without_padding(outputs, rows)
        fresh = set(arrays)

        def run(*changed: str) -> dict[str, Array]:
            buffers.run(context, {name: arrays[name] for name in fresh.union(changed)}, outputs)
            fresh.clear()
            return asked_for

        return run

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> TensorRTDeviceBinding:
        """The inputs must have as many rows as `padded_rows` says."""
        own = self.gpu.own(self.component, (*self.inputs, *self.outputs), tensors)
        with self.gpu.work():
            context = self._context({tensor.name: own[tensor.name].shape for tensor in self.inputs})
        for tensor in self.outputs:
            found, made = own[tensor.name], context.outputs[tensor.name]
            if found.shape != made or found.dtype != np.dtype(tensor.dtype):
                raise EngineError(
                    f"{self.component}: output {tensor.name!r} is {tensor.dtype} of shape {made}, "
                    f"what was bound to it is {found.dtype} of shape {found.shape}"
                )
        return TensorRTDeviceBinding(context, own)

    def _context(self, shapes: Mapping[str, Shape]) -> ShapedContext:
        """The context of these shapes, made where there is none. Raises `EngineError` when no plan takes them."""
        plan = closest(self.component, self._plans, shapes, self._tokens)
        if plan is not self.chosen:
            self.chosen = plan
            self._on_plan(plan)
        key = (plan.key, tuple(shapes[tensor.name] for tensor in self.inputs))
        if key in self._contexts:
            self._contexts.move_to_end(key)
            return self._contexts[key]
        if plan.key not in self._loaded:
            self._loaded[plan.key] = self._load(plan)
        context = ShapedContext(self._loaded[plan.key], shapes)
        self._contexts[key] = context
        if len(self._contexts) > _MOST_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def _load(self, plan: Plan) -> LoadedPlan:
        loaded = LoadedPlan(
            plan,
            self.gpu,
            self.inputs,
            self.outputs,
            onnx=self._refitted or self._onnx,
            weight_budget=self._weight_budget,
        )
        if self._refitted is not None and "strip" not in plan.recipe.flags:
            loaded.refit(self._refitted)
        return loaded

    def _padded(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Shape], int | None]:
        """The shapes to run `feeds` with, and how many rows of the outputs were asked for."""
        shapes = {tensor.name: feeds[tensor.name].shape for tensor in self.inputs}
        asked = self._rows_of(shapes)
        return (shapes if asked is None else self._with_rows(shapes, self.padded_rows(shapes))), asked

    def _rows_of(self, shapes: Mapping[str, Shape]) -> int | None:
        """The rows asked for; a vector of one entry, which stands for all rows, does not count."""
        return max((shapes[name][0] for name in self._by_row), default=None)

    def _most_rows(self, shapes: Mapping[str, Shape]) -> int:
        """The most rows that a plan takes which takes the other axes of `shapes`; 0 when none does."""
        largest = ((plan.profile.shapes[self._by_row[0]][2][0], plan) for plan in self._plans if self._by_row)
        return max((rows for rows, plan in largest if plan.profile.takes(self._with_rows(shapes, rows))), default=0)

    def _part(self, feeds: Mapping[str, Array], rows: slice) -> dict[str, Array]:
        """Some rows of `feeds`; a vector of one entry stands for all of them."""
        return {
            name: array[rows] if name in self._by_row and len(array) > 1 else array for name, array in feeds.items()
        }

    def _with_rows(self, shapes: Mapping[str, Shape], rows: int) -> dict[str, Shape]:
        return {name: (rows, *shape[1:]) if name in self._by_row else shape for name, shape in shapes.items()}

    def _without_padding(self, outputs: Mapping[str, Array], rows: int | None) -> dict[str, Array]:
        return {name: array[:rows] if name in self._rows_out else array for name, array in outputs.items()}


class TensorRTDeviceBinding:
    """An engine that reads and writes tensors on its GPU; see `engine.DeviceBinding`."""

    def __init__(self, context: ShapedContext, tensors: Mapping[str, DeviceTensor]) -> None:
        self._context, self._tensors = context, dict(tensors)  # which hold their memory
        self._addresses = {name: tensor.address for name, tensor in tensors.items()}
        self._gpu = next(iter(tensors.values())).gpu

    def __call__(self) -> None:
        """Enqueue a run."""
        with self._gpu.work():
            self._context.enqueue(self._addresses)

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`: nothing is computed ahead."""
