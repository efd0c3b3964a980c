"""The small files of a bundle: tokenizers, scheduler and pipeline index.

They are written before the long work, so that what is wrong with them shows at once.
"""

from __future__ import annotations

from pathlib import Path

from ...bundle import Bundle
from ...common.errors import DiffoundryError
from ...common.files import remove, sha256_file, write_json
from ..reading import Reading
from .scheduler import changes, scheduler_config, write_traced

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
_INDEX = "model_index.json"


def write_files(reading: Reading, work: Path, name: str, traced: tuple[str, tuple[int, ...]] | None) -> Bundle:
    """A draft of the bundle, with its small files in the folder `work` and no model yet.

    name: of the checkpoint. traced: a scheduler to be traced, and for which steps.
    Raises `CheckpointError` or `DiffoundryError` for a tokenizer or scheduler that cannot be written.
    """
    from ..modules.text import tokenizer

    source, folders = reading.source, ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
    for folder in folders:
        remove(work / folder)
    tokenizers = {
        each.tokenizer: tokenizer(source, each.component, each.tokenizer, work) for each in reading.pipeline.wiring.text
    }
    by_task = changes(source, reading.family, reading.tasks)
    (work / "scheduler").mkdir()
    config = scheduler_config(source)
    write_json(work / "scheduler" / "scheduler_config.json", config)
    if traced:
        write_traced(work / "scheduler", config, by_task.get(reading.tasks[0], {}), *traced)
    most = config.get("num_train_timesteps", 1000)
    if isinstance(most, int) and reading.steps > most:
        raise DiffoundryError(
            f"the model has {most} timesteps, {reading.steps} steps by default are more: ask for fewer"
        )
    index = {key: [None, None] if key in _LEFT_OUT else value for key, value in source.index.items()}
    write_json(work / _INDEX, {**index, "requires_safety_checker": False})
    paths = [path for folder in folders for path in sorted((work / folder).rglob("*")) if path.is_file()]
    manifest = reading.draft(tokenizers, by_task, name)
    manifest.files.update({path.relative_to(work).as_posix(): sha256_file(path) for path in (work / _INDEX, *paths)})
    return Bundle(work, manifest)
