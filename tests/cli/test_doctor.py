"""`repvgg-trt doctor`: what is here, what works, and what installs the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from repvgg_deploy import __version__
from repvgg_deploy.cli.trt import main
from repvgg_deploy.errors import CudaError
from repvgg_deploy.measure import environment
from repvgg_deploy.runtime.cuda.port import DeviceInfo
from repvgg_deploy.specs import codec
from tests.contract.source_tree import ROOT


def ask(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def ability(report: dict[str, Any], begin: str) -> dict[str, str]:
    return next(each for each in report["abilities"] if each["name"].startswith(begin))


def test_doctor_lists_what_is_installed_and_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    report = ask(capsys)
    assert report["version"] == __version__
    assert report["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert ability(report, "infer, eval")["missing"] == ""
    has_torch = importlib.util.find_spec("torch") is not None
    assert (ability(report, "repvgg-export")["missing"] == "") == has_torch
    assert report["problems"] == []


def test_doctor_names_the_command_that_installs_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hidden = ("torch", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "no   --plot: matplotlib not installed\n       pip install '.[plot]' in the repository's folder" in said
    assert "pip install '.[export,cpu]'" in said


def test_doctor_lists_every_gpu_with_its_driver(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = DeviceInfo("NVIDIA A10", "8.6", "580.95.05", "13.0", 24 << 30)
    port = SimpleNamespace(count_devices=lambda: 2, describe_device=lambda index: facts)
    monkeypatch.setattr(environment, "open_cuda", lambda provider: port)
    report = ask(capsys)
    assert [gpu["name"] for gpu in report["gpus"]] == ["NVIDIA A10"] * 2
    assert ability(report, "run a plan")["missing"] == ""
    assert "knows no CUDA" in ability(report, "Engine(")["missing"]
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA A10, compute capability 8.6, " in said
    assert "driver 580.95.05, CUDA 13.0" in said


def test_doctor_without_a_driver_says_why_and_what_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(provider: object) -> None:
        raise CudaError("the driver is too old", remedy="install a newer driver")

    monkeypatch.setattr(environment, "open_cuda", refuse)
    report = ask(capsys)
    assert report["no_gpu"] == "the driver is too old"
    assert ability(report, "run a plan")["remedy"] == "install a newer driver"


def test_doctor_finds_two_onnx_runtimes_in_one_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_version", lambda name: "1.32.0")
    assert "onnxruntime and onnxruntime-gpu are both installed" in ask(capsys)["problems"][0]


@pytest.mark.parametrize("error", [ImportError("libonnx.so: no such\n file"), ModuleNotFoundError("no x", name="x")])
def test_doctor_of_an_onnx_runtime_that_cannot_be_imported_says_what_fails(
    error: ImportError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    name = f", name={error.name!r}" if error.name else ""
    (tmp_path / "onnxruntime.py").write_text(f"raise {type(error).__name__}({str(error)!r}{name})\n")
    report = ask(capsys)
    said = f"is installed but cannot be imported: {' '.join(str(error).split())}"
    assert report["problems"] == [f"onnxruntime {said}"]
    found = ability(report, "infer, eval")
    assert said in found["missing"] and found["remedy"].startswith("pip install --force-reinstall onnxruntime")
    # What needs no ONNX Runtime is not blamed for it, installed or not.
    assert "onnxruntime" not in ability(report, "--plot")["missing"]


def test_doctor_knows_every_extra_that_a_command_needs() -> None:
    project: Any = codec.read_toml(ROOT / "pyproject.toml", "the project", remedy="clone it again")
    extras = project["project"]["optional-dependencies"]
    known = {extra for _, _, each in environment._NEEDS for extra in each.split(",")}
    # What builds and runs plans is asked itself; `pycuda` and `gpu` stand in for others.
    assert set(extras) - known == {"gpu", "tensorrt", "rtx", "pycuda", "docs", "dev"}


def test_doctor_loads_neither_torch_nor_onnx() -> None:
    program = (
        "import sys; from repvgg_deploy.measure.environment import examine; examine(); "
        "print(sorted({'torch', 'onnx', 'openvino', 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
