"""A denoiser with the controls that act in it, as one engine: residuals stay on the device that they are made on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from ..bundle import Tensor
from ..bundle.wiring import SCALE
from ..common.arrays import Array
from ..common.errors import EngineError
from ..families.control import MOST_SLOTS, halved, slot
from .engine import DeviceArray, DeviceBinding, Engine, HostBinding


def input_name(component: str, name: str) -> str:
    """The input of a `ControlledEngine` that is the input `name` of one control alone.

    Those are what the plain denoiser does not take; the others are shared with it.
    """
    return f"{component}.{name}"


def slots(takes: Collection[str], made: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, str]] | None:
    """For each control the inputs of the denoiser that take its residuals, None where there are too few.

    takes: the inputs of the denoiser. made: the outputs of each control.
    """
    free, found = set(takes), {}
    for name, outputs in made.items():
        ways = [{tensor.name: slot(tensor.name, k) for tensor in outputs} for k in range(MOST_SLOTS)]
        taken = next((way for way in ways if free.issuperset(way.values())), None)
        if taken is None:
            return None
        found[name] = taken
        free -= set(taken.values())
    return found


class ControlledEngine(Engine):
    """The residuals of all controls, summed, go into the denoiser. A residual that none makes is zero.

    Its inputs are those of the plain denoiser, and for each control `component.controlnet_cond`, a picture,
    `component.scale`, a factor for each residual, and what it takes beside these. On the host a control whose scales
    are all zero is not run. The denoiser takes the residuals of a few controls of a kind as inputs of their own, so
    that nothing has to be added up outside of it; those of more are, on the host.
    """

    def __init__(self, denoiser: Engine, controls: Mapping[str, Engine], plain: Collection[str]) -> None:
        """controls: by their components. plain: the inputs of the denoiser that are no residuals."""
        self._denoiser, self._controls = denoiser, dict(controls)
        self._residuals = [tensor for tensor in denoiser.inputs if tensor.name not in plain]
        known = {tensor.name for tensor in self._residuals}
        shared = {tensor.name for tensor in denoiser.inputs if tensor.name in plain}
        inputs = [tensor for tensor in denoiser.inputs if tensor.name in shared]
        for name, control in self._controls.items():
            if not {tensor.name for tensor in control.outputs} <= known:
                raise EngineError(f"{name} and {denoiser.component} do not fit together: compile the bundle again")
            inputs += [
                Tensor(input_name(name, tensor.name), tensor.dtype, tensor.shape)
                for tensor in control.inputs
                if tensor.name not in shared
            ]
        self._names = {
            name: {
                tensor.name: tensor.name if tensor.name in shared else input_name(name, tensor.name)
                for tensor in control.inputs
            }
            for name, control in self._controls.items()
        }
        self._taken = slots(
            {tensor.name for tensor in self._residuals}, {name: each.outputs for name, each in self._controls.items()}
        )
        self.binds_device = self._taken is not None
        super().__init__(denoiser.component, inputs, denoiser.outputs)

    def to_device(self, array: Array) -> DeviceArray:
        """See `engine.Engine`."""
        return self._denoiser.to_device(array)

    def padded_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `engine.Engine`."""
        return self._denoiser.padded_rows(shapes)

    def capture(self, launches: Callable[[], None], what: str = "") -> Callable[[], None]:
        """See `engine.Engine`."""
        return self._denoiser.capture(launches, what)

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        residuals = self._zeros(feeds)
        for name, control in self._controls.items():
            for residual, array in control(self._of(name, feeds)).items():
                residuals[self._input(name, residual)] += array
        return self._denoiser({**self._shared(feeds), **residuals})

    def _bind_host(self, feeds: Mapping[str, Array], twice: Collection[str]) -> HostBinding:
        return _HostBinding(self, feeds, twice)

    def _bind_device(self, tensors: Mapping[str, DeviceArray]) -> DeviceBinding:
        if self._taken is None:
            raise EngineError(f"{self.component}: so many controls run with the loop on the host: use the loop 'host'")
        return _DeviceBinding(self, tensors)

    def _input(self, name: str, residual: str) -> str:
        """The input of the denoiser that this residual of a control goes to; of too many, that of all others."""
        return residual if self._taken is None else self._taken[name][residual]

    def _zeros(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """A residual of zeros for each that the denoiser takes."""
        sample = self._denoiser.inputs[0]
        sizes = {str(axis): size for axis, size in zip(sample.shape, feeds[sample.name].shape, strict=True)}
        sizes |= halved(sizes)
        return {
            tensor.name: np.zeros(
                [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape], tensor.dtype
            )
            for tensor in self._residuals
        }

    def _of(self, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of a control, by its own names."""
        return {own: feeds[outer] for own, outer in self._names[name].items()}

    def _of_device(self, name: str, tensors: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        return {own: tensors[outer] for own, outer in self._names[name].items()}

    def _shared(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of the denoiser but the residuals."""
        return {tensor.name: feeds[tensor.name] for tensor in self._denoiser.inputs if tensor.name in feeds}


class _HostBinding:
    """Of one control the denoiser reads the arrays that it writes; of several, their sums."""

    def __init__(self, engine: ControlledEngine, feeds: Mapping[str, Array], twice: Collection[str]) -> None:
        self._engine, self._names = engine, engine._names
        self._residuals = engine._zeros(feeds)
        self._scales = {name: feeds[input_name(name, SCALE)] for name in engine._controls}
        self._controls = {
            name: control.bind_host(engine._of(name, feeds), [own for own in self._names[name] if own in twice])
            for name, control in engine._controls.items()
        }
        self._waiting = {name: set[str]() for name in engine._controls}
        self._denoiser = engine._denoiser.bind_host({**engine._shared(feeds), **self._residuals}, twice)

    def __call__(self, *changed: str) -> dict[str, Array]:
        made: list[dict[str, Array]] = []
        for name, control in self._controls.items():
            self._waiting[name].update(own for own, outer in self._names[name].items() if outer in changed)
            if self._scales[name].any():
                given = control(*self._waiting[name])
                made.append({self._engine._input(name, residual): array for residual, array in given.items()})
                self._waiting[name] = set()
        for residual, array in self._residuals.items():
            arrays = [each[residual] for each in made if residual in each]
            try:
                if arrays:
                    np.copyto(array, arrays[0])
                else:
                    array.fill(0)
                for more in arrays[1:]:
                    array += more
            except ValueError:
                raise EngineError(
                    f"{self._engine.component} takes {residual} of shape {array.shape}, a control gives it of "
                    f"{', '.join(str(each.shape) for each in arrays)}: compile the bundle again with controls that "
                    "were made for this model"
                ) from None
        return self._denoiser(*changed, *self._residuals)


class _DeviceBinding:
    """Each control writes tensors that the denoiser reads; those that none writes are zero."""

    def __init__(self, engine: ControlledEngine, tensors: Mapping[str, DeviceArray]) -> None:
        sample = engine._denoiser.inputs[0].name
        zeros = engine._zeros({sample: np.broadcast_to(np.zeros((), tensors[sample].dtype), tensors[sample].shape)})
        residuals = {residual: engine.to_device(array) for residual, array in zeros.items()}
        self._controls = []
        for name, control in engine._controls.items():
            made = {tensor.name: residuals[engine._input(name, tensor.name)] for tensor in control.outputs}
            self._controls.append(
                (engine._names[name], control.bind_device({**engine._of_device(name, tensors), **made}))
            )
        self._denoiser = engine._denoiser.bind_device({**tensors, **residuals})

    def __call__(self) -> None:
        """See `engine.DeviceBinding`."""
        for _, control in self._controls:
            control()
        self._denoiser()

    def refresh(self, *changed: str) -> None:
        """See `engine.DeviceBinding`."""
        for names, control in self._controls:
            control.refresh(*(own for own, outer in names.items() if outer in changed))
        self._denoiser.refresh(*changed)
