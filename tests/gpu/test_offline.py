"""What is carried to a GPU machine without a package index: only what its Python lacks is unpacked there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_parts import offline


def make_wheel(folder: Path, name: str, module: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}.py", "carried = True\n")


def test_packages_that_are_missing_are_unpacked_and_found_and_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "PACKAGES", {"carried_module": "carried-package", "pytest": "pytest"})
    make_wheel(tmp_path / "wheels", "carried_package", "carried_module")
    make_wheel(tmp_path / "wheels", "pytest", "pytest")
    environment = offline.add_packages(tmp_path / "wheels", [sys.executable], tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["carried_module.py"]
    code = "import carried_module, pytest; print(carried_module.carried, hasattr(pytest, 'carried'))"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout == "True False\n"


def test_failing_measurement_is_the_exit_code(tmp_path: Path) -> None:
    """The program stands for a Python whose machine has no GPU."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ncase "$1" in -c) exec "$REAL" "$@" ;; esac\necho "error: no NVIDIA driver was found"\nexit 1\n', encoding="utf-8")
    program.chmod(0o755)
    arguments = ["run", str(tmp_path / "wheels"), "--models", str(tmp_path / "models"), "--out", str(tmp_path / "out"), "--", str(program)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REAL", sys.executable)
        assert offline.main(arguments) == 1
    log, *_ = (tmp_path / "out").glob("pytest-gpu-*.txt")
    assert "no NVIDIA driver" in log.read_text(encoding="utf-8")


def test_every_package_that_makes_models_is_carried() -> None:
    from benchmarks.gpu_parts.models import find_missing

    assert find_missing() == [] or set(find_missing()) - {"torch", "onnx"} <= set(offline.PACKAGES)
    assert {"onnxscript", "onnxsim", "onnxruntime", "pytest_timeout"} <= set(offline.PACKAGES)
