"""An Engine that runs for long holds its memory and its threads.

`infer` from many threads, `submit`, a batcher, engines opened and closed.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch
from tests.waiting import wait_until

WORKERS = 8
FACTOR = float(os.environ.get("REPVGG_SOAK_FACTOR", "1"))  # of the long forms; `make long` sets it
# Resident memory after warm-up; allocators keep some of what threads freed. One batch that leaked in each call would be
# 300 MB after 100,000.
GROWTH_BYTES = 24 << 20
# What Python itself holds: counters grow to a fixed size, nothing else stays.
PYTHON_GROWTH_BYTES = 300_000


def long(count: int) -> Any:
    """A long form, marked `slow`, with its count times REPVGG_SOAK_FACTOR and the time for it."""
    return pytest.param(round(count * FACTOR), marks=[pytest.mark.slow, pytest.mark.timeout(1200 * max(1.0, FACTOR))])


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def own_threads() -> int:
    """Threads that Engines and batchers started."""
    return sum(thread.name.startswith("repvgg-") for thread in threading.enumerate())


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return request.param


@pytest.mark.parametrize("calls", [3_000, long(100_000)])
def test_long_run_from_many_threads_keeps_memory_and_threads(tmp_path: Path, backend: Any, calls: int) -> None:
    options = ModelOptions()
    path = make_onnx(tmp_path / "m.onnx", options)
    batches = [random_batch(options, count, seed=count) for count in (1, 2, 3, 5)]
    with Engine(path, backend=backend, options=EngineOptions(intra_op_threads=1, max_batch=4)) as engine:
        expected = [engine.infer(batch) for batch in batches]

        def work(count: int) -> int:
            wrong = 0
            for index in range(count):
                answer = engine.infer(batches[index % 4])
                wrong += not np.allclose(answer, expected[index % 4], rtol=1e-4, atol=1e-4)
            return wrong

        with ThreadPoolExecutor(WORKERS) as pool:
            assert sum(pool.map(work, [100] * WORKERS)) == 0  # every thread has its buffers
            gc.collect()
            before = resident_bytes()
            assert sum(pool.map(work, [calls // WORKERS] * WORKERS)) == 0
            gc.collect()
            assert own_threads() == 0  # `infer` runs in the caller's
            assert resident_bytes() - before < GROWTH_BYTES
        assert engine.statistics().requests == len(batches) + WORKERS * (100 + calls // WORKERS)
        assert engine.statistics().failures == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
@pytest.mark.parametrize("seconds", [1, long(120)])
def test_sixty_four_threads_for_minutes_keep_memory_threads_and_files(
    tmp_path: Path, seconds: int, record_property: Callable[[str, object], None]
) -> None:
    """Ten minutes in `make long`: `infer`, `submit` and a batcher in turn, every answer compared."""
    options, over = ModelOptions(), threading.Event()
    batches = [random_batch(options, count, seed=count) for count in (1, 2, 3, 5)]
    engine_options = EngineOptions(intra_op_threads=1, max_batch=4, max_pending=64)
    with (
        Engine(make_onnx(tmp_path / "m.onnx", options), options=engine_options) as engine,
        engine.batcher(8, max_delay_ms=0.2, max_queue=64 * 5) as batcher,
        ThreadPoolExecutor(64) as pool,
    ):
        expected = [engine.infer(batch) for batch in batches]
        ways = [engine.infer, lambda batch: engine.submit(batch).result(), batcher.infer]

        def work(least: int) -> int:
            done = 0
            while done < least or not over.is_set():
                which = done % 4
                answer = ways[done % 3](batches[which])
                np.testing.assert_allclose(answer, expected[which], rtol=1e-4, atol=1e-4)
                done += 1
            return done

        def count() -> tuple[int, int, int]:
            gc.collect()
            return (
                resident_bytes(),
                len(list(Path("/proc/self/task").iterdir())),
                len(list(Path("/proc/self/fd").iterdir())),
            )

        over.set()
        list(pool.map(work, [24] * 64))  # every thread has its buffers
        before = count()
        over.clear()
        running = [pool.submit(work, 1) for _ in range(64)]
        time.sleep(seconds)
        over.set()
        inferences = sum(one.result() for one in running)
        after = count()
    record_property(
        "counted",
        f"{inferences} inferences from 64 threads in {seconds} s; memory {before[0] >> 20} → {after[0] >> 20} MB, "
        f"threads {before[1]} → {after[1]}, files {before[2]} → {after[2]}",
    )
    assert after[0] < before[0] + GROWTH_BYTES and after[1] <= before[1] and after[2] <= before[2], (before, after)
    assert inferences >= 64


@pytest.mark.parametrize("calls", [2_000, long(50_000)])
def test_submissions_and_batches_leave_nothing_behind(tmp_path: Path, calls: int) -> None:
    options = ModelOptions()
    image = random_batch(options, 1)
    with Engine(make_onnx(tmp_path / "m.onnx", options), options=EngineOptions(intra_op_threads=1)) as engine:
        expected = engine.infer(image)
        with engine.batcher(8, max_delay_ms=0.2) as batcher:

            def work(count: int) -> None:
                for index in range(count):
                    future = batcher.submit(image) if index % 2 else engine.submit(image)
                    np.testing.assert_allclose(future.result(), expected, rtol=1e-4, atol=1e-4)

            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(work, [50] * WORKERS))
                gc.collect()
                tracemalloc.start()
                try:
                    before = tracemalloc.get_traced_memory()[0]
                    list(pool.map(work, [calls // WORKERS] * WORKERS))
                    gc.collect()
                    grown = tracemalloc.get_traced_memory()[0] - before
                finally:
                    tracemalloc.stop()
                assert grown < PYTHON_GROWTH_BYTES
                assert own_threads() <= engine._options.workers + 1


@pytest.mark.parametrize("rounds", [20, long(500)])
def test_engines_opened_and_closed_leave_no_thread_and_no_model(tmp_path: Path, backend: Any, rounds: int) -> None:
    path = make_onnx(tmp_path / "m.onnx")
    image = random_batch(ModelOptions(), 1)

    def once() -> None:
        with Engine(path, backend=backend) as engine:
            with engine.batcher(4, max_delay_ms=0) as batcher:
                assert batcher.infer(image).shape == (1, 7)
                assert engine.submit(image).result().shape == (1, 7)
            # OpenVINO 2026.4 ends the process (heap corrupted) where a model is freed while a thread that ran it is
            # still ending; `join` returns before the system's thread is gone.
            tasks = [Path(f"/proc/self/task/{thread.native_id}") for thread in batcher._crew.threads]
            wait_until(lambda: not any(task.exists() for task in tasks), "the batcher's thread to end")

    for _ in range(5):
        once()
    gc.collect()
    threads, before = threading.active_count(), resident_bytes()
    for _ in range(rounds):
        once()
    gc.collect()
    wait_until(
        lambda: threading.active_count() <= threads, "the Engine's threads to end, for which close does not wait"
    )
    assert resident_bytes() - before < GROWTH_BYTES
