"""Weights in several files with an index beside them, as diffusers and transformers read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import DiffoundryError
from ..common.files import write_json

_SHARD_BYTES = 1 << 30


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Write torch tensors to `folder` as they come, about 1 GiB a file. stem: of the names of the files.

    No more than one file's tensors are held in memory. Raises `DiffoundryError` on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    shard: dict[str, Any] = {}
    total, count = 0, 0

    def write() -> None:
        nonlocal count
        count += 1
        path = folder / f"{stem}-{count:05}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise DiffoundryError(f"{path} cannot be written ({error}): free some disk space") from None
        places.update(dict.fromkeys(shard, path.name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        total += tensor.nbytes
        if sum(each.nbytes for each in shard.values()) > _SHARD_BYTES:
            write()
    if shard:
        write()
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
