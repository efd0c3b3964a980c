"""Which table a request gets, of our samplers or read off a scheduler by `compile`, and the part of it that it runs."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..common.errors import BundleError, RequestError
from .request import Request
from .schedulers import SAMPLERS, Steps, Table, find_sampler, flowing, is_known, make_table
from .schedulers.config import Config, train_steps
from .schedulers.consistency import lcm, tcd
from .schedulers.flow_match import SHIFT, flow_euler, flow_lcm, shift_of
from .schedulers.forecast import with_forecasts
from .schedulers.stored import TRACED, load_table

_TRACED = re.compile(rf"scheduler/{TRACED}/(?P<name>\w+)/(?P<count>\d+)\.json")
_CONFIG = "scheduler/scheduler_config.json"
_TRAIN_STEPS = "num_train_timesteps"
_OF_FLOW = ("use_flow_sigmas", "prediction_type")
_MOST_TABLES = 256
_OF_OTHERS = ("ddim-inverse", "edm-", "flow-", "ipndm")
"""How the names of schedulers begin that are no use to a model that predicts noise, unless one is its own."""
_STRENGTH = {"img2img": 0.8, "inpaint": 1.0}


class Schedules:
    """The scheduler configuration of a bundle, and the tables that lie in it."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises `BundleError` when the configuration cannot be read or was changed."""
        bundle.check({_CONFIG} & set(bundle.manifest.files))
        self._bundle = bundle
        self.config = bundle.scheduler_config()
        self._made = lru_cache(_MOST_TABLES)(self._make)
        self.traced: dict[str, dict[int, str]] = {}
        for path in bundle.manifest.files:
            found = _TRACED.fullmatch(path)
            if found:
                self.traced.setdefault(found["name"], {})[int(found["count"])] = path

    def named(self, name: str | None) -> str:
        """The name that asks for the scheduler `name` again; None is the configuration's own.

        Raises `RequestError` for one that neither we nor the bundle have, suggesting the nearest.
        """
        wanted = str(self.config.get("_class_name")) if name is None else str(name)
        if wanted in self.traced and not is_known(wanted):
            return wanted
        try:
            return find_sampler(self.config, name)[0]
        except RequestError as error:
            if not self.traced:
                raise
            raise RequestError(f"{error}; traced in this bundle: {', '.join(self.traced)}") from None

    @property
    def train_steps(self) -> int:
        """The timesteps that the model was trained with. Raises `BundleError` when the configuration has none."""
        try:
            return train_steps(Config({name: self.config[name] for name in self.config if name == _TRAIN_STEPS}))
        except RequestError as error:
            raise BundleError(f"{error}: compile the bundle again") from None

    @property
    def usable(self) -> list[str]:
        """The names of schedulers that this model can be drawn with, in its own number of steps.

        Those of models of another kind are left out, where a configuration does not refuse them.
        """
        manifest, found, own = self._bundle.manifest, [], str(self.config.get("_class_name"))
        for name in (*SAMPLERS, *self.traced):
            others = manifest.wiring.flow is None and name.startswith(_OF_OTHERS)
            if others and SAMPLERS[name].class_name != own:
                continue
            with contextlib.suppress(RequestError):
                self.of(Request(scheduler=name), (manifest.default_width, manifest.default_height))
                found.append(name)
        return found

    def strength(self, task: str) -> float:
        """How much of the schedule is run for `task` where a request does not say."""
        flow = self._bundle.manifest.wiring.flow
        return _STRENGTH.get(task, 1.0) if flow is None else flow.usual_strength(task)

    def of(self, request: Request, size: tuple[int, int]) -> tuple[Table, int, int]:
        """The calls that a request makes, the steps of the whole schedule, and those of them that it runs.

        size: width and height of the picture in pixels. Raises `RequestError`.
        """
        manifest, name = self._bundle.manifest, request.scheduler
        count = manifest.default_steps if request.steps is None else request.steps
        asked = Steps(count, timesteps=request.timesteps, sigmas=request.sigmas)
        asked = self.for_size(asked, size, request.task, name, request.scheduler_options)

        def make(steps: Steps) -> Table:
            return self.table(steps, request.task, name, request.scheduler_options)

        if request.timesteps is not None or request.sigmas is not None:
            asked = replace(asked, count=make(asked).steps)
        by_strength = (
            manifest.wiring.strength_by_sampler
            and is_known(self.named(name))
            and find_sampler(self.config, name)[1].table in (lcm, tcd)
        )
        wiring, usual = manifest.wiring, self.strength(request.task)
        if request.image is None or wiring.edits:
            strength = None
        else:
            strength = usual if request.strength is None else request.strength
        table = _part(
            request, asked, make, self.train_steps, strength, by_strength=by_strength, flows=wiring.flow is not None
        )
        run = round(asked.count * table.steps / make(asked).steps)  # a step of some samplers makes two calls
        if request.forecast:
            if make(asked).steps != asked.count:
                raise RequestError("a forecast needs a scheduler with one model call a step, as euler: leave it out")
            table = with_forecasts(table)
        return table, asked.count, run

    def for_size(
        self, steps: Steps, size: tuple[int, int], task: str, name: str | None, options: Mapping[str, Any]
    ) -> Steps:
        """`steps` as a pipeline of flow matching asks for them, others as they are; see `bundle.wiring.Flow`.

        size: width and height of the picture in pixels. options: see `table`. Raises `RequestError`.
        """
        manifest = self._bundle.manifest
        flow = manifest.wiring.flow
        if flow is None or not is_known(self.named(name)):
            return steps
        config = {**self._config(task, name), **options}
        if config.get("use_dynamic_shifting") and options.get("mu") is None:
            width, height = (side // manifest.latents.downscale // flow.patch for side in size)
            steps = replace(steps, mu=shift_of({"max_shift": flow.max_shift, **config}, width * height))
        own = find_sampler(self.config, name)[1].table in (flow_euler, flow_lcm)
        if flow.even and own and steps.sigmas is None and steps.timesteps is None:
            steps = replace(steps, sigmas=tuple(np.linspace(1.0, 1 / steps.count, steps.count).tolist()))
        return steps

    def table(
        self, steps: Steps, task: str, name: str | None = None, options: Mapping[str, Any] | None = None
    ) -> Table:
        """The table of the scheduler `name` for `task`, made once. Raises `RequestError`; see `make_table`.

        options: plain JSON values.
        """
        return self._made(steps, task, name, json.dumps(options or {}, sort_keys=True))

    def _config(self, task: str, name: str | None) -> dict[str, Any]:
        """The configuration as the pipeline class of `task` changes it.

        What the file leaves to its class is not handed on to another scheduler, whether the pipeline changed it or not.
        """
        changes = self._bundle.manifest.scheduler.get(task, {})
        absent = self.config.get("_use_default_values")
        stated = set(self.config) - set(absent if isinstance(absent, list) else ())
        return {**self.config, **{key: value for key, value in changes.items() if name is None or key in stated}}

    def _make(self, steps: Steps, task: str, name: str | None, options_json: str) -> Table:
        known, options = self.named(name), json.loads(options_json)
        if is_known(known):
            config = self._config(task, name)
            if self._bundle.manifest.wiring.flow is not None:
                config = flowing({**config, **options}, name)
                fixed = [key for key in _OF_FLOW if key in options and options[key] != config.get(key)]
                if fixed:
                    raise RequestError(f"{fixed[0]} is what the model was trained for: leave it out")
                if steps.mu is not None:  # made of these
                    options = {key: value for key, value in options.items() if key not in SHIFT}
            return make_table(config, steps, name, options)
        counts = self.traced[known]
        plain = not steps.start and steps.timesteps is None and steps.sigmas is None and not options
        if not plain or steps.count not in counts:
            asked = f"{steps.count} steps" if plain else "options, a start or a schedule of its own"
            raise RequestError(
                f"{known} was traced for {', '.join(map(str, sorted(counts)))} steps, it cannot make {asked}: "
                "compile the bundle again with the --steps you need, or choose another --scheduler"
            )
        path = counts[steps.count]
        self._bundle.check([path])
        return load_table(self._bundle.path(path))


def _part(
    request: Request,
    steps: Steps,
    make: Callable[[Steps], Table],
    train_steps: int,
    strength: float | None,
    *,
    by_strength: bool,
    flows: bool,
) -> Table:
    """The part of the schedule that the request runs. Raises `RequestError` when nothing of it is left.

    by_strength: the model's sampler takes the strength itself and makes all the steps asked for (consistency models).
    strength: None where it starts from noise. flows: whether it is a model of flow matching, whose pipelines run the
    step that a strength lies within, too.
    """
    table = make(steps)

    def calls_before(part: float) -> int:
        """The calls whose timesteps lie before this part of the schedule."""
        return int((table.timesteps >= round(train_steps - part * train_steps)).sum())

    if request.denoising_start is not None:
        before = calls_before(request.denoising_start)
        if before == table.steps:
            raise RequestError(
                f"denoising_start {request.denoising_start:g} leaves no step of {steps.count}: add steps"
            )
        of_first = table.steps - make(replace(steps, start=1)).steps if before else 1
        if before >= of_first:  # of a step of two calls, both or none
            table = make(replace(steps, start=before // of_first))
    elif strength is not None:
        kept = min(int(steps.count * strength), steps.count)
        if flows:
            kept = steps.count - int(steps.count - min(steps.count * strength, steps.count))
        if by_strength and request.task == "img2img" and steps.timesteps is None:
            table = make(replace(steps, strength=strength))
        elif kept < 1:
            least = math.ceil(1000 / steps.count) / 1000
            raise RequestError(
                f"strength {strength:g} leaves no step of {steps.count}: raise it to {least:g} or more, or add steps"
            )
        elif kept < steps.count:
            table = make(replace(steps, start=steps.count - kept))
    if request.denoising_end is not None:
        calls = calls_before(request.denoising_end)
        if not calls:
            raise RequestError(f"denoising_end {request.denoising_end:g} leaves no step of {steps.count}: add steps")
        table = table.until(calls)
    return table
