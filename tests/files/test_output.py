"""Files appear whole or not at all, and two that belong together appear together, whatever interrupts or fails.

Tests may run as root, which may write anywhere: what the system would refuse is simulated.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import ArtifactError
from repvgg_deploy.files import output as output_module
from repvgg_deploy.files.output import (
    atomic_output,
    locked,
    pending_output,
    publish_pair,
    sha256_file,
    signals_deferred,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import sys; from pathlib import Path; from repvgg_deploy.files.output import locked
counter = Path(sys.argv[1])
for _ in range(200):
    with locked(counter):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
DIE = """
import os, signal, sys; from pathlib import Path; from repvgg_deploy.files.output import locked
with locked(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(code: int) -> Any:
    def function(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return function


def test_output_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with atomic_output(target) as output:
        output.partial.write_bytes(b"whole")
        assert not target.exists()
        assert output.partial.parent == tmp_path  # the same disk, so that the rename is one step
        assert output.partial.name.startswith(".")
        assert output.status == "pending"
    assert target.read_bytes() == b"whole"
    assert output.status == "written"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    "error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3), ArtifactError("what", remedy="how")]
)
def test_output_whose_block_fails_leaves_nothing_and_the_error_passes(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, atomic_output(tmp_path / "model.onnx") as output:
        output.partial.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


def test_output_whose_block_fails_keeps_the_older_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_output(target, force=True) as output:
        output.partial.write_bytes(b"new, but half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


def test_output_equal_to_the_file_that_stands_there_is_up_to_date_and_untouched(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("same", encoding="utf-8")
    os.utime(target, ns=(1, 1))
    assert write_text(target, "same").status == "up to date"
    assert write_text(target, "same", force=True).status == "up to date"
    assert target.stat().st_mtime_ns == 1
    assert names(tmp_path) == ["notes.txt"]


def test_output_different_from_the_file_that_stands_there_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(ArtifactError, match="exists and differs") as caught:
        write_text(target, "new")
    assert "--force" in caught.value.remedy
    assert target.read_text(encoding="utf-8") == "old"
    assert write_text(target, "new", force=True).status == "written"
    assert target.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EIO, "operating system")],
)
def test_output_on_a_full_or_broken_disk_is_an_error_that_leaves_nothing(
    tmp_path: Path, code: int, remedy: str
) -> None:
    with (
        pytest.raises(ArtifactError, match="cannot be written") as caught,
        atomic_output(tmp_path / "model.onnx") as output,
    ):
        output.partial.write_bytes(b"half")
        refuse(code)()
    assert os.strerror(code) in caught.value.message
    assert remedy in caught.value.remedy
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_output_that_cannot_be_committed_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, step, refuse(errno.ENOSPC))
    with pytest.raises(ArtifactError, match="No space left"):
        write_text(target, "new", force=True)
    assert target.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_output_in_an_unwritable_folder_is_an_error_with_another_place_as_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", refuse(code))
    with pytest.raises(ArtifactError, match=r"model\.onnx: cannot be written") as caught:
        write_text(tmp_path / "model.onnx", "text")
    assert "--out" in caught.value.remedy
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_really_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_text(folder / "notes.txt", "text")


