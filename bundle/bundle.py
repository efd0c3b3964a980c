"""`Bundle`: a folder with its manifest, opened for reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import BundleError
from ..common.files import check_tree, inside, read_json, sha256_file
from ..common.hashes import sha256_known
from .manifest import MANIFEST_NAME, Component, Manifest, from_json

_ENGINES = "engines"
_OWN = (_ENGINES, "step", "reports/parity.json", "reports/stages", "*/fused.onnx", "*/per_prompt.onnx")
"""What `compile` writes and no other tool does."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. `foreign` is true for a folder that `optimum-cli export onnx` wrote: it has no hashes."""

    root: Path
    manifest: Manifest
    foreign: bool = False

    @classmethod
    def open(cls, root: str | Path, describe: Callable[[Path], Manifest] | None = None) -> Bundle:
        """Read and check the manifest; file contents are checked by `check`.

        describe: makes the manifest of a folder that has a pipeline index and none, where such a folder is taken too.
        Raises `BundleError` when the folder is missing, is no bundle, has lost its manifest, or leads out of itself
        by a path or a link.
        """
        root = Path(root)
        if not root.is_dir():
            raise BundleError(f"{root} is not a folder: give the bundle that `diffoundry compile` wrote")
        whole = os.path.lexists(root / MANIFEST_NAME)
        if not whole and (describe is None or not os.path.lexists(root / "model_index.json")):
            raise BundleError(
                f"{root} holds no {MANIFEST_NAME}: it is not a bundle; make one with `diffoundry compile`"
            )
        check_tree(root)
        if (root / _ENGINES).is_symlink():
            raise BundleError(f"{root}: {_ENGINES} is a link, and engines are written there: remove the link")
        if whole or describe is None:
            bundle = cls(root, from_json(_read_manifest(root / MANIFEST_NAME), str(root / MANIFEST_NAME)))
        else:
            _refuse_headless(root)
            bundle = cls(root, describe(root), foreign=True)
        for name in (*bundle.manifest.all_files(), *bundle.manifest.tokenizers):
            inside(root, name)
        return bundle

    def path(self, relative: str) -> Path:
        """The absolute path of a file in the bundle, which must lie inside it."""
        return inside(self.root, relative)

    def component(self, name: str) -> Component:
        """The component called `name`. Raises `BundleError` listing what there is."""
        components = self.manifest.components
        if name not in components:
            raise BundleError(f"{self.root} has no component {name!r}, only {', '.join(components)}: compile it again")
        return components[name]

    def scheduler_config(self) -> dict[str, Any]:
        """The contents of `scheduler/scheduler_config.json`, of the class that the pipeline index names."""
        config = read_json(self.root / "scheduler" / "scheduler_config.json", "the scheduler configuration")
        if not self.foreign:
            return config
        named = read_json(self.root / "model_index.json", "the pipeline index").get("scheduler")
        if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
            return {**config, "_class_name": named[1]}
        return config

    def problems(self, names: Iterable[str] | None = None, *, known: bool = False) -> list[str]:
        """What is wrong with the files in the manifest (those in `names` if given), a line each; [] when all match.

        known: do not read a large file again that was not touched since it was read, see `common.hashes`.
        """
        files, hashed = self.manifest.all_files(), sha256_known if known else sha256_file
        wanted = files if names is None else {name: files[name] for name in names}
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda name: _problem(hashed, self.path(name), name, wanted[name]), wanted))
        return [line for line in found if line]

    def check(self, names: Iterable[str] | None = None, *, known: bool = False) -> None:
        """Raise `BundleError` when a file in the manifest is missing or was changed since the bundle was built.

        Arguments as for `problems`.
        """
        problems = self.problems(names, known=known)
        if problems:
            raise BundleError(f"{self.root}: {'; '.join(problems)}; compile the bundle again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "the manifest")
    except BundleError as error:
        raise BundleError(f"{error}; get the bundle again, or compile the checkpoint into another folder") from None


def _refuse_headless(root: Path) -> None:
    """Raise `BundleError` for a bundle that lost its manifest: as a folder of another tool it would run unchecked."""
    for pattern in _OWN:
        for path in root.glob(pattern):
            raise BundleError(
                f"{root} has lost its {MANIFEST_NAME}: {path.relative_to(root)} shows that it was a bundle; put the "
                "file back, get the whole bundle again, or compile the checkpoint into another folder"
            )


def _problem(hashed: Callable[[Path], str], path: Path, name: str, expected: str) -> str:
    try:
        return "" if hashed(path) == expected else f"{name} was changed after the bundle was built"
    except OSError:
        return f"{name} is missing or cannot be read"
