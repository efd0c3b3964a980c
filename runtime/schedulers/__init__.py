"""Samplers as data: each function turns a `scheduler_config.json` and the steps asked for into a `Table`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ...common.errors import RequestError, reason
from .config import Config, short, train_steps
from .consistency import lcm, tcd
from .ddpm import ddim, ddim_inverse, ddpm
from .dpm_solver import deis, dpm_multistep, dpm_singlestep
from .edm import edm_dpm_solver, edm_euler
from .flow_match import flow_euler, flow_heun, flow_lcm
from .karras import euler, euler_ancestral, heun, kdpm2, lms
from .pndm import ipndm, pndm
from .predictor_corrector import sa_solver, unipc
from .spacing import trailing_remedy
from .table import ARRAYS, Steps, Table

__all__ = [
    "SAMPLERS",
    "STEP_ARGUMENTS",
    "Sampler",
    "Steps",
    "Table",
    "find_sampler",
    "flowing",
    "is_known",
    "make_table",
]


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler: its table function, the diffusers class it stands for, its paper and what it is, and its options.

    fixed: options that the name stands for.
    """

    table: Callable[[Config, Steps], Table]
    class_name: str
    paper: str
    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)


STEP_ARGUMENTS = frozenset(["eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order"])
"""Options that diffusers takes as arguments of `step`, not from a configuration."""
_LONGEST_REASON = 200
_LONGEST_NAME = 60
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPM_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_DPM_2M_SDE = _DPM_2M | {"algorithm_type": "sde-dpmsolver++"}
_DPM_3 = {"algorithm_type": "dpmsolver++", "solver_order": 3}
_DPM2M = _DPM_2M | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_OF_IMAGE = {"algorithm_type": "data_prediction"}