def test_output_past_a_real_file_size_limit_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """The kernel itself refuses the write, in another process, because the limit cannot be lifted again."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from repvgg_deploy.files.output import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_text(Path(sys.argv[1]), 'x' * 100_000)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.txt")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert "ArtifactError" in result.stderr
    assert "File too large" in result.stderr
    assert names(tmp_path) == []


def test_output_in_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist") as caught:
        write_text(tmp_path / "a" / "notes.txt", "text")
    assert caught.value.remedy == f"mkdir -p {tmp_path / 'a'}"
    with pytest.raises(ArtifactError) as caught:
        write_text(tmp_path / "two words" / "notes.txt", "text")
    assert caught.value.remedy == f"mkdir -p '{tmp_path / 'two words'}'"


def test_output_that_is_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder"):
        write_text(tmp_path, "text", force=True)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_output_has_the_mode_that_the_users_mask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "notes.txt", "text")
        assert os.umask(mask) == mask  # reading the mask must not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "notes.txt").stat().st_mode) == mode


def test_output_with_the_longest_name_that_a_disk_takes_is_written(tmp_path: Path) -> None:
    for name in (
        "n" * 251 + ".txt",
        "計" * 85,
        "x" * 99 + "ü",
    ):  # 255 bytes at most, which no character of a hidden name may be cut in two for
        assert write_text(tmp_path / name, "text").status == "written"
    assert len(names(tmp_path)) == 3


def test_output_that_is_a_link_replaces_the_link_and_not_what_it_shows(tmp_path: Path) -> None:
    shown, link = tmp_path / "shown.txt", tmp_path / "link.txt"
    shown.write_text("kept", encoding="utf-8")
    link.symlink_to(shown)
    write_text(link, "new", force=True)
    assert shown.read_text(encoding="utf-8") == "kept"
    assert link.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_a_file_equals_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path = tmp_path / "data"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


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
    """A new plan and its passport, beside where the old ones stand."""
    with pending_output(folder / "x.plan.json") as passport, pending_output(folder / "x.plan") as main:
        main.partial.write_text("new plan")
        passport.partial.write_text("new passport")
        yield main, passport


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.plan").write_text("old plan")
    (tmp_path / "x.plan.json").write_text("old passport")
    return tmp_path


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


NEW = {"x.plan": "new plan", "x.plan.json": "new passport"}
OLD = {"x.plan": "old plan", "x.plan.json": "old passport"}


def test_pair_replaces_both_and_says_so(folder: Path) -> None:
    with pair(folder) as (main, passport):
        publish_pair(main, passport)
    assert content(folder) == NEW and (main.status, passport.status) == ("written", "written")
    with pair(folder) as (main, passport):
        publish_pair(main, passport)
    assert content(folder) == NEW and (main.status, passport.status) == ("up to date", "up to date")


def test_passport_that_stands_already_comes_back_with_the_main_file_that_it_speaks_of(folder: Path) -> None:
    (folder / "x.plan.json").write_text("new passport")  # of a plan that was changed behind its back
    with pair(folder) as (main, passport):
        publish_pair(main, passport)
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
    with pytest.raises(ArtifactError, match="No space left"), pair(folder) as (main, passport):
        publish_pair(main, passport)
    assert content(folder) == OLD


def test_main_file_that_cannot_be_replaced_keeps_its_passport(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refuse(errno.EPERM))
    with pytest.raises(ArtifactError, match="Operation not permitted"), pair(folder) as (main, passport):
        publish_pair(main, passport)
    assert content(folder) == OLD


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_comes_between_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real, calls = os.replace, 0

    def interrupt(source: Any, target: Any) -> None:
        nonlocal calls
        real(source, target)
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt), pair(folder) as (main, passport):
        publish_pair(main, passport)
    monkeypatch.undo()
    assert content(folder) == NEW


def leave_hidden(folder: Path, name: str, *, age: float) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


def test_hidden_files_of_the_dead_go_when_they_are_an_hour_old_and_others_stay(tmp_path: Path) -> None:
    dead = leave_hidden(tmp_path, ".a.onnx.abcd1234.partial", age=3700)
    aside = leave_hidden(tmp_path, ".a.onnx.abcd1234.partial.old", age=3700)
    young = leave_hidden(tmp_path, ".a.onnx.abcd5678.partial", age=3000)
    other = leave_hidden(tmp_path, ".b.onnx.abcd1234.partial", age=9999)
    users = leave_hidden(tmp_path, ".a.onnx.mine", age=9999)
    alive = leave_hidden(tmp_path, ".a.onnx.abcd9999.partial", age=9999)
    with alive.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_text(tmp_path / "a.onnx", "x")
    assert not dead.exists() and not aside.exists()
    assert all(path.exists() for path in (young, other, users, alive))


def test_hidden_file_of_a_writer_at_work_is_locked(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "a.onnx") as output:
        os.utime(output.partial, (0, 0))  # it has been at work for ages
        write_text(tmp_path / "a.onnx", "another")
        assert output.partial.exists()
        output.partial.write_text("another", encoding="utf-8")
    assert names(tmp_path) == ["a.onnx"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = leave_hidden(tmp_path, ".a.onnx.abcd1234.partial", age=9999)
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    write_text(tmp_path / "a.onnx", "x")
    assert dead.exists()


def test_mask_is_read_without_setting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    mask = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("it was set, and other threads write files"))
        assert output_module.read_umask() == 0o027
    finally:
        monkeypatch.undo()
        os.umask(mask)


def test_dash_is_no_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (lambda: write_text(Path("-"), "x"), lambda: output_module.require_writable(Path("-"))):
        with pytest.raises(ArtifactError, match="standard output") as refused:
            write()
        assert "--out" in refused.value.remedy
    assert names(tmp_path) == []


def test_exchange_swaps_two_folders_at_once_or_changes_nothing(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    done = output_module.exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == (["b"] if done else ["a"])
    assert not output_module.exchange(tmp_path / "a", tmp_path / "absent")
    assert names(tmp_path) == ["a", "b"]


def test_full_disk_is_named_by_the_target_also_from_a_writer_inside(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError) as refused,
        atomic_output(tmp_path / "a.onnx") as output,
        atomic_output(output.partial) as inner,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(inner.partial))
    assert refused.value.message == f"{tmp_path / 'a.onnx'}: cannot be written: No space left on device"
    assert "free some space" in refused.value.remedy
    assert names(tmp_path) == []


def test_full_disk_behind_another_error_is_found(tmp_path: Path) -> None:
    """torch.save closes its archive while the disk's error passes, and raises of that."""
    with pytest.raises(ArtifactError, match="No space left"), atomic_output(tmp_path / "a.pth"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 62848 vs 62800")  # noqa: B904 - as torch does
    with pytest.raises(RuntimeError, match="our own bug"), atomic_output(tmp_path / "a.pth"):
        raise RuntimeError("our own bug")
    assert names(tmp_path) == []
