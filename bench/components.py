"""What each component of a picture costs, and the share of the machine's peaks that it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..bundle import Bundle
from ..common.errors import BenchError, DiffoundryError
from .cost import cost_of, exported
from .report import ComponentCost, Peaks
from .session import Drawn
from .timing import median


def components_of(
    bundle: Bundle, drawn: Sequence[Drawn], precision_of: Callable[[str], str], peaks: Peaks
) -> tuple[tuple[ComponentCost, ...], tuple[str, ...]]:
    """The components that were called for these turns of one picture each, and why figures are missing, if any are.

    precision_of: what a component was computed in.
    """
    taken: dict[str, list[dict[str, Any]]] = {}
    for each in drawn:
        for call in each.calls:
            taken.setdefault(call["component"], []).append(call)
    found, notes = [], []
    for name in (name for name in bundle.manifest.components if name in taken):
        calls = taken[name]
        seconds = median([float(call["seconds"]) for call in calls])
        precision = precision_of(name)
        cost = ComponentCost(name, len(calls) / len(drawn), seconds, weights_bytes=_weights(bundle, name, precision))
        shapes = {key: tuple(shape) for key, shape in calls[0]["shapes"].items()}
        try:
            cost = _counted(cost, bundle, precision, peaks, shapes)
        except DiffoundryError as error:
            notes.append(str(error))
        found.append(cost)
    return tuple(found), tuple(dict.fromkeys(notes))


def _weights(bundle: Bundle, name: str, precision: str) -> int | None:
    """The bytes of a component's model in this precision, as it was exported."""
    try:
        variant, part = exported(bundle, name, precision)
    except BenchError:
        return None
    return int(part * sum(bundle.path(file).stat().st_size for file in variant.files))


def _counted(
    cost: ComponentCost, bundle: Bundle, precision: str, peaks: Peaks, shapes: dict[str, tuple[int, ...]]
) -> ComponentCost:
    """With operations, bytes and shares. Raises `DiffoundryError` where they cannot be counted."""
    counted, seconds = cost_of(bundle, cost.name, precision, shapes), cost.seconds_per_call
    product, copy = peaks.matmul_flops_per_s.get(precision), peaks.copy_bytes_per_s
    return replace(
        cost,
        flops=float(counted.flops),
        bytes=float(counted.bytes),
        share_of_matmul_peak=counted.flops / seconds / product if product and seconds else None,
        share_of_copy_peak=counted.bytes / seconds / copy if copy and seconds else None,
    )
