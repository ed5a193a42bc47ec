"""The statistics of an Engine or a batcher as Prometheus reads them, for a service of your own (extra `service`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError, say_install

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector

    from ..runtime.statistics import Histogram, Statistics

_BATCH_SIZES = tuple(1 << power for power in range(10))
_COUNTERS = {
    "requests": "Requests that were answered",
    "images": "Images of the requests that were answered",
    "failures": "Requests that failed in the backend",
    "refused": "Requests that were refused because the queue was full",
    "expired": "Requests whose deadline passed before they were run",
    "cancelled": "Requests whose client went away before they were run",
}


def make_collector(prefix: str, read: Callable[[], Statistics]) -> Collector:
    """Counters and histograms of Prometheus: `registry.register(make_collector("repvgg_engine", engine.statistics))`.

    Args:
        prefix: Of each name.
        read: Gives the statistics; asked at every scrape, and not before.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """
    try:
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise MissingDependencyError("prometheus-client is not installed", remedy=say_install("service")) from error

    class StatisticsCollector(Collector):
        def describe(self) -> Iterator[Metric]:
            return iter(())  # so that registering it does not ask the Engine yet

        def collect(self) -> Iterator[Metric]:
            return _collect(prefix, read())

    return StatisticsCollector()


def _collect(prefix: str, found: Statistics) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"{prefix}_{name}", text, value=getattr(found, name))
    yield GaugeMetricFamily(f"{prefix}_waiting_images", "Images that wait in the queue now", value=found.waiting)
    yield _seconds(f"{prefix}_queue_seconds", "Seconds from a request's arrival until it was run", found.queue_ms)
    yield _seconds(f"{prefix}_run_seconds", "Seconds that a batch took in the backend", found.run_ms)
    yield _sizes(f"{prefix}_batch_images", "Images in a batch", found.batch_sizes)


def _seconds(name: str, text: str, times: Histogram) -> HistogramMetricFamily:
    """One bucket a doubling, of those times that a model can take."""
    from prometheus_client.core import HistogramMetricFamily

    kept = [(bound / 1e3, count) for bound, count in times.cumulative() if 0.05 < bound < 2e4 or bound == math.inf]
    buckets = [("+Inf" if bound == math.inf else f"{bound:.6g}", count) for bound, count in kept]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=times.total_ms / 1e3)


def _sizes(name: str, text: str, batches: Mapping[int, int]) -> HistogramMetricFamily:
    from prometheus_client.core import HistogramMetricFamily

    buckets = [(str(bound), sum(count for size, count in batches.items() if size <= bound)) for bound in _BATCH_SIZES]
    total = sum(size * count for size, count in batches.items())
    return HistogramMetricFamily(name, text, buckets=[*buckets, ("+Inf", sum(batches.values()))], sum_value=total)
