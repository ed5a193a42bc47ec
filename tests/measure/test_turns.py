"""Ways in turn, on a clock that only calls move: order, what counts, how long, clients, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from repvgg_deploy.errors import ModelError
from repvgg_deploy.measure import times as module
from repvgg_deploy.measure.times import MOST_TURNS, Pace, measure_in_turns


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
    """A call of a client ends when all four are in theirs, and takes a second: one that waited for another would never end."""
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
