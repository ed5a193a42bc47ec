"""A Triton repository under kill -9: each model is whole or not there, and the next writer finishes and cleans up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from repvgg_deploy.serving import repository as module
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from tests.kills import killed_before
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.serving.make_repository import files_below, needs_schema, write_plan

pytestmark = [needs_schema, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")]
# `make long` kills before every event, `make test` before every third.
STEP = 1 if "REPVGG_EVERY_KILL" in os.environ else 3


def write_first(folder: Path, *, jpeg: bool) -> None:
    """What stands before: a model with a file of the user's own, and its ensemble."""
    old = make_onnx(folder / "old.onnx", ModelOptions(), seed=1)
    options = RepositoryOptions(name="b2", ensemble="jpeg" if jpeg else None, written_by="tester")
    write_triton([old], folder / "repo", options)
    (folder / "repo/b2/notes.txt").write_text("mine", encoding="utf-8")


def one(folder: Path) -> None:
    new = make_onnx(folder / "new.onnx", ModelOptions(), seed=2)
    write_triton([new], folder / "repo", RepositoryOptions(name="b2", written_by="tester"))


def one_again(folder: Path) -> None:
    """The same number with other files, other options."""
    new = make_onnx(folder / "new.onnx", ModelOptions(), seed=2)
    options = RepositoryOptions(name="b2", version=1, max_batch=4)
    write_triton([new], folder / "repo", options, force=True)


def plans(folder: Path) -> None:
    names = {"a": "8.6", "b": "8.9"}
    made = [
        write_plan(folder / f"{name}.plan", f"ftrt {name}".encode(), compute_capabilities=(capability,))
        for name, capability in names.items()
    ]
    write_triton(made, folder / "repo", RepositoryOptions(name="b2", version=1), force=True)


def ensemble(folder: Path) -> None:
    """Another input: the old ensemble would not fit the new model."""
    new = make_onnx(folder / "new.onnx", ModelOptions(uint8=True), seed=2)
    write_triton([new], folder / "repo", RepositoryOptions(name="b2", ensemble="jpeg", version=1), force=True)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two_renames"])
@pytest.mark.parametrize("stands", [False, True], ids=["empty", "standing"])
@pytest.mark.parametrize("write", [one, one_again, plans, ensemble])
def test_repository_is_whole_after_a_kill_at_any_event_and_the_next_writer_finishes(
    write: Callable[[Path], None],
    stands: bool,
    exchanges: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    if not exchanges:
        if not stands:
            pytest.skip("nothing stands there to be exchanged")
        monkeypatch.setattr(module, "exchange", lambda *_: False)
    start, expected = tmp_path / "start", tmp_path / "expected"
    start.mkdir()
    if stands:
        write_first(start, jpeg=write in (one, ensemble))  # the others would not suit what stands before them
    shutil.copytree(start, expected)
    write(expected)
    number = 1 - STEP
    while True:
        number += STEP
        folder = tmp_path / f"killed{number}"
        shutil.copytree(start, folder)
        killed = killed_before(number, folder, lambda: write(folder))  # noqa: B023 - it is called at once
        if (folder / "repo").exists() and module.list_models(folder / "repo"):
            findings = validate_repository(folder / "repo")[1]
            assert [one for one in findings if one.severity == "error"] == [], f"after {number - 1} events"
        write(folder)
        assert files_below(folder / "repo") == files_below(expected / "repo"), f"after {number - 1} events"
        assert [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".lock"))] == []
        shutil.rmtree(folder)
        if not killed:
            break
    record_property("counted", f"{number // STEP} kills")
    assert number > 15 or STEP > 1


def test_leftovers_stay_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer may be at work: without locks nobody can tell."""
    leftover = tmp_path / ".repo.abcd1234.partial"
    leftover.mkdir()
    monkeypatch.setattr("repvgg_deploy.files.output._lock", lambda *_: False)
    one(tmp_path)
    assert leftover.exists()
    monkeypatch.undo()
    one(tmp_path)
    assert not leftover.exists()


def test_what_others_write_beside_the_repository_stays(tmp_path: Path) -> None:
    """An export of `repo.onnx`, a build of `repo.plan`, a repository `repo.old`: they may be at work."""
    files = [tmp_path / f".repo{name}.abcd1234.partial" for name in (".onnx", ".plan.json", "")]
    for path in files:
        path.touch()
    other = tmp_path / ".repo.old.abcd1234.partial"
    other.mkdir()
    one(tmp_path)
    assert all(path.exists() for path in (*files, other))


def test_replaced_model_keeps_files_of_others_whatever_their_names(tmp_path: Path) -> None:
    write_first(tmp_path, jpeg=False)
    kept = ["2/labels.txt", "2/1/weights.bin", "docs/config.pbtxt", "docs/.x.partial", "notes.txt"]
    for name in kept:
        path = tmp_path / "repo/b2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    one_again(tmp_path)
    found = files_below(tmp_path / "repo/b2")
    assert {name: found.get(name) for name in kept} == dict.fromkeys(kept, b"mine")


def test_repository_on_a_disk_of_its_own_is_filled_inside_said_so_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is mounted into a container: nothing can be renamed into it from beside it."""
    (tmp_path / "repo").mkdir()
    seen: list[Path] = []
    make = module.tempfile.mkdtemp

    def note(*arguments: object, dir: Path, **named: object) -> str:  # noqa: A002 - its own name
        if dir == tmp_path:
            raise PermissionError(13, "Permission denied")
        seen.append(dir)
        return make(*arguments, dir=dir, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(module.tempfile, "mkdtemp", note)
    one(tmp_path)
    assert seen == [tmp_path / "repo"]
    assert "no server may start on it until this is done" in caplog.text
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == ["b2"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_and_folder_has_the_mode_that_the_users_mask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        one(tmp_path)
        ensemble(tmp_path)
    finally:
        os.umask(before)
    for path in (tmp_path / "repo").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path


def test_full_disk_is_named_by_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / ".repo.x.partial"))

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left") as refused:
        one(tmp_path)
    assert str(tmp_path / "repo" / "b2") in str(refused.value) and ".partial" not in str(refused.value)
