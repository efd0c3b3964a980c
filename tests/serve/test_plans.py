"""A bundle with TensorRT plans: rows on the device, no more than a plan takes. The GPU is played in host memory."""

from __future__ import annotations

import numpy as np
import pytest

from diffoundry import Request
from diffoundry.engines.tensorrt.target import Target
from diffoundry.runtime.pipeline import load
from diffoundry.serve.errors import FieldError
from diffoundry.serve.fields import check_plans
from diffoundry.serve.models import Model, Models
from diffoundry.serve.scheduler import Scheduler
from diffoundry.serve.tickets import Ticket
from diffoundry.tests.runtime.test_plans import ENGINE, add_plans

PROMPT = "a large red star at the left on a navy background"


def test_rows_of_a_bundle_with_plans(trt, copied, pipe):
    add_plans(copied, Target(sizes=((64, 64), (96, 64)), batch=(1, 2)))
    model = Model("pico", load(copied, engine=ENGINE))
    with pytest.raises(FieldError, match="pico has no plan for 128x64, only for 64x64, 96x64"):
        check_plans((128, 64), model)
    requests = [
        Request(PROMPT, seed=1, steps=9, count=2),
        Request("a ring", seed=2, steps=3),
        Request("a ring", seed=2, steps=3, width=96),
    ]
    scheduler = Scheduler(Models([model]))
    tickets = []
    for request in requests:
        check_plans((request.width or 64, 64), model)
        tickets.append(Ticket(model, model.pipeline.job(request)))
        scheduler.submit(tickets[-1])
        scheduler.round()
        assert max(len(batch) for _, batch in scheduler._rows.items()) <= 2
    while scheduler.round():
        assert max((len(batch) for _, batch in scheduler._rows.items()), default=0) <= 2
        assert not any(batch.on_host for _, batch in scheduler._rows.items())
    for ticket, request in zip(tickets, requests, strict=True):
        assert ticket.state == "succeeded", ticket.error
        for i, wanted in enumerate(pipe.generate(request).images):
            assert np.abs(np.asarray(ticket.images[i]).astype(int) - np.asarray(wanted)).max() <= 2
