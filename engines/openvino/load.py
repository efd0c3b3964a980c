"""The engine of a variant: its graphs, the one that the prompt alone decides in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import FULL, Bundle, Variant
from ...bundle.wiring import STEPPING
from ...common.errors import EngineError
from ..cache import EngineStore
from ..changed import NewValue
from ..engine import Engine
from ..split import SplitEngine
from .cache import Cache
from .compiled import Recipe
from .device import Device
from .engine import OpenVinoEngine
from .exact import waves, without_waves
from .norms import without_reshapes
from .upsample import in_one_convolution

_OF_PICTURES = ("encoder", "decoder")
"""Roles whose images are large beside their weights: there it pays to write their norms otherwise."""


def load_variant(
    bundle: Bundle,
    name: str,
    variant: Variant,
    *,
    provider: str,
    precision: str,
    threads: int,
    streams: int = 1,
    small: bool = False,
    changed: Mapping[Path, Sequence[NewValue]] | None = None,
) -> Engine:
    """The engine of a variant of component `name` on a device of OpenVINO.

    provider: a key of `device.DEVICES`. precision: of what is not in eight bits. changed: initializers that are others
    than in the files, by graph. For the rest see `compiled.Recipe`.
    Raises `EngineError` when OpenVINO or the device is not there, or the model cannot be read.
    """
    component, device = bundle.component(name), Device.open(provider, precision)
    recipe, whole = Recipe(precision, threads, streams, small), Recipe(FULL, threads, 1, small)
    rewrites = _rewrites(component.role, precision) if device.on_cpu else ()

    def load(
        graph: str,
        recipe: Recipe,
        label: str = "",
        part: Callable[[Any], Any] = lambda model: model,
        rewrites: Sequence[Callable[[Any], Any]] = (),
    ) -> Engine:
        store = EngineStore(bundle.root / "engines")
        label = ":".join([graph, *filter(None, [label]), *(rewrite.__name__ for rewrite in rewrites)])
        path = bundle.path(graph)
        own = (changed or {}).get(path, ())
        cache = None if bundle.foreign or own else Cache(store, name, variant.files, label)
        if own:
            part = partial(_with, changed=own, part=part)
        return OpenVinoEngine(path, name, device, recipe, component.inputs, component.outputs, cache, part, rewrites)

    steps = component.role in STEPPING
    timestep = _timestep(bundle) if steps and precision != FULL else ""
    if timestep and waves(device.core.read_model(str(bundle.path(variant.model))), timestep) is not None:
        made = load(variant.model, whole, "waves", partial(waves, timestep=timestep))
        rest = load(variant.model, recipe, "rest", partial(without_waves, timestep=timestep), rewrites)
        per_step: Engine = SplitEngine(name, made, rest, each_call=True)
    else:
        per_step = load(variant.model, recipe, rewrites=rewrites)
    if not variant.per_prompt:
        return per_step
    return SplitEngine(name, load(variant.per_prompt, whole), per_step)


def _with(model: Any, changed: Sequence[NewValue], part: Callable[[Any], Any]) -> Any:
    """What `part` makes of `model` with other values of initializers, which keep their names in it."""
    from openvino import Tensor, op

    constants = {each.get_friendly_name(): each for each in model.get_ops() if each.get_type_name() == "Constant"}
    for each in changed:
        old = constants.get(each.initializer.name)
        if old is None:
            raise EngineError(
                f"OpenVINO folded {each.initializer.name}, so that it cannot be changed: use the engine onnxruntime"
            )
        kind = old.get_output_element_type(0)
        half = each.value.dtype == np.uint16  # bfloat16, which NumPy has not
        new = op.Constant(Tensor(each.value, each.value.shape, kind) if half else each.value, shared_memory=False)
        new.set_friendly_name(each.initializer.name)
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(new.output(0))
    return part(model)


def _rewrites(role: str, precision: str) -> tuple[Callable[[Any], Any], ...]:
    """What makes a model of this role faster on a processor; each gives the same numbers but for rounding."""
    norms = (without_reshapes,) if role in _OF_PICTURES and precision == FULL else ()
    return in_one_convolution, *norms


def _timestep(bundle: Bundle) -> str:
    """The name of the denoiser's input that takes the timestep."""
    inputs = bundle.manifest.wiring.inputs.items()
    return next((name for name, source in inputs if source.startswith("timestep")), "")
