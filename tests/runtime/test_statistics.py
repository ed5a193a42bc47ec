from __future__ import annotations

import math
import threading

import pytest

from repvgg_deploy.runtime.statistics import BOUNDS_MS, Histogram, Recorder, Statistics


def recorded(*seconds: float) -> Histogram:
    recorder = Recorder()
    for value in seconds:
        recorder.answer(1, value)
    return recorder.snapshot().run_ms


def test_percentiles_are_those_of_the_times_to_within_a_bucket() -> None:
    times = [index / 1000 for index in range(1, 101)]  # 1 to 100 ms
    found = recorded(*times)
    assert found.count == 100 and found.total_ms == pytest.approx(5050)
    for percent in (1, 50, 90, 99, 100):
        assert percent <= found.percentile(percent) <= percent * 2 ** (1 / 8)


def test_no_time_has_no_percentile() -> None:
    assert math.isnan(Histogram().percentile(50)) and Histogram().count == 0


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e6])
def test_times_beyond_the_buckets_are_counted(seconds: float) -> None:
    found = recorded(seconds)
    assert found.count == 1 and found.cumulative()[-1] == (math.inf, 1)


def test_cumulative_buckets_grow_and_end_with_all() -> None:
    buckets = recorded(0.0005, 0.002, 0.002, 10.0, 1e5).cumulative()
    bounds, counts = zip(*buckets, strict=True)
    assert list(bounds) == sorted(bounds) and list(counts) == sorted(counts)
    assert dict(buckets)[1.0] == 1 and dict(buckets)[2.0] == 3 and buckets[-1] == (math.inf, 5)
    assert len(recorded().cumulative(every=1)) == len(BOUNDS_MS) + 1


def test_difference_of_snapshots_is_what_happened_between() -> None:
    recorder = Recorder()
    recorder.answer_batch([1, 2], [0.001, 0.002], 0.01)
    recorder.count("refused", 3)
    before = recorder.snapshot()
    recorder.answer_batch([4], [0.5], 0.02)
    recorder.count("expired")
    after = recorder.snapshot(waiting=7)
    between = after - before
    assert (after.requests, after.images, after.refused, after.batch_sizes) == (3, 7, 3, {3: 1, 4: 1})
    assert (between.requests, between.images, between.refused, between.expired, between.waiting) == (1, 4, 0, 1, 7)
    assert between.batch_sizes == {4: 1} and between.queue_ms.count == 1 and between.queue_ms.percentile(50) >= 500
    assert Statistics() - Statistics() == Statistics()


def test_many_threads_lose_no_count() -> None:
    recorder = Recorder()

    def work() -> None:
        for _ in range(2000):
            recorder.answer(2, 0.001)
            recorder.count("failures")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = recorder.snapshot()
    assert (found.requests, found.images, found.failures, found.run_ms.count) == (16000, 32000, 16000, 16000)
