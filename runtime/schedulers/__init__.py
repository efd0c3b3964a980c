"""Samplers as data: each function turns a `scheduler_config.json` and a step count into a `Table`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    """The sampler called `name` (or by its diffusers class); without a name, the one `config` was written for.

    Raises `RequestError` suggesting the nearest name.
    """
    by_class = {sampler.class_name: key for key, sampler in SAMPLERS.items()}
    asked = name or str(config.get("_class_name", ""))
    key = by_class.get(asked, asked.lower() if name else asked)
    if key in SAMPLERS:
        return key, SAMPLERS[key]
    known = ", ".join(SAMPLERS)
    if name is None:
        raise RequestError(
            f"the bundle's own scheduler {asked or '(none)'} is not supported: add --scheduler with one of {known}"
        )
    near = difflib.get_close_matches(key, [*SAMPLERS, *by_class], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RequestError(f"unknown scheduler {name!r}: {hint}the schedulers are {known}")


def make_table(config: Config, steps: int, name: str | None = None) -> Table:
    """The table of `steps` steps of the sampler `name` (default: the config's own) under `config`."""
    _, sampler = find_sampler(config, name)
    return sampler.table({**config, **(sampler.fixed if name else {})}, steps)