_EULER = partial(Sampler, euler, "EulerDiscreteScheduler", "Karras et al. 2022")
_HEUN = partial(Sampler, heun, "HeunDiscreteScheduler", "Karras et al. 2022")
_LMS = partial(Sampler, lms, "LMSDiscreteScheduler", "Bashforth and Adams 1883")
_KDPM2 = partial(Sampler, kdpm2, "KDPM2DiscreteScheduler", "Lu et al. 2022")
_KDPM2_A = partial(Sampler, partial(kdpm2, ancestral=True), "KDPM2AncestralDiscreteScheduler", "Lu et al. 2022")
_MULTISTEP = partial(Sampler, dpm_multistep, "DPMSolverMultistepScheduler", "Lu et al. 2022")
_SINGLESTEP = partial(Sampler, dpm_singlestep, "DPMSolverSinglestepScheduler", "Lu et al. 2022")
_PNDM = partial(Sampler, pndm, "PNDMScheduler", "Liu et al. 2022")
_UNIPC = partial(Sampler, unipc, "UniPCMultistepScheduler", "Zhao et al. 2023")

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, "DDIMScheduler", "Song et al. 2021", "deterministic; with eta=1 as stochastic as DDPM"),
    "ddim-inverse": Sampler(ddim_inverse, "DDIMInverseScheduler", "Song et al. 2021", "ddim from image to noise"),
    "ddpm": Sampler(ddpm, "DDPMScheduler", "Ho et al. 2020", "stochastic, for many steps"),
    "dpm++2m": _MULTISTEP("second order, deterministic", _DPM_2M),
    "dpm++2m-karras": _MULTISTEP("dpm++2m on Karras sigmas", _DPM_2M | _KARRAS),
    "dpm++2m-sde": _MULTISTEP("second order, stochastic", _DPM_2M_SDE),
    "dpm++2m-sde-karras": _MULTISTEP("dpm++2m-sde on Karras sigmas", _DPM_2M_SDE | _KARRAS),
    "dpm++3m": _MULTISTEP("third order, deterministic", _DPM_3),
    "dpm++3m-sde": _MULTISTEP("third order, stochastic", _DPM_3 | {"algorithm_type": "sde-dpmsolver++"}),
    "dpm2m": _MULTISTEP("second order in the predicted noise", _DPM2M),
    "dpm++2s": _SINGLESTEP("second order, blocks of 2 steps", _DPM_2M),
    "dpm++2s-karras": _SINGLESTEP("dpm++2s on Karras sigmas", _DPM_2M | _KARRAS),
    "dpm++3s": _SINGLESTEP("third order, blocks of 3 steps", _DPM_3),
    "deis": Sampler(deis, "DEISMultistepScheduler", "Zhang & Chen 2023", "exponential integrator, order 1 to 3"),
    "euler": _EULER("first order, deterministic"),
    "euler_a": Sampler(euler_ancestral, "EulerAncestralDiscreteScheduler", "Song et al. 2021", "euler, fresh noise"),
    "euler-karras": _EULER("euler, Karras sigmas", _KARRAS),
    "heun": _HEUN("second order, two calls a step"),
    "heun-karras": _HEUN("heun, Karras sigmas", _KARRAS),
    "lms": _LMS("fourth-order multistep in sigma"),
    "lms-karras": _LMS("lms, Karras sigmas", _KARRAS),
    "kdpm2": _KDPM2("second order, two calls a step"),
    "kdpm2-karras": _KDPM2("kdpm2, Karras sigmas", _KARRAS),
    "kdpm2_a": _KDPM2_A("kdpm2 with fresh noise"),
    "kdpm2_a-karras": _KDPM2_A("kdpm2_a, Karras sigmas", _KARRAS),
    "edm-euler": Sampler(edm_euler, "EDMEulerScheduler", "Karras et al. 2022", "euler for models in EDM's formulation"),
    "edm-dpm++2m": Sampler(
        edm_dpm_solver, "EDMDPMSolverMultistepScheduler", "Lu et al. 2022", "dpm++2m for models in EDM's formulation"
    ),
    "ipndm": Sampler(ipndm, "IPNDMScheduler", "Liu et al. 2022", "fourth-order multistep of models of audio"),
    "flow-euler": Sampler(
        flow_euler, "FlowMatchEulerDiscreteScheduler", "Esser et al. 2024", "of flow-matching models"
    ),
    "flow-heun": Sampler(flow_heun, "FlowMatchHeunDiscreteScheduler", "Esser et al. 2024", "flow-euler, second order"),
    "flow-lcm": Sampler(flow_lcm, "FlowMatchLCMScheduler", "Luo et al. 2023", "of distilled flow models"),
    "lcm": Sampler(lcm, "LCMScheduler", "Luo et al. 2023", "1 to 8 steps of a consistency-distilled model"),
    "plms": _PNDM("fourth order, deterministic", {"skip_prk_steps": True}),
    "pndm": _PNDM("plms, Runge-Kutta at first", {"skip_prk_steps": False}),
    "sa": Sampler(
        sa_solver, "SASolverScheduler", "Xue et al. 2023", "multistep predictor-corrector, stochastic", _OF_IMAGE
    ),
    "tcd": Sampler(tcd, "TCDScheduler", "Zheng et al. 2024", "a few steps of a TCD-distilled model; eta is its gamma"),
    "unipc": _UNIPC("multistep predictor-corrector"),
    "unipc-karras": _UNIPC("unipc, Karras sigmas", _KARRAS),
}
_OF_FLOW = (flow_euler, flow_heun, flow_lcm)
_ALSO_OF_FLOW = (dpm_multistep, dpm_singlestep, deis, unipc)
_BY_CLASS = {sampler.class_name: sampler for sampler in reversed(SAMPLERS.values())}
"""The first sampler of each diffusers class."""


def is_known(name: str) -> bool:
    """Whether `name` is a short name or a diffusers class that has a function here."""
    return name.lower() in SAMPLERS or name in _BY_CLASS


