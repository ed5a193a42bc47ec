"""The batcher: its threads, on fakes and on real Engines; and its queue, on a virtual clock.

Of the queue: nothing is lost, nothing is answered twice, nothing is run too late, nobody is overtaken.
"""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from repvgg_deploy.errors import DeadlineError, EngineBusyError, InputError, ModelError
from repvgg_deploy.runtime.batcher import Batcher, BatchModel, BatchQueue, Request
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import BatcherOptions, EngineOptions
from repvgg_deploy.runtime.results import TopK
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch

PATIENCE = 300  # seconds until a test that hangs is given up; none waits so long


class Model:
    """Doubles numbers. `gate` holds it up, so that a test decides what waits."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.fail: Callable[[np.ndarray], bool] = lambda batch: False
        self.kept: list[np.ndarray] | None = None  # the batches, where a test asks for them
        self.made: list[np.ndarray] = []

    def check(self, batch: object) -> np.ndarray:
        if not isinstance(batch, np.ndarray):
            raise InputError("no array", remedy="give one")
        return batch

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        self.started.release()
        assert self.gate.wait(PATIENCE)
        self.sizes.append(len(batch))
        if self.kept is not None:
            self.kept.append(batch)
        if self.fail(batch):
            raise ModelError("it broke", remedy="mend it")
        return (batch * 2,)

    def make_batch(self, shape: tuple[int, ...], dtype: object) -> np.ndarray:
        self.made.append(np.full(shape, np.nan, dtype))
        return self.made[-1]

    def open(self, **options: object) -> Batcher:
        return Batcher(
            BatcherOptions(**options), BatchModel(self.check, self.run, lambda outputs: outputs[0], self.make_batch)
        )


def one(value: float) -> np.ndarray:
    return np.full((1, 2), value, np.float32)


def held(model: Model, batcher: Batcher) -> object:
    """Holds the model up in a first batch, so that what comes now waits."""
    model.gate.clear()
    first = batcher.submit(one(-1))
    assert model.started.acquire(timeout=PATIENCE)
    return first


def test_requests_that_wait_become_one_batch_and_each_gets_its_own_answer() -> None:
    model = Model()
    with model.open(max_batch=8, max_delay_ms=0) as batcher:
        held(model, batcher)
        futures = [batcher.submit(np.full((count, 2), count, np.float32)) for count in (1, 3, 2)]
        model.gate.set()
        for count, future in zip((1, 3, 2), futures, strict=True):
            np.testing.assert_array_equal(future.result(PATIENCE), np.full((count, 2), 2 * count, np.float32))
            assert future.result().base is None  # nobody holds the others' answers
    assert model.sizes == [1, 6]
    found = batcher.statistics()
    assert (found.requests, found.images, found.batch_sizes, found.waiting) == (4, 7, {1: 1, 6: 1}, 0)
    assert found.queue_ms.count == 4 and found.run_ms.count == 2


def test_batch_that_fails_is_run_one_by_one_and_only_the_culprit_fails() -> None:
    model = Model()
    model.fail = lambda batch: bool((batch == 13).any())
    with model.open(max_batch=8, max_delay_ms=0) as batcher:
        held(model, batcher)
        good, bad, fine = (batcher.submit(one(value)) for value in (1, 13, 2))
        model.gate.set()
        assert good.result(PATIENCE)[0, 0] == 2 and fine.result(PATIENCE)[0, 0] == 4
        with pytest.raises(ModelError, match="it broke"):
            bad.result(PATIENCE)
        assert batcher.infer(one(3))[0, 0] == 6  # it goes on
    assert batcher.statistics().failures == 1 and model.sizes[1] == 3


def test_requests_are_put_together_in_memory_that_is_made_once() -> None:
    model = Model()
    model.kept = []
    with model.open(max_batch=8, max_delay_ms=0) as batcher:
        for turn in range(5):
            first = held(model, batcher)
            futures = [batcher.submit(one(turn + value)) for value in range(8)]
            model.gate.set()
            assert [future.result(PATIENCE)[0, 0] for future in futures] == [2 * (turn + value) for value in range(8)]
            assert first.result(PATIENCE)[0, 0] == -2
            assert model.started.acquire(timeout=PATIENCE)  # of the eight
    assert model.sizes == [1, 8] * 5 and len(model.made) == 1
    assert all(np.shares_memory(batch, model.made[0]) for batch in model.kept[1::2])
    assert not any(np.shares_memory(batch, model.made[0]) for batch in model.kept[::2])


def test_request_that_runs_alone_is_not_copied() -> None:
    model, batch = Model(), one(1)
    model.kept = []
    with model.open(max_delay_ms=0) as batcher:
        batcher.infer(batch)
    assert model.kept[0] is batch and model.made == []


def test_batch_is_not_written_to_while_it_runs() -> None:
    """Two threads put batches together; each has memory of its own, which it uses again when its batch was run."""
    model = Model()
    with model.open(max_batch=2, max_delay_ms=PATIENCE * 1e3, concurrency=2, max_queue=100) as batcher:
        model.gate.clear()
        futures = [batcher.submit(one(value)) for value in range(8)]
        for _ in range(2):
            assert model.started.acquire(timeout=PATIENCE)
        assert len(batcher._crew.queue) == 4  # the others wait
        model.gate.set()
        assert [future.result(PATIENCE)[0, 0] for future in futures] == [2 * value for value in range(8)]
    assert model.sizes == [2] * 4 and len(model.made) == 2 and not np.shares_memory(*model.made)


def test_memory_of_batches_grows_to_what_is_needed_and_holds_every_size() -> None:
    model = Model()
    with model.open(max_batch=6, max_delay_ms=0, max_queue=100) as batcher:
        for shape, count in (((1, 4), 2), ((1, 4), 3), ((1, 4), 6), ((1, 2, 3), 4), ((1, 5), 6), ((1, 4), 5)):
            batches = [np.full(shape, value, np.float32) for value in range(count)]
            first = held(model, batcher)
            futures = [batcher.submit(batch) for batch in batches]
            model.gate.set()
            for future, batch in zip(futures, batches, strict=True):
                np.testing.assert_array_equal(future.result(PATIENCE), 2 * batch)
            first.result(PATIENCE)
            assert model.started.acquire(timeout=PATIENCE)
    assert [one.size for one in model.made] == [8, 16, 24, 30]


def test_bad_request_is_refused_at_once_and_alone() -> None:
    model = Model()
    with model.open(max_batch=4) as batcher:
        for wrong, match in (("text", "no array"), (np.zeros((5, 2), np.float32), "more than this batcher")):
            with pytest.raises(InputError, match=match):
                batcher.submit(wrong)
        with pytest.raises(InputError, match="timeout_ms"):
            batcher.submit(one(1), timeout_ms=-1)
        assert batcher.infer(one(1))[0, 0] == 2


def test_full_queue_pushes_back() -> None:
    model = Model()
    with model.open(max_batch=2, max_queue=2, max_delay_ms=0) as batcher:
        held(model, batcher)
        waiting = [batcher.submit(one(value)) for value in (1, 2)]
        with pytest.raises(EngineBusyError, match="2 images wait already, and the queue holds 2"):
            batcher.submit(one(3))
        waiting[0].cancel()
        third = batcher.submit(one(3))  # in the place of the cancelled one
        assert batcher.statistics().refused == 1 and batcher.statistics().waiting == 2
        model.gate.set()
        assert third.result(PATIENCE)[0, 0] == 6
    assert batcher.statistics().cancelled == 1


def test_request_past_its_deadline_is_not_run() -> None:
    model, now = Model(), [0.0]
    batcher = Batcher(
        BatcherOptions(max_batch=4, max_delay_ms=0),
        BatchModel(model.check, model.run, lambda outputs: outputs[0]),
        clock=lambda: now[0],
    )
    with batcher:
        held(model, batcher)
        late, early, patient = (
            batcher.submit(one(1), timeout_ms=50),
            batcher.submit(one(2), timeout_ms=500),
            batcher.submit(one(3)),
        )
        now[0] = 0.1
        model.gate.set()
        with pytest.raises(DeadlineError, match="waited 100 ms"):
            late.result(PATIENCE)
        assert isinstance(late.exception(), TimeoutError)
        assert early.result(PATIENCE)[0, 0] == 4 and patient.result(PATIENCE)[0, 0] == 6
    assert model.sizes == [1, 2] and batcher.statistics().expired == 1


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_or_cancels_what_waits(drain: bool) -> None:
    model = Model()
    batcher = model.open(max_batch=2, max_delay_ms=1e6, max_queue=10)
    futures = [batcher.submit(one(1))]  # waits for a second one, for a quarter of an hour
    batcher.close(drain=drain)
    if drain:
        assert futures[0].result(0)[0, 0] == 2
    else:
        with pytest.raises(CancelledError):
            futures[0].result(0)
    with pytest.raises(InputError, match="closed"):
        batcher.submit(one(1))
    batcher.close()
    assert batcher.closed and not any(thread.is_alive() for thread in batcher._crew.threads)


def test_dropped_batchers_run_what_waits_and_give_back_threads_and_engine(tmp_path: Path) -> None:
    path, image = make_onnx(tmp_path / "m.onnx"), random_batch(ModelOptions(), 1)
    engine = Engine(path, options=EngineOptions(intra_op_threads=1))
    backend = weakref.ref(engine._backend)
    futures, threads = [], []
    for _ in range(10):
        batcher = engine.batcher(4, max_delay_ms=1e6)  # nothing is run before it is dropped
        futures.append(batcher.submit(image))
        threads += batcher._crew.threads
    expected = engine.infer(image)
    del batcher, engine
    gc.collect()
    for future in futures:
        np.testing.assert_array_equal(future.result(PATIENCE), expected)
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    futures.clear()
    gc.collect()
    assert backend() is None


def test_unhashable_client_and_a_batcher_to_pickle_are_input_errors() -> None:
    with Model().open() as batcher:
        with pytest.raises(InputError, match="client: expected something that tells clients apart") as refused:
            batcher.submit(one(1), client=[1] * 10**6)
        assert len(str(refused.value)) < 500
        with pytest.raises(InputError, match="open Engine and batcher in each process"):
            pickle.dumps(batcher)
        assert batcher.infer(one(1), client=("a", 1))[0, 0] == 2


def test_callback_may_submit_again_and_close() -> None:
    model = Model()
    batcher = model.open(max_batch=2, max_delay_ms=0)
    answers: list[float] = []
    finished = threading.Event()

    def again(future) -> None:
        answers.append(float(future.result()[0, 0]))
        if len(answers) < 3:
            batcher.submit(future.result()).add_done_callback(again)
        else:
            batcher.close()
            finished.set()

    batcher.submit(one(1)).add_done_callback(again)
    assert finished.wait(PATIENCE)
    batcher.close()
    assert answers == [2, 4, 8]


@pytest.mark.parametrize("broken", ["callback", "answer", "callback of a failure"])
def test_thread_of_a_batcher_outlives_what_its_futures_do(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    model.fail = lambda batch: broken == "callback of a failure" and 1 in batch
    packaged: list[int] = []

    def package(outputs) -> np.ndarray:
        packaged.append(1)
        if broken == "answer" and len(packaged) == 2:
            raise MemoryError("no room for a copy")
        return outputs[0]

    options = BatcherOptions(max_batch=8, max_delay_ms=0)
    with Batcher(options, BatchModel(model.check, model.run, package)) as batcher:
        held(model, batcher)
        futures = [batcher.submit(one(value)) for value in (1, 2, 3)]
        if broken != "answer":
            futures[0].add_done_callback(lambda _: sys.exit(3))
        model.gate.set()
        assert [future.result(PATIENCE)[0, 0] for future in futures[1:]] == [4, 6]
        assert batcher.submit(one(5)).result(PATIENCE)[0, 0] == 10
    assert isinstance(
        futures[0].exception(PATIENCE),
        {"answer": MemoryError, "callback of a failure": ModelError}.get(broken, type(None)),
    )
    assert ("tried to end the thread" in caplog.text) == (broken != "answer")


def test_delay_of_centuries_waits_for_a_full_batch() -> None:
    model = Model()
    with model.open(max_batch=2, max_delay_ms=1e300) as batcher:
        first = batcher.submit(one(1))
        time.sleep(0.1)  # the thread begins to wait
        assert batcher.submit(one(2)).result(PATIENCE)[0, 0] == 4 and first.result(PATIENCE)[0, 0] == 2


_PROGRAM = """
import sys
import numpy as np
from repvgg_deploy.runtime.engine import Engine

