"""Read the table of any linear scheduler off its own code: run it in float64 on unit vectors, keep what it did.

Every state is then a row of weights: of the first x, of each model output, of each noise. From these the fewest
registers that carry the past are found, which is all that a table is.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ...common.arrays import Array
from ...common.errors import RequestError, reason
from ...runtime.schedulers.table import Steps, Table
from ..loading import quiet

_LINEAR = 1e-9
"""Largest difference to the table's own prediction, relative to the largest state so far."""
_DEPENDENT = 1e-11
"""A part of a state this small, relative to the state, is rounding."""
_FAR = 0.01
"""A part this large is found again from rounded registers without amplifying their rounding."""
_SCALES = (0.01, 1.0, 100.0)
"""How large the random vectors are that a scheduler must treat alike: what clips or thresholds does not."""
_WIDER = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double}
_MOST_CALLS = 4000
_OPTIONS = ("timesteps", "sigmas", "mu")


def trace_scheduler_class(name: str, config: Mapping[str, Any], counts: Iterable[int]) -> dict[int, Table]:
    """The tables of a scheduler class by step count.

    name: a diffusers class name, or `module:Class`. config: a `scheduler_config.json`. Where step() takes `eta` it is
    0, as diffusers' pipelines pass it.
    Raises `RequestError` when there is no such class, it cannot be built, or `trace_scheduler` refuses it.
    """
    kind = _find_class(name)
    known = inspect.signature(kind).parameters
    try:
        with quiet():
            if hasattr(kind, "from_config"):
                scheduler = kind.from_config(config)
            else:
                scheduler = kind(**{key: value for key, value in config.items() if key in known})
    except Exception as error:  # each scheduler has its own ways of refusing
        raise RequestError(
            f"{kind.__name__} cannot be built from the scheduler configuration: {reason(error)}"
        ) from None
    accepted = set(inspect.signature(scheduler.step).parameters) - set(known) if hasattr(scheduler, "step") else set()
    options = {"eta": 0.0} if "eta" in accepted else {}
    return {count: trace_scheduler(scheduler, Steps(count), **options) for count in counts}


