"""Mutated ONNX files: each is refused with a message of ours, or answers exactly as the original, and none crashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES, run_cases
from tests.fuzz.onnx_cases import mutate
from tests.runtime.make_model import make_onnx


@pytest.mark.timeout(900 + CASES)
def test_engine_of_mutated_file_refuses_it_or_answers_as_before(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = make_onnx(tmp_path / "m.onnx")
    report = run_cases("onnx_cases", model, 0, CASES)  # standard error ends with the seed of a case that kills it
    record_property("counted", report["outcomes"])
    assert report["wrong"] == {}
    assert sum(report["outcomes"].values()) == CASES
    refused = sum(count for name, count in report["outcomes"].items() if name.endswith(": refused"))
    # Nearly every mutation breaks the file; those that do not (such as foreign metadata appended) must still be
    # answered.
    assert 0.5 * CASES < refused < CASES


def test_mutations_of_a_seed_are_always_the_same(tmp_path: Path) -> None:
    data = make_onnx(tmp_path / "m.onnx").read_bytes()
    cases = [mutate(data, seed) for seed in range(60)]
    assert cases == [mutate(data, seed) for seed in range(60)]
    assert sum(changed != data for _, changed in cases) >= 50
    assert len({name for name, _ in cases}) >= 10
