"""The two files of a build under kill -9."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from pathlib import Path

import pytest

from repvgg_deploy.build.deliver import deliver
from repvgg_deploy.errors import ArtifactError
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


FAULTS = (errno.EXDEV, errno.ESTALE, errno.EPERM, errno.EIO, errno.EINTR, errno.ENOLCK)


@pytest.mark.parametrize("done", [False, True], ids=["refused", "done_and_denied"])
@pytest.mark.parametrize("call", ["replace", "unlink", "chmod", "fsync", "stat", "mkdir", "flock"])
@pytest.mark.parametrize("stands", [False, True])
def test_fault_of_the_file_system_at_any_call_is_an_error_and_the_two_files_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, done: bool, stands: bool
) -> None:
    """NFS may also say that a call failed which it has done: its first answer was lost."""
    module = __import__("fcntl") if call == "flock" else os
    real, seen = getattr(module, call), 0

    def build(folder: Path, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        deliver(folder / "b2.plan", data, make_passport(plan_sha256=digest), force=True)

    for number in itertools.count(1):
        folder, fault = tmp_path / str(number), FAULTS[number % len(FAULTS)]
        folder.mkdir()
        if stands:
            build(folder, b"old plan")
        seen = 0

        def answer(*arguments: object, **named: object) -> object:
            nonlocal seen
            if call == "stat" and not str(arguments[0]).startswith(str(folder)):  # noqa: B023 - in this round alone
                return real(*arguments, **named)
            seen += 1
            if seen != number:  # noqa: B023
                return real(*arguments, **named)
            if done:
                real(*arguments, **named)
            raise OSError(fault, os.strerror(fault))  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(module, call, answer)
            try:
                build(folder, b"new plan")
            except ArtifactError:
                assert seen >= number
            except OSError as error:  # only where nothing of ours was begun
                pytest.fail(f"call {number}: {error!r}")
        plan = folder / "b2.plan"
        assert plan.exists() or not stands
        if plan.exists():
            passport = read_passport(plan)
            assert passport is not None, f"call {number}"
            assert passport.plan_sha256 == hashlib.sha256(plan.read_bytes()).hexdigest(), f"call {number}"
        build(folder, b"new plan")
        assert plan.read_bytes() == b"new plan"
        if seen < number:
            break
    assert number > 1 or call == "mkdir"
