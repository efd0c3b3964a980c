"""The order in which pictures move, and the times that clients are told."""

from __future__ import annotations

from diffoundry.serve.turns import Turn, choose, in_order, until_room, waits


def turns(*steps, client="a", came=0.0, **options):
    """Pictures that are due after three times their steps."""
    return [
        Turn(client=client, remaining=each, arrived=i, due=came + 3.0 * each, **options) for i, each in enumerate(steps)
    ]


def foreseen(pictures, most, step=0.0, decode=0.0, **options):
    """step: seconds of each row."""
    return waits(pictures, most, lambda first, rows: rows * step, lambda each: decode, **options)


def test_short_ones_come_first():
    assert [turn.remaining for turn in in_order(turns(50, 4, 20))] == [4, 20, 50]


def test_as_long_ones_come_in_the_order_of_their_arrival():
    assert [turn.arrived for turn in in_order(turns(20, 20, 20))] == [0, 1, 2]


def test_the_first_of_each_client_comes_before_the_second_of_any():
    many, one = turns(4, 4, 4, client="a"), turns(50, client="b")
    assert [turn.client for turn in in_order([*many, *one])] == ["a", "b", "a", "a"]


def test_images_of_one_client_yield_for_a_time_alone():
    many, one = turns(4, 4, 4, client="a", yields=6.0), turns(50, client="b", yields=75.0)
    assert [turn.client for turn in in_order([*many, *one], 5.0)] == ["a", "b", "a", "a"]
    assert [turn.client for turn in in_order([*many, *one], 6.0)] == ["a", "a", "a", "b"]


def test_priority_comes_before_all():
    low, high = turns(4), turns(50, priority=1)
    assert [turn.remaining for turn in in_order([*low, *high])] == [50, 4]


def test_no_long_one_waits_for_ever_nor_holds_up_short_ones():
    """A new picture of 4 steps comes whenever the one before is done, and one picture alone is stepped in a round."""
    [long], shorts = turns(50), []
    rounds, short = 0, None
    while long.remaining:
        if short is None or not short.remaining:
            [short] = turns(4, came=float(rounds))
            begin = rounds
        rounds += 1
        [chosen] = choose(in_order([long, short]), 1)
        chosen.remaining -= 1
        if not short.remaining:
            shorts.append(rounds - begin)
    assert rounds < 4 * 50
    assert sorted(shorts)[len(shorts) // 2] == 4


def test_a_round_is_one_call_of_those_that_go_along_with_the_first():
    wide = turns(5, 6, 7, group="wide", most=2)
    other = turns(4, 20, 50, group="small")
    assert [turn.remaining for turn in choose(in_order([*wide, *other]), 4)] == [4, 20, 50]
    assert [turn.remaining for turn in choose(in_order([*wide, *other[1:]]), 4)] == [5, 6]
    assert [turn.remaining for turn in choose(in_order(other), 2)] == [4, 20]


def test_waits_are_those_of_the_rounds():
    """Two at a time, 10 ms a step of each; when one is alone a round takes half as long."""
    found = foreseen(turns(4, 8, 4), 2, step=0.01)
    assert [round(each.begins, 3) for each in found] == [0.0, 0.0, 0.08]
    assert [round(each.ends, 3) for each in found] == [0.08, 0.16, 0.16]
    assert [round(each.ends, 3) for each in foreseen(turns(4, 8), 2, step=0.01, ahead=1.0)] == [1.08, 1.12]
    assert [round(each.ends, 3) for each in foreseen(turns(2, 2), 2, step=0.01, prepare=lambda each: 0.5)] == [1.04] * 2


def test_groups_take_turns_as_they_do_when_drawn():
    wide, small = turns(2, 6, group="wide"), turns(4, group="small")
    assert [each.ends for each in foreseen([wide[0], *small, wide[1]], 4, step=1.0)] == [4.0, 8.0, 12.0]
    assert [each.ends for each in foreseen(turns(2, 2, most=1), 4, step=1.0)] == [2.0, 4.0]


def test_the_decoder_counts():
    assert [each.ends for each in foreseen(turns(4, 8), 2, decode=1.0)] == [2.0, 3.0]


def test_there_is_room_when_enough_have_ended():
    found = foreseen(turns(4, 8, 4), 2, step=0.01)
    assert until_room(found, 1, 4) == 0.0
    assert round(until_room(found, 1, 3), 3) == 0.08
    assert round(until_room(found, 3, 3), 3) == 0.16
    assert until_room([], 1, 0) == 0.0
