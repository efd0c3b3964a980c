"""The scheduler configuration of a checkpoint, and what its pipeline classes change in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import CheckpointError, DiffoundryError, RequestError, reason
from ...families import Family
from ..checkpoint import Checkpoint


def scheduler_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own configuration, of the class that its pipeline index names.

    Keys that the file leaves out stay out, so that each sampler applies its own default, as diffusers does.
    """
    config = checkpoint.config("scheduler", "scheduler_config.json")
    return {**config, "_class_name": checkpoint.kind("scheduler")[1]} if checkpoint.has("scheduler") else config


def changes(checkpoint: Checkpoint, family: Family, tasks: Sequence[str]) -> dict[str, dict[str, bool | int]]:
    """By task, what the pipeline class of `family` changes in the configuration; see `Family.scheduler`.

    Raises `CheckpointError` when the scheduler's class refuses the configuration.
    """
    import diffusers

    config = scheduler_config(checkpoint)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if known:
        try:
            config = dict(kind.from_config(config).config)
        except Exception as error:  # each scheduler has its own ways of refusing
            raise CheckpointError(
                f"the scheduler configuration of {checkpoint.root} is damaged ({reason(error)}): download it again"
            ) from None
    return family.scheduler_changes(tasks, config)


def write_traced(
    folder: Path, config: dict[str, Any], changed: dict[str, bool | int], name: str, counts: Sequence[int]
) -> None:
    """Write the tables of the scheduler class `name` below `folder`, one for each step count.

    changed: what the pipeline class changes in `config`. name: a diffusers class or `module:Class`.
    Raises `RequestError` when it cannot be traced.
    """
    from ...runtime.schedulers import is_known
    from ...runtime.schedulers.stored import save_table, traced_path
    from .trace_scheduler import trace_scheduler_class

    own = name.rpartition(":")[2]
    if is_known(own):
        raise RequestError(
            f"the scheduler {own} needs no tracing: diffoundry has it; a class of your own needs its own name"
        )
    config = {**config, **{key: value for key, value in changed.items() if key in config}}
    try:
        tables = trace_scheduler_class(name, config, counts)
    except DiffoundryError:
        raise
    except (Exception, SystemExit) as error:  # a class of somebody's own may do anything
        raise RequestError(
            f"the scheduler {name!r} cannot be traced ({type(error).__name__}: {reason(error)})"
        ) from None
    for count, table in tables.items():
        path = folder / traced_path(own, count)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(path, table)
