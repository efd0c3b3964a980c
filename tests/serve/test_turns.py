"""The order in which pictures move, and the times that clients are told."""

from __future__ import annotations

from diffoundry.serve.turns import OLDEST, Turn, choose, in_order, until_room, waits


def turns(*steps, client="a", **options):
    return [Turn(client=client, remaining=each, arrived=i, **options) for i, each in enumerate(steps)]


def test_short_ones_come_first():
    assert [turn.remaining for turn in in_order(turns(50, 4, 20))] == [4, 20, 50]


def test_as_long_ones_come_in_the_order_of_their_arrival():
    assert [turn.arrived for turn in in_order(turns(20, 20, 20))] == [0, 1, 2]


def test_the_first_of_each_client_comes_before_the_second_of_any():
    many, one = turns(4, 4, 4, client="a"), turns(50, client="b")
    assert [turn.client for turn in in_order([*many, *one])] == ["a", "b", "a", "a"]


def test_priority_comes_before_all():
    low, high = turns(4), turns(50, priority=1)
    assert [turn.remaining for turn in in_order([*low, *high])] == [50, 4]


def test_one_that_moves_gives_way_only_where_it_pays():
    [moving] = turns(6)
    moving.moving = True
    [near, short] = turns(4, 1)
    assert choose([moving, near], 1) == [moving]
    assert choose([moving, short], 1) == [short]


def test_no_long_one_waits_for_ever_nor_holds_up_short_ones():
    """A new picture of 4 steps comes whenever the one before is done, and one picture alone is stepped in a round."""
    [long], shorts = turns(50), []
    rounds, short = 0, None
    while long.remaining:
        if short is None or not short.remaining:
            [short] = turns(4)
            short.arrived, begin = 1 + rounds, rounds
        rounds += 1
        [chosen] = choose([long, short], 1, oldest=rounds % OLDEST == 0)
        long.moving, short.moving = chosen is long, chosen is short
        chosen.remaining -= 1
        if not short.remaining:
            shorts.append(rounds - begin)
    assert rounds <= OLDEST * 50
    assert sum(shorts) / len(shorts) < 6


def test_the_oldest_is_that_of_the_highest_priority():
    low, high = turns(4, 50), turns(50, 9, priority=1)
    assert choose([*low, *high], 2, oldest=True) == high
    assert choose(low, 1, oldest=True) == low[:1]


def test_a_round_is_one_call_of_those_that_go_along_with_the_first():
    wide = turns(5, 6, 7, group="wide", most=2)
    other = turns(4, 20, 50, group="small")
    assert [turn.remaining for turn in choose([*wide, *other], 4)] == [4, 20, 50]
    assert [turn.remaining for turn in choose([*wide, *other[1:]], 4)] == [5, 6]
    assert [turn.remaining for turn in choose(other, 2)] == [4, 20]


def test_waits_are_those_of_the_rounds():
    """Two at a time, 10 ms a step of each: a round takes 20 ms."""
    found = waits(turns(4, 8, 4), 2, step=0.01, decode=0.0)
    assert [round(each.begins, 3) for each in found] == [0.0, 0.0, 0.08]
    assert [round(each.ends, 3) for each in found] == [0.08, 0.16, 0.16]


def test_the_decoder_counts():
    assert [each.ends for each in waits(turns(4, 8), 2, step=0.0, decode=1.0)] == [1.0, 2.0]


def test_there_is_room_when_enough_have_ended():
    found = waits(turns(4, 8, 4), 2, step=0.01, decode=0.0)
    assert until_room(found, 1, 4) == 0.0
    assert round(until_room(found, 1, 3), 3) == 0.08
    assert round(until_room(found, 3, 3), 3) == 0.16
    assert until_room([], 1, 0) == 0.0
