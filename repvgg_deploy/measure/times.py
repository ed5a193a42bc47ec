"""Ways of running, in turn within one run; their times → percentiles, throughput, and whether they can be trusted.

In turn, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from ..errors import MissingDependencyError, ModelError

LARGEST_DRIFT = 0.05
"""Medians of the first and the second half of the turns may be so far apart; beyond, the machine has changed."""
LARGEST_SPREAD = 0.10
"""Standard deviation by mean."""
FEW_CALLS = 100
"""Of fewer, the 99th percentile is the largest."""
MOST_TURNS = 8
_LEAST_TURNS = 2
_WARM_CALLS = 3
_ERRORS_ONLY = 3
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Call = Callable[[], object]
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of single calls.

    A percentile is a time that was measured: the smallest that so many percent do not exceed (nearest rank).
    """

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
    """The times of one way of running.

    Attributes:
        seconds: By turn, of each call.
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
        first, second = (
            statistics.median(itertools.chain.from_iterable(part))
            for part in (turns.seconds[:half], turns.seconds[half:])
        )
        drift = second / first - 1
        if abs(drift) > LARGEST_DRIFT:
            found.append(
                f"the second half is {100 * abs(drift):.0f} % {'slower' if drift > 0 else 'faster'} than the first"
            )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure.

    Attributes:
        duration_s: Seconds of each way, all turns together.
        warm_up_s: Seconds of each way before the first turn, and at least three calls.
        clients: Threads that call at once.
    """

    duration_s: float = 3.0
    warm_up_s: float = 0.5
    clients: int = 1


def measure_in_turns(
    ways: Mapping[K, Call], pace: Pace, *, progress: Callable[[K], None] = lambda _: None
) -> dict[K, Turns]:
    """Runs every way in up to eight turns, each round beginning with another one.

    The first call of a turn is not counted: it finds caches that the way before it filled.

    Args:
        ways: What a way calls, by its key.
        pace: How long, and how many clients.
        progress: Told the key of a way after each of its turns, and once after its warm-up.
    """
    slowest = 0.0
    for name, call in ways.items():
        slowest = max(slowest, _warm_up(call, pace.warm_up_s))
        progress(name)
    # A way whose single call takes longer than a turn would make eight turns of sixteen calls.
    turns = max(_LEAST_TURNS, min(MOST_TURNS, int(pace.duration_s / slowest)))
    names = list(ways)
    found: dict[K, list[tuple[list[float], float]]] = {name: [] for name in names}
    for turn in range(turns):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(_run_turn(ways[name], pace.duration_s / turns, pace.clients))
            progress(name)
    return {
        name: Turns(tuple(tuple(calls) for calls, _ in parts), tuple(wall for _, wall in parts))
        for name, parts in found.items()
    }


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


class BareSession:
    """An ONNX Runtime session on the file as it stands, as anybody would open it.

    Args:
        path: The ONNX.
        device: Where it runs.
        threads: CPU threads that share one batch; None for the default.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelError: It refuses the file, or does not run on the device.
    """

    def __init__(self, path: Path, *, device: Literal["cpu", "cuda"] = "cpu", threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                f"--compare onnxruntime needs ONNX Runtime: {error}", remedy="pip install 'repvgg-deploy[cpu]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = _PROVIDERS[device]
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[wanted])
        except Exception as error:
            message = " ".join(str(error).split())
            raise ModelError(
                f"{path}: a bare ONNX Runtime session refuses it: {message}", remedy="leave out --compare onnxruntime"
            ) from error
        if self._session.get_providers()[0] != wanted:
            raise ModelError(
                f"{path}: ONNX Runtime does not run on {device} here",
                remedy="leave out --compare onnxruntime, or give --device cpu",
            )
        self.name = f"ONNX Runtime {onnxruntime.__version__}, {wanted}, the file as it stands"

    def make_call(self, batch: NDArray[Any]) -> Call:
        """Runs this batch of the model's input."""
        feed = {self._session.get_inputs()[0].name: batch}
        return lambda: self._session.run(None, feed)
