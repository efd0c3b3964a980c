"""What `build` can make again of a bundle, taken out of it where it was damaged."""

from __future__ import annotations

from dataclasses import replace

from ..bundle import FULL, Bundle
from ..bundle.manifest import Component
from ..bundle.reports import REPORTS, read_report
from ..common.files import holds
from ..engines.names import FUSED_ENGINES
from .eightbit.conversion import is_document

_OF_MODELS = ("precision", "quality")
"""Reports that go with the models of a lower precision."""


def without_damaged(bundle: Bundle, precision: str) -> Bundle:
    """`bundle` without models, reports and documents that are missing or were changed, and can be made again.

    precision: the one that is asked for, whose models go with their reports; others are kept without. What the fp32
    models are, and all that comes with them, stays: `Bundle.check` tells what is wrong with it.
    """
    files = bundle.manifest.files
    spare = [path for path in files if is_document(path) or path in (f"reports/{name}.json" for name in REPORTS)]
    lost = {path for path in spare if not holds(bundle.root, {path: files[path]})}
    kept = {path: sha for path, sha in files.items() if path not in lost}
    bundle = replace(bundle, manifest=replace(bundle.manifest, files=kept))
    known = precision == FULL or all(precision in read_report(bundle, name) for name in _OF_MODELS)
    gone = None if known else precision
    components = {name: _whole(bundle, part, gone) for name, part in bundle.manifest.components.items()}
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


def _whole(bundle: Bundle, part: Component, gone: str | None) -> Component:
    """`part` without models made here that are damaged, or in the precision `gone`."""
    given = {path for key, each in part.variants.items() if not _is_made_here(key) for path in each.files}
    kept = {}
    for key, each in part.variants.items():
        own = {path: sha for path, sha in each.files.items() if path not in given}
        if not own or (holds(bundle.root, own) and key.partition("/")[0] != gone):
            kept[key] = each
    return replace(part, variants=kept)


def _is_made_here(key: str) -> bool:
    precision, _, backend = key.partition("/")
    return precision != FULL or backend in FUSED_ENGINES
