"""Single requests from many clients become full batches.

`BatchQueue` decides which waiting requests become the next batch and when: no thread, no clock, no model. `Batcher` has
the threads that run them.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import reprlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import DeadlineError, EngineBusyError, InputError
from .options import BatcherOptions
from .results import Arrays, Result
from .statistics import Recorder, Statistics
from .threads import answer, fail, wait_for

logger = logging.getLogger(__name__)
_LONGEST_WAIT_SECONDS = 60.0
"""Python refuses to wait for centuries, which a delay may say; and `_Crew.end`, called by a garbage collection inside
the lock, may come after the last look and before the wait."""


@dataclass(slots=True, eq=False)
class Request:
    """One caller's images.

    Attributes:
        batch: (N, …), checked; N is at most the batcher's `max_batch`.
        arrival: Seconds, by the batcher's clock.
        deadline: When it is too late to run it, by the same clock; infinity for never.
        client: Whose it is: clients take turns.
        future: The answer.
    """

    batch: NDArray[Any]
    arrival: float
    deadline: float = math.inf
    client: Hashable = None
    future: Future[Any] = field(default_factory=Future)

    @property
    def images(self) -> int:
        """How many."""
        return len(self.batch)


@dataclass(frozen=True, slots=True)
class BatchModel:
    """What a batcher runs.

    Attributes:
        check: An object → the batch as the model takes it, or an InputError.
        run: A checked batch → its outputs; it is read no more then.
        package: Outputs → what a caller gets.
        make_batch: Memory of a shape and dtype that `run` reads without another copy.
    """

    check: Callable[[object], NDArray[Any]]
    run: Callable[[NDArray[Any]], Arrays]
    package: Callable[[Sequence[NDArray[Any]]], Result]
    make_batch: Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]] = np.empty


@dataclass(slots=True, eq=False)
class _Cancellations:
    """Whether a request may have been cancelled since `discard` looked. Futures hold this, and not the queue."""

    seen: bool = False

    def hear(self, future: Future[Any]) -> None:
        if future.cancelled():
            self.seen = True


class BatchQueue:
    """Requests that wait.

    Clients take turns: each batch takes one request of each client that has any, oldest client first, then another of
    each, until it is full; so one that sends thousands delays others by a batch, not by thousands. Requests of one
    client are never overtaken by later ones of the same client and image size. Callers that name no client are one, so
    first come is first served.
    """

    def __init__(self, options: BatcherOptions) -> None:
        self._options = options
        self._clients: OrderedDict[Hashable, deque[Request]] = OrderedDict()
        self._images = 0
        # A long queue is looked through only when something in it may be over: it would cost more than a batch does.
        self._soonest = math.inf  # no deadline of those that wait is earlier
        self._cancellations = _Cancellations()

    @property
    def images(self) -> int:
        """Images that wait."""
        return self._images

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for waiting in self._clients.values() for request in waiting)

    def offer(self, request: Request) -> None:
        """Adds a request, or raises EngineBusyError where the queue is full."""
        limit = self._options.queue_images
        if self._images + request.images > limit:
            raise EngineBusyError(
                f"{self._images} images wait already, and the queue holds {limit}",
                remedy="try again later (HTTP 503 with Retry-After), send fewer at once, add Engines, or open the "
                "batcher with a larger max_queue",
            )
        self._clients.setdefault(request.client, deque()).append(request)
        self._images += request.images
        self._soonest = min(self._soonest, request.deadline)
        request.future.add_done_callback(self._cancellations.hear)

    def discard(self, now: float) -> tuple[list[Request], list[Request]]:
        """Removes and returns what need not be run any more: requests past their deadline, and cancelled ones."""
        expired: list[Request] = []
        cancelled: list[Request] = []
        if now < self._soonest and not self._cancellations.seen:
            return expired, cancelled
        self._cancellations.seen = False
        for client, waiting in list(self._clients.items()):
            alive: deque[Request] = deque()
            for request in waiting:
                if request.future.cancelled():
                    cancelled.append(request)
                elif request.deadline <= now:
                    expired.append(request)
                else:
                    alive.append(request)
            self._keep(client, alive)
        self._images -= sum(request.images for request in (*expired, *cancelled))
        self._soonest = min((request.deadline for request in self), default=math.inf)
        return expired, cancelled

    def take(self, now: float, *, at_once: bool = False) -> list[Request]:
        """The next batch, taken out of the queue, its futures running. Empty while waiting may still fill it.

        With `at_once`, because the queue is being closed, nothing is waited for.
        """
        full = self._images >= self._options.max_batch
        if not (at_once or full or now - self._oldest() >= self._options.max_delay_ms / 1e3):
            return []
        batch: list[Request] = []
        room = self._options.max_batch
        shape: tuple[int, ...] | None = None
        closed: set[Hashable] = set()  # clients whose next request does not fit: a later one may not overtake it
        while room and (clients := [client for client in self._clients if client not in closed]):
            for client in clients:
                if not room:
                    break
                request = self._next(client, shape, now)
                if request is None or request.images > room:
                    closed.add(client)
                    continue
                waiting = self._clients[client]
                waiting.remove(request)
                self._keep(client, waiting)
                self._images -= request.images
                if not request.future.set_running_or_notify_cancel():
                    continue
                if client in self._clients:
                    self._clients.move_to_end(client)
                shape = request.batch.shape[1:]
                batch.append(request)
                room -= request.images
        return batch

    def wake_at(self) -> float:
        """When something falls due by itself: a batch, or a deadline; infinity where nothing waits."""
        return min(self._oldest() + self._options.max_delay_ms / 1e3, self._soonest)

    def _oldest(self) -> float:
        """Arrival of the request that waits longest; a client's stand in the order in which they came."""
        return min((waiting[0].arrival for waiting in self._clients.values()), default=math.inf)

    def _next(self, client: Hashable, shape: tuple[int, ...] | None, now: float) -> Request | None:
        """A client's first request whose image size suits the batch; what is past its deadline is left to `discard`."""
        for request in self._clients.get(client, ()):
            if request.deadline > now and (shape is None or request.batch.shape[1:] == shape):
                return request
        return None

    def _keep(self, client: Hashable, waiting: deque[Request]) -> None:
        if waiting:
            self._clients[client] = waiting
            return
        del self._clients[client]
        if not self._clients:
            self._soonest = math.inf


