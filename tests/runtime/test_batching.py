"""The batching policy on a virtual clock: nothing lost, nothing twice, nothing too late, nobody overtaken."""

from __future__ import annotations

import math
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from repvgg_deploy.errors import EngineBusyError, InputError
from repvgg_deploy.runtime.batcher import BatcherOptions, BatchQueue, Request

FOREVER = 1e9


def make(
    images: int = 1, arrival: float = 0.0, deadline: float = math.inf, client: object = None, size: int = 4
) -> Request:
    return Request(np.zeros((images, 3, size, size), np.float32), arrival, deadline, client)


def fill(queue: BatchQueue, *requests: Request) -> list[Request]:
    for request in requests:
        queue.offer(request)
    return list(requests)


def test_full_batch_is_taken_at_once() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=10))
    requests = fill(queue, *(make() for _ in range(5)))
    assert queue.take(0.0) == requests[:4]
    assert queue.take(0.0) == [] and queue.images == 1
    assert all(request.future.running() for request in requests[:4])


def test_first_request_waits_for_others_no_longer_than_the_delay() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=10))
    requests = fill(queue, make(arrival=1.0), make(arrival=1.005))
    assert queue.take(1.0099) == []
    assert queue.wake_at() == pytest.approx(1.01)
    assert queue.take(1.0101) == requests
    assert queue.wake_at() == math.inf


def test_closing_waits_for_nothing() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=FOREVER))
    requests = fill(queue, make())
    assert queue.take(0.0) == [] and queue.take(0.0, at_once=True) == requests


def test_request_that_does_not_fit_waits_and_is_not_overtaken() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=0))
    first, large, small = fill(queue, make(2), make(3), make(1))
    assert queue.take(0.0) == [first]
    assert queue.take(0.0) == [large, small]


def test_full_queue_refuses_and_frees_the_places_of_the_dead() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=2, max_queue=4))
    cancelled, late, _ = fill(queue, make(), make(deadline=1.0), make(2))
    with pytest.raises(EngineBusyError, match="4 images wait"):
        queue.offer(make())
    cancelled.future.cancel()
    assert queue.discard(1.0) == ([late], [cancelled])
    queue.offer(make(2))
    assert queue.images == 4


class Watched(Future[object]):
    asked = 0

    def cancelled(self) -> bool:
        Watched.asked += 1
        return super().cancelled()


def test_long_queue_is_not_looked_through_for_every_batch() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=0, max_queue=2000))
    requests = fill(queue, *(make(arrival=index, deadline=1e4 + index, client=index % 3) for index in range(2000)))
    for request in requests:
        request.future.__class__ = Watched
    for _ in range(100):
        assert queue.discard(2000.0) == ([], []) and len(queue.take(2000.0)) == 4
    assert Watched.asked < 2000 and queue.images == 1600
    requests[1999].future.cancel()
    assert queue.discard(10_401.0) == ([requests[400], requests[401]], [requests[1999]])
    assert queue.images == 1597 and queue.wake_at() == 402.0


def test_deadline_wakes_before_the_delay_does() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=100))
    fill(queue, make(arrival=0.0, deadline=0.05))
    assert queue.wake_at() == 0.05
    assert queue.take(0.2) == []  # too late, though it is due
    assert len(queue.discard(0.2)[0]) == 1


def test_images_of_another_size_form_a_batch_of_their_own() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=0))
    small, large, other = fill(queue, make(size=4), make(size=8), make(size=4))
    assert queue.take(0.0) == [small, other]
    assert queue.take(0.0) == [large]


def test_clients_take_turns() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=4, max_delay_ms=0, max_queue=100))
    greedy = fill(queue, *(make(client="greedy") for _ in range(10)))
    modest = fill(queue, make(client="modest"), make(client="modest"))
    assert queue.take(0.0) == [greedy[0], modest[0], greedy[1], modest[1]]
    assert queue.take(0.0) == greedy[2:6]


