"""Tickets whose images are drawn by several `Drawer`s, of which some are lost. Ray is not needed: they are in here."""

from __future__ import annotations

import asyncio
import pickle
import time
from contextlib import aclosing

import numpy as np
import pytest
from PIL import Image

from diffoundry import Control, Guidance, Request
from diffoundry.serve.admission import QueueFullError
from diffoundry.serve.cluster import Device, Replicas, device_of, read_arguments
from diffoundry.serve.drawer import Drawer, Failed, Order, kind_of
from diffoundry.serve.fleet import Fleet, LostError
from diffoundry.serve.models import Model, Models
from diffoundry.serve.queue import DrainingError
from diffoundry.serve.server import Options
from diffoundry.serve.tickets import Drawn, Ended, Partial, Step, Ticket
from diffoundry.tests.serve.conftest import until

PROMPT = "a large red star at the left on a navy background"


@pytest.fixture(scope="module")
def drawers(bundle_of):
    """Two, in this process."""
    options = Options({"pico": bundle_of("pico")}, rows=2, queue=0, threads=1)
    made = [Drawer(options, name, lambda line: None) for name in ("a", "b")]
    yield made
    for each in made:
        assert each._service.scheduler.drain(10)


@pytest.fixture(scope="module")
def models(bundle_of, pipe):
    return Models([Model("pico", pipe)])


class Road:
    """Sends orders to drawers in turn, over a road on which the first ones are lost after so many news each."""

    def __init__(self, drawers, lost=()):
        self.drawers, self.lost, self.orders = drawers, list(lost), []

    async def __call__(self, order, kind):
        assert kind == kind_of("pico", (64, 64))
        drawer = self.drawers[len(self.orders) % 2]
        self.orders.append(order)
        left = self.lost.pop(0) if self.lost else None
        async with aclosing(drawer.draw(pickle.loads(pickle.dumps(order)))) as stream:
            async for news in stream:
                if left == 0:
                    raise LostError("it was killed")
                left = None if left is None else left - 1
                yield pickle.loads(pickle.dumps(news))


def fleet_of(models, send, **options):
    fleet = Fleet(models, send, **{"most_rows": 2, "drawers": 2, "queue": 20, **options})
    fleet.start()
    return fleet


def ticket_of(models, partial_images=0, **options):
    model = models.named("pico")
    return Ticket(model, model.pipeline.job(Request(PROMPT, **options)), partial_images=partial_images)


async def drawn(fleet, *tickets):
    """The events of each ticket to its end."""
    found = [[] for _ in tickets]
    for ticket, events in zip(tickets, found, strict=True):
        ticket.listeners.append(events.append)
        fleet.submit(ticket)
    while not all(ticket.is_over for ticket in tickets):
        await asyncio.sleep(0.005)
    return found


def is_idle(drawers):
    return all(not each._service.scheduler._images for each in drawers)


def test_an_image_whose_drawer_is_lost_is_drawn_anew(models, drawers, pipe):
    """Its pictures are right, and nobody hears of anything twice."""
    road = Road(drawers, lost=(2, 0, 3))
    ticket = ticket_of(models, seed=7, count=2, steps=16, partial_images=3)
    fleet = fleet_of(models, road)
    (events,) = asyncio.run(drawn(fleet, ticket))
    assert ticket.state == "succeeded" and len(road.orders) == 5 and fleet.metrics.redrawn._value.get() == 3
    assert sorted(order.request.seed for order in road.orders) in ([7, 7, 7, 8, 8], [7, 7, 8, 8, 8], [7, 7, 7, 7, 8])
    wanted = pipe.generate(Request(PROMPT, seed=7, count=2, steps=16)).images
    for i, image in enumerate(wanted):
        assert np.abs(np.asarray(ticket.images[i]).astype(int) - np.asarray(image)).max() <= 1
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == sorted(set(steps)) and steps[-1] == 32 == ticket.step
    shown = [(event.index, event.number) for event in events if isinstance(event, Partial)]
    assert sorted(shown) == [(i, number) for i in range(2) for number in range(3)]
    assert sorted(event.index for event in events if isinstance(event, Drawn)) == [0, 1]
    assert isinstance(events[-1], Ended) and not fleet._images and ticket.tokens == 77
    until(lambda: is_idle(drawers))


def test_a_job_may_take_as_long_in_a_drawer_as_here(models, drawers, monkeypatch):
    taken, scheduler = [], drawers[0]._service.scheduler
    submit = scheduler.submit
    monkeypatch.setattr(scheduler, "submit", lambda ticket: (taken.append(ticket), submit(ticket)))
    ticket = ticket_of(models, steps=1)
    ticket.patience = 4.0
    asyncio.run(drawn(fleet_of(models, Road(drawers)), ticket))
    assert [each.patience for each in taken] == [4.0]


def test_what_ends_every_drawer_is_given_up(models, drawers):
    road = Road(drawers, lost=[0] * 9)
    ticket, fleet = ticket_of(models, steps=30), fleet_of(models, road)
    asyncio.run(drawn(fleet, ticket))
    assert ticket.state == "failed" and "4 replicas were lost" in str(ticket.error)
    assert len(road.orders) == 4 and not fleet._images
    until(lambda: is_idle(drawers))


