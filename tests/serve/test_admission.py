"""What is taken and what is refused, and the room that is kept for those who were told to come again."""

from __future__ import annotations

import math
import sys
import threading

import pytest

from diffoundry import Request
from diffoundry.serve.admission import Admission, QueueFullError
from diffoundry.serve.demand import Demand
from diffoundry.serve.errors import refusal
from diffoundry.serve.memory import few_arenas, trim
from diffoundry.serve.meter import Meter
from diffoundry.serve.models import Model
from diffoundry.serve.returns import Returns
from diffoundry.serve.rows import underway
from diffoundry.serve.tickets import Ticket
from diffoundry.serve.turns import choose, in_order


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def queue(pipe):
    """Two rows, of which each takes 1 s a step, and a function that asks for images of some steps."""
    model, clock, meter = Model("pico", pipe), Clock(), Meter()
    admission, here = Admission(2, 20, meter, clock, 3.0), []
    jobs = {}

    def ask(steps, client="", mark="", count=1, **options):
        if (steps, count) not in jobs:
            jobs[steps, count] = pipe.job(Request("a", seed=1, steps=steps, count=count))
        ticket = Ticket(model, jobs[steps, count], client=client or f"c{len(here)}", mark=mark, **options)
        images = underway(ticket, len(here), clock.now)
        admission.check(here, 0, images)
        here.extend(images)
        return images

    meter.stepped(Ticket(model, pipe.job(Request("a", steps=1))).kind, 2, 2.0)
    return admission, clock, here, ask


def refused(ask, *arguments, **options):
    with pytest.raises(QueueFullError) as error:
        ask(*arguments, **options)
    return error.value


def test_what_would_take_too_long_is_refused_and_says_when_it_would_not(queue):
    """A full batch of 10 steps takes 20 s, so 60 s are allowed, and 9 s of them are left for others."""
    _, clock, here, ask = queue
    for _ in range(5):
        ask(10)
    assert [image.due for image in here] == [60.0] * 5
    error = refused(ask, 10)
    assert error.seconds == pytest.approx(9.0) and error.retry_after == 9
    del here[:3]  # when these have ended there is room
    clock.now = 30.0
    ask(10)


def test_a_short_one_is_taken_only_where_it_makes_no_long_one_late(queue):
    _, clock, here, ask = queue
    for _ in range(4):
        ask(10)
    ask(2)
    clock.now = 19.0  # nothing was drawn since: all that is there is almost late
    assert refused(ask, 2).seconds > 1
    assert len(here) == 5


def test_where_rows_are_free_all_is_taken(queue):
    admission, _, here, ask = queue
    admission.returns.tell(("other", ""), 0.0, 1.0, 1000.0, 4, of_many=False, came=False)
    ask(10)
    ask(10)
    assert refused(ask, 10).seconds is None, "all is promised for the next minute"
    assert len(here) == 2


def test_one_that_comes_when_it_was_told_is_taken_before_others(queue):
    _, clock, here, ask = queue
    for _ in range(5):
        ask(10)
    wait = refused(ask, 10, client="a", mark="one").seconds
    assert refused(ask, 10, client="a", mark="one").seconds == pytest.approx(wait), "its time stays"
    assert refused(ask, 10, client="b", mark="two").seconds > wait, "after the first of them"
    clock.now = wait
    for image in here:
        image.remaining -= 2
    refused(ask, 10, client="c", mark="three")
    ask(10, client="a", mark="one")


def test_the_load_is_that_of_the_last_requests_whatever_becomes_of_them():
    demand = Demand()
    for i in range(60):  # each second one of a second: as much as can be drawn
        demand.come(float(i), 1.0)
    assert demand.load == pytest.approx(1.0, abs=0.1) and demand.pressure == 0
    for _ in range(10):  # a burst
        demand.come(60.0, 1.0)
    assert 0 < demand.pressure < 1
    for i in range(300):
        demand.come(60.0 + i / 5, 1.0)
    assert demand.load == pytest.approx(5.0, abs=0.1) and demand.pressure == 1
    for i in range(30):
        demand.come(120.0 + i, 1.0)
    assert demand.pressure == 0
    slow, fast = Demand(), Demand()
    for i in range(40):
        slow.come(i * 100.0, 300.0)
        fast.come(i / 100, 0.03)
    assert slow.load == pytest.approx(fast.load), "it does not matter how fast a model is"


def test_while_far_too_much_is_asked_for_new_ones_wait_for_nobody(queue):
    """But one that was told to come again has all its time, and a job more than others have."""
    admission, clock, here, ask = queue
    for i in range(40):
        admission.demand.come(i / 100, 10.0)
    clock.now = 0.4
    assert admission.demand.pressure == 1
    ask(10)
    ask(10)
    wait = refused(ask, 10, client="a", mark="one").seconds
    ask(10, patience=4.0)
    clock.now += wait
    for image in here:
        image.remaining -= 1
    refused(ask, 10, client="b", mark="two")
    ask(10, client="a", mark="one")
    clock.now += 1000.0
    del here[1:]
    ask(10)
    ask(10)
    assert admission.demand.pressure == 0, "which is over when they stay away"


