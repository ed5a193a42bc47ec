"""Which backend runs an ONNX."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from repvgg_deploy.errors import InputError
from repvgg_deploy.runtime import opening
from repvgg_deploy.runtime.engine import Engine
from tests.runtime.make_model import make_metadata, make_onnx, write_bound
from tests.runtime.test_typed_models import OPTIONS, build_quantized


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("plain") / "m.onnx")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bound(
        tmp_path_factory.mktemp("int8") / "m.onnx", build_quantized().SerializeToString(), make_metadata(OPTIONS)
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
