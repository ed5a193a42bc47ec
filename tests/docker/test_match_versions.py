"""docker/match_versions.py: from a passport to build arguments that the Dockerfiles have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.make_repository import write_plan

ROOT = Path(__file__).resolve().parents[2]


def match(plan: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docker/match_versions.py"), str(plan)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize(
    ("passport", "arguments"),
    [
        ({"tensorrt_version": "10.11.0.33"}, "TENSORRT_VERSION=10.11.0.33 CUDA_MAJOR=12 TRITON_RELEASE=25.06"),
        ({"tensorrt_version": "10.7.0"}, "TENSORRT_VERSION=10.7.0 CUDA_MAJOR=12 TRITON_RELEASE=24.12"),
        ({"tensorrt_version": "10.7.0.23"}, "TENSORRT_VERSION=10.7.0 CUDA_MAJOR=12 TRITON_RELEASE=24.12"),
        ({"tensorrt_version": "10.8.0.43"}, "TENSORRT_VERSION=10.8.0.43 CUDA_MAJOR=12"),
        ({"tensorrt_version": "11.4.0.106"}, "TENSORRT_VERSION=11.4.0.106 CUDA_MAJOR=13"),
        (
            {"tensorrt_version": "1.7.1.116", "flavour": "tensorrt_rtx"},
            "TENSORRT=tensorrt-rtx-cu13==1.7.1.116 CUDA_MAJOR=13",
        ),
    ],
    ids=lambda value: value["tensorrt_version"] if isinstance(value, dict) else "",
)
def test_arguments_are_those_of_the_passport(passport: dict[str, Any], arguments: str, tmp_path: Path) -> None:
    done = match(write_plan(tmp_path / "net.plan", **passport))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [word for argument in arguments.split() for word in ("--build-arg", argument)]


def test_arguments_are_ones_that_the_dockerfiles_have(tmp_path: Path) -> None:
    pytest.importorskip("dockerfile_parse", reason="dockerfile-parse, of the extra dev, is not installed")
    from tests.docker.dockerfiles import defaults

    for passport in ({"tensorrt_version": "10.11.0.33"}, {"tensorrt_version": "1.7.1.116", "flavour": "tensorrt_rtx"}):
        words = match(write_plan(tmp_path / "net.plan", **passport)).stdout.split()
        assert {word.partition("=")[0] for word in words[1::2]} <= {*defaults("runtime"), *defaults("triton")}


@pytest.mark.parametrize("version", ["8.6.1.6", "8.5.3.1"])
def test_tensorrt_8_is_refused_with_a_remedy(version: str, tmp_path: Path) -> None:
    done = match(write_plan(tmp_path / "net.plan", tensorrt_version=version))
    assert (done.returncode, done.stdout) == (1, "")
    assert version in done.stderr
    assert "TensorRT 10" in done.stderr


def test_plan_without_a_passport_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "net.plan").write_bytes(b"ftrt")
    done = match(tmp_path / "net.plan")
    assert (done.returncode, done.stdout) == (1, "")
    assert "net.plan: has no passport net.plan.json beside it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("net.onnx", b"\x08\x08onnx", "is no TensorRT plan"), ("missing.plan", None, "no such file")],
    ids=["onnx", "missing"],
)
def test_what_is_no_plan_is_called_so(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = match(tmp_path / name)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{name}: {said}" in done.stderr
    assert "remedy: " in done.stderr


def test_passport_alone_is_enough(tmp_path: Path) -> None:
    write_plan(tmp_path / "net.plan").unlink()
    assert match(tmp_path / "net.plan").returncode == 0
