"""`repvgg-trt triton`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repvgg_deploy.cli.trt import main
from tests.runtime.make_model import make_onnx
from tests.serving.make_repository import needs_schema, read_config, write_plan

pytestmark = needs_schema


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["triton", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_triton_writes_what_its_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_plan(tmp_path / "b2.plan", tensorrt_version="10.7.0.23")
    options = [
        "--name",
        "classifier",
        "--version",
        7,
        "--instances",
        2,
        "--max-queue-delay-us",
        0,
        "--preferred-batch",
        2,
        4,
        "--max-batch",
        8,
    ]
    queue = ["--max-queue", 5, "--queue-timeout-us", 0, "--cuda-graphs"]
    status, out, err = run(capsys, plan, "--out", tmp_path / "repo", *options, *queue)
    assert (status, "tritonserver:24.12-py3" in out) == (0, True)
    assert f"next: repvgg-trt triton --validate {tmp_path / 'repo'}" in err
    config = read_config(tmp_path / "repo/classifier")
    policy = config.dynamic_batching.default_queue_policy
    assert (
        config.max_batch_size,
        config.instance_group[0].count,
        list(config.dynamic_batching.preferred_batch_size),
    ) == (8, 2, [2, 4])
    assert (
        config.dynamic_batching.max_queue_delay_microseconds,
        policy.max_queue_size,
        policy.default_timeout_microseconds,
    ) == (0, 5, 0)
    assert config.optimization.cuda.graphs
    assert (tmp_path / "repo/classifier/7/model.plan").exists()


def test_triton_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, make_onnx(tmp_path / "tiny.onnx"), "--out", tmp_path / "repo", "--ensemble", "jpeg", "--json"
    )
    data = json.loads(out)
    assert status == 0
    assert [(model["name"], model["version"], model["status"]) for model in data["models"]] == [
        ("tiny", 1, "written"),
        ("tiny_decode", 1, "written"),
        ("tiny_jpeg", 1, "written"),
    ]
    assert data["provenance"]["precision"] == "fp32"


def test_validate_says_what_is_wrong_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, make_onnx(tmp_path / "tiny.onnx"), "--out", tmp_path / "repo")
    assert run(capsys, "--validate", tmp_path / "repo")[:2] == (0, "tiny  nothing found that Triton would refuse\n")
    (tmp_path / "repo/tiny/1/model.onnx").write_bytes(b"")
    status, out, err = run(capsys, "--validate", tmp_path / "repo")
    assert (status, out) == (1, "tiny  Triton would refuse it\n")
    assert "model.onnx is empty" in err
    assert "remedy: " in err
    status, out, _ = run(capsys, "--validate", tmp_path / "repo", "--json")
    assert (status, json.loads(out)["valid"], len(json.loads(out)["findings"])) == (1, False, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is needed"),
        (["a.onnx"], "--out FOLDER is needed"),
        (["a.onnx", "--validate", "repo"], "--validate writes nothing"),
        (["a.onnx", "--out", "repo", "--version", "0"], "at least 1"),
        (["a.onnx", "--out", "repo", "--max-queue-delay-us", "-1"], "expected"),
        (["a.onnx", "--out", "repo", "--ensemble", "png"], "invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["triton", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_model_that_is_not_there_is_an_error_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, tmp_path / "no.onnx", "--out", tmp_path / "repo")
    assert (status, "no such file" in err) == (1, True)
