"""Which waiting requests become the next batch, and when. Pure: no thread, no clock, no model; `batcher` has those."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ..errors import EngineBusyError, InputError


@dataclass(frozen=True, slots=True)
class BatcherOptions:
    """How requests become batches.

    Attributes:
        max_batch: Images run together at most; the profile's maximum of a plan, where throughput peaks elsewhere.
        max_delay_ms: How long the first request of a batch waits for others. Under load nothing waits for it: batches fill while others run.
        max_queue: Images that may wait; one more request is refused. None: eight batches.
        timeout_ms: A request that waited so long is not run any more; None: for ever. Each request may have its own.
        concurrency: Batches under way at once: 2 where copies and computation of two overlap (a GPU with two contexts), 1 on a CPU.
    """

    max_batch: int = 32
    max_delay_ms: float = 2.0
    max_queue: int | None = None
    timeout_ms: float | None = None
    concurrency: int = 1

    def __post_init__(self) -> None:
        for name, value in (("max_batch", self.max_batch), ("concurrency", self.concurrency)):
            _require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "a whole number of at least 1")
        _require(_is_number(self.max_delay_ms) and self.max_delay_ms >= 0, "max_delay_ms", self.max_delay_ms, "0 or more milliseconds")
        _require(self.timeout_ms is None or (_is_number(self.timeout_ms) and self.timeout_ms > 0), "timeout_ms", self.timeout_ms, "a positive number")
        queue = self.max_queue
        whole = queue is None or (isinstance(queue, int) and not isinstance(queue, bool) and queue >= self.max_batch)
        _require(whole, "max_queue", queue, f"a whole number of at least max_batch, {self.max_batch}")

    @property
    def queue_images(self) -> int:
        """`max_queue`, or what stands for it."""
        return self.max_queue if self.max_queue is not None else 8 * self.max_batch


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"batcher: {name}: expected {expected}, found {value!r}", remedy=f"correct {name}")


@dataclass(slots=True, eq=False)
class Request:
    """One caller's images.

    Attributes:
        batch: (N, …), checked; N is at most the batcher's `max_batch`.
        arrival: When it came, in seconds of the caller's clock.
        deadline: When it is too late to run it; infinity for never.
        client: Whose it is: clients take turns.
        future: Who waits for the answer.
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


@dataclass(slots=True, eq=False)
class _Cancellations:
    """Whether a request may have been cancelled since somebody looked; futures hold this and not the queue."""

    seen: bool = False

    def hear(self, future: Future[Any]) -> None:
        if future.cancelled():
            self.seen = True


class BatchQueue:
    """Requests that wait.

    Clients take turns: each batch takes one request of each client that has any, oldest client first, then another of each, until it is full; so one
    that sends thousands delays others by a batch, not by thousands. Requests of one client are never overtaken by later ones of the same client and
    image size. Callers that name no client are one, so first come is first served.

    Args:
        options: See `BatcherOptions`.
    """

    def __init__(self, options: BatcherOptions) -> None:
        self._options = options
        self._clients: OrderedDict[Hashable, deque[Request]] = OrderedDict()
        self._images = 0
        # So that a long queue is looked through only when something in it may be over: it would cost more than a batch does.
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
        """Adds a request.

        Raises:
            EngineBusyError: It is full.
        """
        limit = self._options.queue_images
        if self._images + request.images > limit:
            raise EngineBusyError(
                f"{self._images} images wait already, and the queue holds {limit}",
                remedy="try again later (HTTP 503 with Retry-After), send fewer at once, add Engines, or open the batcher with a larger max_queue",
            )
        self._clients.setdefault(request.client, deque()).append(request)
        self._images += request.images
        self._soonest = min(self._soonest, request.deadline)
        request.future.add_done_callback(self._cancellations.hear)

    def discard(self, now: float) -> tuple[list[Request], list[Request]]:
        """Removes what need not be run any more.

        Returns:
            Requests whose deadline has passed, and requests that were cancelled.
        """
        expired: list[Request] = []
        cancelled: list[Request] = []
        if now < self._soonest and not self._cancellations.seen:
            return expired, cancelled
        self._cancellations.seen = False
        for client, waiting in list(self._clients.items()):
            alive: deque[Request] = deque()
            for request in waiting:
                (cancelled if request.future.cancelled() else expired if request.deadline <= now else alive).append(request)
            self._keep(client, alive)
        self._images -= sum(request.images for request in (*expired, *cancelled))
        self._soonest = min((request.deadline for request in self), default=math.inf)
        return expired, cancelled

    def take(self, now: float, *, at_once: bool = False) -> list[Request]:
        """The next batch: its requests are no longer in the queue, and their futures are running; empty while waiting may still fill it.

        Args:
            now: The time.
            at_once: Whether nothing may be waited for, because the queue is being closed.
        """
        due = at_once or self._images >= self._options.max_batch or now - self._oldest() >= self._options.max_delay_ms / 1e3
        return self._collect(now) if due and self._clients else []

    def wake_at(self) -> float:
        """When something falls due by itself: a batch, or a deadline; infinity where nothing waits."""
        return min(self._oldest() + self._options.max_delay_ms / 1e3, self._soonest)

    def _oldest(self) -> float:
        """Arrival of the request that waits longest; a client's stand in the order in which they came."""
        return min((waiting[0].arrival for waiting in self._clients.values()), default=math.inf)

    def _collect(self, now: float) -> list[Request]:
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
                self._remove(request)
                if not request.future.set_running_or_notify_cancel():
                    continue
                if client in self._clients:
                    self._clients.move_to_end(client)
                shape = request.batch.shape[1:]
                batch.append(request)
                room -= request.images
        return batch

    def _next(self, client: Hashable, shape: tuple[int, ...] | None, now: float) -> Request | None:
        """A client's first request of a size of image that suits the batch; what is past its deadline stays for `discard`."""
        fitting = (r for r in self._clients.get(client, ()) if r.deadline > now and (shape is None or r.batch.shape[1:] == shape))
        return next(fitting, None)

    def _remove(self, request: Request) -> None:
        waiting = self._clients[request.client]
        waiting.remove(request)
        self._keep(request.client, waiting)
        self._images -= request.images

    def _keep(self, client: Hashable, waiting: deque[Request]) -> None:
        if waiting:
            self._clients[client] = waiting
            return
        del self._clients[client]
        if not self._clients:
            self._soonest = math.inf
