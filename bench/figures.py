"""The figures of a report that can be held against those of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import units
from .parts import TITLES
from .report import Report, System

Unit = Literal["s", "/s", "×"]


@dataclass(frozen=True, slots=True)
class Figure:
    """Its values in one run. unit: seconds, of which fewer are better, or of what more is: a rate, a ratio to ours.

    of_turn: whether it is a part of a turn.
    """

    values: tuple[float, ...]
    unit: Unit = "s"
    of_turn: bool = False


def figures(report: Report, system: System) -> dict[str, Figure]:
    """What can be compared of a system, by its name; what not every turn or start tells is left out."""
    turns, stages, cold = system.turns, [turn.stages for turn in system.turns], system.cold
    of_turn: dict[str, list[float | None]] = {
        TITLES["before"]: [each.before for each in stages],
        "text encoders": [each.text for each in stages],
        "image encoder": [each.image_encode for each in stages],
        TITLES["first_step"]: [each.first_step for each in stages],
        TITLES["steps"]: [sum(each.steps) or None for each in stages],
        "denoiser, all steps": [sum(each.denoiser) or None for each in stages],
        "rest of the steps": [sum(each.loop) or None for each in stages],
        TITLES["after"]: [each.after for each in stages],
        "decoder": [each.decode for each in stages],
    }
    others: dict[str, list[float | None]] = {
        "turn": [turn.seconds for turn in turns],
        "cold start, imports done": [each.import_s for each in cold],
        "cold start, loaded": [each.load_s for each in cold],
        "cold start, first step": [each.first_step_s for each in cold],
        "cold start, first picture": [each.first_image_s for each in cold],
    }
    told_by_all = {
        what: Figure(told, of_turn=what in of_turn)
        for what, values in ({"turn": others.pop("turn")} | of_turn | others).items()
        if (told := tuple(value for value in values if value is not None)) and len(told) == len(values)
    }
    return told_by_all | _rates(report, system)


def _rates(report: Report, system: System) -> dict[str, Figure]:
    rates = {}
    for offline in report.scenario.offline:
        if offline.system == system.name:
            rates["offline, pictures/s"] = Figure((offline.images_per_s,), "/s")
    for server in report.scenario.server:
        if server.system == system.name:
            limit = units.seconds(server.p99_limit_s)
            rates[f"server, pictures/s with p99 under {limit}"] = Figure((server.rate_per_s,), "/s")
    return rates
