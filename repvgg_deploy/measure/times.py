"""Ways of running, in turn within one run; their times → percentiles, throughput, and whether they can be trusted.

In turn, so that what disturbs the machine disturbs all of them. At the end stand the two that an Engine is compared
with: a bare ONNX Runtime session, and PyTorch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from ..errors import MissingDependencyError, ModelError, say_install
from ..specs.values import VariantSpec

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
    return _run_clients(call, seconds, clients)


def _call_until(call: Call, end: float, stop: threading.Event) -> list[float]:
    times: list[float] = []
    while not times or (time.perf_counter() < end and not stop.is_set()):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _run_clients(call: Call, seconds: float, clients: int) -> tuple[list[float], float]:
    """So many threads that begin together; the first failure of one stops all and is raised."""
    begun: list[float] = []
    barrier = threading.Barrier(clients, action=lambda: begun.append(time.perf_counter()))
    stop = threading.Event()

    def work() -> list[float]:
        try:
            call()
            barrier.wait()
            return _call_until(call, time.perf_counter() + seconds, stop)
        except threading.BrokenBarrierError:  # another has failed
            return []
        except BaseException:
            stop.set()
            barrier.abort()
            raise

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(work) for _ in range(clients)]
        try:
            times = [second for future in as_completed(futures) for second in future.result()]
        finally:
            stop.set()
            barrier.abort()
    return times, time.perf_counter() - begun[0]


class BareSession:
    """An ONNX Runtime session on the file as it stands, as anybody would open it.

    `make_batch` gives so many images as the model takes them.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelError: It refuses the file, or does not run on the device.
    """

    def __init__(
        self,
        path: Path,
        make_batch: Callable[[int], NDArray[Any]],
        *,
        device: Literal["cpu", "cuda"],
        threads: int | None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                f"--compare onnxruntime needs ONNX Runtime: {error}", remedy=say_install("cpu")
            ) from error
        self._make_batch = make_batch
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

    def make_call(self, count: int) -> Call:
        """Runs so many images."""
        feed = {self._session.get_inputs()[0].name: self._make_batch(count)}
        return lambda: self._session.run(None, feed)


class TorchRival:
    """The deploy form of the same variant in PyTorch, float32, with weights of a seed: speed does not depend on them.

    Raises:
        MissingDependencyError: torch is not installed.
    """

    def __init__(self, variant: VariantSpec, size: tuple[int, int], *, device: str, threads: int | None) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                "--compare torch needs PyTorch, which is not installed", remedy=say_install("export")
            ) from error
        from ..model.network import RepVGG

        self._torch: Any = torch
        self._threads = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._size, self._device = size, device
        self._model = RepVGG(variant, "deploy").eval().to(device)
        self.name = f"PyTorch {torch.__version__}, {device}, float32"

    def make_call(self, count: int) -> Call:
        """Runs so many images, from host memory to host memory."""
        torch, model, device = self._torch, self._model, self._device
        images = torch.randn(count, 3, *self._size)

        def call() -> object:
            with torch.inference_mode():
                return model(images.to(device)).cpu()

        return call

    def close(self) -> None:
        """Gives PyTorch the threads that it had."""
        self._torch.set_num_threads(self._threads)