def test_cancelled_request_takes_no_place_in_a_batch() -> None:
    queue = BatchQueue(BatcherOptions(max_batch=2, max_delay_ms=0))
    requests = fill(queue, make(), make(), make())
    requests[0].future.cancel()
    assert queue.take(0.0) == requests[1:]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_batch": True},
        {"max_batch": 1.5},
        {"max_delay_ms": -1},
        {"max_delay_ms": math.nan},
        {"timeout_ms": 0},
        {"max_queue": 3, "max_batch": 4},
        {"concurrency": 0},
    ],
)
def test_options_that_cannot_hold_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        BatcherOptions(**wrong)


class QueueMachine(RuleBasedStateMachine):
    """Requests of three clients come, are cancelled, fall late and are taken, in any order; time goes on as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.options = BatcherOptions(max_batch=5, max_delay_ms=10, max_queue=12)
        self.queue = BatchQueue(self.options)
        self.now = 0.0
        self.waiting: list[Request] = []
        self.done: list[Future[object]] = []

    @rule(
        images=st.integers(1, 5),
        client=st.sampled_from("abc"),
        size=st.sampled_from([4, 8]),
        patience=st.sampled_from([0.005, 0.02, math.inf]),
    )
    def offer(self, images: int, client: str, size: int, patience: float) -> None:
        request = make(images, self.now, self.now + patience, client, size)
        if sum(r.images for r in self.waiting) + images > 12:
            with pytest.raises(EngineBusyError):
                self.queue.offer(request)
        else:
            self.queue.offer(request)
            self.waiting.append(request)

    @rule(step=st.sampled_from([0.001, 0.004, 0.011]))
    def let_time_pass(self, step: float) -> None:
        self.now += step

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        assert data.draw(st.sampled_from(self.waiting)).future.cancel()

    @rule()
    def discard(self) -> None:
        expired, cancelled = self.queue.discard(self.now)
        assert {id(r) for r in cancelled} == {id(r) for r in self.waiting if r.future.cancelled()}
        assert {id(r) for r in expired} == {
            id(r) for r in self.waiting if r.deadline <= self.now and not r.future.cancelled()
        }
        self._leave([*expired, *cancelled])

    @rule(at_once=st.booleans())
    def take(self, at_once: bool) -> None:
        before = list(self.waiting)
        alive = [r for r in before if not r.future.cancelled() and r.deadline > self.now]
        batch = self.queue.take(self.now, at_once=at_once)
        assert sum(r.images for r in batch) <= 5
        assert len({r.batch.shape[1:] for r in batch}) <= 1
        assert all(r.deadline > self.now and r.future.running() for r in batch)
        oldest = min((r.arrival for r in before), default=math.inf)
        if not at_once and sum(r.images for r in before) < 5 and self.now - oldest < 0.0099:
            assert not batch
        if at_once and alive:
            assert batch
        for client in "abc":  # nobody of the same client and size is overtaken
            for size in (4, 8):
                mine = [r for r in alive if r.client == client and r.batch.shape[-1] == size]
                taken = [r for r in batch if r.client == client and r.batch.shape[-1] == size]
                assert taken == mine[: len(taken)]
        gone = {id(r) for r in self.queue}
        self._leave([r for r in before if id(r) not in gone])

    @invariant()
    def nothing_is_lost(self) -> None:
        assert {id(r) for r in self.queue} == {id(r) for r in self.waiting}
        assert self.queue.images == sum(r.images for r in self.waiting) <= 12
        assert len(self.queue) == len(self.waiting)
        if not self.waiting:
            assert self.queue.wake_at() == math.inf

    def _leave(self, requests: list[Request]) -> None:
        for request in requests:
            assert request.future not in self.done
            self.done.append(request.future)
        left = {id(r) for r in requests}
        self.waiting = [r for r in self.waiting if id(r) not in left]


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
test_queue_under_any_sequence = QueueMachine.TestCase
