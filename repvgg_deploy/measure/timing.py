"""Times of calls → percentiles, throughput, and whether they can be trusted. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_DRIFT = 0.05
"""Medians of the first and the second half of the turns may be so far apart; beyond, the machine was not the same throughout."""
LARGEST_SPREAD = 0.10
"""Standard deviation by mean."""
FEW_CALLS = 100
"""Of fewer, the 99th percentile is the largest."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of single calls. A percentile is a time that was measured: the smallest that so many percent do not exceed (nearest rank)."""

    calls: int
    min_ms: float
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Turns:
    """What one way of running was measured to be, a turn at a time.

    Attributes:
        seconds: Of each call, by turn.
        wall_seconds: Of each turn; clients run at once.
    """

    seconds: tuple[tuple[float, ...], ...]
    wall_seconds: tuple[float, ...]

    @property
    def calls(self) -> int:
        """How many there were."""
        return sum(len(turn) for turn in self.seconds)


def summarize(turns: Turns) -> Latency:
    """Percentiles of all calls."""
    found = sorted(1e3 * second for turn in turns.seconds for second in turn)
    rank = [found[max(1, math.ceil(len(found) * percent / 100)) - 1] for percent in (50, 90, 95, 99)]
    return Latency(len(found), found[0], rank[0], rank[1], rank[2], rank[3], found[-1], statistics.fmean(found))


def count_images_per_second(turns: Turns, batch: int) -> float:
    """Images of all clients together by the time that it took."""
    return turns.calls * batch / sum(turns.wall_seconds)


def find_instability(turns: Turns) -> tuple[str, ...]:
    """Why the times should not be trusted, in sentences; none where nothing speaks against them."""
    every = [second for turn in turns.seconds for second in turn]
    found = []
    spread = statistics.pstdev(every) / statistics.fmean(every)
    if spread > LARGEST_SPREAD:
        found.append(f"calls spread by {100 * spread:.0f} %")
    if len(turns.seconds) > 1:
        half = len(turns.seconds) // 2
        first, second = (statistics.median(_flatten(part)) for part in (turns.seconds[:half], turns.seconds[half:]))
        drift = second / first - 1
        if abs(drift) > LARGEST_DRIFT:
            found.append(f"the second half is {100 * abs(drift):.0f} % {'slower' if drift > 0 else 'faster'} than the first")
    return tuple(found)


def _flatten(parts: Sequence[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]
