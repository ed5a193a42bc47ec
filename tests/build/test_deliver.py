"""The two files of a build under kill -9."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from repvgg_deploy.build.deliver import deliver
from repvgg_deploy.files.passport import read_passport
from tests.files.make_passport import make_passport
from tests.kills import killed_before

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.mark.parametrize("stands", [False, True])
def test_plan_and_passport_under_a_kill_at_any_event_belong_together(tmp_path: Path, stands: bool) -> None:
    old, new = b"old plan", b"new plan"

    def build(folder: Path, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        deliver(folder / "b2.plan", data, make_passport(plan_sha256=digest, build_seconds=len(digest)), force=True)

    number, killed = 0, True
    while killed:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        if stands:
            build(folder, old)
        killed = killed_before(number, folder, lambda: build(folder, new))  # noqa: B023 - it is called at once
        plan = folder / "b2.plan"
        assert plan.exists() or not stands  # a visible plan is never gone
        if plan.exists():
            assert plan.read_bytes() in (old, new)
            passport = read_passport(plan)
            assert passport is not None, f"after {number - 1} events"
            assert passport.plan_sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
        build(folder, new)
        found = read_passport(plan)
        assert found is not None and found.plan_sha256 == hashlib.sha256(new).hexdigest()
    assert number > 8
