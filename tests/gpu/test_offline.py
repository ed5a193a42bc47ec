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


def test_packages_that_are_missing_are_unpacked_and_found_and_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PACKAGES", {"carried_module": "carried-package", "pytest": "pytest"})
    make_wheel(tmp_path / "wheels", "carried_package", "carried_module")
    make_wheel(tmp_path / "wheels", "pytest", "pytest")
    environment = offline.add_packages(tmp_path / "wheels", [sys.executable], tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["carried_module.py"]
    code = "import carried_module, pytest; print(carried_module.carried, hasattr(pytest, 'carried'))"
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        == "True False\n"
    )


def run_as_python(folder: Path, script: str, *options: str) -> int:
    """The exit code of `offline` with a shell script in place of Python; it finds the real one in `$REAL`."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    places = [str(folder / "wheels"), "--models", str(folder / "models"), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REAL", sys.executable)
        return offline.main(["run", *places, *options, "--", str(program)])


def test_failing_measurement_is_the_exit_code(tmp_path: Path) -> None:
    """The program stands for a Python whose machine has no GPU."""
    script = 'case "$1" in -c) exec "$REAL" "$@" ;; esac\necho "error: no NVIDIA driver was found"\nexit 1'
    assert run_as_python(tmp_path, script) == 1
    log, *_ = (tmp_path / "out").glob("pytest-gpu-*.txt")
    assert "no NVIDIA driver" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["tests", "figures"])
def test_program_that_a_signal_ended_is_a_failure(tmp_path: Path, what: str) -> None:
    """TensorRT that crashes leaves a negative exit code, which is less than 0 and no less wrong."""
    crashing = "-m" if what == "tests" else "benchmarks/gpu.py"
    script = f'case "$1" in -c) exec "$REAL" "$@" ;; {crashing}) kill -SEGV $$ ;; esac'
    assert run_as_python(tmp_path, script) == 1


@pytest.mark.parametrize(("skipped", "code"), [(33, 1), (6, 0)])
def test_run_whose_tests_were_all_skipped_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: int, code: int
) -> None:
    """As without the models where torch is not: pytest's exit code is 0."""
    report = tmp_path / "report.xml"
    report.write_text(
        f'<testsuites><testsuite errors="0" failures="0" skipped="{skipped}" tests="33"/></testsuites>',
        encoding="utf-8",
    )
    monkeypatch.setenv("REPORT", str(report))
    script = 'case "$1" in\n-c) exec "$REAL" "$@" ;;\n-m) for last; do :; done; cp "$REPORT" "$last" ;;\nesac'
    assert run_as_python(tmp_path, script) == code


def test_minutes_are_those_of_tests_and_figures_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "count_run", lambda _: 1)
    times = iter([0.0, 240.0])  # the tests take four minutes
    monkeypatch.setattr(offline.time, "monotonic", lambda: next(times))
    script = f'case "$1" in -c) exec "$REAL" "$@" ;; esac\necho "$@" >> {tmp_path}/called'
    options = ["--minutes", "9", "--seconds", "1", "--variants", "B2", "A0"]
    assert run_as_python(tmp_path, script, *options) == 0
    tests, figures = (tmp_path / "called").read_text(encoding="utf-8").splitlines()
    assert (
        "pytest" in tests and "-W default" in tests and "--minutes 5.00 --seconds 1 --variants B2 A0 --out" in figures
    )


def test_every_package_that_makes_models_is_carried() -> None:
    from benchmarks.gpu_parts.models import find_missing

    assert find_missing() == [] or set(find_missing()) - {"torch", "onnx"} <= set(offline.PACKAGES)
    assert {"onnxscript", "onnxsim", "onnxruntime", "pytest_timeout"} <= set(offline.PACKAGES)
