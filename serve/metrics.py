"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server. The names on the page all begin with `diffoundry_`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.waiting = Gauge("diffoundry_waiting_images", "Images that were not begun", registry=registry)
        self.moving = Gauge("diffoundry_moving_images", "Images that were begun and have steps left", registry=registry)
        self.decoding = Gauge("diffoundry_decoding_images", "Images that wait for the decoder", registry=registry)
        self.rows = Histogram("diffoundry_step_rows", "Images in a step", buckets=_ROWS, registry=registry)
        self.step = Histogram("diffoundry_step_seconds", "Duration of a step", buckets=_SECONDS, registry=registry)
        self.wait = Histogram(
            "diffoundry_wait_seconds", "From a request to its first step", buckets=_SECONDS, registry=registry
        )
        self.images = Counter("diffoundry_images", "Images that were drawn", ["model"], registry=registry)
        self.errors = Counter("diffoundry_errors", "Requests that failed while drawn", ["kind"], registry=registry)
        self.redrawn = Counter("diffoundry_redrawn_images", "Images whose replica was lost", registry=registry)
        self.requests = Counter("diffoundry_requests", "Requests that ended", ["route", "status"], registry=registry)
        self.refused = Counter("diffoundry_refused", "Requests for which there was no place", registry=registry)
        self.loaded = Gauge("diffoundry_loaded_bytes", "Models in memory, about", ["model"], registry=registry)

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
