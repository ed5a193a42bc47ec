"""Taking models out of a repository: what goes, and what stays although it is no longer wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.repository import find_stale, remove_models
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.serving.make_repository import edit_config, files_below, needs_schema, read_config

pytestmark = needs_schema
MINE = "tester"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def write(repository: Path, name: str, *, written_by: str | None = MINE, seed: int = 0, ensemble: bool = False) -> None:
    onnx = make_onnx(repository.parent / "net.onnx", ModelOptions(), seed=seed)
    write_triton(
        [onnx], repository, RepositoryOptions(name=name, written_by=written_by, ensemble="jpeg" if ensemble else None)
    )


def names(repository: Path) -> list[str]:
    return sorted(entry.name for entry in repository.iterdir())


def test_what_is_not_wanted_goes_and_the_rest_is_as_it_was(repository: Path) -> None:
    write(repository, "old", ensemble=True)
    write(repository, "new")
    before = files_below(repository / "new")
    stale = find_stale(repository, MINE, {"new"})
    assert stale.removable == ("old_jpeg", "old", "old_decode")  # no ensemble without its parts, at any moment
    assert stale.kept == {}
    remove_models(repository, stale.removable)
    assert names(repository) == ["new"]
    assert files_below(repository / "new") == before
    assert sorted(entry.name for entry in repository.parent.iterdir()) == [
        "models",
        "net.onnx",
    ]  # nothing is left beside it


def test_models_of_others_stay(repository: Path) -> None:
    write(repository, "nobodys", written_by=None)
    write(repository, "others", written_by="another program")
    (repository / "by_hand/1").mkdir(parents=True)
    (repository / "by_hand/config.pbtxt").write_text('name: "by_hand"\nbackend: "python"\n', encoding="utf-8")
    (repository / "broken").mkdir()
    (repository / "broken/config.pbtxt").write_text("no text of a message", encoding="utf-8")
    (repository / "notes.txt").write_text("mine", encoding="utf-8")
    assert find_stale(repository, MINE, ()).removable == ()


@pytest.mark.parametrize("place", ["README.md", "7/model.onnx", "configs/other.pbtxt"])
def test_model_to_which_somebody_added_something_stays(place: str, repository: Path) -> None:
    write(repository, "old")
    added = repository / "old" / place
    added.parent.mkdir(exist_ok=True)
    added.write_bytes(b"somebody's")
    stale = find_stale(repository, MINE, ())
    assert stale.removable == ()
    assert stale.kept == {"old": f"it holds {place.partition('/')[0]}, which somebody else put there"}


def test_every_version_of_ours_is_known_as_ours(repository: Path) -> None:
    for seed in range(3):
        write(repository, "old", seed=seed)
    assert read_config(repository / "old").parameters["repvgg_deploy.written_versions"].string_value == "1,2,3"
    assert find_stale(repository, MINE, ()).removable == ("old",)


def test_version_of_somebody_else_stays_theirs_when_the_next_is_ours(repository: Path) -> None:
    write(repository, "shared", written_by=None, seed=1)
    write(repository, "shared", seed=2)
    assert read_config(repository / "shared").parameters["repvgg_deploy.written_versions"].string_value == "2"
    assert find_stale(repository, MINE, ()).kept == {"shared": "it holds 1, which somebody else put there"}


def test_what_an_ensemble_of_others_needs_stays_and_what_that_needs(repository: Path) -> None:
    write(repository, "old", ensemble=True)
    shutil.copytree(repository / "old_jpeg", repository / "theirs")

    def make_theirs(config: object) -> None:
        config.name = "theirs"  # type: ignore[attr-defined]
        config.parameters.clear()  # type: ignore[attr-defined]

    edit_config(repository / "theirs", make_theirs)
    stale = find_stale(repository, MINE, ())
    assert stale.removable == ("old_jpeg",)
    assert stale.kept == {"old": "the ensemble theirs needs it", "old_decode": "the ensemble theirs needs it"}
    remove_models(repository, stale.removable)
    assert validate_repository(repository)[1] == ()


def test_repository_that_is_not_there_yet_holds_nothing_stale(repository: Path) -> None:
    assert find_stale(repository, MINE, ()).removable == ()


def test_writer_is_no_difference_that_needs_force(repository: Path) -> None:
    write(repository, "net", written_by=None)
    write(repository, "net")
    assert read_config(repository / "net").parameters["repvgg_deploy.written_by"].string_value == MINE
    before = files_below(repository)
    write(repository, "net")
    assert files_below(repository) == before
