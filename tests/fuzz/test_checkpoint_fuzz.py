"""Mutated checkpoints end in a checkpoint or in one of our errors: no other exception, no hang, no code run.

`REPVGG_FUZZ_CASES` sets the number of cases (CI: 2000 or more). A failure names its case; repeat it with
`python -m tests.fuzz.checkpoint_mutations 1 CASE FOLDER`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.checkpoint_mutations import CASE_SECONDS, make_seeds, run_case

ROOT = Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("REPVGG_FUZZ_CASES", "300"))


def test_unmutated_seeds_load(tmp_path):
    seeds = make_seeds(tmp_path)
    assert [run_case(seed, tmp_path / "seed") for seed in seeds] == ["loaded"] * len(seeds)


@pytest.mark.timeout(900 + CASES)
def test_mutated_checkpoints_end_in_a_checkpoint_or_our_error(tmp_path, record_property):
    program = [sys.executable, "-m", "tests.fuzz.checkpoint_mutations", str(CASES), "0", str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600 + CASES, check=False)
    assert done.returncode == 0, f"the interpreter died: {done.stderr[-2000:]}"
    result = json.loads(done.stdout)
    record_property("counted", {**result["ends"], "slowest_s": result["slowest_s"]})
    assert result["failures"] == []
    assert not result["ran"], "a mutated pickle ran code"
    assert result["slowest_s"] < CASE_SECONDS
    ends = result["ends"]
    assert sum(ends.values()) == CASES
    # Mutations that only ever break the container, or never break anything, would test nothing behind it.
    assert ends["loaded"] > CASES // 20
    assert len(ends) >= 8
