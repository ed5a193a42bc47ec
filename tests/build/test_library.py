"""Which TensorRT is taken, and which are refused."""

from __future__ import annotations

import logging
import sys
import types

import pytest

from repvgg_deploy.build.library import open_library
from repvgg_deploy.errors import BuildError, InputError, MissingDependencyError


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def put(**versions: str | None) -> None:
        for name in ("tensorrt", "tensorrt_rtx", "tensorrt_lean"):
            version = versions.get(name)
            module = types.ModuleType(name)
            module.__version__ = version
            monkeypatch.setitem(sys.modules, name, module if version else None)

    return put


def test_auto_takes_tensorrt_and_else_tensorrt_rtx(install) -> None:
    install(tensorrt="10.9.0.34", tensorrt_rtx="1.7.1.116")
    assert open_library("auto").name == "TensorRT 10.9.0.34"
    assert open_library("rtx").name == "TensorRT-RTX 1.7.1.116"
    install(tensorrt_rtx="1.7.1.116")
    assert open_library("auto").is_rtx


@pytest.mark.parametrize(
    ("backend", "extras"), [("auto", ("[tensorrt]", "[rtx]")), ("tensorrt", ("[tensorrt]",)), ("rtx", ("[rtx]",))]
)
def test_nothing_installed_names_the_extras(install, backend: str, extras: tuple[str, ...]) -> None:
    install()
    with pytest.raises(MissingDependencyError, match="no plan can be built") as caught:
        open_library(backend)
    assert all(extra in caught.value.remedy for extra in extras)


@pytest.mark.parametrize(("backend", "said"), [("auto", True), ("tensorrt", True), ("rtx", False)])
def test_lean_runtime_is_named_where_it_is_all_that_is_there(install, backend: str, said: bool) -> None:
    install(tensorrt_lean="11.4.0.106")
    with pytest.raises(MissingDependencyError, match="no plan can be built") as caught:
        open_library(backend)
    assert (
        "what is here of TensorRT is its lean runtime (tensorrt_lean), which runs plans and builds none"
        in caught.value.message
    ) == said


@pytest.mark.parametrize(
    ("version", "message"),
    [("10.2.0.19", "known to be broken"), ("8.4.3.1", "not supported"), ("9.3.0", "not supported")],
)
def test_versions_that_do_not_do_are_refused(install, version: str, message: str) -> None:
    install(tensorrt=version)
    with pytest.raises(BuildError, match=f"TensorRT {version} is {message}"):
        open_library("auto")


@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.1", "10.1.0", "10.3.0.26", "11.4.0.106"])
def test_supported_versions_are_taken(install, version: str, caplog: pytest.LogCaptureFixture) -> None:
    install(tensorrt=version)
    assert open_library("tensorrt").version == version
    assert caplog.text == ""


def test_newer_major_version_is_taken_with_a_warning(install, caplog: pytest.LogCaptureFixture) -> None:
    install(tensorrt="12.0.0.1")
    with caplog.at_level(logging.WARNING):
        assert open_library("auto").number == (12, 0)
    assert "newer than what this version was made for" in caplog.text


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError, match="no backend is named 'cuda'"):
        open_library("cuda")


def test_ctrl_c_while_it_is_imported_is_not_taken_for_a_broken_installation(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('initialization failed') from KeyboardInterrupt()", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(KeyboardInterrupt):
        open_library("auto")


def test_bindings_without_their_libraries_are_explained(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise OSError('libnvinfer.so.10: cannot open shared object file')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match=r"installed but cannot be imported: libnvinfer\.so\.10") as caught:
        open_library("auto")
    assert "--backend rtx" in caught.value.remedy