class _Room:
    """Memory in which a thread puts requests together, a batch at a time: it grows to what is needed, and stays."""

    def __init__(self, model: BatchModel, most: int) -> None:
        self._make, self._most = model.make_batch, most
        self._numbers: NDArray[Any] = np.empty(0)

    def join(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The images of all parts, which are of one size, in memory that the next batch overwrites."""
        count, sizes, dtype = sum(map(len, parts)), parts[0].shape[1:], parts[0].dtype
        each = math.prod(sizes)
        if count * each > self._numbers.size:
            rows = min(1 << (count - 1).bit_length(), self._most)
            self._numbers = np.empty(0)  # the old memory is free before the new one is taken
            self._numbers = self._make((rows * each,), dtype)
        batch = self._numbers[: count * each].reshape(count, *sizes)
        return np.concatenate(parts, out=batch)


class _Crew:
    """The queue of a batcher and the threads that run it.

    The threads hold this, and not the Batcher: one that is dropped without `close()` gives them back, and its Engine.
    """

    def __init__(self, options: BatcherOptions, model: BatchModel, clock: Callable[[], float]) -> None:
        self.clock, self._model = clock, model
        self._most = options.max_batch
        self.queue = BatchQueue(options)
        self.changed = threading.Condition()
        self.closing = False
        self.recorder = Recorder()
        self.process = os.getpid()
        self._working = options.concurrency
        self.threads = [
            threading.Thread(target=self._work, name=f"repvgg-batcher-{index}", daemon=True)
            for index in range(options.concurrency)
        ]
        for thread in self.threads:
            thread.start()
        # At its end, Python stops daemon threads inside a library's call, which kills the process: close them before.
        atexit.register(self.close)

    def end(self) -> None:
        """Lets the threads end when what waits is done. Does not wait: a garbage collection may call it anywhere."""
        if self.process == os.getpid():
            with self.changed:
                self.closing = True
                self.changed.notify_all()

    def close(self, *, drain: bool = True) -> None:
        """As `Batcher.close`."""
        if self.process != os.getpid():  # the threads are in the parent, and so is whoever held the lock
            self.closing = True
            return
        with self.changed:
            self.closing = True
            waiting = [] if drain else list(self.queue)
            self.changed.notify_all()
        for request in waiting:
            request.future.cancel()
        with self.changed:
            self.changed.notify_all()
        for thread in self.threads:
            if thread is not threading.current_thread():  # called from a future's callback
                thread.join()

    def _work(self) -> None:
        room = _Room(self._model, self._most)
        while True:
            with self.changed:
                now = self.clock()
                expired, cancelled = self.queue.discard(now)
                batch = self.queue.take(now, at_once=self.closing)
                if not (batch or expired or cancelled):
                    if self.closing:
                        self.changed.notify_all()
                        self._working -= 1
                        if not self._working:
                            atexit.unregister(self.close)  # it would hold the model until the program ends
                        return
                    wake = self.queue.wake_at()
                    self.changed.wait(min(max(0.0, wake - now), _LONGEST_WAIT_SECONDS))
                    continue
                if batch and len(self.queue):
                    self.changed.notify()  # another thread may have a batch, too
            self.end_requests(expired, cancelled)
            if batch:
                self._answer(batch, room)
            del batch, expired, cancelled  # while this thread waits, it holds nobody's images

    def end_requests(self, expired: Sequence[Request], cancelled: Sequence[Request]) -> None:
        """Those that are not run. Outside the lock: callbacks of futures run here, and may call anything."""
        for request in expired:
            if request.future.set_running_or_notify_cancel():
                message = f"the request waited {1e3 * (self.clock() - request.arrival):.0f} ms and its deadline passed"
                fail(request.future, DeadlineError(message, remedy="add Engines, or give a larger timeout_ms"))
        if expired or cancelled:
            self.recorder.count("expired", len(expired))
            self.recorder.count("cancelled", len(cancelled))

    def _answer(self, batch: list[Request], room: _Room) -> None:
        start = self.clock()
        try:
            parts = [request.batch for request in batch]
            outputs = self._model.run(parts[0] if len(parts) == 1 else room.join(parts))
        except BaseException as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            if len(batch) == 1:
                self.recorder.count("failures")
                fail(batch[0].future, error)
                return
            logger.warning("a batch of %d requests failed, each is run by itself: %s", len(batch), error)
            for request in batch:
                self._answer([request], room)
            return
        finish = self.clock()
        self.recorder.answer_batch([r.images for r in batch], [start - r.arrival for r in batch], finish - start)
        position = 0
        for request in batch:
            rows = slice(position, position + request.images)
            position += request.images

            def make(rows: slice = rows) -> Result:
                # Copies, so that one caller does not hold the answers of all.
                return self._model.package(outputs if len(batch) == 1 else [output[rows].copy() for output in outputs])

            answer(request.future, make)


class Batcher:
    """Collects requests from many threads or coroutines and runs them together; `Engine.batcher` makes one.

    Use it as a context manager. Requests are checked when they are handed in, so a bad one fails its caller alone.
    Where the backend fails on a batch of several, each is run once more by itself: what makes the model fail fails
    alone. One that is dropped without `close()` runs what waits, and then gives back its threads and the Engine.

    Args:
        options: How requests become batches.
        model: What runs them.
        clock: Seconds that only grow.
    """

    def __init__(
        self, options: BatcherOptions, model: BatchModel, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._options, self._check_batch = options, model.check
        self._crew = _Crew(options, model, clock)
        weakref.finalize(self, self._crew.end).atexit = False

    @property
    def options(self) -> BatcherOptions:
        """How requests become batches."""
        return self._options

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._crew.closing

    def submit(
        self, batch: NDArray[Any], *, client: Hashable = None, timeout_ms: float | None = None
    ) -> Future[Result]:
        """Hands in one request and returns at once.

        Args:
            batch: N images as `Engine.infer` takes them, N at most `max_batch`. Do not write to it before the answer is
                there.
            client: Whose request it is, if clients are to take turns.
            timeout_ms: In place of the batcher's.

        Returns:
            The answer: as `Engine.infer`'s, of these images. It ends with DeadlineError if the deadline passes before
            it is run; cancelling it before then takes it out of the queue.

        Raises:
            InputError: The images are not what the model expects or too many, or the batcher is closed.
            EngineBusyError: The queue is full.
        """
        images = self._check(batch, timeout_ms)
        try:
            hash(client)
        except TypeError as error:
            raise InputError(
                f"client: expected something that tells clients apart, found an unhashable {type(client).__qualname__}",
                remedy="give a name or a number, such as the address of the client",
            ) from error
        if self._crew.process != os.getpid():  # before the lock, whose owner may be in the parent only
            raise InputError(
                "this batcher was opened before a fork, and threads do not follow",
                remedy="open Engine and batcher in each worker",
            )
        now = self._crew.clock()
        limit = timeout_ms if timeout_ms is not None else self._options.timeout_ms
        request = Request(images, now, math.inf if limit is None else now + limit / 1e3, client)
        dropped: tuple[list[Request], list[Request]] = ([], [])
        try:
            with self._crew.changed:
                if self._crew.closing:
                    raise InputError(
                        "this batcher is closed",
                        remedy="submit inside the with block and before close(), or open another",
                    )
                if self._crew.queue.images + request.images > self._options.queue_images:
                    dropped = self._crew.queue.discard(now)  # the dead take no places
                self._crew.queue.offer(request)
                self._crew.changed.notify()
        except EngineBusyError:
            self._crew.recorder.count("refused")
            raise
        finally:
            self._crew.end_requests(*dropped)
        return request.future

    def infer(self, batch: NDArray[Any], *, client: Hashable = None, timeout_ms: float | None = None) -> Result:
        """`submit`, and waits for the answer.

        Raises:
            InputError: As `submit`.
            EngineBusyError: The queue is full.
            DeadlineError: The deadline passed before it was run.
            ModelError: The backend failed.
            CudaError: The GPU failed.
        """
        return self.submit(batch, client=client, timeout_ms=timeout_ms).result()

    async def infer_async(
        self, batch: NDArray[Any], *, client: Hashable = None, timeout_ms: float | None = None
    ) -> Result:
        """`infer` for a coroutine; a task that is cancelled takes its request out of the queue."""
        return await wait_for(self.submit(batch, client=client, timeout_ms=timeout_ms))

    def statistics(self) -> Statistics:
        """What happened since it was opened."""
        with self._crew.changed:
            waiting = self._crew.queue.images
        return self._crew.recorder.snapshot(waiting)

    def close(self, *, drain: bool = True) -> None:
        """Lets no new request in and returns when the last batch is done; a second call waits, too.

        Args:
            drain: Whether those that wait are still run; else they are cancelled.
        """
        self._crew.close(drain=drain)

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a batcher cannot be pickled, copied or sent to another process: its threads stay in this one",
            remedy="send the path of the model, and open Engine and batcher in each process",
        )

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, batch: object, timeout_ms: float | None) -> NDArray[Any]:
        images = self._check_batch(batch)
        if len(images) > self._options.max_batch:
            raise InputError(
                f"batch: {len(images)} images are more than this batcher runs at once, {self._options.max_batch}",
                remedy="call Engine.infer, which takes any number, or hand them in one by one",
            )
        if timeout_ms is not None and not (isinstance(timeout_ms, (int, float)) and timeout_ms > 0):
            raise InputError(
                f"timeout_ms: expected a positive number of milliseconds, found {reprlib.repr(timeout_ms)}",
                remedy="leave it out, or correct it",
            )
        return images
