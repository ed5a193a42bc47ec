"""Two files that belong together appear together: whoever writes beside them, whatever interrupts, whatever the disk says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import ArtifactError
from repvgg_deploy.files.output import locked, pending_output, publish_pair, signals_deferred

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import sys; from pathlib import Path; from repvgg_deploy.publication import locked
counter = Path(sys.argv[1])
for _ in range(200):
    with locked(counter):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
DIE = """
import os, signal, sys; from pathlib import Path; from repvgg_deploy.publication import locked
with locked(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(code: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)


def test_lock_lets_one_process_in_at_a_time_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNT, counter) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert counter.read_text() == "600"
    assert names(tmp_path) == ["counter"]


def test_lock_of_a_killed_process_holds_up_nobody(tmp_path: Path) -> None:
    target = tmp_path / "x.plan"
    assert start(DIE, target).wait(60) == -signal.SIGKILL
    assert names(tmp_path) == [".x.plan.lock"]
    with locked(target):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    with caplog.at_level(logging.WARNING), locked(tmp_path / "x"):
        pass
    assert "has no locks" in caplog.text and names(tmp_path) == []


def test_lock_file_of_another_user_is_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, real, opened = tmp_path / ".x.lock", os.open, []
    name.touch()

    def open_as_another_user(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        opened.append(flags)
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_as_another_user)
    with locked(tmp_path / "x"), name.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(opened) == 1


def test_lock_in_a_folder_that_cannot_be_written_to_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", refuse(errno.EACCES))
    with pytest.raises(ArtifactError, match=r"x\.plan: cannot be written") as caught, locked(tmp_path / "x.plan"):
        pass
    assert "--out" in caught.value.remedy


def refuse(code: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_in_the_block_is_heard_after_it(number: signal.Signals) -> None:
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("signal"))
    try:
        with signals_deferred():
            signal.raise_signal(number)
            heard.append("work")
    finally:
        signal.signal(number, before)
    assert heard == ["work", "signal"]


def test_ignored_signal_stays_ignored_and_other_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_deferred():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    entered: list[bool] = []

    def work() -> None:
        with signals_deferred():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert entered == [True]


@contextlib.contextmanager
def pair(folder: Path) -> Iterator[tuple[Any, Any]]:
    """A new plan and its paper, beside where the old ones stand."""
    with pending_output(folder / "x.plan.json") as paper, pending_output(folder / "x.plan") as main:
        main.partial.write_text("new plan")
        paper.partial.write_text("new paper")
        yield main, paper


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.plan").write_text("old plan")
    (tmp_path / "x.plan.json").write_text("old paper")
    return tmp_path


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


NEW = {"x.plan": "new plan", "x.plan.json": "new paper"}
OLD = {"x.plan": "old plan", "x.plan.json": "old paper"}


def test_pair_replaces_both_and_says_so(folder: Path) -> None:
    with pair(folder) as (main, paper):
        publish_pair(main, paper)
    assert content(folder) == NEW and (main.status, paper.status) == ("written", "written")
    with pair(folder) as (main, paper):
        publish_pair(main, paper)
    assert content(folder) == NEW and (main.status, paper.status) == ("up to date", "up to date")


def test_paper_that_stands_already_comes_back_with_the_main_file_that_it_speaks_of(folder: Path) -> None:
    (folder / "x.plan.json").write_text("new paper")  # of a plan that was changed behind its back
    with pair(folder) as (main, paper):
        publish_pair(main, paper)
    assert content(folder) == NEW


@pytest.mark.parametrize("call", ["fsync", "chmod"])
@pytest.mark.parametrize("at", [1, 2])
def test_full_disk_leaves_the_old_pair(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int) -> None:
    real, calls = getattr(os, call), []

    def fail(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError, match="No space left"), pair(folder) as (main, paper):
        publish_pair(main, paper)
    assert content(folder) == OLD


def test_main_file_that_cannot_be_replaced_keeps_its_paper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refuse(errno.EPERM))
    with pytest.raises(ArtifactError, match="Operation not permitted"), pair(folder) as (main, paper):
        publish_pair(main, paper)
    assert content(folder) == OLD


@pytest.mark.parametrize("call", ["rename", "replace"])
def test_ctrl_c_comes_between_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def interrupt(source: Any, target: Any) -> None:
        real(source, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt), pair(folder) as (main, paper):
        publish_pair(main, paper)
    monkeypatch.undo()
    assert content(folder) == NEW
