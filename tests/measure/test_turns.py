"""Ways in turn: order, what counts, how long, clients, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from repvgg_deploy.errors import ModelError
from repvgg_deploy.measure.turns import MOST_TURNS, Pace, measure_in_turns


def recording(log: list[str], name: str, seconds: float = 0.001) -> Callable[[], None]:
    def call() -> None:
        log.append(name)
        time.sleep(seconds)

    return call


def test_ways_take_turns_and_each_round_begins_with_another() -> None:
    log: list[str] = []
    found = measure_in_turns({name: recording(log, name) for name in "abc"}, Pace(duration_s=0.8, warm_up_s=0.0))
    assert {name: len(turns.seconds) for name, turns in found.items()} == dict.fromkeys("abc", MOST_TURNS)
    changes = [log[index] for index in range(len(log)) if index == 0 or log[index] != log[index - 1]]
    # The warm-up's a, b, c; then the rounds, whose borders fall together where one ends and the next begins with the same way.
    assert changes[:9] == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]


def test_warm_up_and_the_first_call_of_each_turn_are_not_counted() -> None:
    log: list[str] = []
    turns = measure_in_turns({"a": recording(log, "a")}, Pace(duration_s=0.05, warm_up_s=0.0))["a"]
    assert len(log) == 3 + turns.calls + len(turns.seconds)
    assert all(second >= 0.001 for turn in turns.seconds for second in turn)
    assert all(wall >= sum(turn) for wall, turn in zip(turns.wall_seconds, turns.seconds, strict=True))


def test_slow_calls_make_two_turns_of_one_call_each() -> None:
    turns = measure_in_turns({"a": lambda: time.sleep(0.02)}, Pace(duration_s=0.01, warm_up_s=0.0))["a"]
    assert [len(turn) for turn in turns.seconds] == [1, 1]


def test_progress_is_told_once_a_way_and_turn() -> None:
    told: list[str] = []
    measure_in_turns({"a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.001)}, Pace(0.8, 0.0), progress=told.append)
    assert told.count("a") == told.count("b") == MOST_TURNS + 1


def test_clients_call_at_once() -> None:
    together, most, guard = 0, 0, threading.Lock()

    def call() -> None:
        nonlocal together, most
        with guard:
            together += 1
            most = max(most, together)
        time.sleep(0.002)
        with guard:
            together -= 1

    turns = measure_in_turns({"a": call}, Pace(duration_s=0.2, warm_up_s=0.0, clients=4))["a"]
    assert most == 4
    assert turns.calls >= 4 * len(turns.seconds)
    assert sum(second for turn in turns.seconds for second in turn) > 1.5 * sum(turns.wall_seconds)  # four at once, and a busy machine


@pytest.mark.parametrize("clients", [1, 3])
def test_failure_of_a_call_ends_the_run_and_its_threads(clients: int) -> None:
    before, calls = threading.active_count(), [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise ModelError("the backend failed", remedy="look")
        time.sleep(0.001)

    with pytest.raises(ModelError, match="the backend failed"):
        measure_in_turns({"a": call}, Pace(duration_s=0.5, warm_up_s=0.0, clients=clients))
    assert threading.active_count() == before
