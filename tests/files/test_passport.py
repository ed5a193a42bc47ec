"""Reading the passport of a plan."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg_deploy.errors import ArtifactError, PlanError
from repvgg_deploy.files import passport as passport_module
from repvgg_deploy.files.output import locked
from repvgg_deploy.files.passport import passport_path, read_passport, require_unchanged
from repvgg_deploy.specs import codec
from tests.files.make_passport import make_passport


def test_passport_stands_beside_the_plan_and_keeps_its_whole_name() -> None:
    assert passport_path(Path("a/b2.plan")) == Path("a/b2.plan.json")
    assert passport_path(Path("b2.v1.engine")) == Path("b2.v1.engine.json")


def test_passport_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_passport(tmp_path / "b2.plan") is None


def test_passport_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    passport = make_passport(precision_shares={"fp16": 1.0}, platform="linux-x86_64")
    (tmp_path / "b2.plan.json").write_text(codec.dumps(passport), encoding="utf-8")
    assert read_passport(tmp_path / "b2.plan") == passport


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{}", "PlanPassport.schema"),
        (codec.dumps(make_passport()).replace('"schema":1', '"schema":2').encode(), "expected one of 1"),
        (codec.dumps(make_passport()).replace('"flavour":"tensorrt"', '"flavour":"onnx"').encode(), "flavour"),
        (codec.dumps(make_passport())[:-20].encode(), "not JSON"),
    ],
)
def test_passport_that_is_damaged_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "b2.plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        read_passport(tmp_path / "b2.plan")
    assert "b2.plan.json" in caught.value.message and "repvgg-trt build" in caught.value.remedy


def test_passport_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b2.plan.json").mkdir()
    with pytest.raises(PlanError, match="cannot be read"):
        read_passport(tmp_path / "b2.plan")


def test_plan_that_changed_is_refused_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    passport = make_passport(plan_sha256=hashlib.sha256(b"plan").hexdigest())
    require_unchanged(tmp_path / "b2.plan", hashlib.sha256(b"plan").hexdigest(), passport)
    with pytest.raises(PlanError, match=r"b2\.plan: is not the plan of its passport b2\.plan\.json: expected sha256"):
        require_unchanged(tmp_path / "b2.plan", hashlib.sha256(b"plam").hexdigest(), passport)


def leave(folder: Path, *, suffix: str = ".partial", content: bytes = b"plan") -> Path:
    """A plan alone, and its passport in the hidden file of a build that was killed."""
    (folder / "b2.plan").write_bytes(b"plan")
    passport = make_passport(plan_sha256=hashlib.sha256(content).hexdigest())
    hidden = folder / f".b2.plan.json.ab_12345{suffix}"
    hidden.write_text(codec.dumps(passport), encoding="utf-8")
    return hidden


@pytest.mark.parametrize("suffix", [".partial", ".partial.old"])
def test_passport_of_a_killed_build_is_put_in_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    hidden = leave(tmp_path, suffix=suffix)
    (tmp_path / ".b2.plan.json.aaaaaaaa.partial").write_bytes(b"{")  # of another build, killed earlier
    found = read_passport(tmp_path / "b2.plan")
    assert found is not None and found.plan_sha256 == hashlib.sha256(b"plan").hexdigest()
    assert "lost when its build was killed" in caplog.text
    assert not hidden.exists() and passport_path(tmp_path / "b2.plan").exists()
    caplog.clear()
    assert read_passport(tmp_path / "b2.plan") == found and caplog.text == ""


def test_passport_of_a_killed_build_of_another_plan_is_not_taken(tmp_path: Path) -> None:
    hidden = leave(tmp_path, content=b"another plan")
    assert read_passport(tmp_path / "b2.plan") is None
    assert hidden.exists() and not passport_path(tmp_path / "b2.plan").exists()


def test_passport_is_not_finished_for_who_holds_the_lock(tmp_path: Path) -> None:
    leave(tmp_path)
    with locked(tmp_path / "b2.plan"):
        assert read_passport(tmp_path / "b2.plan", finish=False) is None


def test_passport_in_a_folder_that_may_not_be_written_to_is_used_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = leave(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(passport_module, "locked", _refused)
    monkeypatch.setattr(passport_module.os, "replace", refuse)
    assert read_passport(tmp_path / "b2.plan") is not None
    assert hidden.exists()


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[bool]:
    raise ArtifactError(f"{path}: cannot be written: Permission denied", remedy="make it writable")
    yield False
