from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from repvgg_deploy.errors import ArtifactError
from repvgg_deploy.serving import repository
from repvgg_deploy.serving.options import ServedFile
from repvgg_deploy.serving.repository import find_version, list_versions, write_version

FILES = (ServedFile("model.onnx", b"weights"), ServedFile("model.json", b"{}"))
OTHER = (ServedFile("model.onnx", b"other weights"),)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write_version_writes_every_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"from a file")
    model = tmp_path / "m"
    model.mkdir()
    write_version(model / "3", (*FILES, ServedFile("plan", source)))
    assert content(model / "3") == {"model.onnx": b"weights", "model.json": b"{}", "plan": b"from a file"}
    assert [entry.name for entry in model.iterdir()] == ["3"]


def test_write_version_is_readable_by_the_user_of_the_server(tmp_path: Path) -> None:
    write_version(tmp_path / "1", FILES)
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "1" / "model.onnx").stat().st_mode & 0o777 == 0o644


def test_write_version_replaces_another(tmp_path: Path) -> None:
    write_version(tmp_path / "1", FILES)
    write_version(tmp_path / "1", OTHER)
    assert content(tmp_path / "1") == {"model.onnx": b"other weights"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_write_version_that_fails_leaves_no_version(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"x")
    (tmp_path / "m").mkdir()
    copy = shutil.copyfile

    def fail(start: Path, to: Path) -> None:
        copy(start, to)
        raise error

    monkeypatch.setattr(repository.shutil, "copyfile", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        write_version(tmp_path / "m" / "1", (*FILES, ServedFile("plan", source)))
    assert list((tmp_path / "m").iterdir()) == []


def test_write_version_that_cannot_be_put_in_place_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path / "1", FILES)
    monkeypatch.setattr(repository, "exchange", lambda *_: False)  # as where the system has none
    rename, calls = os.rename, []

    def fail_second(start: Path, to: Path) -> None:
        calls.append(start)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(start, to)

    monkeypatch.setattr(repository.os, "rename", fail_second)
    with pytest.raises(ArtifactError, match="Input/output error"):
        write_version(tmp_path / "1", OTHER)
    assert content(tmp_path / "1") == {"model.onnx": b"weights", "model.json": b"{}"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


def test_versions_are_numbers_as_triton_reads_them(tmp_path: Path) -> None:
    for name in ("1", "12", "03", "0", "x", ".4.partial", "5.tmp", "²"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    assert list_versions(tmp_path) == (1, 12)
    assert list_versions(tmp_path / "nowhere") == ()


def test_find_version_counts_on_unless_the_highest_holds_the_same(tmp_path: Path) -> None:
    assert find_version(tmp_path, FILES, None) == (1, False)
    write_version(tmp_path / "2", FILES)
    assert find_version(tmp_path, FILES, None) == (2, True)
    assert find_version(tmp_path, OTHER, None) == (3, False)
    assert find_version(tmp_path, OTHER, 1) == (1, False)
    assert find_version(tmp_path, OTHER, 2, force=True) == (2, False)
    with pytest.raises(ArtifactError, match="holds other files"):
        find_version(tmp_path, OTHER, 2)
    assert find_version(tmp_path, FILES, 2) == (2, True)
