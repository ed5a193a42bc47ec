"""Mutated checkpoints end in a checkpoint or in one of our errors: no other exception, no hang, no code run.

A failure names its case; repeat it with
`python -m tests.fuzz.checkpoint_mutations 1 CASE FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES, run_cases
from tests.fuzz.checkpoint_mutations import CASE_SECONDS, make_seeds, run_case


def test_unmutated_seeds_load(tmp_path: Path) -> None:
    seeds = make_seeds(tmp_path)
    assert [run_case(seed, tmp_path / "seed") for seed in seeds] == ["loaded"] * len(seeds)


@pytest.mark.timeout(900 + CASES)
def test_mutated_checkpoints_end_in_a_checkpoint_or_our_error(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    result = run_cases("checkpoint_mutations", CASES, 0, tmp_path)
    record_property("counted", {**result["ends"], "slowest_s": result["slowest_s"]})
    assert result["failures"] == []
    assert not result["ran"], "a mutated pickle ran code"
    assert result["slowest_s"] < CASE_SECONDS
    ends = result["ends"]
    assert sum(ends.values()) == CASES
    # Mutations that only ever break the container, or never break anything, would test nothing behind it.
    assert ends["loaded"] > CASES // 20
    assert len(ends) >= 8