def test_what_no_drawer_can_draw_is_not_tried_again(models, drawers):
    road = Road(drawers)
    ticket, fleet = ticket_of(models, steps=3), fleet_of(models, road)

    async def send(order, kind):
        yield Failed("RequestError", "steps are too few")

    fleet._send = send
    asyncio.run(drawn(fleet, ticket))
    assert ticket.state == "failed" and str(ticket.error) == "steps are too few"
    assert type(ticket.error).__name__ == "RequestError"
    (news,) = asyncio.run(_all(drawers[0], Order("none", Request(PROMPT))))
    assert news.kind == "DiffoundryError" and "no model 'none'" in news.error.args[0]


async def _all(drawer, order):
    return [news async for news in drawer.draw(order)]


def test_cancel_and_deadlines_free_the_rows_elsewhere(models, drawers):
    fleet = fleet_of(models, Road(drawers))

    async def run():
        cancelled, late = ticket_of(models, count=2, steps=900), ticket_of(models, steps=900)
        late.deadline = time.monotonic() + 0.5
        for ticket in (cancelled, late):
            fleet.submit(ticket)
        while not cancelled.step:
            await asyncio.sleep(0.01)
        assert fleet.outlook(cancelled).seconds > 0
        fleet.cancel(cancelled)
        assert cancelled.state == "cancelled"
        while not late.is_over:
            await asyncio.sleep(0.01)
        assert late.state == "failed" and "deadline" in str(late.error)

    asyncio.run(run())
    assert not fleet._images and not fleet._timers
    until(lambda: is_idle(drawers))


def test_what_is_too_much_is_refused_and_what_is_there_is_drawn_at_the_end(models, drawers):
    fleet = fleet_of(models, Road(drawers), queue=4)

    async def run():
        tickets = [ticket_of(models, steps=40, count=2) for _ in range(4)]
        for ticket, client in zip(tickets, "abcd", strict=True):
            ticket.client = client
            fleet.submit(ticket)
        with pytest.raises(QueueFullError) as refused:
            fleet.submit(ticket_of(models))
        assert refused.value.retry_after >= 1
        assert fleet.is_ready
        assert await asyncio.to_thread(fleet.drain, 20)
        assert [ticket.state for ticket in tickets] == ["succeeded"] * 4
        with pytest.raises(DrainingError):
            fleet.submit(ticket_of(models))
        assert not fleet.is_ready

    asyncio.run(run())


def test_orders_travel_whole():
    picture = Image.new("RGB", (8, 8), "navy")
    request = Request(
        PROMPT,
        guidance=Guidance(3.0),
        scheduler="euler",
        scheduler_options={"use_karras_sigmas": True},
        image=picture,
        control=[Control("edge", picture, scale=0.5)],
        prompt_embeds=None,
        seed=3,
    )
    order = Order("pico", request, "key 1", 2, 1, 3.5)
    found = pickle.loads(pickle.dumps(order))
    assert (found.model, found.client, found.priority, found.partial_images, found.seconds) == (
        "pico",
        "key 1",
        2,
        1,
        3.5,
    )
    for name in ("prompt", "guidance", "scheduler", "scheduler_options", "seed", "strength"):
        assert getattr(found.request, name) == getattr(request, name)
    assert np.array_equal(np.asarray(found.request.control[0].image), np.asarray(picture))


def test_a_drawer_says_what_it_has_warm(drawers):
    assert kind_of("pico", (64, 64)) in drawers[0].warm and drawers[0].is_ready


def test_arguments_of_an_application(tmp_path, bundle_of):
    options, replicas = read_arguments(
        {
            "bundles": f"small={bundle_of('pico')},other={tmp_path}",
            "threads": "2",
            "max_rows": 4,
            "memory": "1.5",
            "api_key_file": "keys",
            "lora": {"style": "a.safetensors"},
            "warm": "true",
            "page": False,
            "replicas": "1-3",
        }
    )
    assert list(options.bundles) == ["small", "other"] and options.loras == {"style": "a.safetensors"}
    assert (options.threads, options.rows, options.memory, options.warm, options.page) == (2, 4, 3 << 29, True, False)
    assert replicas == Replicas(1, 3) and Replicas.parse(2) == Replicas(2, 2)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "bundles"),
        ({"bundles": "a,,b"}, "list of texts"),
        ({"bundles": "a", "colour": "red"}, "no argument 'colour'"),
        ({"bundles": "a", "threads": "two"}, "threads"),
        ({"bundles": "a", "replicas": "3-1"}, "MIN-MAX"),
        ({"bundles": "a", "warm": "yes"}, "true or false"),
        ({"bundles": "a", "memory": "much"}, "memory"),
        ({"bundles": "a", "lora": "style"}, "NAME=FILE"),
    ],
)
def test_arguments_that_are_wrong(given, word):
    from diffoundry.common.errors import RequestError

    with pytest.raises(RequestError, match=word):
        read_arguments(given)


def test_a_device_of_a_replica(bundle_of):
    bundles = {"pico": bundle_of("pico")}
    device = device_of(Options(bundles, threads=2))
    assert device == Device({"num_cpus": 2.0}, {"num_cpus": 0.0})
    assert device.fit({"CPU": 5.0}) == 2 and device.fit({}) == 0
    gpu = device_of(Options(bundles, engine="tensorrt"))
    assert gpu.replica["num_gpus"] + gpu.ingress["num_gpus"] == 1 and gpu.fit({"GPU": 4.0, "CPU": 9.0}) == 4
