"""Write the scheduler configuration of a checkpoint as its pipeline class uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bundle import CheckpointError, DiffoundryError, RequestError
from ..bundle.files import read_json, write_json
from .checkpoint import Checkpoint


def write_scheduler(checkpoint: Checkpoint, folder: Path, mend: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write `scheduler_config.json`: the checkpoint's own keys, what the pipeline class mends, and no other default.

    Keys that the file leaves out stay out, so that each sampler applies its own default, as diffusers does.
    """
    import diffusers

    config = checkpoint.config("scheduler", "scheduler_config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    full = dict(config)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if known:
        try:
            full = dict(kind.from_config(config).config)
        except Exception as error:  # each scheduler has its own ways of refusing
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"the scheduler configuration of {checkpoint.root} is damaged ({reason[:200]}): download it again"
            ) from None
    mended = mend({name: value for name, value in full.items() if not name.startswith("_")})
    changed = {name: value for name, value in mended.items() if name in full and full[name] != value}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler_config.json", {**config, **changed})


def write_traced(folder: Path, name: str, counts: Sequence[int]) -> None:
    """Write the tables of the scheduler class `name` under the configuration in `folder`, one for each step count.

    name: a diffusers class or `module:Class`. Raises `RequestError` when it cannot be traced.
    """
    from ..runtime.schedulers import is_known
    from ..runtime.schedulers.stored import save_table, traced_path
    from .trace_scheduler import trace_scheduler_class

    own = name.rpartition(":")[2]
    if is_known(own):
        raise RequestError(
            f"the scheduler {own} needs no tracing: diffoundry has it; a class of your own needs its own name"
        )
    config = read_json(folder / "scheduler_config.json", "the scheduler configuration")
    try:
        tables = trace_scheduler_class(name, config, counts)
    except DiffoundryError:
        raise
    except (Exception, SystemExit) as error:  # a class of somebody's own may do anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise RequestError(f"the scheduler {name!r} cannot be traced ({type(error).__name__}: {reason})") from None
    for count, table in tables.items():
        path = folder / traced_path(own, count)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(path, table)
