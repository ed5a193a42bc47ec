"""What Prometheus reads: requests as clients see them, and the Engine's and the batcher's own statistics, taken when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector
from prometheus_client import Histogram as Timer
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from repvgg_deploy.runtime.statistics import Histogram, Statistics

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCH_SIZES = tuple(1 << power for power in range(10))
_COUNTERS = {
    "requests": "Answered",
    "images": "Of the requests that were answered",
    "failures": "That ended with an error of the backend",
    "refused": "That found the queue full",
    "expired": "Whose deadline passed before they were run",
    "cancelled": "Whose client went away before they were run",
}


class RequestMetrics:
    """Requests by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("repvgg_http_requests", "Requests that were answered", ["route", "status"], registry=registry)
        self.seconds = Timer("repvgg_http_request_seconds", "From a request's head to its answer", ["route"], buckets=_SECONDS, registry=registry)
        self.active = Gauge("repvgg_http_active_requests", "Inference requests under way", registry=registry)
        self.buffered = Gauge("repvgg_http_buffered_bytes", "Bodies of requests in memory", registry=registry)
        self.ready = Gauge("repvgg_ready", "1 while /v2/health/ready says so", registry=registry)


class StatisticsCollector(Collector):
    """Statistics that only grow, as counters and histograms of Prometheus.

    Args:
        prefix: Of each name.
        read: Gives the statistics.
    """

    def __init__(self, prefix: str, read: Callable[[], Statistics]) -> None:
        self._prefix = prefix
        self._read = read

    def describe(self) -> Iterator[Metric]:
        """Nothing: so that registering it does not ask the Engine yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All of it, at this moment."""
        found = self._read()
        for name, text in _COUNTERS.items():
            unit = "" if name == "images" else "Requests: "
            yield CounterMetricFamily(f"{self._prefix}_{name}", unit + text, value=getattr(found, name))
        yield GaugeMetricFamily(f"{self._prefix}_waiting_images", "In the queue now", value=found.waiting)
        yield _seconds(f"{self._prefix}_queue_seconds", "From a request's arrival until it was run", found.queue_ms)
        yield _seconds(f"{self._prefix}_run_seconds", "Of each batch in the backend", found.run_ms)
        yield _sizes(f"{self._prefix}_batch_images", "Images that were run together", found.batch_sizes)


def make_registry(engine: Callable[[], Statistics], batcher: Callable[[], Statistics]) -> CollectorRegistry:
    """A registry of this service alone: process, platform, Engine and batcher."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(StatisticsCollector("repvgg_engine", engine))
    registry.register(StatisticsCollector("repvgg_batcher", batcher))
    return registry


def _seconds(name: str, text: str, times: Histogram) -> HistogramMetricFamily:
    """One bucket a doubling, of those times that a model can take."""
    kept = [(bound / 1e3, count) for bound, count in times.cumulative() if 0.05 < bound < 2e4 or bound == math.inf]
    buckets = [("+Inf" if bound == math.inf else f"{bound:.6g}", count) for bound, count in kept]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=times.total_ms / 1e3)


def _sizes(name: str, text: str, batches: Mapping[int, int]) -> HistogramMetricFamily:
    buckets = [(str(bound), sum(count for size, count in batches.items() if size <= bound)) for bound in _BATCH_SIZES]
    total = sum(size * count for size, count in batches.items())
    return HistogramMetricFamily(name, text, buckets=[*buckets, ("+Inf", sum(batches.values()))], sum_value=total)
