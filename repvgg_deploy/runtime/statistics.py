"""What an Engine or a batcher has done so far, at about a microsecond a request and in a fixed amount of memory.

Counters and histograms count from the opening on and only ever grow, which is what a Prometheus exporter wants:
`Histogram.cumulative` are its buckets. For the last minute, subtract an earlier snapshot.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_PER_DOUBLING = 8
_SMALLEST_MS, _LARGEST_MS = 2.0**-10, 2.0**17  # a microsecond to two minutes
_STEPS = round(math.log2(_LARGEST_MS / _SMALLEST_MS)) * _PER_DOUBLING
BOUNDS_MS: tuple[float, ...] = tuple(_SMALLEST_MS * math.pow(2.0, step / _PER_DOUBLING) for step in range(_STEPS + 1))
"""Upper bounds of the buckets of every time, in milliseconds: each 9 % above the one before."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Times, in milliseconds.

    Attributes:
        counts: One a bucket: up to and with each of BOUNDS_MS, and one more for what is longer.
        total_ms: Sum of all times.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_MS) + 1)
    total_ms: float = 0.0

    @property
    def count(self) -> int:
        """How many times there are."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float:
        """The time that so many percent do not exceed, to within 9 %; NaN where there is none.

        Args:
            percent: 0 to 100.
        """
        wanted, seen = max(1, math.ceil(self.count * percent / 100)), 0
        for index, found in enumerate(self.counts):
            seen += found
            if seen >= wanted:
                return BOUNDS_MS[min(index, len(BOUNDS_MS) - 1)]
        return math.nan

    def cumulative(self, every: int = _PER_DOUBLING) -> tuple[tuple[float, int], ...]:
        """(upper bound in ms, how many are at most that), as Prometheus has it: the last bound is infinity.

        Args:
            every: Buckets to take together; by default there is one pair a doubling.
        """
        seen, found = 0, []
        for index, bound in enumerate(BOUNDS_MS):
            seen += self.counts[index]
            if index % every == 0:
                found.append((bound, seen))
        return (*found, (math.inf, self.count))

    def __sub__(self, earlier: Histogram) -> Histogram:
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(counts, self.total_ms - earlier.total_ms)


_GROWING = ("requests", "images", "failures", "refused", "expired", "cancelled", "queue_ms", "run_ms")


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot.

    Attributes:
        requests: Answered, one a call.
        images: In those requests.
        failures: Requests that ended with an error of the backend.
        refused: Requests that found the queue full.
        expired: Requests whose deadline passed before they were run.
        cancelled: Requests that were cancelled before they were run.
        waiting: Images in the queue now; of an Engine, batches that were submitted and wait for a thread.
        batch_sizes: How often so many images were run together.
        queue_ms: Time from a request's arrival until it was run.
        run_ms: Time of each batch in the backend, splitting and joining included.
    """

    requests: int = 0
    images: int = 0
    failures: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    waiting: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    queue_ms: Histogram = Histogram()
    run_ms: Histogram = Histogram()

    def __sub__(self, earlier: Statistics) -> Statistics:
        """What happened since an earlier snapshot; `waiting` stays what it is now."""
        sizes = Counter(self.batch_sizes)
        sizes.subtract(earlier.batch_sizes)
        return replace(
            self,
            **{name: getattr(self, name) - getattr(earlier, name) for name in _GROWING},
            batch_sizes={size: count for size, count in sorted(sizes.items()) if count},
        )


class _Times:
    """A histogram under construction."""

    __slots__ = ("counts", "total_ms")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        self.total_ms = 0.0

    def add(self, seconds: float) -> None:
        milliseconds = seconds * 1e3
        self.counts[bisect.bisect_left(BOUNDS_MS, milliseconds)] += 1
        self.total_ms += milliseconds

    def snapshot(self) -> Histogram:
        return Histogram(tuple(self.counts), self.total_ms)


class Recorder:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter[str]()
        self._sizes = Counter[int]()
        self._queue, self._run = _Times(), _Times()

    def answer(self, images: int, seconds: float) -> None:
        """One request that was run at once and by itself."""
        with self._lock:
            self._counts["requests"] += 1
            self._counts["images"] += images
            self._sizes[images] += 1
            self._run.add(seconds)

    def answer_batch(self, images: list[int], waited: list[float], seconds: float) -> None:
        """Several requests that were run together: images of each, seconds each waited, seconds that the batch took."""
        with self._lock:
            self._counts["requests"] += len(images)
            self._counts["images"] += sum(images)
            self._sizes[sum(images)] += 1
            for value in waited:
                self._queue.add(value)
            self._run.add(seconds)

    def wait(self, seconds: float) -> None:
        """A request left the queue."""
        with self._lock:
            self._queue.add(seconds)

    def count(self, what: str, number: int = 1) -> None:
        """So many more `failures`, `refused`, `expired` or `cancelled`."""
        with self._lock:
            self._counts[what] += number

    def snapshot(self, waiting: int = 0) -> Statistics:
        """All of it at one moment, `waiting` beside it."""
        with self._lock:
            return Statistics(
                waiting=waiting,
                batch_sizes=dict(sorted(self._sizes.items())),
                queue_ms=self._queue.snapshot(),
                run_ms=self._run.snapshot(),
                **self._counts,
            )
