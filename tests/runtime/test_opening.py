"""What a file is, and what runs it: files that are no model of ours are refused before ONNX Runtime sees them."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.errors import InputError, ModelError, PlanError, RepVGGDeployError
from repvgg_deploy.files import wire
from repvgg_deploy.runtime import opening
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.specs.values import ModelMetadata, TensorSpec
from tests.runtime.make_model import (
    QUANTIZED,
    ModelOptions,
    build_quantized,
    make_metadata,
    make_onnx,
    strip_metadata,
    write_bound,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_onnx(tmp_path_factory.mktemp("model") / "m.onnx").read_bytes()


CHANGES: dict[str, tuple[Callable[[bytes], bytes], type[RepVGGDeployError], str]] = {
    "empty": (lambda data: b"", ModelError, "is empty"),
    "half": (lambda data: data[: len(data) // 2], ModelError, "truncated"),
    "one byte short": (lambda data: data[:-1], ModelError, "truncated"),
    "text": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", ModelError, "is a Git LFS pointer"),
    "zip": (lambda data: b"PK\x03\x04" + bytes(200), ModelError, "is a zip archive"),
    "foreign": (strip_metadata, ModelError, "without repvgg_deploy metadata"),
    "weight changed": (lambda data: data.replace(b"tiny", b"tinY", 1), ModelError, "was changed after its export"),
    "appended field": (
        lambda data: data + wire.bytes_field(6, b"a comment"),
        ModelError,
        "was changed after its export",
    ),
    "metadata changed": (
        lambda data: data.replace(b'"class 3"', b'"class X"'),
        ModelError,
        "was changed after its export",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_engine_of_bad_file_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bytes, case: str
) -> None:
    change, kind, message = CHANGES[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(change(good))
    assert path.read_bytes() != good
    monkeypatch.setattr("onnxruntime.InferenceSession", None)  # calling it would be a TypeError
    with pytest.raises(kind, match=message) as caught:
        Engine(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_engine_of_good_file_after_these_changes_still_opens(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.plan"  # the content decides, not the name
    path.write_bytes(good)
    with Engine(path) as engine:
        assert engine.spec.kind == "logits"


def test_engine_of_unknown_content_named_plan_speaks_of_plans(tmp_path: Path) -> None:
    path = tmp_path / "a0.plan"
    path.write_bytes(b"something else")
    with pytest.raises(PlanError, match="runs ONNX models only"):
        Engine(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "below a file", "long name"])
def test_engine_of_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.write_bytes(b"x")
        path /= "m.onnx"
    elif kind == "long name":
        path = tmp_path / ("m" * 300)
    with pytest.raises(ModelError, match=re.escape(str(path))):
        Engine(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_engine_of_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx")
    path.chmod(0)
    with pytest.raises(ModelError, match="cannot be read"):
        Engine(path)


@pytest.mark.parametrize("path", [None, 3, b"m.onnx", "", "a\0b"])
def test_engine_of_something_else_than_a_path_is_refused(path: Any) -> None:
    with pytest.raises(InputError, match="expected the path of a model file"):
        Engine(path)


FLOAT_INPUT = TensorSpec("images", "float32", ("batch", 3, 16, 16), "NCHW")
CONTRADICTIONS: dict[str, dict[str, object]] = {
    "input name": {"input": dataclasses.replace(FLOAT_INPUT, name="other")},
    "input dtype": {"input": dataclasses.replace(FLOAT_INPUT, dtype="uint8")},
    "input size": {"input": dataclasses.replace(FLOAT_INPUT, shape=("batch", 3, 16, 17))},
    "input rank": {"input": dataclasses.replace(FLOAT_INPUT, shape=("batch", 3, 16), layout="other")},
    "rank of layout": {"input": dataclasses.replace(FLOAT_INPUT, shape=("batch", 3, 16))},
    "no dimension": {"input": dataclasses.replace(FLOAT_INPUT, shape=())},
    "no output": {"outputs": ()},
    "top5 with one output": {"kind": "top5"},
    "output name": {"outputs": (TensorSpec("other", "float32", ("batch", 7), "NC"),)},
    "more classes": {"outputs": (TensorSpec("logits", "float32", ("batch", 8), "NC"),)},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_engine_of_metadata_that_speaks_of_another_graph_is_refused(tmp_path: Path, good: bytes, case: str) -> None:
    metadata: ModelMetadata = make_metadata(ModelOptions())
    forged = dataclasses.replace(metadata, spec=dataclasses.replace(metadata.spec, **CONTRADICTIONS[case]))  # type: ignore[arg-type]
    path = write_bound(tmp_path / "m.onnx", strip_metadata(good), forged)
    with pytest.raises(ModelError, match=r"contradicts itself|disagree"):
        Engine(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("plain") / "m.onnx")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bound(
        tmp_path_factory.mktemp("int8") / "m.onnx", build_quantized().SerializeToString(), make_metadata(QUANTIZED)
    )


def install_openvino(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (there or None) if name == "openvino" else real(name, *rest)
    )


@pytest.mark.parametrize("there", [True, False])
def test_backend_that_is_not_chosen_is_onnx_runtime_whatever_is_installed(
    monkeypatch: pytest.MonkeyPatch, plain: Path, quantized: Path, there: bool
) -> None:
    install_openvino(monkeypatch, there)
    for path in (plain, quantized):
        with Engine(path) as engine:
            assert engine.backend_name.startswith("ONNX Runtime")
            assert engine.device == "cpu"


@pytest.mark.parametrize(
    ("graph", "device", "there", "expected", "reason"),
    [
        ("quantized", "cpu", True, "openvino", "the graph is INT8"),
        ("quantized", "cpu", False, "onnxruntime", "not installed"),
        ("plain", "cpu", True, "onnxruntime", "not INT8"),
        ("quantized", "cuda", True, "onnxruntime", "does not run on cuda"),
    ],
)
def test_fastest_backend_depends_on_graph_device_and_packages_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    graph: str,
    device: str,
    there: bool,
    expected: str,
    reason: str,
) -> None:
    install_openvino(monkeypatch, there)
    with caplog.at_level(logging.INFO, logger="repvgg_deploy"):
        assert opening._choose(request.getfixturevalue(graph), device, "fastest") == expected
    assert reason in caplog.text


def test_unknown_backend_is_refused(plain: Path) -> None:
    with pytest.raises(InputError, match="found 'onnx'") as caught:
        Engine(plain, backend="onnx")
    assert "openvino" in caught.value.remedy
