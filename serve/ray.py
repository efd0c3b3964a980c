"""`diffoundry serve --ray`: the server of one machine as an application of Ray Serve, with a replica a device.

The ingress is the server: keys, tickets, jobs, pictures that are kept. It draws nothing; its `Fleet` sends each image
to a replica, a `Drawer`. So a replica holds nothing that cannot be made again, and may end at any time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from ..common.errors import DiffoundryError, RequestError, reason
from . import app
from .cluster import Device, Replicas, absolute, device_of, read_arguments
from .drawer import Drawer, News, Order
from .fleet import Fleet, LostError
from .guard import read_keys
from .server import Options, guarded, log_to_stderr, open_models, reserve
from .service import Service

NAME = "diffoundry"
"""Of the application."""
_AHEAD = 4
"""Images that a replica is sent, by those that it steps together: it chooses among so many whose turn it is."""
_REQUESTS = 100_000
"""That the ingress has open. It refuses by images, not by requests."""
_OBJECTS = 256 << 20
"""Bytes of shared memory for pictures on their way, in a Ray of our own."""
_WARM_S, _UP_S, _DOWN_S, _HEALTH_S = 1.0, 10.0, 300.0, 5.0
"""Seconds between looks at what is warm; before replicas come and go; between looks at whether they draw."""
_ENDING_S = 10.0


def build(arguments: dict[str, Any]) -> Any:
    """An application for `serve run diffoundry.serve.ray:build bundles=BUNDLE threads=2 …`.

    arguments: options of `diffoundry serve`, see `cluster.read_arguments`. Raises `DiffoundryError`.
    """
    options, replicas = read_arguments(arguments)
    # The root imports what may not be imported here; it is there before any module of it is.
    version = str(vars(sys.modules[__name__.partition(".")[0]])["__version__"])
    return application(replace(options, version=version), replicas)


def application(options: Options, replicas: Replicas | None) -> Any:
    """The ingress and its replicas, not deployed. replicas: None for one to as many as the cluster has devices for.

    Raises `DiffoundryError` for what cannot be served, where this process can see it.
    """
    try:
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError:
        raise missing() from None
    options, device = absolute(options), device_of(options)
    if replicas is None:
        replicas = Replicas(1, max(1, device.fit(ray.cluster_resources() if ray.is_initialized() else {})))
    same = {"graceful_shutdown_timeout_s": options.drain + _ENDING_S, "logging_config": {"enable_access_log": False}}
    count: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        count = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": options.rows,
                "upscale_delay_s": _UP_S,
                "downscale_delay_s": _DOWN_S,
            }
        }
    drawer = serve.deployment(
        Replica,
        name="drawer",
        ray_actor_options=dict(device.replica),
        max_ongoing_requests=_AHEAD * options.rows,
        health_check_period_s=_HEALTH_S,
        request_router_config=RequestRouterConfig(
            request_router_class="diffoundry.serve.routing.WarmRouter",
            request_router_kwargs={"rows": options.rows},
            request_routing_stats_period_s=_WARM_S,
        ),
        **same,
        **count,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=1,
        ray_actor_options=dict(device.ingress),
        max_ongoing_requests=_REQUESTS,
        **same,
    )
    return ingress.bind(options, replicas.most, drawer.bind(options))


class Replica:
    """A `Drawer` as Ray Serve runs it, in a process of its own."""

    def __init__(self, options: Options) -> None:
        from ray import serve

        log_to_stderr()
        name = serve.get_replica_context().replica_id.unique_id
        self._drawer = Drawer(options, name, _log)

    async def draw(self, order: Order) -> AsyncGenerator[News, None]:
        """See `Drawer.draw`."""
        async for news in self._drawer.draw(order):
            yield news

    def record_routing_stats(self) -> dict[str, Any]:
        """What `routing.WarmRouter` goes by."""
        return {"warm": self._drawer.warm}

    def check_health(self) -> None:
        """Raises where another replica should take its place."""
        if not self._drawer.is_ready:
            raise DiffoundryError("the engine failed three times in a row")


class Ingress:
    """The server: all that `app.build` makes, drawn by replicas."""

    def __init__(self, options: Options, most: int, drawers: Any) -> None:
        """most: replicas. drawers: a handle to them."""
        log_to_stderr()
        keys = [] if options.keys is None else read_keys(options.keys)
        models = open_models(options, _log)
        send = partial(_send, drawers)
        self._fleet = Fleet(
            models, send, most_rows=options.rows, drawers=most, queue=options.queue, patience=options.patience
        )
        self._fleet.start()
        service = Service(models, self._fleet, options.version)
        # Ray waits for open requests; jobs that are left then could be asked for by nobody.
        self._app = app.build(service, keys=keys, origins=options.origins, drain=0.0, with_page=options.page)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def drain(self, seconds: float) -> bool:
        """Take nothing more, and draw what is there."""
        return self._fleet.drain(seconds)


async def _send(drawers: Any, order: Order, kind: str) -> AsyncGenerator[News, None]:
    """A `fleet.Send`."""
    from ray.exceptions import RayError, RayTaskError

    response = drawers.options(stream=True, multiplexed_model_id=kind).draw.remote(order)
    try:
        async for news in response:
            yield news
    except RayTaskError:
        raise
    except RayError as error:
        raise LostError(type(error).__name__) from None
    finally:
        response.cancel()


def serve(options: Options, replicas: Replicas | None, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end: in the cluster of `RAY_ADDRESS`, else in a Ray on this machine alone.

    say: shows a line. Raises `DiffoundryError` for what cannot be served, before the first request is taken.
    """
    if options.port == 0:
        raise RequestError("Ray Serve takes no port 0: give another --port")
    keys = [] if options.keys is None else read_keys(options.keys)
    device = device_of(options)
    is_own = not os.environ.get("RAY_ADDRESS")
    if is_own:
        open_models(options, say)
        reserve(options.host, options.port).close()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve as ray_serve
    except ImportError:
        raise missing() from None
    try:
        _connect(is_own, device, replicas)
        ray_serve.start(http_options={"host": options.host, "port": options.port})
        ended = threading.Event()
        before = {each: signal.signal(each, lambda *_: ended.set()) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            handle = ray_serve.run(application(options, replicas), name=NAME, route_prefix="/")
            host = f"[{options.host}]" if ":" in options.host else options.host
            say(f"listening on http://{host}:{options.port}/v1 ({guarded(keys)})")
            ended.wait()
            try:
                handle.drain.remote(options.drain).result(timeout_s=options.drain + _ENDING_S)
            finally:  # a cluster would run it on
                ray_serve.delete(NAME)
        finally:
            for number, old in before.items():
                signal.signal(number, old)
    except DiffoundryError:
        raise
    except (RuntimeError, ConnectionError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        raise DiffoundryError(f"Ray could not serve this: {reason(error)}") from None
    finally:
        if is_own:
            ray_serve.shutdown()
        ray.shutdown()


def _connect(is_own: bool, device: Device, replicas: Replicas | None) -> None:
    """Join the cluster, or start one here. Raises `RequestError` where one here has no room for the replicas."""
    import ray

    if not is_own:
        ray.init(logging_level=logging.WARNING)
        return
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECTS, logging_level=logging.WARNING)
    room, least = device.fit(ray.cluster_resources()), 1 if replicas is None else replicas.least
    if least > room:
        wanted: Mapping[str, float] = device.replica
        each = "a GPU" if "num_gpus" in wanted else f"{wanted['num_cpus']:g} cores"
        raise RequestError(
            f"this machine has room for {room} replicas of {each}: give fewer --replicas or --threads, or name a "
            "cluster by RAY_ADDRESS"
        )


def missing() -> DiffoundryError:
    """The error where the extra is not installed."""
    return DiffoundryError("several replicas need Ray Serve: pip install 'diffoundry[ray]'")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