def _find_class(name: str) -> Any:
    module, colon, class_name = name.partition(":")
    if not colon:
        module, class_name = "diffusers", name
    try:
        found = importlib.import_module(module)
        kind = getattr(found, class_name)
    except (ImportError, ValueError) as error:
        raise RequestError(f"the scheduler {name!r} cannot be imported: {reason(error)}") from None
    except AttributeError:
        names = [known for known in dir(found) if known.endswith("Scheduler")]
        near = difflib.get_close_matches(class_name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "a scheduler of your own is named module:Class"
        raise RequestError(f"{module} has no class {class_name!r}: {hint}") from None
    if not isinstance(kind, type):
        raise RequestError(f"the scheduler {name!r} is no class")
    return kind


def trace_scheduler(scheduler: Any, steps: Steps, **options: Any) -> Table:
    """The table of a diffusers-style scheduler: `set_timesteps`, `timesteps` and `step`, and what else it has.

    options: arguments of every step() beside the usual three, such as `eta`. The scheduler is not changed.
    Raises `RequestError` when it fails, draws noise more than once a step, or is not linear.
    """
    name = type(scheduler).__name__
    lacks = [method for method in ("set_timesteps", "step") if not callable(getattr(scheduler, method, None))]
    if lacks:
        raise RequestError(f"{name} cannot be traced: it has no {' and no '.join(lacks)}")
    ready, timesteps = _prepared(scheduler, steps)
    calls = len(timesteps)
    with float64():
        init_scale = float(getattr(ready, "init_noise_sigma", 1.0))
    unit = np.eye(1 + 2 * calls)
    inputs, states, draws, levels = _run(ready, timesteps, unit, options)
    for part in (inputs, states, levels, timesteps.numpy(), np.float64(init_scale)):
        if not np.isfinite(part).all():
            raise RequestError(f"{name} has no {steps.count} finite steps: ask for fewer or mend its configuration")
    seen = states[:-1]
    size = (seen * seen).sum(1)
    in_a_run = [init_scale or 1.0, *[1.0] * (2 * calls)]  # how large the first x, each model output and noise are
    table = Table(
        timesteps=timesteps.numpy().astype(np.float64),
        input_scale=np.divide((inputs * seen).sum(1), size, out=np.ones(calls), where=size > 0),
        weights=_weights(states * in_a_run),
        x0=np.zeros((calls, 2)),
        draws=draws,
        alpha_sigma=levels,
        init_scale=init_scale,
    )
    _check_linear(ready, timesteps, table, options)
    return table


def run_in_float64(scheduler: Any, steps: Steps, given: Array, **options: Any) -> tuple[Array, Array, Array]:
    """What the scheduler's own code makes of `given` without float32 rounding; it need not be linear.

    given: (1 + 2S, D), the first x, then a model output and a noise for each call. options: as for `trace_scheduler`.
    Returns the timesteps (S,), the model inputs (S, D) and the states (S + 1, D).
    """
    ready, timesteps = _prepared(scheduler, steps)
    inputs, states, _, _ = _run(ready, timesteps, given, options)
    return timesteps.numpy().astype(np.float64), inputs, states


def impulse_responses(table: Table) -> Array:
    """(S + 1, 1 + 2S): each state as weights of [first x, m_0, noise_0, m_1, noise_1, …], nothing clamped."""
    calls, size = table.steps, table.registers
    unit = np.eye(1 + 2 * calls)
    registers = np.zeros((size, len(unit)))
    registers[0] = unit[0]
    states = [registers[0]]
    for k in range(calls):
        m, noise = unit[1 + 2 * k], unit[2 + 2 * k]
        x0 = table.x0[k, 0] * registers[0] + table.x0[k, 1] * m
        registers = table.weights[k] @ np.vstack([registers, m, noise, x0])
        states.append(registers[0])
    return np.array(states)


class _Float64(TorchFunctionMode):  # type: ignore[misc]
    """Torch without a narrower float than float64, whose normal noise is `noise`."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: torch.Tensor | None = None
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.noise is not None and func in (torch.randn, torch.randn_like):
            self.draws += 1
            size = {"size": kwargs["size"]} if "size" in kwargs else {}
            shape = args[0].shape if func is torch.randn_like else torch.empty(*args, **size).shape
            if shape != self.noise.shape:
                raise ValueError(f"it draws noise of shape {tuple(shape)}, not that of the latents")
            return self.noise.clone()
        wide = {key: _wide_dtype(value) for key, value in kwargs.items()}
        return _WIDER.get(func, func)(*map(_wide_dtype, args), **wide)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@contextmanager
def float64() -> Iterator[_Float64]:
    """Within it torch makes no narrower float than float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64() as mode, torch.no_grad():
            yield mode
    finally:
        torch.set_default_dtype(default)


def _prepared(scheduler: Any, steps: Steps) -> tuple[Any, Any]:
    """A copy of the scheduler whose timesteps are set and whose data are float64, and the timesteps to make."""
    name = type(scheduler).__name__
    custom = {key: getattr(steps, key) for key in _OPTIONS if getattr(steps, key) is not None}
    custom = {key: list(value) if isinstance(value, tuple) else value for key, value in custom.items()}
    count = [steps.count] if steps.timesteps is None and steps.sigmas is None else []
    try:
        ready = copy.deepcopy(scheduler)
        ready.set_timesteps(*count, **custom)
        begin = steps.start * int(getattr(ready, "order", 1))
        if hasattr(ready, "set_begin_index"):
            ready.set_begin_index(begin)
        widen(ready)
        timesteps = torch.as_tensor(ready.timesteps)[begin:]
    except Exception as error:  # each scheduler has its own ways of refusing
        raise RequestError(f"{name} cannot make {steps.count} steps: {reason(error)}") from None
    if len(timesteps) > _MOST_CALLS:
        raise RequestError(f"{name} makes {len(timesteps)} calls, more than the {_MOST_CALLS} that can be traced")
    if timesteps.ndim != 1 or not len(timesteps):
        raise RequestError(f"{name} has no step {steps.start} of {steps.count}")
    return ready, timesteps


def widen(scheduler: Any) -> None:
    """Make the data of a scheduler float64, as its own code left them in float32."""
    vars(scheduler).update({key: _widened(value) for key, value in vars(scheduler).items()})


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(np.float64)
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


def _run(prepared: Any, timesteps: Any, given: Array, options: Mapping[str, Any]) -> tuple[Array, Array, Array, Array]:
    """The scheduler's run on `given` (1 + 2S, D): the first x, then a model output and a noise for each call.

    Returns what the model saw (S, D), the states (S + 1, D), the draws (S,) and the levels (S, 2), see `Table`.
    """
    scheduler, name = copy.deepcopy(prepared), type(prepared).__name__
    scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
    x, *fed = torch.from_numpy(given)[:, None, None, None]
    inputs, states, draws, levels = [], [x], [], []
    for k, timestep in enumerate(timesteps):
        levels.append(_level(scheduler, timesteps[k : k + 1]))
        try:
            with float64() as mode:
                mode.noise = fed[2 * k + 1]
                inputs.append(scale(x, timestep))
                done = scheduler.step(fed[2 * k], timestep, x, **options)
                x = done.prev_sample if hasattr(done, "prev_sample") else done[0]
        except Exception as error:  # each scheduler has its own ways of refusing
            raise RequestError(f"{name} cannot be traced, step {k} fails: {reason(error)}") from None
        if mode.draws > 1:
            raise RequestError(f"{name} cannot be traced: step {k} draws noise {mode.draws} times, a table holds one")
        states.append(x)
        draws.append(mode.draws == 1)
    inputs, states = (torch.stack(part).numpy().reshape(len(part), -1) for part in (inputs, states))
    return inputs, states, np.array(draws), np.array(levels)


def _level(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """α and σ of x = α · image + σ · noise at `timestep`; (1, 0) for a scheduler that noises no image."""
    image, noise = torch.eye(2, dtype=torch.float64)[:, None, None, None]
    try:
        with float64():
            if hasattr(scheduler, "scale_noise"):
                x = scheduler.scale_noise(image, timestep, noise)
            else:
                x = scheduler.add_noise(image, noise, timestep)
    except Exception:  # it has no such method, or one that says that it cannot
        return 1.0, 0.0
    alpha, sigma = x.flatten().tolist()
    return alpha, sigma


def _weights(states: Array) -> Array:
    """(S, K, K + 3): the table rows that make `states` (S + 1, 1 + 2S), with the fewest registers for each row.

    A register holds what is known of a coming state: the part of it that its past decides. Backwards from the last
    state, those of row k + 1 and state k itself span what row k has to know.
    """
    calls = len(states) - 1
    rows: list[tuple[list[int], Array]] = []
    following = [calls]
    for k in reversed(range(calls)):
        known = states[:, : 1 + 2 * k]
        here = _spanning(known, [k, *following], np.linalg.norm(states, axis=1))
        past = np.zeros((len(following), len(here)))
        for i, j in enumerate(following):
            past[i] = [j == other for other in here] if j in here else np.linalg.lstsq(known[here].T, known[j])[0]
        rows.append((here, np.hstack([past, states[following, 1 + 2 * k : 3 + 2 * k]])))
        following = here
    size = max(len(here) for here, _ in rows)
    weights = np.zeros((calls, size, size + 3))
    for k, (here, row) in enumerate(reversed(rows)):
        weights[k, : len(row), : len(here)] = row[:, :-2]
        weights[k, : len(row), size : size + 2] = row[:, -2:]
    return weights


def _spanning(known: Array, among: list[int], norms: Array) -> list[int]:
    """Which rows of `known` span those `among`: the first one, then the nearest that is far from the span of those
    taken, and where none is, the farthest."""
    rest = known[among] / np.where(norms[among] > 0, norms[among], 1)[:, None]
    taken, pick = [among[0]], 0
    while True:
        rest = rest - np.outer(rest @ rest[pick], rest[pick]) / (rest[pick] @ rest[pick] or 1)
        distance = np.linalg.norm(rest, axis=1)
        pick = int((distance > _FAR).argmax() if (distance > _FAR).any() else distance.argmax())
        if distance[pick] <= _DEPENDENT:
            return sorted(taken)
        taken.append(among[pick])


def _check_linear(prepared: Any, timesteps: Any, table: Table, options: Mapping[str, Any]) -> None:
    """Raise `RequestError` when the scheduler does to random vectors, small or large, what `table` does not."""
    response = impulse_responses(table)
    rng = np.random.default_rng(0)
    for scale in _SCALES:
        given = rng.standard_normal((response.shape[1], 8)) * scale
        given[0] *= table.init_scale or 1.0
        inputs, states, _, _ = _run(prepared, timesteps, given, options)
        expected = response @ given
        largest = np.maximum.accumulate(np.abs(expected).max(1))
        wrong = np.abs(states - expected).max(1)[1:] / largest[1:]
        scaled = expected[:-1] * table.input_scale[:, None]
        wrong = np.maximum(wrong, np.abs(inputs - scaled).max(1) / np.maximum(largest[:-1], np.abs(scaled).max(1)))
        bad = np.flatnonzero(~(wrong < _LINEAR))
        if len(bad):
            raise RequestError(
                f"{type(prepared).__name__} is not linear: at step {bad[0]} it differs by {wrong[bad[0]]:.1e} "
                "(relative) from its own response to unit vectors: switch off what clips, thresholds or draws otherwise"
            )
