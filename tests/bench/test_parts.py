"""The parts of a turn fill it, whatever a system tells."""

from __future__ import annotations

import pytest

from diffoundry.bench.parts import MERGED, parts_of
from diffoundry.bench.report import Stages, Turn
from diffoundry.tests.bench.reports import system


def keys_of(count=3, **stages):
    made = parts_of(system(turns=(Turn(1.0, Stages(**stages)),)), count)
    assert sum(part.seconds for part in made) == pytest.approx(1.0)
    return [(part.key, round(part.seconds, 6)) for part in made]


def test_all_are_told():
    assert keys_of(before=0.1, first_step=0.2, steps=(0.3, 0.3), after=0.1) == [
        ("before", 0.1),
        ("first_step", 0.2),
        ("steps", 0.6),
        ("after", 0.1),
    ]


@pytest.mark.parametrize(
    ("told", "keys"),
    [
        ({}, [MERGED]),
        ({"before": 0.2}, ["before", MERGED]),
        ({"after": 0.2}, [MERGED, "after"]),
        ({"first_step": 0.3, "steps": (0.2, 0.2)}, [MERGED, "steps", MERGED]),
        ({"before": 0.1, "after": 0.2}, ["before", MERGED, "after"]),
        (
            {"before": 0.1, "first_step": 0.1, "steps": (0.3, 0.3), "after": 0.1},
            ["before", "first_step", "steps", "after", MERGED],
        ),
    ],
)
def test_what_is_not_told_is_merged(told, keys):
    assert [key for key, _ in keys_of(**told)] == keys


def test_one_step_has_no_further_ones():
    assert [key for key, _ in keys_of(count=1, before=0.1, first_step=0.8, after=0.1)] == [
        "before",
        "first_step",
        "after",
    ]


def test_a_stage_that_one_turn_does_not_tell_is_merged():
    told = Stages(before=0.1, first_step=0.2, steps=(0.3,), after=0.4)
    assert [part.key for part in parts_of(system(turns=(Turn(1.0, told), Turn(2.0))), 2)] == [MERGED]
    assert parts_of(system(turns=()), 2) == ()