def test_those_who_are_taken_in_a_lasting_overload_take_as_long_as_in_a_full_batch(queue):
    """Which is 20 s, a third of what they may take."""
    _, clock, here, ask = queue
    took, refusals = [], 0
    for i in range(400):
        try:
            ask(10, client=str(i))
        except QueueFullError:
            refusals += 1
        clock.now += 2.0
        for image in choose(in_order(here, clock.now), 2):
            image.remaining -= 1
            if not image.remaining:
                here.remove(image)
                took.append(clock.now - image.came)
    assert refusals > 300 and len(took) > 70, "five times as much is asked for as can be drawn, and no row is idle"
    assert max(took) <= 60 and max(took[10:]) <= 24


def test_room_is_kept_for_as_many_as_come_again():
    returns = Returns()
    told, everyone = {"of_many": False, "came": False}, {"client": "", "of_many": True}
    returns.tell(("a", ""), 0.0, 5.0, 2.0, 1, **told)
    assert returns.expected(0.0, **everyone) == (2.0, 1.0, 2.0)
    assert returns.expected(0.0, 4.0, **everyone) == (0, 0, 2.0)
    for i in range(200):  # none of whom come
        returns.tell((f"{i}", ""), 0.0, 1.0, 1.0, 1, **told)
    assert returns.left(("a", ""), 4.0) == 1.0 and len(returns) == 1
    assert returns.expected(4.0, **everyone)[0] < 0.2
    for i in range(200):
        returns.tell((f"{i}", ""), 4.0, 1.0, 1.0, 1, **told)
        returns.come((f"{i}", ""))
    assert returns.expected(4.0, **everyone) == (2.0, 1.0, 2.0)
    returns.tell(("b", ""), 4.0, 1.0, 7.0, 1, of_many=True, came=True)
    assert returns.expected(4.0, client="", of_many=False)[0] == 2.0 and returns.again() == 7.0
    assert returns.expected(4.0, client="b", of_many=False)[0] == 9.0, "it keeps room for its own"


def test_one_client_with_many_requests_books_no_more_than_the_rows_from_others(queue):
    """All that it is told after that is kept from its own new requests alone."""
    _, clock, here, ask = queue
    for _ in range(5):
        ask(10)
    told = [refused(ask, 10, client="many", mark=str(i)).seconds for i in range(6)]
    assert told == [9.0, 25.0, 50.0, None, None, None], "10 s of work each, in 40 % of the time"
    one = refused(ask, 10, client="one", mark="one")
    assert one.seconds == 50.0, "behind two of them, which is less than the next minute"
    clock.now = one.seconds
    here.clear()
    for i in range(2):
        ask(10, client="many", mark=str(i))
    ask(10, client="one", mark="one")


def test_the_headers_say_when_to_come_again():
    assert refusal(QueueFullError(1.2)).headers == {"Retry-After": "2", "Retry-After-Ms": "1200"}
    assert refusal(QueueFullError(0.01)).headers == {"Retry-After": "1", "Retry-After-Ms": "10"}
    never = refusal(QueueFullError(None))
    assert (never.status, never.headers) == (429, {}) and "later" in never.message


def test_jobs_may_take_longer_and_go_behind_others(queue):
    _, _, here, ask = queue
    for _ in range(10):
        ask(10, patience=4.0)
    [image] = ask(10)
    assert (here[0].due, image.due) == (240.0, 60.0)
    assert in_order(here)[0] is image


def test_without_a_bound_in_time_there_is_that_of_images(queue):
    admission, _, here, ask = queue
    admission.patience = math.inf
    for _ in range(22):
        ask(10)
    assert refused(ask, 10).seconds == 20.0 and len(here) == 22


def test_the_meter_knows_batches_of_other_sizes_and_kinds():
    meter = Meter()
    assert not meter.has_steps and meter.round("a", 4) == meter.row("a") == meter.once("decode", "a") == 0.0
    meter.stepped("a", 4, 2.0)
    meter.stepped("a", 1, 1.0)
    assert (meter.round("a", 4), meter.round("a", 8), meter.round("a", 2)) == (2.0, 4.0, 2.0)
    assert meter.round("b", 4) == 2.0 and meter.row("a") == pytest.approx(0.55)
    meter.took("decode", "a", 3.0)
    assert meter.once("decode", "b") == 3.0 and meter.once("preview", "a") == 0.0
    for size in range(1000):
        meter.stepped(size, 1, 7.0)
        meter.took("decode", size, 5.0)
        meter.stepped("a", 4, 2.0)
    assert meter.round("a", 4) == 2.0 and meter.once("decode", "another") == 5.0
    assert len(meter._rounds) == len(meter._rows) == len(meter._parts["decode"]) == 256


def test_the_meter_is_read_while_it_measures():
    meter, stop, failed = Meter(), threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                meter.round(-1, 99), meter.row(-1), meter.once("decode", -1)
            except Exception as error:
                failed.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        for i in range(2000):
            meter.stepped(i % 100, 1 + i % 7, 0.1)
            meter.took("decode", i % 100, 0.1)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert not failed


def test_memory_is_given_back():
    few_arenas()
    trim()
