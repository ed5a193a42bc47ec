"""CUDA graphs, and that nothing leaks whatever fails."""

from __future__ import annotations

import gc
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repvgg_deploy.errors import CudaError
from tests.fakes.cuda import FakeCuda
from tests.fakes.tensorrt import Faults
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world
from tests.runtime.make_model import random_batch
from tests.runtime.tensorrt.machines import MACHINES, PATIENCE, PLAIN, batch_of

# CUDA graphs


def test_usual_batch_sizes_run_as_graphs_from_the_second_time_on(world: World) -> None:
    with world.open() as engine:
        for round_ in range(4):
            for count in (1, 4, 8):
                assert_answers(world, engine, batch_of(count, seed=round_))
        assert world.cuda.launches >= 9
    with world.open(cuda_graphs=False) as engine:
        before = world.cuda.launches
        for _ in range(4):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == before


def test_failed_capture_falls_back_and_is_logged_once(tmp_path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(faults=Faults(no_capture=True)))
    with caplog.at_level(logging.WARNING), world.open() as engine:
        for count in (1, 1, 1, 4, 4, 4):
            assert_answers(world, engine, batch_of(count))
    assert world.cuda.launches == 0 and world.cuda.leaks() == {}
    assert len([record for record in caplog.records if "CUDA graphs are left out" in record.message]) == 1


def test_capture_that_somebody_elses_wait_for_the_device_broke_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """torch.cuda.synchronize() in another thread, in the midst of a capture."""
    begin = world.cuda.begin_capture
    waits: list[bool] = []

    def interfere(stream: object) -> None:
        begin(stream)
        if not waits:
            with world.cuda.on_device(0), pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
                waits.append(True)
                world.cuda.device_wait()

    monkeypatch.setattr(world.cuda, "begin_capture", interfere)
    with caplog.at_level(logging.INFO), world.open(contexts=1) as engine:
        for seed in range(4):
            assert_answers(world, engine, batch_of(4, seed=seed))
        assert waits and world.cuda.launches >= 1
    assert "tried again" in caplog.text and "left out" not in caplog.text
    assert world.cuda.leaks() == {}