batcher = Engine(sys.argv[1]).batcher(max_batch=64)
for _ in range(8):
    batcher.submit(np.zeros((64, 3, 96, 96), np.float32)).add_done_callback(lambda _: print("answered", flush=True))
raise KeyboardInterrupt
"""


def test_program_that_ends_without_close_drains_and_is_not_killed(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(size=(96, 96)))
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert found.returncode in (130, -signal.SIGINT) and "Fatal" not in found.stderr
    assert found.stdout.split() == ["answered"] * 8


def test_batcher_holds_no_images_while_it_waits() -> None:
    model = Model()
    with model.open(max_delay_ms=0) as batcher:
        batch = one(1)
        reference = weakref.ref(batch)
        batcher.infer(batch)
        batcher.infer(one(2))  # the thread has come round
        del batch
        gc.collect()
        assert reference() is None


def test_64_threads_get_each_their_own_answer() -> None:
    model = Model()
    with (
        model.open(max_batch=32, max_delay_ms=1, max_queue=1000, concurrency=2) as batcher,
        ThreadPoolExecutor(64) as pool,
    ):
        futures = [pool.submit(batcher.infer, one(value), client=value % 7) for value in range(2000)]
        assert [float(future.result(PATIENCE)[0, 0]) for future in futures] == [2.0 * value for value in range(2000)]
    found = batcher.statistics()
    assert found.requests == 2000 and found.failures == 0 and max(model.sizes) <= 32
    assert sum(size * count for size, count in found.batch_sizes.items()) == 2000


def test_coroutines_share_batches_and_a_cancelled_task_is_not_run() -> None:
    model = Model()

    async def serve(batcher: Batcher) -> None:
        held(model, batcher)
        tasks = [asyncio.ensure_future(batcher.infer_async(one(value))) for value in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        model.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[2], asyncio.CancelledError)
        assert [float(found[index][0, 0]) for index in (0, 1, 3)] == [0, 2, 6]

    with model.open(max_batch=8, max_delay_ms=0) as batcher:
        asyncio.run(serve(batcher))
    assert model.sizes == [1, 3]


@pytest.mark.parametrize(
    "options", [ModelOptions(), ModelOptions(kind="top5"), ModelOptions(uint8=True), ModelOptions(batch=4)]
)
def test_engine_batcher_answers_as_infer_does(tmp_path: Path, options: ModelOptions) -> None:
    with (
        Engine(make_onnx(tmp_path / "m.onnx", options)) as engine,
        engine.batcher(max_batch=8, max_delay_ms=1) as batcher,
    ):
        batches = [random_batch(options, count, seed=count) for count in (1, 2, 3, 1, 5)]
        futures = [batcher.submit(batch) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            found, expected = future.result(PATIENCE), engine.infer(batch)
            if isinstance(expected, TopK):
                np.testing.assert_array_equal(found.classes, expected.classes)
                found, expected = found.scores, expected.scores
            np.testing.assert_allclose(
                found, expected, rtol=1e-5, atol=1e-5
            )  # another batch size may sum in another order
        with pytest.raises(InputError):
            batcher.submit(batches[0][0])


def test_engine_batcher_of_an_output_without_row_per_image_is_refused(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(kind="module"))
    with (
        Engine(path) as engine,
        pytest.raises(InputError, match=r"mean .* has no row per image, so requests cannot be run together"),
    ):
        engine.batcher()


def test_engine_submit_and_infer_async_answer_as_infer_does(tmp_path: Path) -> None:
    options = ModelOptions()
    with Engine(make_onnx(tmp_path / "m.onnx", options)) as engine:
        batch = random_batch(options, 3)
        expected = engine.infer(batch)
        np.testing.assert_array_equal(engine.submit(batch).result(PATIENCE), expected)
        np.testing.assert_array_equal(asyncio.run(engine.infer_async(batch)), expected)
        with pytest.raises(InputError):
            engine.submit(batch[0])
        found = engine.statistics()
        assert (found.requests, found.images, found.batch_sizes) == (3, 9, {3: 3}) and found.queue_ms.count == 2


class SlowBackend:
    """Waits for a gate."""

    name = "slow"

    def __init__(self, backend) -> None:
        self.backend, self.gate, self.started, self.closed = backend, threading.Event(), threading.Semaphore(0), 0

    def run(self, batch):
        self.started.release()
        assert self.gate.wait(PATIENCE)
        return self.backend.run(batch)

    def close(self) -> None:
        self.closed += 1
        self.backend.close()


def test_submitted_batches_are_bounded_and_survive_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repvgg_deploy.runtime import opening as module

    made: list[SlowBackend] = []
    opened = module.open_backend

    def open_slowly(*args, **named) -> SlowBackend:
        made.append(SlowBackend(opened(*args, **named)))
        return made[-1]

    monkeypatch.setattr(module, "open_backend", open_slowly)
    options = ModelOptions()
    engine = Engine(make_onnx(tmp_path / "m.onnx", options), options=EngineOptions(workers=1, max_pending=2))
    slow = made[0]
    batch = random_batch(options, 2)
    futures = [engine.submit(batch)]
    assert slow.started.acquire(timeout=PATIENCE)
    futures += [engine.submit(batch), engine.submit(batch)]
    assert engine.statistics().waiting == 2
    with pytest.raises(EngineBusyError, match="no more may"):
        engine.submit(batch)
    assert futures[1].cancel()
    assert (engine.statistics().refused, engine.statistics().cancelled) == (1, 1)
    engine.close(wait=False)
    with pytest.raises(InputError, match="closed"):
        engine.submit(batch)
    assert slow.closed == 0  # what was handed in before is still run
    slow.gate.set()
    engine.close()
    assert slow.closed == 1
    wait(futures, PATIENCE)
    assert futures[0].result().shape == futures[2].result().shape == (2, 7)


def test_close_in_a_callback_does_not_wait_for_itself(tmp_path: Path) -> None:
    engine = Engine(make_onnx(tmp_path / "m.onnx", ModelOptions()), options=EngineOptions(workers=1))
    batch, closed = random_batch(ModelOptions(), 2), threading.Event()

    def close(_: object) -> None:
        engine.close()
        closed.set()

    first = engine.submit(batch)
    second = engine.submit(batch)
    first.add_done_callback(close)
    assert closed.wait(PATIENCE)
    assert second.result(PATIENCE).shape == (2, 7)
    engine.close()


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
    """Requests of three clients come, are cancelled, fall late and are taken, in any order, at any time."""

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
