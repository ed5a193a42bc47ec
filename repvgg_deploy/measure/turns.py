"""Several ways of running, in turn within one run, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .timing import Turns

MOST_TURNS = 8
_LEAST_TURNS = 2
_WARM_CALLS = 3

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure.

    Attributes:
        duration_s: Of each way, all turns together.
        warm_up_s: Of each way before the first turn, and at least three calls.
        clients: Threads that call at once.
    """

    duration_s: float = 3.0
    warm_up_s: float = 0.5
    clients: int = 1


def measure_in_turns(ways: Mapping[str, Call], pace: Pace, *, progress: Callable[[str], None] = lambda _: None) -> dict[str, Turns]:
    """Runs every way in up to eight turns, each round beginning with another one.

    The first call of a turn is not counted: it finds caches that the way before it filled.

    Args:
        ways: Calls by name.
        pace: How long, and how many clients.
        progress: Told the name of a way after each of its turns, and once after its warm-up.
    """
    slowest = 0.0
    for name, call in ways.items():
        slowest = max(slowest, _warm_up(call, pace.warm_up_s))
        progress(name)
    # A way whose single call takes longer than a turn would make eight turns of sixteen calls.
    turns = max(_LEAST_TURNS, min(MOST_TURNS, int(pace.duration_s / slowest)))
    names = list(ways)
    found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in names}
    for turn in range(turns):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(_run_turn(ways[name], pace.duration_s / turns, pace.clients))
            progress(name)
    return {name: Turns(tuple(tuple(calls) for calls, _ in parts), tuple(wall for _, wall in parts)) for name, parts in found.items()}


def _warm_up(call: Call, seconds: float) -> float:
    """Seconds of the last call."""
    end, count, last = time.perf_counter() + seconds, 0, 0.0
    while count < _WARM_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        last, count = time.perf_counter() - start, count + 1
    return last


def _run_turn(call: Call, seconds: float, clients: int) -> tuple[list[float], float]:
    """Seconds of each call, and of the turn."""
    if clients == 1:
        call()
        begin = time.perf_counter()
        return _call_until(call, begin + seconds, threading.Event()), time.perf_counter() - begin
    return _Clients(call, seconds, clients).run()


def _call_until(call: Call, end: float, stop: threading.Event) -> list[float]:
    times: list[float] = []
    while not times or (time.perf_counter() < end and not stop.is_set()):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


class _Clients:
    """So many threads that begin together; the first failure of one stops all and is raised."""

    def __init__(self, call: Call, seconds: float, count: int) -> None:
        self._call, self._seconds, self._count = call, seconds, count
        self._barrier = threading.Barrier(count + 1)
        self._stop = threading.Event()
        self._times: list[list[float]] = [[] for _ in range(count)]
        self._failure: BaseException | None = None

    def run(self) -> tuple[list[float], float]:
        threads = [threading.Thread(target=self._work, args=(index,)) for index in range(self._count)]
        for thread in threads:
            thread.start()
        try:
            self._wait()
            begin = time.perf_counter()
            for thread in threads:
                thread.join()
            wall = time.perf_counter() - begin
        finally:
            self._stop.set()
            self._barrier.abort()
        if self._failure is not None:
            raise self._failure
        return [value for times in self._times for value in times], wall

    def _work(self, index: int) -> None:
        try:
            self._call()
            if self._wait():
                self._times[index] = _call_until(self._call, time.perf_counter() + self._seconds, self._stop)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            self._failure = self._failure or error
            self._stop.set()
            self._barrier.abort()

    def _wait(self) -> bool:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            return False
        return True