def find_sampler(config: Mapping[str, Any], name: str | None) -> tuple[str, Sampler]:
    """The sampler called `name`, under the name that asks for it again.

    A short name fixes the options it stands for; a diffusers class name, and the class of the config itself when
    `name` is None, leaves them to the config. Raises `RequestError` suggesting the nearest name.
    """
    if name is None:
        own = str(config.get("_class_name", ""))
        if own not in _BY_CLASS:
            raise RequestError(
                f"the bundle's own scheduler {own[:_LONGEST_NAME] or '(none)'} is not supported: "
                "add --scheduler with one of those that `diffoundry schedulers` lists"
            )
        return own, _BY_CLASS[own]
    if isinstance(name, str) and name in _BY_CLASS:
        return name, _BY_CLASS[name]
    if isinstance(name, str) and name.lower() in SAMPLERS:
        return name.lower(), SAMPLERS[name.lower()]
    near = difflib.get_close_matches(str(name).lower(), [*SAMPLERS, *_BY_CLASS], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RequestError(f"unknown scheduler {short(name)}: {hint}`diffoundry schedulers` lists them")


def flowing(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """`config` for a model of flow matching under the sampler `name`: some samplers of noise have a form for it.

    Raises `RequestError` for one that has none.
    """
    key, sampler = find_sampler(config, name)
    curved = sampler.table is not unipc and key in SAMPLERS and sampler.fixed.get("use_karras_sigmas")
    if sampler.table in _ALSO_OF_FLOW and curved:
        raise RequestError(f"{key} has no form for flow matching, as this model wants: choose {key.split('-')[0]}")
    if sampler.table in _OF_FLOW:
        return dict(config)
    if sampler.table not in _ALSO_OF_FLOW:
        raise RequestError(
            f"{key} is a scheduler of models that predict noise, this one is of flow matching: choose flow-euler, "
            "flow-lcm, dpm++2m, unipc or deis"
        )
    shift = {} if config.get("shift") is None else {"flow_shift": config["shift"]}
    return {**shift, **config, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def make_table(
    config: Mapping[str, Any], steps: int | Steps, name: str | None = None, options: Mapping[str, Any] | None = None
) -> Table:
    """The table of the sampler `name` (default: the config's own) under `config` with `options` laid over it.

    steps: a count, or which steps. Raises `RequestError` for an option that is not supported or that the sampler does
    not have, a damaged config, or more steps than it has.
    """
    key, sampler = find_sampler(config, name)
    asked = steps if isinstance(steps, Steps) else Steps(steps)
    by_default = config.get("_use_default_values")
    absent = {str(option) for option in by_default} if isinstance(by_default, list) else set()
    absent |= STEP_ARGUMENTS  # diffusers' pipelines heed none of them in a configuration
    own = {option: value for option, value in config.items() if option not in absent and not option.startswith("_")}
    options = dict(options or {})
    if options.get("mu") is not None:
        asked = replace(asked, mu=Config({"mu": options["mu"]}).get("mu"))
    read = Config({**own, **(sampler.fixed if key in SAMPLERS else {}), **options})
    if not 0 <= asked.start < max(asked.count, 1):
        raise RequestError(f"the first step must be between 0 and {asked.count - 1}, found {asked.start}")
    try:
        with np.errstate(all="ignore"):
            table = sampler.table(read, asked)
    except (TypeError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
        raise RequestError(
            f"the scheduler configuration is damaged ({reason(error, _LONGEST_REASON)}): mend the scheduler options, "
            "or the scheduler_config.json"
        ) from None
    for option in options:
        if option not in read.read:
            near = difflib.get_close_matches(option, sorted(read.read), n=1)
            hint = f", did you mean {near[0]!r}?" if near else ": leave it out"
            raise RequestError(
                f"{key} has no scheduler option {short(option)}, or it has no effect with the others{hint}"
            )
    with np.errstate(over="ignore"):
        parts = (getattr(table, part) for part in (*ARRAYS, "init_scale"))
        finite = all(np.isfinite(np.float32(part)).all() for part in parts)
    if not finite and len(table.timesteps) and table.timesteps.min() == -1:
        raise RequestError(
            f"timestep_spacing=trailing makes {asked.count + 1} timesteps of {asked.count} steps, "
            f"where {key} divides by zero: {trailing_remedy(train_steps(read), asked.count)}"
        )
    if not finite:
        raise RequestError(
            f"{key} has no {asked.count} distinct steps under this configuration: "
            "ask for fewer --steps, or mend the scheduler's options"
        )
    return table
