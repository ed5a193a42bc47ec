"""Ways in turn, on a clock that only calls move; percentiles and throughput of known times; when not to trust them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from repvgg_deploy.errors import ModelError
from repvgg_deploy.measure import times as module
from repvgg_deploy.measure.times import (
    MOST_TURNS,
    Pace,
    Turns,
    count_images_per_second,
    find_instability,
    measure_in_turns,
    summarize,
)


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self._now, self._lock = 0.0, threading.Lock()

    def perf_counter(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def recording(log: list[str], name: str, clock: Clock) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        clock.advance(0.001)

    return call


def test_ways_take_turns_and_each_round_begins_with_another(clock: Clock) -> None:
    log: list[str] = []
    found = measure_in_turns({name: recording(log, name, clock) for name in "abc"}, Pace(duration_s=0.8, warm_up_s=0.0))
    assert {name: len(turns.seconds) for name, turns in found.items()} == dict.fromkeys("abc", MOST_TURNS)
    changes = [log[index] for index in range(len(log)) if index == 0 or log[index] != log[index - 1]]
    # The warm-up's a, b, c; then the rounds, whose borders fall together where one ends and the next begins with the
    # same way.
    assert changes[:9] == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]


def test_warm_up_and_the_first_call_of_each_turn_are_not_counted(clock: Clock) -> None:
    log: list[str] = []
    turns = measure_in_turns({"a": recording(log, "a", clock)}, Pace(duration_s=0.05, warm_up_s=0.0))["a"]
    assert len(log) == 3 + turns.calls + len(turns.seconds)
    assert all(second == pytest.approx(0.001) for turn in turns.seconds for second in turn)
    assert turns.wall_seconds == pytest.approx([sum(turn) for turn in turns.seconds])


def test_slow_calls_make_two_turns_of_one_call_each(clock: Clock) -> None:
    turns = measure_in_turns({"a": lambda: clock.advance(0.02)}, Pace(duration_s=0.01, warm_up_s=0.0))["a"]
    assert [len(turn) for turn in turns.seconds] == [1, 1]


def test_progress_is_told_once_a_way_and_turn(clock: Clock) -> None:
    told: list[str] = []
    ways = {"a": lambda: clock.advance(0.001), "b": lambda: clock.advance(0.001)}
    measure_in_turns(ways, Pace(0.8, 0.0), progress=told.append)
    assert told.count("a") == told.count("b") == MOST_TURNS + 1


def test_clients_call_at_once(clock: Clock) -> None:
    """A call of a client ends when all four are in theirs: one that waited for another would never end."""
    main, meeting = threading.current_thread(), threading.Barrier(4, action=lambda: clock.advance(1.0))

    def call() -> None:
        if threading.current_thread() is main:  # the warm-up
            clock.advance(1.0)
        else:
            meeting.wait(300)

    turns = measure_in_turns({"a": call}, Pace(duration_s=0.2, warm_up_s=0.0, clients=4))["a"]
    assert turns.seconds == ((1.0,) * 4,) * 2
    assert max(turns.wall_seconds) <= 1.0


@pytest.mark.parametrize("clients", [1, 3])
def test_failure_of_a_call_ends_the_run_and_its_threads(clock: Clock, clients: int) -> None:
    before, calls = set(threading.enumerate()), [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise ModelError("the backend failed", remedy="look")
        clock.advance(0.001)

    with pytest.raises(ModelError, match="the backend failed"):
        measure_in_turns({"a": call}, Pace(duration_s=0.5, warm_up_s=0.0, clients=clients))
    assert set(threading.enumerate()) <= before


def turns_of(*seconds: list[float]) -> Turns:
    return Turns(tuple(tuple(turn) for turn in seconds), tuple(sum(turn) for turn in seconds))


def test_percentiles_of_one_to_a_hundred_are_those_numbers() -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 101) / 1e3).tolist()
    found = summarize(turns_of(shuffled[:30], shuffled[30:]))
    assert (found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms) == pytest.approx(
        (1, 50, 90, 95, 99, 100)
    )
    assert (found.calls, found.mean_ms) == (100, pytest.approx(50.5))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 999])
def test_percentiles_are_those_of_numpys_nearest_rank(count: int) -> None:
    seconds = np.random.default_rng(count).gamma(2.0, 0.01, count)
    found = summarize(turns_of(seconds.tolist()))
    expected = np.percentile(1e3 * seconds, [0, 50, 90, 95, 99, 100], method="inverted_cdf")
    np.testing.assert_allclose(
        [found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms], expected, rtol=1e-12
    )


def test_throughput_counts_clients_that_ran_at_once() -> None:
    turns = Turns(((0.1,) * 40,), (1.0,))  # four clients, ten calls each in a second
    assert count_images_per_second(turns, 8) == 320


def test_steady_times_are_not_complained_of() -> None:
    steady = np.random.default_rng(0).normal(0.01, 0.0002, 400).tolist()
    assert find_instability(turns_of(steady[:100], steady[100:200], steady[200:300], steady[300:])) == ()


def test_drift_and_spread_are_named() -> None:
    slower = turns_of([0.010] * 60, [0.010] * 60, [0.011] * 60, [0.011] * 60)
    assert find_instability(slower) == ("the second half is 10 % slower than the first",)
    faster = turns_of([0.011] * 60, [0.010] * 60)
    assert find_instability(faster) == ("the second half is 9 % faster than the first",)
    spread = turns_of([0.010, 0.015] * 60, [0.010, 0.015] * 60)
    assert find_instability(spread) == ("calls spread by 20 %",)