def test_own_wait_for_the_device_breaks_no_capture(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that unnamed streams used is freed after such a wait, in any thread, which is after the capture's end."""
    begin, waited = world.cuda.begin_capture, threading.Event()

    def wait_for_device() -> None:
        with world.cuda.on_device(0):
            world.cuda.synchronize()
        waited.set()

    thread = threading.Thread(target=wait_for_device)

    def begin_capture(stream: object) -> None:
        begin(stream)
        thread.start()
        assert not waited.wait(0.2)

    monkeypatch.setattr(world.cuda, "begin_capture", begin_capture)
    with world.open(contexts=1) as engine:
        assert_answers(world, engine, batch_of(4))
        assert_answers(world, engine, batch_of(4, seed=1))
        assert world.cuda.launches == 1 and waited.wait(PATIENCE)
    thread.join()
    assert world.cuda.leaks() == {}


def test_graphs_of_tensorrt_rtx_hold_the_kernels_of_their_shape(tmp_path, monkeypatch) -> None:
    """It compiles them in the background. The slower ones that it runs meanwhile, a graph would keep for good.

    The fake refuses to capture those.
    """
    world = make_world(tmp_path, monkeypatch, Setting(version="1.7.1.116", rtx=True))
    with world.open(contexts=1) as engine:
        for _ in range(3):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == 2
        slot = engine._backend._pool.acquire_idle()
        slot._full, slot._lanes = {0}, {}  # where there is no further context, the one for all shapes is not captured
        engine._backend._pool.release(slot)
        for _ in range(3):
            assert_answers(world, engine, batch_of(4))
        assert world.cuda.launches == 2
    assert world.cuda.leaks() == {}


def test_warm_up_makes_every_context_and_graph(world: World) -> None:
    with world.open(contexts=3) as engine:
        engine.warm_up()
        launches, contexts = world.cuda.launches, world.trt.seen.contexts
        assert launches >= 3
        assert_answers(world, engine, batch_of(1))
        assert world.cuda.launches == launches + 1 and world.trt.seen.contexts == contexts


def test_nothing_is_captured_or_made_after_warm_up(world: World) -> None:
    """So that no request pays for it, and a caller may wait for the whole device from then on."""
    with world.open(contexts=2) as engine:
        engine.warm_up()
        captures, contexts = world.cuda.calls["begin_capture"], world.trt.seen.contexts
        assert captures == 2 * 4, "1, 2, 4 and 8 in each slot"
        for index in range(40):
            assert_answers(world, engine, batch_of(1 + index % 8, seed=index))
            with world.cuda.on_device(0):
                world.cuda.device_wait()
        assert (world.cuda.calls["begin_capture"], world.trt.seen.contexts) == (captures, contexts)


# failures, and what is freed when

CALLS = (
    "allocate", "allocate_host", "copy", "create_stream", "create_event", "synchronize_stream", "begin_capture",
    "end_capture", "launch_graph", "record_event", "wait_event", "synchronize_event",
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail_at_any_time_and_nothing_leaks(tmp_path, monkeypatch, call: str) -> None:
    """The nth call fails, for every n until none does: a typed error or a right answer, and an engine that goes on."""
    reached = 0
    for nth in range(1, 60):
        world = make_world(tmp_path, monkeypatch)
        world.cuda.fail(call, nth=nth)
        try:
            engine = world.open()
        except CudaError:
            pass
        else:
            failures = 0
            for count in (3, 3, 3, 20, 2, 2):
                try:
                    assert_answers(world, engine, batch_of(count, seed=count))
                except CudaError:
                    failures += 1
            assert failures <= 1
            missed = bool(world.cuda.faults)
            world.cuda.faults.clear()
            assert_answers(world, engine, batch_of(3))
            engine.close()
            if missed:
                break
        assert world.cuda.leaks() == {}, (call, nth)
        reached = nth
    assert reached >= 1, "the call was never made"


def test_close_waits_for_running_work_and_frees_everything(world: World) -> None:
    engine = world.open(contexts=2)
    gate, started = threading.Event(), threading.Event()
    real = FakeCuda.synchronize_stream

    def slow(stream: object) -> None:
        started.set()
        assert gate.wait(PATIENCE)
        real(world.cuda, stream)

    world.cuda.synchronize_stream = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.infer, batch_of(3))
        assert started.wait(PATIENCE)
        engine.close(wait=False)
        assert world.cuda.leaks() != {}
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive() and world.cuda.leaks() != {}
        gate.set()
        closing.join(PATIENCE)
        assert not closing.is_alive() and world.cuda.leaks() == {}
        np.testing.assert_allclose(running.result(PATIENCE), world.expect(batch_of(3))[0], rtol=1e-5, atol=1e-5)
    assert world.cuda.leaks() == {}


def test_engine_that_is_dropped_gives_memory_and_threads_back(world: World) -> None:
    threads = threading.active_count()
    engine = world.open()
    answers = [engine.submit(random_batch(PLAIN, count)) for count in (3, 8, 20)]
    batcher = engine.batcher()
    answers.append(batcher.submit(random_batch(PLAIN, 2)))
    batcher.close()
    del engine, batcher
    assert [len(answer.result(PATIENCE)) for answer in answers] == [3, 8, 20, 2]
    del answers
    end = time.monotonic() + PATIENCE
    while (world.cuda.leaks() or threading.active_count() > threads) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)  # until the threads that ran them have let go of the Engine, too
    assert world.cuda.leaks() == {} and threading.active_count() <= threads


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from(["ok", "enqueue", "copy", "allocate"])), min_size=1, max_size=12
    ),
    contexts=st.integers(1, 3),
    graphs=st.booleans(),
    eager=st.booleans(),
    setting=st.sampled_from(MACHINES),
)
def test_any_sequence_of_requests_and_failures(
    tmp_path, monkeypatch, requests, contexts, graphs, eager, setting
) -> None:
    world = make_world(tmp_path, monkeypatch, replace(setting, profile=(2, 4, 8), eager=eager))
    with world.open(contexts=contexts, cuda_graphs=graphs) as engine:
        for count, fate in requests:
            if fate == "enqueue":
                world.trt.faults.enqueue.add(world.trt.seen.runs + 1)
            elif fate != "ok":
                world.cuda.fail(fate)
            batch = batch_of(count, seed=count)
            try:
                assert_answers(world, engine, batch)
            except CudaError:
                assert fate != "ok"
            world.cuda.faults.clear()
            world.trt.faults.enqueue.clear()
            assert_answers(world, engine, batch)
    assert world.cuda.leaks() == {}


def assert_steady(world: World, count: int) -> None:
    with world.open(contexts=2) as engine, ThreadPoolExecutor(4) as pool:
        batches = [batch_of(1 + index % 11, seed=index) for index in range(33)]
        expected = [world.expect(batch)[0] for batch in batches]
        for found, wanted in zip(pool.map(engine.infer, batches), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        for size in range(1, 12):  # every context meets every size, which threads alone would leave to chance
            engine.warm_up((size, *engine.spec.input.shape[1:]))
        taken = {
            name: world.cuda.calls[name] for name in ("allocate", "allocate_host", "create_stream", "create_event")
        }
        held = world.cuda.leaks()
        for index, found in enumerate(pool.map(engine.infer, (batches[index % 33] for index in range(count)))):
            assert found.shape == expected[index % 33].shape
        assert {name: world.cuda.calls[name] for name in taken} == taken, "memory is taken anew in the steady state"
        assert {name: number for name, number in world.cuda.leaks().items() if name != "graphs"} == {
            n: v for n, v in held.items() if n != "graphs"
        }
    assert world.cuda.leaks() == {}


def test_steady_state_takes_no_memory(world: World) -> None:
    assert_steady(world, 500)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_steady_state_takes_no_memory_in_100_000_inferences(world: World) -> None:
    assert_steady(world, 100_000)
