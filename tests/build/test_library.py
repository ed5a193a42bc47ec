"""Which TensorRT is taken and which are refused; the libraries that TensorRT 8 takes kernels from."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from repvgg_deploy.build import library
from repvgg_deploy.build.library import (
    Gpu,
    GpuSearch,
    choose_tactic_sources,
    find_tactic_libraries,
    look_for_gpu,
    open_library,
    read_library_version,
)
from repvgg_deploy.errors import BuildError, CudaError, InputError, MissingDependencyError
from repvgg_deploy.runtime.cuda import opening
from tests.build.fake_trt import Config, FakeTrt
from tests.build.make_typed import make_typed


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


PROPERTY = "int cudnnGetProperty(int type, int *value) { *value = type == 0 ? 8 : type == 1 ? 6 : 0; return %d; }\n"
REAL = "long cudnnGetVersion(void) { return 8600; }\n"


@pytest.mark.parametrize(
    ("missing", "kept"),
    [
        ((), None),
        (("CUDNN",), ("CUBLAS", "CUBLAS_LT", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")),
        (("CUDNN", "CUBLAS", "CUBLAS_LT"), ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")),
    ],
)
def test_libraries_that_are_not_there_are_left_out_of_tensorrt_8(
    tmp_path: Path, missing: tuple[str, ...], kept: tuple[str, ...] | None
) -> None:
    trt = FakeTrt("8.5.3.1", make_typed(tmp_path, "fp32"), None)
    found = {name: None if name in missing else "1.2.3" for name in ("CUDNN", "CUBLAS", "CUBLAS_LT")}
    choose_tactic_sources(trt, Config(trt), found)
    expected = [] if kept is None else [sum(1 << int(getattr(trt.TacticSource, kind)) for kind in kept)]
    assert trt.said("tactic_sources") == expected


def make_library(path: Path, source: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, text=True, check=True, timeout=300
    )
    return str(path)


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ("", None),
        (PROPERTY % 0, None),
        (REAL, "unknown version"),
        (REAL + PROPERTY % 1, "unknown version"),
        (REAL + PROPERTY % 0, "8.6.0"),
    ],
    ids=["empty", "another", "old", "failing", "whole"],
)
def test_version_of_a_library_is_read_and_an_empty_one_is_not_taken_for_it(
    tmp_path: Path, source: str, version: str | None
) -> None:
    library = make_library(tmp_path / "libx.so", source)
    assert read_library_version(library, "cudnnGetVersion", "cudnnGetProperty") == version


def test_libraries_are_told_by_version_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_library(tmp_path / "lib11.so", REAL + PROPERTY % 0)
    second = make_library(tmp_path / "lib12.so", REAL)
    functions = ("cudnnGetVersion", "cudnnGetProperty")
    known = {"CUDNN": (*functions, (str(tmp_path / "libnone.so"),)), "CUBLAS": (*functions, (first, second))}
    monkeypatch.setattr(library, "_LIBRARIES", known)
    assert find_tactic_libraries() == {"CUDNN": None, "CUBLAS": "8.6.0, unknown version"}


def test_gpu_is_asked_of_the_cuda_port_and_its_error_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    info = types.SimpleNamespace(
        name="NVIDIA A10", compute_capability="8.6", driver_version="", cuda_version="13.0", memory_bytes=1
    )
    port = types.SimpleNamespace(describe_device=lambda index: info)
    monkeypatch.setattr(opening, "open_cuda", lambda provider: port)
    assert look_for_gpu() == GpuSearch(Gpu("NVIDIA A10", "8.6", None, "13.0"))

    def fail(provider: None) -> None:
        raise CudaError("no driver", remedy="install one")

    monkeypatch.setattr(opening, "open_cuda", fail)
    assert look_for_gpu() == GpuSearch(None, "no driver", "install one")
