"""What is written, read back through Triton's own schema."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import ArtifactError, InputError, MissingDependencyError, PlanError
from repvgg_deploy.serving import config
from repvgg_deploy.serving.config import load_schema, parse_config, print_config
from repvgg_deploy.serving.options import RepositoryOptions
from repvgg_deploy.serving.triton import write_triton
from repvgg_deploy.serving.validate import validate_repository
from repvgg_deploy.specs.values import ShapeProfile
from tests.runtime.make_model import ModelOptions, make_metadata, make_onnx
from tests.serving.make_repository import edit_config, files_below, needs_schema, read_config, write_plan

pytestmark = needs_schema


def type_name(tensor: Any) -> str:
    return load_schema().DataType.Name(tensor.data_type)


def kind_name(config: Any) -> str:
    group = config.instance_group[0]
    return type(group).Kind.Name(group.kind)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "tiny.onnx")


def write(model: Path | list[Path], tmp_path: Path, **options: Any) -> Any:
    """Writes a repository; gives the configuration of its first model."""
    force = options.pop("force", False)
    models = model if isinstance(model, list) else [model]
    result = write_triton(models, tmp_path / "repo", RepositoryOptions(**options), force=force)
    return read_config(tmp_path / "repo" / result.models[0].name)


def test_onnx_is_served_as_its_metadata_says(onnx: Path, tmp_path: Path) -> None:
    config = write(onnx, tmp_path)
    assert (config.name, config.platform, config.max_batch_size, config.default_model_filename) == (
        "tiny",
        "onnxruntime_onnx",
        32,
        "model.onnx",
    )
    assert [(t.name, type_name(t), list(t.dims)) for t in config.input] == [("images", "TYPE_FP32", [3, 16, 16])]
    assert [(t.name, type_name(t), list(t.dims), t.label_filename) for t in config.output] == [
        ("logits", "TYPE_FP32", [7], "labels.txt")
    ]
    assert kind_name(config) == "KIND_AUTO"
    assert config.version_policy.latest.num_versions == 2
    assert (tmp_path / "repo/tiny/1/model.onnx").read_bytes() == onnx.read_bytes()
    assert (tmp_path / "repo/tiny/labels.txt").read_text().splitlines() == [f"class {index}" for index in range(7)]


def test_onnx_says_where_it_came_from(onnx: Path, tmp_path: Path) -> None:
    import hashlib

    found = {name: value.string_value for name, value in write(onnx, tmp_path).parameters.items()}
    assert found == {
        "repvgg_deploy.source": "tiny.onnx",
        "repvgg_deploy.source_sha256": hashlib.sha256(onnx.read_bytes()).hexdigest(),
        "repvgg_deploy.checkpoint_sha256": "0" * 64,
        "repvgg_deploy.precision": "fp32",
    }


def test_batching_has_a_queue_that_refuses(onnx: Path, tmp_path: Path) -> None:
    options = {
        "max_queue_delay_us": 500,
        "preferred_batch": (8, 4, 8),
        "max_batch": 16,
        "max_queue": 9,
        "queue_timeout_us": 70,
        "instances": 3,
    }
    config = write(onnx, tmp_path, **options)
    batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([4, 8], 500)
    assert (policy.max_queue_size, policy.default_timeout_microseconds, policy.timeout_action) == (
        9,
        70,
        type(policy).REJECT,
    )
    assert (config.max_batch_size, config.instance_group[0].count) == (16, 3)


def test_queue_is_eight_of_the_largest_batches_by_itself(onnx: Path, tmp_path: Path) -> None:
    assert write(onnx, tmp_path, max_batch=4).dynamic_batching.default_queue_policy.max_queue_size == 32


def test_warm_up_runs_one_image_and_the_largest_batch(onnx: Path, tmp_path: Path) -> None:
    config = write(onnx, tmp_path)
    assert [
        (w.batch_size, list(w.inputs["images"].dims), type_name(w.inputs["images"])) for w in config.model_warmup
    ] == [(1, [3, 16, 16], "TYPE_FP32"), (32, [3, 16, 16], "TYPE_FP32")]


def test_uint8_model_of_any_size_keeps_its_type_and_warms_up_at_its_own_size(tmp_path: Path) -> None:
    config = write(make_onnx(tmp_path / "any.onnx", ModelOptions(uint8=True, size=("height", "width"))), tmp_path)
    assert (type_name(config.input[0]), list(config.input[0].dims)) == ("TYPE_UINT8", [-1, -1, 3])
    assert list(config.model_warmup[0].inputs["images"].dims) == [16, 16, 3]


def make_sized_plan(path: Path, content: bytes = b"ftrt plan", **more: Any) -> Path:
    """A plan of a model of any image size, for images from 8×16 to 64×48."""
    spec = make_metadata(ModelOptions(size=("height", "width"))).spec
    profile = ShapeProfile(1, 4, 8, (8, 16), (32, 24), (64, 48))
    return write_plan(path, content, **{"spec": spec, "profile": profile, **more})


def test_plan_of_several_image_sizes_warms_up_at_the_one_that_it_is_tuned_for(tmp_path: Path) -> None:
    config = write(make_sized_plan(tmp_path / "any.plan"), tmp_path)
    assert list(config.input[0].dims) == [3, -1, -1]
    assert [list(w.inputs["images"].dims) for w in config.model_warmup] == [[3, 32, 24]] * 2
    assert validate_repository(tmp_path / "repo")[1] == ()
    edit_config(tmp_path / "repo/any", lambda config: config.model_warmup[0].inputs["images"].dims.__setitem__(1, 65))
    (finding,) = validate_repository(tmp_path / "repo")[1]
    assert "takes images from (3, 8, 16) to (3, 64, 48), and the warm-up 'batch 1' sends [3, 65, 24]" in finding.message


def test_plans_of_different_image_sizes_are_no_one_model(tmp_path: Path) -> None:
    first = make_sized_plan(tmp_path / "a.plan", compute_capabilities=("8.6",))
    profile = ShapeProfile(1, 4, 8, (8, 16), (32, 24), (64, 64))
    second = make_sized_plan(tmp_path / "b.plan", b"ftrt 2", compute_capabilities=("8.9",), profile=profile)
    with pytest.raises(InputError, match=r"images from \(8, 16\) to \(64, 64\), and .* to \(64, 48\)"):
        write([first, second], tmp_path)


def test_fixed_batch_is_served_without_batching(tmp_path: Path) -> None:
    fixed = make_onnx(tmp_path / "fixed.onnx", ModelOptions(batch=4))
    config = write(fixed, tmp_path)
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (
        0,
        [4, 3, 16, 16],
        [4, 7],
    )
    assert not config.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["images"].dims)) for w in config.model_warmup] == [(1, [4, 3, 16, 16])]
    for wrong in ({"max_batch": 4}, {"preferred_batch": (4,)}):
        with pytest.raises(InputError, match="fixed"):
            write(fixed, tmp_path, **wrong)


def test_output_without_a_row_per_image_is_served_without_batching(tmp_path: Path) -> None:
    config = write(make_onnx(tmp_path / "module.onnx", ModelOptions(kind="module")), tmp_path)
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [-1, 3, 16, 16])
    assert [list(output.dims) for output in config.output] == [[-1, 7], [1, 8]]


@pytest.mark.parametrize(
    ("kind", "labelled"), [("logits", True), ("probabilities", True), ("top5", False), ("features", False)]
)
def test_labels_are_given_where_an_output_has_a_score_a_class(kind: str, labelled: bool, tmp_path: Path) -> None:
    config = write(make_onnx(tmp_path / "m.onnx", ModelOptions(kind=kind)), tmp_path)
    assert [bool(output.label_filename) for output in config.output] == [labelled] * len(config.output)
    assert (tmp_path / "repo/m/labels.txt").exists() == labelled


# -- plans


def test_plan_is_served_as_its_passport_says(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "b2.plan", tensorrt_version="10.7.0.23", compute_capabilities=("8.9",))
    result = write_triton([plan], tmp_path / "repo")
    config = read_config(tmp_path / "repo/b2")
    profile = result.servable
    assert (config.platform, config.max_batch_size, config.default_model_filename) == (
        "tensorrt_plan",
        profile.max_batch,
        "model.plan",
    )
    assert kind_name(config) == "KIND_GPU"
    assert list(config.instance_group[0].profile) == ["0"]
    assert list(config.dynamic_batching.preferred_batch_size) == [profile.opt_batch, profile.max_batch]
    assert (tmp_path / "repo/b2/1/model.plan").read_bytes() == b"ftrt plan"
    assert (tmp_path / "repo/b2/1/model.plan.json").read_bytes() == plan.with_name("b2.plan.json").read_bytes()
    assert result.container == "nvcr.io/nvidia/tritonserver:24.12-py3"
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters["repvgg_deploy.tensorrt_version"] == "10.7.0.23"
    assert parameters["repvgg_deploy.container"] == result.container
    assert parameters["repvgg_deploy.precision"] == "fp16"
    assert parameters["repvgg_deploy.source_sha256"] == "e" * 64


def test_plan_takes_no_larger_batch_than_its_profile(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "b2.plan")
    largest = write(plan, tmp_path).max_batch_size
    with pytest.raises(InputError, match=f"batches up to {largest}") as caught:
        write(plan, tmp_path, max_batch=largest + 1)
    assert f"--max-batch {largest + 1}" in caught.value.remedy
    with pytest.raises(InputError, match="above the largest"):
        write(plan, tmp_path, preferred_batch=(largest + 1,))


def test_triton_is_told_the_profiles_that_its_batches_need(tmp_path: Path) -> None:
    profile = ShapeProfile(1, 128, 128, batches=(1, 8, 32, 128))
    plan = write_plan(tmp_path / "b2.plan", profile=profile)
    config = write(plan, tmp_path)
    assert list(config.instance_group[0].profile) == ["0", "1", "2", "3"]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32, 128]
    fewer = write(plan, tmp_path, name="fewer", max_batch=16)
    assert list(fewer.instance_group[0].profile) == ["0", "1", "2"]  # the one for 32 takes 9 to 16
    assert list(fewer.dynamic_batching.preferred_batch_size) == [8, 16]
    assert validate_repository(tmp_path / "repo")[1] == ()


def test_plans_of_other_profiles_are_not_one_model(tmp_path: Path) -> None:
    first = write_plan(tmp_path / "a.plan", compute_capabilities=("8.6",), profile=ShapeProfile(1, 8, 8))
    several = ShapeProfile(1, 8, 8, batches=(1, 8))
    second = write_plan(tmp_path / "b.plan", b"ftrt 2", compute_capabilities=("8.9",), profile=several)
    with pytest.raises(InputError, match=r"profiles for batches of 1, 8, and .* for all batches in one") as caught:
        write([first, second], tmp_path)
    assert "--profiles" in caught.value.remedy


def test_cuda_graphs_are_for_plans_and_only_when_asked_for(tmp_path: Path, onnx: Path) -> None:
    plan = write_plan(tmp_path / "b2.plan")
    assert not write(plan, tmp_path).HasField("optimization")
    assert write(plan, tmp_path, cuda_graphs=True, name="graphs").optimization.cuda.graphs
    assert not write(onnx, tmp_path, cuda_graphs=True).HasField("optimization")


def test_plans_of_several_gpu_types_are_one_model(tmp_path: Path) -> None:
    plans = [
        write_plan(tmp_path / "a.plan", b"ftrt for 8.6", compute_capabilities=("8.6",), profile=ShapeProfile(1, 8, 32)),
        write_plan(tmp_path / "b.plan", b"ftrt for 8.9", compute_capabilities=("8.9",), profile=ShapeProfile(1, 4, 16)),
    ]
    config = write(plans, tmp_path, name="b2")
    assert dict(config.cc_model_filenames) == {"8.6": "model_sm86.plan", "8.9": "model_sm89.plan"}
    assert config.default_model_filename == ""
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (16, [4, 16])
    assert (tmp_path / "repo/b2/1/model_sm86.plan").read_bytes() == b"ftrt for 8.6"
    assert (tmp_path / "repo/b2/1/model_sm89.plan").read_bytes() == b"ftrt for 8.9"
    assert (tmp_path / "repo/b2/1/model_sm89.plan.json").exists()
    assert validate_repository(tmp_path / "repo")[1] == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx_sha256": "f" * 64}, "onnx_sha256"),
        ({"tensorrt_version": "10.8.0.43"}, "tensorrt_version"),
        ({}, "compute capability 8.6, as another"),
        ({"compute_capabilities": ()}, "names no compute capability"),
    ],
)
def test_plans_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    first = write_plan(tmp_path / "a.plan", compute_capabilities=("8.6",))
    second = write_plan(tmp_path / "b.plan", **{"compute_capabilities": ("8.6",), **changes})
    with pytest.raises(InputError, match=message):
        write([first, second], tmp_path)
    assert not (tmp_path / "repo").exists()


def test_plan_that_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="TensorRT-RTX"):
        write(write_plan(tmp_path / "rtx.plan", flavour="tensorrt_rtx"), tmp_path)
    with pytest.raises(InputError, match="batches from 8 on"):
        write(write_plan(tmp_path / "eight.plan", profile=ShapeProfile(8, 8, 8)), tmp_path)
    plan = write_plan(tmp_path / "changed.plan")
    plan.write_bytes(b"ftrt other")
    with pytest.raises(PlanError, match="is not the plan of its passport"):
        write(plan, tmp_path)
    plan.with_name("changed.plan.json").unlink()
    with pytest.raises(PlanError, match="no passport"):
        write(plan, tmp_path)


def test_models_that_are_not_all_plans_are_refused(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several models"):
        write([onnx, write_plan(tmp_path / "b.plan")], tmp_path)
    with pytest.raises(InputError, match="found none"):
        write([], tmp_path)


# -- what is there already


def test_writing_again_changes_nothing(onnx: Path, tmp_path: Path) -> None:
    write(onnx, tmp_path, ensemble="jpeg")
    before = files_below(tmp_path / "repo")
    result = write_triton([onnx], tmp_path / "repo", RepositoryOptions(ensemble="jpeg"))
    assert [model.version.status for model in result.models] == ["up to date"] * 3
    assert files_below(tmp_path / "repo") == before


def test_version_that_holds_other_files_needs_force(onnx: Path, tmp_path: Path) -> None:
    write(onnx, tmp_path, version=1)
    before = files_below(tmp_path / "repo")
    make_onnx(onnx, seed=1)
    with pytest.raises(ArtifactError, match="holds other files"):
        write(onnx, tmp_path, version=1)
    assert files_below(tmp_path / "repo") == before
    write(onnx, tmp_path, version=1, force=True)
    assert (tmp_path / "repo/tiny/1/model.onnx").read_bytes() == onnx.read_bytes()


def test_another_file_becomes_the_next_version_and_says_so(onnx: Path, tmp_path: Path) -> None:
    first = write(onnx, tmp_path).parameters["repvgg_deploy.source_sha256"].string_value
    make_onnx(onnx, seed=1)
    second = write(onnx, tmp_path).parameters["repvgg_deploy.source_sha256"].string_value
    assert first != second
    assert sorted(entry.name for entry in (tmp_path / "repo/tiny").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
        "labels.txt",
    ]


def test_other_options_are_not_slipped_under_a_served_model(onnx: Path, tmp_path: Path) -> None:
    write(onnx, tmp_path)
    before = files_below(tmp_path / "repo")
    make_onnx(onnx, seed=1)
    with pytest.raises(ArtifactError, match="configures the model otherwise"):
        write(onnx, tmp_path, instances=2)
    assert files_below(tmp_path / "repo") == before
    assert write(onnx, tmp_path, instances=2, force=True).instance_group[0].count == 2


def test_a_users_own_parameters_are_not_lost(onnx: Path, tmp_path: Path) -> None:
    write(onnx, tmp_path)
    path = tmp_path / "repo/tiny/config.pbtxt"
    path.write_text(path.read_text() + 'parameters { key: "intra_op_thread_count" value { string_value: "2" } }\n')
    with pytest.raises(ArtifactError, match="configures the model otherwise"):
        write(onnx, tmp_path)
    assert "intra_op_thread_count" in path.read_text()


def test_other_labels_need_force(tmp_path: Path) -> None:
    write(make_onnx(tmp_path / "a.onnx"), tmp_path, name="m")
    (tmp_path / "repo/m/labels.txt").write_text("one\n")
    with pytest.raises(ArtifactError, match="names other classes"):
        write(make_onnx(tmp_path / "b.onnx", seed=1), tmp_path, name="m")
    assert not (tmp_path / "repo/m/2").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ü", "x" * 129])
def test_name_that_is_no_folder_or_url_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="model name"):
        RepositoryOptions(name=name)


@pytest.mark.parametrize(
    "wrong",
    [{"version": 0}, {"instances": 0}, {"max_batch": -1}, {"max_queue_delay_us": -1}, {"preferred_batch": (8, 0)}],
)
def test_counts_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        RepositoryOptions(**wrong)


# -- the schema


@pytest.mark.parametrize("text", ['nmae: "x"', "max_batch_size: many", "input { data_type: TYPE_FLOAT }", "input {"])
def test_parse_config_refuses_what_the_schema_does_not_know(text: str) -> None:
    with pytest.raises(InputError, match="line 1"):
        parse_config(text, Path("config.pbtxt"))


def test_print_config_and_parse_config_are_inverse() -> None:
    config = load_schema().ModelConfig(name="größe", max_batch_size=8)
    config.cc_model_filenames["8.9"] = "b"
    assert parse_config(print_config(config), Path("x")) == config
    assert "größe" in print_config(config)


def test_load_schema_without_tritonclient_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(config.sys.modules, config._SCHEMA, raising=False)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="tritonclient") as caught:
        load_schema()
    assert "'.[serving]'" in caught.value.remedy


def test_load_schema_does_not_import_grpc() -> None:
    import subprocess
    import sys

    code = "import sys; from repvgg_deploy.serving.config import load_schema; load_schema(); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, timeout=300, capture_output=True, text=True
    )
    assert not {"grpc", "numpy"} & set(result.stdout.split())


def test_repository_below_a_path_with_a_space_is_warned_of_where_the_python_backend_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tritonserver 2.51 ends its python backend there with an error about a number."""
    onnx = make_onnx(tmp_path / "tiny.onnx")
    write_triton([onnx], tmp_path / "two words", RepositoryOptions())
    assert "space" not in caplog.text
    write_triton([onnx], tmp_path / "two words", RepositoryOptions(ensemble="jpeg"))
    assert "has a space in its path" in caplog.text


def test_new_model_that_does_not_fit_on_the_disk_leaves_nothing_that_a_server_would_stumble_on(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        write(onnx, tmp_path, name="new")
    assert list((tmp_path / "repo").iterdir()) == []
