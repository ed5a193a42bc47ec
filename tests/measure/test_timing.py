"""Percentiles and throughput of known times, and what makes them untrustworthy."""

from __future__ import annotations

import numpy as np
import pytest

from repvgg_deploy.measure.times import Turns, count_images_per_second, find_instability, summarize


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
