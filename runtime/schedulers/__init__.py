"""Samplers as data: each function turns a `scheduler_config.json` and a step count into a `Table`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...bundle import RequestError
from .config import Config
from .ddim import ddim
from .ddpm import ddpm
from .dpm_solver import dpm_solver_pp_2m
from .euler import euler
from .lcm import lcm
from .table import Table

__all__ = ["SAMPLERS", "Sampler", "Table", "find_sampler", "make_table"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler: its table function, the diffusers class it stands for, and the options that its name fixes."""

    table: Callable[[Config, int], Table]
    class_name: str
    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, "DDIMScheduler", "Song et al. 2021, deterministic"),
    "ddpm": Sampler(ddpm, "DDPMScheduler", "Ho et al. 2020, stochastic"),
    "euler": Sampler(euler, "EulerDiscreteScheduler", "Karras et al. 2022, algorithm 2, deterministic"),
    "dpm++2m": Sampler(
        dpm_solver_pp_2m,
        "DPMSolverMultistepScheduler",
        "Lu et al. 2022, second-order multistep, deterministic",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "lcm": Sampler(lcm, "LCMScheduler", "Luo et al. 2023, few steps with a consistency-distilled model"),
}


def find_sampler(config: Config, name: str | None) -> tuple[str, Sampler]:
    """The sampler called `name`, under the name that asks for it again.

    A short name fixes the options it stands for; a diffusers class name, and the class of the config itself when
    `name` is None, leaves them to the config. Raises `RequestError` suggesting the nearest name.
    """
    by_class = {sampler.class_name: sampler for sampler in SAMPLERS.values()}
    known = ", ".join(SAMPLERS)
    if name is None:
        own = str(config.get("_class_name", ""))
        if own not in by_class:
            raise RequestError(
                f"the bundle's own scheduler {own or '(none)'} is not supported: add --scheduler with one of {known}"
            )
        return own, by_class[own]
    if isinstance(name, str) and name in by_class:
        return name, by_class[name]
    if isinstance(name, str) and name.lower() in SAMPLERS:
        return name.lower(), SAMPLERS[name.lower()]
    near = difflib.get_close_matches(str(name).lower(), [*SAMPLERS, *by_class], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RequestError(f"unknown scheduler {name!r}: {hint}the schedulers are {known}")


def make_table(config: Config, steps: int, name: str | None = None) -> Table:
    """The table of `steps` steps of the sampler `name` (default: the config's own) under `config`.

    Raises `RequestError` for an option that is not supported, a damaged config, or more steps than it has.
    """
    key, sampler = find_sampler(config, name)
    try:
        with np.errstate(all="ignore"):
            table = sampler.table({**config, **(sampler.fixed if key in SAMPLERS else {})}, steps)
    except (TypeError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
        raise RequestError(f"the scheduler configuration is damaged ({error}): compile the bundle again") from None
    if not all(np.isfinite(part).all() for part in (table.A, table.b, table.c, table.d, table.x0, table.input_scale)):
        raise RequestError(f"{key} has no {steps} distinct steps under this configuration: ask for fewer --steps")
    return table
