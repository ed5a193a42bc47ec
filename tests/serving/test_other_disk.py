"""Models, cache and outputs on different disks: nothing is renamed from one to another, and nothing is left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg_deploy.build.cache import PlanCache
from repvgg_deploy.build.deliver import deliver
from repvgg_deploy.errors import ArtifactError
from repvgg_deploy.files.output import write_text
from repvgg_deploy.files.passport import read_passport
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.precision.quantization import quantize
from repvgg_deploy.serving import repository as module
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from tests.files.make_passport import make_passport
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.serving.make_repository import files_below, needs_schema


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk than `tmp_path`."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second disk here: /dev/shm is none, or may not be written to")
    with tempfile.TemporaryDirectory(dir=memory, prefix="repvgg-test-") as folder:
        yield Path(folder)


def hidden(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob(".*")]


def test_typed_onnx_and_plan_are_written_to_another_disk_than_source_and_cache(
    tmp_path: Path, other_disk: Path
) -> None:
    source = make_onnx(tmp_path / "m.onnx", ModelOptions())
    quantize(source, other_disk / "m-fp16.onnx", QuantizeOptions(precision="fp16"))
    assert (other_disk / "m-fp16.onnx").stat().st_dev != source.stat().st_dev
    data, cache = b"ftrt plan", PlanCache(tmp_path / "cache")
    passport = make_passport(plan_sha256=hashlib.sha256(data).hexdigest())
    cache.store("a" * 64, data, passport)
    found = cache.find("a" * 64)
    assert found is not None
    deliver(other_disk / "m.plan", *found, force=False)
    assert (other_disk / "m.plan").read_bytes() == data
    assert read_passport(other_disk / "m.plan") == passport
    assert hidden(tmp_path, other_disk) == []


@needs_schema
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by_a_link"])
def test_repository_on_another_disk_than_its_models_is_written_and_replaced(
    tmp_path: Path, other_disk: Path, linked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    repository = other_disk / "repo"
    if linked:
        repository.mkdir()
        repository = tmp_path / "models"
        repository.symlink_to(other_disk / "repo")
    for seed in (1, 2):
        source = make_onnx(tmp_path / "m.onnx", ModelOptions(), seed=seed)
        write_triton([source], repository, RepositoryOptions(name="b2", version=1), force=True)
        assert files_below(other_disk / "repo")["b2/1/model.onnx"] == source.read_bytes()
        assert validate_repository(repository)[1] == ()
    assert hidden(tmp_path, other_disk) == []
    assert "is a mount of its own" not in caplog.text  # a server may start at any time


@needs_schema
def test_model_whose_folder_is_a_mount_of_its_own_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = make_onnx(tmp_path / "m.onnx", ModelOptions()), tmp_path / "repo/b2"
    folder.mkdir(parents=True)
    rename = os.rename

    def refuse(one: Path, other: Path) -> None:
        if folder in (one, other):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(one, other)

    monkeypatch.setattr(module, "exchange", lambda *_: False)
    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(ArtifactError, match="b2: cannot be written") as refused:
        write_triton([source], tmp_path / "repo", RepositoryOptions(name="b2"))
    assert "mount the folder around it" in refused.value.remedy
    assert list(folder.iterdir()) == hidden(tmp_path) == []


def test_output_that_links_to_another_disk_becomes_a_file_here(tmp_path: Path, other_disk: Path) -> None:
    (tmp_path / "a.txt").symlink_to(other_disk / "a.txt")
    write_text(tmp_path / "a.txt", "new", force=True)
    assert not (tmp_path / "a.txt").is_symlink() and list(other_disk.iterdir()) == []
