"""Files appear whole or not at all. Tests may run as root, which may write anywhere: what the system would refuse is simulated."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import ArtifactError
from repvgg_deploy.files import output
from repvgg_deploy.files.output import atomic_output, sha256_file, write_text

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("size", [0, 3, 10, 99])
def test_hash_of_a_stream_takes_no_more_than_asked(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        assert (
            output.hash_stream(hashlib.sha256(), file, size).digest() == hashlib.sha256(b"0123456789"[:size]).digest()
        )
        assert file.tell() == min(size, 10)
