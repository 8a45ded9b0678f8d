"""Prometheus metrics of an endpoint and the engines behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

from amskv_kernels.serving.engine import Load

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # buckets: digits on a CPU … a full queue
GAUGES = {
    "amskv_images_waiting": ("images that wait to enter", "waiting"),
    "amskv_images_active": ("images inside", "active"),
    "amskv_pool_pages": ("pages of the pool", "units"),
    "amskv_pool_pages_used": ("pages that someone held in the last tick", "used"),
    "amskv_pool_pages_planned": ("pages that were planned for the last tick", "planned"),
}


class Metrics:
    """What has happened, kept for whoever scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.image_seconds = Histogram(
            "amskv_image_seconds", "from request to image", buckets=SECONDS, registry=self.registry
        )
        self.refused = Counter("amskv_refused", "requests refused", ["status"], registry=self.registry)
        self._loads: Mapping[str, Load] = {}
        self.registry.register(self)

    def refuse(self, status: int) -> None:
        """A request was refused."""
        self.refused.labels(str(status)).inc()

    def text(self, loads: Mapping[str, Load]) -> bytes:
        """All metrics, with the engines as they are."""
        self._loads = loads
        return generate_latest(self.registry)

    def describe(self) -> list[Any]:
        """Nothing is asked before the first scrape."""
        return []

    def collect(self) -> Iterator[Any]:
        """What the engines said."""
        loads = self._loads.items()
        for name, (says, field) in GAUGES.items():
            gauge = GaugeMetricFamily(name, says, labels=["engine"])
            for engine, load in loads:
                gauge.add_metric([engine], getattr(load, field))
            yield gauge
        booked = GaugeMetricFamily(
            "amskv_pool_pages_booked", "pages booked for a coming tick", labels=["engine", "ahead"]
        )
        done = CounterMetricFamily("amskv_images", "images that are done", labels=["engine", "outcome"])
        ticks = SummaryMetricFamily("amskv_tick_seconds", "one step of every image inside", labels=["engine"])
        for engine, load in loads:
            for ahead, pages in enumerate(load.coming):
                booked.add_metric([engine, str(ahead)], pages)
            for outcome in ("drawn", "cancelled", "failed"):
                done.add_metric([engine, outcome], getattr(load, outcome))
            ticks.add_metric([engine], load.ticks, load.busy)
        yield from (booked, done, ticks)
