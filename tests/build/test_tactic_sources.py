"""The libraries that TensorRT 8 takes kernels from: found, told from empty stand-ins, left out where they are missing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from repvgg_deploy.build import library
from repvgg_deploy.build.library import choose_tactic_sources, find_tactic_libraries, read_library_version
from tests.build.fake_trt import Config, FakeTrt
from tests.build.make_typed import make_typed

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
