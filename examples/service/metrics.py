"""What Prometheus reads: requests as clients see them, and the Engine's and the batcher's own statistics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from repvgg_deploy.runtime.statistics import Statistics
from repvgg_deploy.serving.prometheus import make_collector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class RequestMetrics:
    """Requests by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "repvgg_http_requests",
            "Requests that were answered, by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "repvgg_http_request_seconds",
            "Seconds from the head of a request to its answer, by route",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.active = Gauge(
            "repvgg_http_active_requests", "Inference requests that are under way now", registry=registry
        )
        self.buffered = Gauge("repvgg_http_buffered_bytes", "Bytes of request bodies in memory now", registry=registry)
        self.ready = Gauge("repvgg_ready", "1 while /v2/health/ready answers 200, else 0", registry=registry)


def make_registry(
    engine: Callable[[], Statistics], batcher: Callable[[], Statistics], about: dict[str, str]
) -> CollectorRegistry:
    """A registry of this service alone: process, platform, Engine and batcher, and what it is (`about`)."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter, which nobody reads
    registry = CollectorRegistry()
    Info("repvgg_build", "The version of repvgg-deploy, and what runs the model", registry=registry).info(about)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(make_collector("repvgg_engine", engine))
    registry.register(make_collector("repvgg_batcher", batcher))
    return registry
