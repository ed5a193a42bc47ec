"""Mutated passports, calibration files, scales, cached plans, timings and labels end in a value or our error.

A failure names its case; repeat it with
`python -m tests.fuzz.small_files 1 CASE FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES, run_cases
from tests.fuzz.small_files import CASE_SECONDS, FORMATS, mutate


@pytest.mark.timeout(900 + CASES)
def test_mutated_small_files_end_in_a_value_or_our_error(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    result = run_cases("small_files", CASES, 0, tmp_path)
    record_property("counted", {**result["ends"], "slowest_s": result["slowest_s"]})
    assert result["failures"] == []
    assert result["slowest_s"] < CASE_SECONDS
    for name, ends in result["ends"].items():
        assert sum(ends.values()) == CASES, name
        assert min(ends["read"], ends["refused"]) > 0, name  # mutations that always or never break test nothing


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_of_a_case_are_always_the_same(name: str) -> None:
    seed = FORMATS[name].make()
    assert [mutate(seed, number) for number in range(20)] == [mutate(seed, number) for number in range(20)]
