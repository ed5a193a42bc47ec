"""What Triton would refuse is found. That Triton really refuses it is shown in test_real_server.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import Finding, validate_repository
from repvgg_deploy.specs.values import ShapeProfile
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.serving.broken_configs import BROKEN
from tests.serving.make_repository import edit_config, needs_schema, write_plan

pytestmark = needs_schema


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_triton([make_onnx(tmp_path / "tiny.onnx")], tmp_path / "repo", RepositoryOptions(ensemble="jpeg"))
    return tmp_path / "repo"


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    write_triton([write_plan(tmp_path / "b2.plan")], tmp_path / "plans")
    return tmp_path / "plans"


def findings(repository: Path) -> list[Finding]:
    return list(validate_repository(repository)[1])


def only(repository: Path, severity: str = "error") -> str:
    """The message of the one finding there is."""
    found = findings(repository)
    assert [finding.severity for finding in found] == [severity], found
    assert found[0].remedy
    return f"{found[0].model}: {found[0].message}"


def test_what_is_written_is_found_good(repository: Path, plans: Path) -> None:
    assert validate_repository(repository) == (("tiny", "tiny_decode", "tiny_jpeg"), ())
    assert validate_repository(plans) == (("b2",), ())


@pytest.mark.parametrize("kind", ["logits", "probabilities", "top5", "features", "module"])
@pytest.mark.parametrize("batch", ["batch", 4])
def test_every_kind_of_model_is_found_good_as_written(kind: str, batch: str | int, tmp_path: Path) -> None:
    write_triton([make_onnx(tmp_path / "m.onnx", ModelOptions(kind=kind, batch=batch))], tmp_path / "repo")
    assert findings(tmp_path / "repo") == []


@pytest.mark.parametrize(
    ("edit", "message"), [(case.edit, case.message) for case in BROKEN], ids=[case.name for case in BROKEN]
)
def test_configuration_that_triton_refuses_is_found(edit: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    write_triton([make_onnx(tmp_path / "tiny.onnx")], tmp_path / "repo")
    edit_config(tmp_path / "repo/tiny", edit)
    found = findings(tmp_path / "repo")
    assert any(finding.severity == "error" and message in finding.message for finding in found), found


def test_configuration_that_is_hardly_meant_is_warned_of(tmp_path: Path) -> None:
    write_triton([make_onnx(tmp_path / "fixed.onnx", ModelOptions(batch=2))], tmp_path / "repo")
    edit_config(tmp_path / "repo/fixed", lambda config: config.dynamic_batching.SetInParent())
    assert "nothing that could be put together" in only(tmp_path / "repo", "warning")
    edit_config(
        tmp_path / "repo/fixed", lambda config: [config.ClearField(name) for name in ("dynamic_batching", "output")]
    )
    assert "has no output" in only(tmp_path / "repo", "warning")


@pytest.mark.parametrize(("platform", "warned"), [("", True), ("pytorch_libtorch", False)])
def test_backend_that_is_not_written_here_is_not_judged(platform: str, warned: bool, repository: Path) -> None:
    edit_config(repository / "tiny", lambda config: setattr(config, "platform", platform))
    assert [finding.severity for finding in findings(repository)] == ["warning"] * warned


def test_platform_of_a_python_model_may_have_any_name(repository: Path) -> None:
    edit_config(repository / "tiny_decode", lambda config: config.ClearField("backend"))
    edit_config(repository / "tiny_decode", lambda config: setattr(config, "platform", "own"))
    assert findings(repository) == []


def test_text_that_the_schema_does_not_know_is_found_with_its_line(repository: Path) -> None:
    path = repository / "tiny/config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size", "max_batchsize"))
    assert "max_batchsize" in findings(repository)[0].message


def test_name_that_is_not_the_folders_is_found(repository: Path) -> None:
    (repository / "tiny").rename(repository / "other")
    messages = " | ".join(finding.message for finding in findings(repository))
    assert "names the model 'tiny', and its folder is 'other'" in messages
    assert "needs the model 'tiny', which is not in the repository" in messages


def test_files_that_are_not_there_are_found(repository: Path) -> None:
    (repository / "tiny_decode/1/model.py").unlink()
    assert only(repository) == "tiny_decode: version 1: model.py is not there"
    (repository / "tiny_decode/1/model.py").write_text("")
    assert "is empty" in only(repository)


def test_labels_are_checked(repository: Path) -> None:
    labels = repository / "tiny/labels.txt"
    labels.write_text("one\ntwo\n")
    assert "names 2 classes, and 'logits' has 7" in only(repository, "warning")
    labels.unlink()
    assert "labels.txt" in only(repository)


def test_version_folders_are_checked(repository: Path) -> None:
    (repository / "tiny/1").rename(repository / "tiny/01")
    messages = " | ".join(finding.message for finding in findings(repository))
    assert "has no version folder" in messages
    assert "begins with 0" in messages


def test_policy_of_a_version_that_is_not_there_is_found(repository: Path) -> None:
    edit_config(repository / "tiny", lambda config: config.version_policy.specific.versions.append(3))
    assert "wants version 3" in only(repository)


def test_only_versions_that_would_be_served_are_judged(repository: Path) -> None:
    model = (repository / "tiny/1/model.onnx").read_bytes()
    (repository / "tiny/1/model.onnx").write_bytes(b"broken")
    for number in ("2", "3"):
        (repository / "tiny" / number).mkdir()
        (repository / "tiny" / number / "model.onnx").write_bytes(model)
    assert findings(repository) == []
    edit_config(repository / "tiny", lambda config: config.version_policy.all.SetInParent())
    assert "version 1: " in only(repository)


def test_onnx_that_was_changed_or_cut_off_is_found(repository: Path) -> None:
    path = repository / "tiny/1/model.onnx"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "version 1: model.onnx" in only(repository)


def test_onnx_of_another_interface_is_found(repository: Path, tmp_path: Path) -> None:
    other = make_onnx(tmp_path / "uint8.onnx", ModelOptions(uint8=True, classes=9))
    (repository / "tiny/1/model.onnx").write_bytes(other.read_bytes())
    messages = [finding.message for finding in findings(repository)]
    assert any("input 'images' is TYPE_UINT8, and config.pbtxt says TYPE_FP32" in text for text in messages)
    assert any("input 'images' is [16, 16, 3], and config.pbtxt says [3, 16, 16]" in text for text in messages)
    assert any("output 'logits' is [9], and config.pbtxt says [7]" in text for text in messages)
    fixed = make_onnx(tmp_path / "fixed.onnx", ModelOptions(batch=2))
    (repository / "tiny/1/model.onnx").write_bytes(fixed.read_bytes())
    assert "takes batches of 2 only, and max_batch_size is 32" in only(repository)


def test_batch_above_the_plans_profile_is_found(plans: Path) -> None:
    edit_config(plans / "b2", lambda config: setattr(config, "max_batch_size", 4096))
    assert "and max_batch_size is 4096" in only(plans)


def test_profiles_that_a_plan_lacks_or_that_take_too_little_are_found(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "b2.plan", profile=ShapeProfile(1, 32, 32, batches=(1, 8, 32)))
    write_triton([plan], tmp_path / "repo")

    def use(*profiles: str) -> None:
        def edit(config: Any) -> None:
            config.instance_group[0].profile[:] = profiles

        edit_config(tmp_path / "repo/b2", edit)

    assert findings(tmp_path / "repo") == []
    for wrong in ("3", "first"):
        use("0", wrong)
        assert f"has 3 optimization profiles, counted from 0, and none is '{wrong}'" in only(tmp_path / "repo")
    for few in (("0", "1"), ()):  # without a name Triton takes the first
        use(*few)
        assert "none of its optimization profiles that are in use takes a batch of 32" in only(tmp_path / "repo")
    use("2")
    assert findings(tmp_path / "repo") == []


def test_plan_that_changed_or_is_of_another_library_is_found(plans: Path, tmp_path: Path) -> None:
    (plans / "b2/1/model.plan").write_bytes(b"ftrt cut off")
    assert "truncated or changed" in only(plans)
    rtx = write_plan(tmp_path / "rtx.plan", flavour="tensorrt_rtx", profile=ShapeProfile(2, 8, 32))
    (plans / "b2/1/model.plan").write_bytes(rtx.read_bytes())
    (plans / "b2/1/model.plan.json").write_bytes(rtx.with_name("rtx.plan.json").read_bytes())
    messages = " | ".join(finding.message for finding in findings(plans))
    assert "is of TensorRT-RTX" in messages
    assert "takes no batch below 2" in messages


def test_plan_without_a_passport_is_only_warned_of(plans: Path) -> None:
    (plans / "b2/1/model.plan.json").unlink()
    assert "no passport" in only(plans, "warning")
    (plans / "b2/1/model.plan.json").write_text("{}")
    assert "cannot be read" in only(plans)


def test_onnx_of_others_is_only_warned_of(repository: Path) -> None:
    """A repository may hold other models, and Triton serves them."""
    onnx = pytest.importorskip("onnx")
    path = repository / "tiny/1/model.onnx"
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "is not of repvgg-export, so that it was not checked" in only(repository, "warning")


def test_file_that_cannot_be_served_is_found_without_a_configuration(repository: Path, tmp_path: Path) -> None:
    (repository / "tiny/config.pbtxt").unlink()
    assert "Triton would make one up" in only(repository, "warning")
    (repository / "tiny/1/model.onnx").write_bytes(b"\x08\x0acut off")
    assert [finding.severity for finding in findings(repository)] == ["error", "warning"]
    rtx = write_plan(tmp_path / "rtx.plan", flavour="tensorrt_rtx")
    (tmp_path / "own/rtx/1").mkdir(parents=True)
    for suffix in ("", ".json"):
        (tmp_path / f"own/rtx/1/model.plan{suffix}").write_bytes(rtx.with_name(f"rtx.plan{suffix}").read_bytes())
    messages = [finding.message for finding in findings(tmp_path / "own") if finding.severity == "error"]
    assert messages == ["version 1: model.plan is of TensorRT-RTX, which Triton cannot load"]


def test_ensemble_of_models_that_do_not_fit_is_found(repository: Path) -> None:
    edit_config(repository / "tiny_jpeg", lambda config: setattr(config, "max_batch_size", 64))
    assert {finding.message for finding in findings(repository)} == {
        f"takes batches up to 64, and its step {name!r} only up to 32" for name in ("tiny", "tiny_decode")
    }


def test_what_an_interrupted_copy_left_is_warned_of(repository: Path) -> None:
    (repository / "tiny/.2.abc.partial").mkdir()
    assert ".2.abc.partial was left" in only(repository, "warning")


def test_hidden_folder_is_a_model_for_triton(repository: Path) -> None:
    (repository / ".repo.abcd1234.partial/tiny").mkdir(parents=True)
    (repository / ".repository.lock").touch()  # a file is none
    assert "neither a config.pbtxt nor a version folder" in only(repository)


def test_folders_that_are_no_model_are_found(repository: Path) -> None:
    (repository / "notes").mkdir()
    assert "neither a config.pbtxt nor a version folder" in only(repository)
    (repository / "notes/1").mkdir()
    assert "Triton would make one up" in only(repository, "warning")


def test_what_is_no_repository_is_refused(repository: Path, tmp_path: Path) -> None:
    cases = (
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path / "repo/tiny/1", "holds no model"),
        (tmp_path / "repo/tiny", "is one model"),
    )
    for folder, message in cases:
        with pytest.raises(InputError, match=message):
            validate_repository(folder)


def test_repository_that_may_not_be_read_is_one_message(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match=r"config\.pbtxt: cannot be read: Permission denied") as caught:
        validate_repository(repository)
    assert "the user that tritonserver runs as" in caught.value.remedy
