"""Rounds made one by one on the real pipeline: nothing sleeps, and the clock stands still where it is ours."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

import diffoundry
from diffoundry import Guidance, Request
from diffoundry.common.errors import EngineError, RequestError
from diffoundry.runtime.pipeline import Pipeline
from diffoundry.serve.admission import QueueFullError
from diffoundry.serve.models import Model, Models
from diffoundry.serve.queue import DrainingError
from diffoundry.serve.scheduler import Scheduler
from diffoundry.serve.tickets import BrokenError, Ended, OverdueError, Partial, Step, Ticket

PROMPT = "a large red star at the left on a navy background"
MIXED = [
    Request(PROMPT, seed=7, steps=8, scheduler="dpm++2m"),
    Request("a small ring", seed=9, steps=3, scheduler="ddpm", guidance=Guidance(4, interval=(0, 0.5)), count=2),
    Request("a star", seed=3, steps=11, scheduler="euler_a", guidance=Guidance(1.0)),
    Request(PROMPT, seed=7, steps=6, scheduler="heun", guidance=Guidance(5, mode="split"), width=96, height=64),
]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def drawing(pipe):
    """Makes schedulers of the pico model, and tickets for it."""
    model = Model("pico", pipe)

    def make(**options):
        return Scheduler(Models([model]), **options)

    def ticket(request=None, client="", **options):
        own = {name: options.pop(name) for name in ("priority", "partial_images", "deadline") if name in options}
        return Ticket(model, pipe.job(request or Request(PROMPT, seed=1, **options)), client=client, **own)

    return make, ticket


def finish(scheduler):
    rounds = 1
    while scheduler.round():
        rounds += 1
        assert rounds < 1000
    return rounds


def pixels(image):
    return np.asarray(image).astype(int)


def test_mixed_rows_give_the_pictures_that_they_give_alone(drawing, pipe):
    make, ticket = drawing
    scheduler, tickets = make(most_rows=3), [ticket(request) for request in MIXED]
    scheduler.submit(tickets[0])
    scheduler.round()
    for each in tickets[1:]:
        scheduler.submit(each)
    finish(scheduler)
    for each, request in zip(tickets, MIXED, strict=True):
        wanted = pipe.generate(request)
        assert each.state == "succeeded"
        for i, image in enumerate(wanted.images):
            assert np.abs(pixels(each.images[i]) - pixels(image)).max() <= 1


def test_a_short_one_overtakes_long_ones_and_they_end_as_they_would(drawing, pipe):
    make, ticket = drawing
    scheduler = make(most_rows=1)
    long, short = ticket(steps=20, client="a"), ticket(steps=3, client="a")
    scheduler.submit(long)
    for _ in range(5):
        scheduler.round()
    assert (long.step, long.state) == (5, "running")
    scheduler.submit(short)
    for _ in range(4):
        scheduler.round()
    assert short.state == "succeeded" and long.step <= 6
    finish(scheduler)
    wanted = pipe.generate(Request(PROMPT, seed=1, steps=20)).images[0]
    assert np.array_equal(pixels(long.images[0]), pixels(wanted))


def test_texts_are_encoded_together(drawing, pipe, monkeypatch):
    make, ticket = drawing
    calls, prepare = [], type(pipe).prepare
    monkeypatch.setattr(type(pipe), "prepare", lambda self, jobs: calls.append(len(jobs)) or prepare(self, jobs))
    scheduler = make(most_rows=4)
    for i in range(3):
        scheduler.submit(ticket(Request(f"a ring {i}", steps=2)))
    finish(scheduler)
    assert calls == [3]


def test_a_step_is_never_far_behind_a_decoder(drawing):
    """One picture is decoded in a round where steps take no longer, however many are done at once."""
    make, ticket = drawing
    scheduler = make(most_rows=4, clock=Clock())
    done, moving = ticket(Request(PROMPT, steps=1, count=3)), ticket(steps=6, client="b")
    scheduler.submit(done)
    scheduler.submit(moving)
    for k in range(1, 4):
        scheduler.round()
        assert (len(done.images), moving.step) == (k, k)


def test_a_tiled_picture_is_decoded_a_tile_a_round(drawing, pipe):
    """Steps of others come in between, its engine may be dropped meanwhile, and one that is cancelled is left."""
    make, ticket = drawing
    request = Request(PROMPT, seed=3, steps=2, width=128, height=64, tiled=True)
    scheduler, (tiled, gone), moving = make(clock=Clock()), (ticket(request), ticket(request)), ticket(steps=9)
    scheduler.submit(tiled)
    scheduler.round()
    scheduler.submit(moving)
    scheduler.round()
    assert scheduler.decoding == 1 and moving.step == 0, "the first of three tiles in a row, two above each other"
    for k in range(1, 6):
        assert not tiled.images
        pipe.release("vae_decoder")
        scheduler.round()
        assert moving.step == k
    assert np.array_equal(pixels(tiled.images[0]), pixels(pipe.generate(request).images[0]))
    scheduler.submit(gone)
    while not scheduler.decoding:
        scheduler.round()
    scheduler.cancel(gone)
    finish(scheduler)
    assert (gone.state, gone.images, moving.state) == ("cancelled", {}, "succeeded")


def test_cancelling_frees_the_rows_at_the_next_step(drawing):
    make, ticket = drawing
    scheduler = make(most_rows=4)
    gone, stays = ticket(steps=20, count=2), ticket(steps=4, client="b")
    events = []
    gone.listeners.append(events.append)
    scheduler.submit(gone)
    scheduler.submit(stays)
    scheduler.round()
    scheduler.cancel(gone)
    scheduler.round()
    assert gone.state == "cancelled" and gone.step == 2 and isinstance(events[-1], Ended)
    assert [image.ticket for image in scheduler._images] == [stays]
    finish(scheduler)
    assert stays.state == "succeeded" and not len(scheduler._rows)


def test_one_that_was_not_begun_can_be_cancelled(drawing):
    make, ticket = drawing
    scheduler, waiting = make(most_rows=1), ticket(steps=9)
    scheduler.submit(ticket(steps=2))
    scheduler.submit(waiting)
    scheduler.round()
    scheduler.cancel(waiting)
    finish(scheduler)
    assert waiting.state == "cancelled" and waiting.step == 0


def test_a_full_queue_says_when_there_is_room(drawing):
    make, ticket = drawing
    clock = Clock()
    scheduler = make(most_rows=1, queue=1, clock=clock)
    scheduler._meter.stepped(ticket(steps=1).kind, 1, 2.0)
    scheduler.submit(ticket(steps=10))
    scheduler.submit(ticket(steps=20))
    with pytest.raises(QueueFullError, match="try again in 20 s") as refused:
        scheduler.submit(ticket(steps=2))
    assert refused.value.retry_after == 20
    assert len(scheduler._images) == 2
    finish(scheduler)
    scheduler.submit(ticket(steps=1))
    finish(scheduler)


def test_the_last_places_are_for_clients_that_have_few(drawing):
    make, ticket = drawing
    scheduler = make(most_rows=4, queue=4)
    for _ in range(6):
        scheduler.submit(ticket(steps=2, client="many"))
    with pytest.raises(QueueFullError):
        scheduler.submit(ticket(steps=2, client="many"))
    for name in ("one", "two"):
        scheduler.submit(ticket(steps=2, client=name))
    with pytest.raises(QueueFullError):
        scheduler.submit(ticket(steps=2, client="three"))
    with pytest.raises(RequestError, match="ask for 8"):
        scheduler.submit(ticket(steps=2, count=9))
    finish(scheduler)


def test_what_is_late_ends(drawing):
    make, ticket = drawing
    clock = Clock()
    scheduler, late = make(clock=clock), ticket(steps=9, deadline=5.0)
    scheduler.submit(late)
    scheduler.round()
    clock.now = 6.0
    finish(scheduler)
    assert late.state == "failed" and isinstance(late.error, OverdueError) and late.step == 1
    scheduler._meter.stepped(ticket(steps=1).kind, 1, 10.0)
    with pytest.raises(OverdueError, match="after its deadline"):
        scheduler.submit(ticket(steps=9, deadline=7.0))


def test_one_that_waits_for_the_decoder_ends_when_the_server_does(drawing):
    make, ticket = drawing
    scheduler, late = make(most_rows=4, clock=Clock()), ticket(steps=1, count=3)
    scheduler.submit(late)
    scheduler.round()
    assert not scheduler._images and scheduler.decoding == 2
    assert not scheduler.drain(0.0)
    scheduler._run()
    assert late.state == "cancelled" and late.ended.is_set()


def test_the_outlook_is_that_of_the_measured_steps(drawing):
    make, ticket = drawing
    scheduler = make(most_rows=1, clock=Clock())
    first, second = ticket(steps=4), ticket(steps=6)
    scheduler.submit(first)
    assert scheduler.outlook(first).seconds is None
    scheduler.submit(second)
    scheduler._meter.stepped(ticket(steps=1).kind, 1, 0.5)
    assert (scheduler.outlook(first).place, scheduler.outlook(first).seconds) == (1, 2.0)
    assert (scheduler.outlook(second).place, scheduler.outlook(second).seconds) == (2, 5.0)
    scheduler.round()
    assert (scheduler.outlook(first).place, scheduler.outlook(second).place) == (0, 1)
    finish(scheduler)
    assert scheduler.outlook(second).seconds == 0.0


def test_partial_images_and_steps_are_told(drawing, pipe):
    make, ticket = drawing
    scheduler, watched = make(), ticket(steps=8, partial_images=3)
    events = []
    watched.listeners.append(events.append)
    scheduler.submit(watched)
    finish(scheduler)
    assert [each.step for each in events if isinstance(each, Step)] == list(range(1, 9))
    partial = [each for each in events if isinstance(each, Partial)]
    assert [each.number for each in partial] == [0, 1, 2]
    run = pipe.steps(Request(PROMPT, seed=1, steps=8))
    latents = [progress.latents for progress in run][3]
    wanted = np.clip(pipe.decode(latents)[0] / 2 + 0.5, 0, 1).transpose(1, 2, 0) * 255
    assert np.abs(pixels(partial[1].image) - wanted).max() <= 1


def test_a_step_that_fails_beside_others_is_tried_alone(bundle_of):
    """The denoiser of this pipeline fails in calls of several rows: as where memory is short."""

    class Fails:
        def __init__(self, engine):
            self._engine = engine

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def bind_host(self, feeds, *more):
            if len(next(iter(feeds.values()))) > 2:
                raise EngineError("no memory for as many rows")
            return self._engine.bind_host(feeds, *more)

    pipe = Pipeline(
        diffoundry.load(bundle_of("pico")).bundle, threads=1, wrap=lambda n, e: Fails(e) if n == "unet" else e
    )
    model = Model("pico", pipe)
    scheduler = Scheduler(Models([model]))
    tickets = [Ticket(model, pipe.job(Request(PROMPT, seed=i, steps=2))) for i in range(3)]
    for each in tickets:
        scheduler.submit(each)
    finish(scheduler)
    assert [each.state for each in tickets] == ["succeeded"] * 3


def test_one_that_overflows_ends_alone(drawing):
    make, ticket = drawing
    scheduler = make()
    bad = ticket(Request(PROMPT, steps=2, guidance=Guidance(1e6), scheduler="euler"))
    good = ticket(steps=3)
    scheduler.submit(bad)
    scheduler.submit(good)
    scheduler.round()
    image = next(each for each in scheduler._images if each.ticket is bad)
    image.batch._row(image.handle).state.x[...] = np.nan
    finish(scheduler)
    assert bad.state == "failed" and "not finite" in str(bad.error)
    assert good.state == "succeeded"


def test_what_should_not_happen_ends_one_ticket_and_is_not_told(drawing, monkeypatch):
    make, ticket = drawing
    scheduler, broken, good = make(), ticket(steps=2), ticket(steps=2, client="b")
    scheduler.submit(broken)
    scheduler.submit(good)
    parts = type(broken.model.pipeline).picture_parts

    def fails(self, job, latents):
        if job is broken.job:
            raise ZeroDivisionError("of our own")
        return parts(self, job, latents)

    monkeypatch.setattr(type(broken.model.pipeline), "picture_parts", fails)
    finish(scheduler)
    assert broken.state == "failed" and isinstance(broken.error, BrokenError)
    assert "of our own" not in str(broken.error)
    assert good.state == "succeeded"


def test_models_take_turns_where_memory_holds_one(bundle_of, monkeypatch):
    monkeypatch.setattr(sys.modules[Models.__module__], "_SWITCH", 6)
    models = [Model(name, diffoundry.load(bundle_of("pico"))) for name in ("a", "b")]
    one = int(models[0].size * 1.5)
    scheduler = Scheduler(Models(models, one))
    tickets = [
        Ticket(model, model.pipeline.job(Request(PROMPT, seed=1, steps=steps)))
        for model, steps in zip(models, (20, 2), strict=True)
    ]
    scheduler.submit(tickets[0])
    scheduler.round()
    scheduler.submit(tickets[1])
    while scheduler.round():
        assert sum(model.held for model in models) <= one
        if tickets[1].state == "succeeded":
            break
    assert tickets[0].state == "running", "the long one gave way after a while"
    finish(scheduler)
    assert [each.state for each in tickets] == ["succeeded"] * 2
    with pytest.raises(RequestError, match="--memory"):
        Models(models, models[0].size - 1)


def test_a_model_waits_while_pictures_of_another_are_decoded(bundle_of):
    models = [Model(name, diffoundry.load(bundle_of("pico"))) for name in ("a", "b")]
    scheduler = Scheduler(Models(models, int(models[0].size * 1.5)), clock=Clock())
    requests = Request(PROMPT, steps=1, count=3), Request(PROMPT, steps=2)
    tickets = [Ticket(model, model.pipeline.job(each)) for model, each in zip(models, requests, strict=True)]
    for each in tickets:
        scheduler.submit(each)
    finish(scheduler)
    assert [each.state for each in tickets] == ["succeeded"] * 2


def test_a_model_that_decodes_gives_way_when_that_is_done(bundle_of, monkeypatch):
    """Else its decoder would be loaded again for each tile, beside the model that took its place."""
    monkeypatch.setattr(sys.modules[Models.__module__], "_SWITCH", 3)
    models = [Model(name, diffoundry.load(bundle_of("pico"))) for name in ("a", "b")]
    scheduler = Scheduler(Models(models, int(models[0].size * 1.5)), clock=Clock())
    tiled = Request(PROMPT, steps=1, width=128, height=64, tiled=True)
    asked = (models[0], tiled), (models[0], Request(PROMPT, steps=40)), (models[1], Request(PROMPT, steps=2))
    tickets = [Ticket(model, model.pipeline.job(request)) for model, request in asked]
    for each in tickets:
        scheduler.submit(each)
    while scheduler.round():
        assert not (models[0].held and models[1].held)
        if tickets[2].state == "succeeded":
            assert tickets[1].step < 40, "it gave way"
    assert [each.state for each in tickets] == ["succeeded"] * 3


def test_a_scheduler_whose_bundle_is_gone_is_not_ready(copied):
    model = Model("pico", diffoundry.load(copied, engine="onnxruntime"))
    scheduler = Scheduler(Models([model]))
    scheduler.start()
    jobs = [Ticket(model, model.pipeline.job(Request(PROMPT, seed=1, steps=1))) for _ in range(4)]
    scheduler.submit(jobs[0])
    jobs[0].ended.wait(20)
    assert jobs[0].state == "succeeded"
    model.pipeline.release_all()
    shutil.rmtree(copied / "text_encoder")
    for each in jobs[1:]:
        assert scheduler.is_ready
        scheduler.submit(each)
        each.ended.wait(20)
        assert each.state == "failed"
    assert not scheduler.is_ready
    scheduler.drain(5)


def test_requests_that_overflow_do_not_make_it_unready(drawing):
    """Whoever asks could end the server so."""
    make, ticket = drawing
    scheduler, text = make(), np.full((77, 64), 1e38)
    scheduler.start()
    for _ in range(4):
        scheduler.submit(bad := ticket(Request(prompt_embeds=text, steps=1, guidance=Guidance(1.0))))
        assert bad.ended.wait(20) and "not finite" in str(bad.error)
    assert scheduler.is_ready
    scheduler.drain(5)


def test_an_image_that_is_shown_on_its_way_is_one(drawing):
    make, ticket = drawing
    scheduler, shown = make(most_rows=2, queue=2), ticket(steps=6, count=2)
    shown.partial_images = 3
    scheduler.submit(shown)
    seen = []
    while scheduler.round():
        seen.append((scheduler.present, scheduler.decoding))
    assert shown.state == "succeeded"
    assert max(present for present, _ in seen) == 2
    assert all(decoding <= 2 for _, decoding in seen)


def test_a_scheduler_that_drains_takes_nothing_more_and_ends_what_it_has(drawing):
    make, ticket = drawing
    scheduler, last = make(), ticket(steps=3)
    scheduler.start()
    scheduler.submit(last)
    assert scheduler.drain(20)
    assert last.state == "succeeded" and not scheduler.is_ready
    with pytest.raises(DrainingError):
        scheduler.submit(ticket(steps=1))
