"""The stages of a turn as a row of parts that fill it, whatever a system tells of them."""

from __future__ import annotations

from dataclasses import dataclass

from .report import System, Turn
from .timing import median

ORDER = ("before", "first_step", "steps", "after")
TITLES = {"before": "text, before", "first_step": "first step", "steps": "further steps", "after": "decode, after"}
MERGED = "merged"
"""The key of a part that holds what a system does not tell apart."""
_REST = 0.005
"""Of a turn: stages that are told and add up to less leave a part of their own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a turn. key: one of `ORDER`, or `MERGED`. title: the stages it holds. seconds: their median."""

    key: str
    title: str
    seconds: float


def parts_of(system: System, steps: int) -> tuple[Part, ...]:
    """The parts of a system's turns, in order; empty without turns. steps: of the request.

    Stages that a system does not tell are merged with their neighbours.
    """
    told = [_told(turn, steps) for turn in system.turns]
    if not told:
        return ()
    known = [key for key in ORDER if all(each[key] is not None for each in told)]
    gaps = _gaps(known)
    between = [
        max(0.0, turn.seconds - sum(each[key] or 0.0 for key in known))
        for turn, each in zip(system.turns, told, strict=True)
    ]
    ordered = [_part(key, known, median([each[key] or 0.0 for each in told])) for key in known]
    if gaps:
        place = sum(ORDER.index(key) < ORDER.index(gaps[0]) for key in known)
        ordered.insert(place, Part(MERGED, " + ".join(TITLES[key] for key in gaps), median(between)))
    elif median(between) > _REST * median([turn.seconds for turn in system.turns]):
        ordered.append(Part(MERGED, "rest", median(between)))
    return tuple(part for part in ordered if part.seconds > 0)


def _told(turn: Turn, steps: int) -> dict[str, float | None]:
    stages = turn.stages
    single = steps == 1 and stages.first_step is not None
    return {
        "before": stages.before,
        "first_step": stages.first_step,
        "steps": sum(stages.steps) if stages.steps or single else None,
        "after": stages.after,
    }


def _gaps(known: list[str]) -> list[str]:
    """The stages that nobody tells; the first step is counted from the call when there is no `before`."""
    gaps = [key for key in ORDER if key not in known]
    return [key for key in gaps if not (key == "before" and "first_step" in known)]


def _part(key: str, known: list[str], seconds: float) -> Part:
    if key == "first_step" and "before" not in known:
        return Part(MERGED, f"{TITLES['before']} + {TITLES[key]}", seconds)
    return Part(key, TITLES[key], seconds)
