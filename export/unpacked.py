"""Checkpoints and parts of them that are single files, as folders in the layout of diffusers.

Each is unpacked once for each content, after all that its names, its shapes and the configurations tell was checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle.workspace import UNPACKED
from ..calibration.build import check_disk
from ..common.errors import CheckpointError, DiffoundryError
from ..common.files import remove, sha256_file, sha256_json, sha256_tree
from ..families.parts import TRANSFORMER
from .checkpoint import Checkpoint, is_part
from .configs import QWEN3 as OF_QWEN3
from .reading import Asked, Reading
from .single_file import SingleFile, is_single_file
from .single_file.flow import FlowFile, missing
from .single_file.part_names import QWEN3, held
from .single_file.parts import PartFile
from .single_file.weights import Weights, open_weights
from .weight_files import holds_weights

_OUTLINE = "outline"


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A checkpoint as folders. components: in place of its own. single: whether it is one file."""

    source: Checkpoint
    components: Mapping[str, str | Path]
    single: bool


def unpack(
    checkpoint: str | Path, work: Path, config: str | Path | None, prediction_type: str | None, asked: Asked
) -> Unpacked:
    """`checkpoint` and its components as folders, of which those that are made lie below `work`.

    config, prediction_type: of a single file, see `compile`.
    Raises `CheckpointError` or `DiffoundryError`, before anything is hashed or unpacked.
    """
    folder = None if config is None else Path(config)
    if not isinstance(checkpoint, (str, Path)) or not is_single_file(Path(checkpoint)):
        for name, value in (("config", config), ("prediction type", prediction_type)):
            if value is not None:
                raise DiffoundryError(f"the {name} goes with a single file, which {checkpoint} is not: leave it out")
        source = Checkpoint.open(checkpoint)
        files = _files(source, asked.components)
        return Unpacked(source, _with_parts(source, asked, files, {}, work, checkpoint), False)
    weights = open_weights(Path(checkpoint))
    flow = FlowFile.of(weights)
    if flow is not None:
        if prediction_type is not None:
            raise DiffoundryError(f"the prediction type is a U-Net's, {checkpoint} is {flow.title}: leave it out")
        return _unpack_flow(flow, folder, work, asked)
    vae = asked.components.get("vae")
    single = SingleFile.of(
        weights, config=folder, prediction_type=prediction_type, vae=None if vae is None else Path(vae)
    )
    source = Checkpoint.open(_unpack_unet(single, work, asked))
    files = _files(source, asked.components)
    return Unpacked(source, _with_parts(source, asked, files, {}, work, checkpoint), True)


def _files(source: Checkpoint, components: Mapping[str, str | Path]) -> dict[str, Path]:
    """The components that are given as single files, and that the checkpoint has."""
    found = {name: Path(path) for name, path in components.items() if is_part(name) and source.has(name)}
    return {name: path for name, path in found.items() if is_single_file(path)}


def _read(source: Checkpoint, asked: Asked, files: Iterable[str], shown: str | Path) -> None:
    """Raise for what the configurations already tell. files: components that are in files yet."""
    components = {name: path for name, path in asked.components.items() if name not in files}
    Reading.of(source, replace(asked, components=components, controls={}, t2i_adapters={}, adapters={}), shown)


def _unpack_unet(single: SingleFile, work: Path, asked: Asked) -> Path:
    """The diffusers folder made of a file with a U-Net."""
    path = single.weights.path
    with tempfile.TemporaryDirectory(prefix="diffoundry-") as outline:
        single.write_outline(Path(outline))
        try:
            source = Checkpoint.open(outline)
            _read(source, asked, _files(source, asked.components), path)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(outline, str(path))) from None
        decided = [sha256_file(path), sha256_tree(Path(outline))]
    unpacked = work / UNPACKED / sha256_json(decided)[:16]
    if not unpacked.is_dir():
        remove(work / UNPACKED)
        unpacked.parent.mkdir()
        single.write(unpacked)
    return unpacked


def _unpack_flow(flow: FlowFile, config: Path | None, work: Path, asked: Asked) -> Unpacked:
    """The folder that has the configurations of `flow`, with its parts as components of it."""
    path = flow.weights.path
    root = config
    if root is None:
        root = work / UNPACKED / _OUTLINE
        remove(root)
        root.mkdir(parents=True)
        flow.write_outline(root, asked.components)
    elif not root.is_dir():
        raise CheckpointError(f"{root} is no folder: the configuration must be a folder in the diffusers layout")
    source = Checkpoint.open(root)
    if not source.has(TRANSFORMER) or source.kind(TRANSFORMER)[1] != flow.kind:
        raise CheckpointError(
            f"{path} is {flow.title}, the configuration {config} is that of a {source.class_name}: give a folder of "
            f"a checkpoint of {flow.title}"
        )
    models = [name for name in source.index if is_part(name) and source.has(name)]
    own = [name for name in models if name not in asked.components]
    kinds = {name: QWEN3 if source.kind(name)[1] in OF_QWEN3 else source.kind(name)[1] for name in own}
    here = [name for name in own if name == TRANSFORMER or held(flow.weights, name, kinds[name])]
    for name in own:
        if name not in here and not (config and holds_weights(config / name)):
            raise missing(path, name, config)
    files = {**_files(source, asked.components), **dict.fromkeys(here, path)}
    try:
        return Unpacked(source, _with_parts(source, asked, files, {path: flow.weights}, work, path), True)
    except CheckpointError as error:  # nobody knows the folder that was made
        raise CheckpointError(str(error) if config else str(error).replace(str(root), str(path))) from None


def _with_parts(
    source: Checkpoint,
    asked: Asked,
    files: Mapping[str, Path],
    opened: Mapping[Path, Weights],
    work: Path,
    shown: str | Path,
) -> dict[str, str | Path]:
    """The components that are asked for, with the folders of those in `files`, unpacked once for each content.

    opened: the weights of files that were opened before. shown: what the user calls the checkpoint.
    """
    made = dict(asked.components)
    if not files:
        return made
    _read(source, asked, files, shown)
    weights = {path: opened.get(path) or open_weights(path) for path in dict.fromkeys(files.values())}
    parts = {
        name: PartFile.of(weights[path], name, *source.kind(name), source.config(name)) for name, path in files.items()
    }
    hashes = {path: sha256_file(path) for path in weights}
    folders = {
        name: work
        / UNPACKED
        / f"{name}-{sha256_json([hashes[files[name]], source.kind(name), dict(part.config)])[:16]}"
        for name, part in parts.items()
    }
    new = {name: parts[name] for name, folder in folders.items() if not folder.is_dir()}
    check_disk(work, 1.0 * sum(part.size for part in new.values()))
    for name, part in new.items():
        for old in (work / UNPACKED).glob(f"{name}-*"):
            remove(old)
        part.write(folders[name])
    return made | folders
