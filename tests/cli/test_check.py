"""`repvgg-trt check`, as a user calls it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from repvgg_deploy.build import judge as check_module
from repvgg_deploy.build.library import Gpu, GpuSearch
from repvgg_deploy.cli.trt import main
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import ShapeProfile
from tests.files.make_passport import make_passport

GOOD = "gpu=l4,trt=11.4.0.106"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "b2.plan")


def write_plan(path: Path, **changes: Any) -> Path:
    path.write_bytes(b"ftrt plan")
    passport = make_passport(
        plan_sha256=hashlib.sha256(b"ftrt plan").hexdigest(), precision_shares={"fp16": 0.988, "fp32": 0.012}, **changes
    )
    path.with_name(f"{path.name}.json").write_text(codec.dumps(passport), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        (((320, 320), (480, 640), (1280, 1280)), "320×320 to 1280×1280 pixels, tuned for 480×640"),
        (((480, 640),) * 3, "480×640 pixels and no other"),
    ],
)
def test_plan_of_several_image_sizes_says_them(
    tmp_path: Path, machine, capsys: pytest.CaptureFixture[str], sizes: Any, line: str
) -> None:
    machine("11.4.0.106", L4)
    plan = write_plan(tmp_path / "any.plan", profile=ShapeProfile(1, 8, 32, *sizes))
    assert re.search(rf"^images     {line}$", run(capsys, plan)[1], re.M)


def test_plan_of_several_profiles_says_them(tmp_path: Path, machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("11.4.0.106", L4)
    plan = write_plan(tmp_path / "any.plan", profile=ShapeProfile(1, 8, 32, batches=(1, 8, 32)))
    assert re.search(r"^batches    1 to 32, with kernels of their own for 1, 8, 32$", run(capsys, plan)[1], re.M)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a GPU and a TensorRT, or without."""

    def put(version: str | None, gpu: Gpu | None, lean: str | None = None) -> None:
        for name, found in (("tensorrt", version), ("tensorrt_lean", lean)):
            module = types.ModuleType(name)
            module.__version__ = found
            monkeypatch.setitem(sys.modules, name, module if found else None)
        monkeypatch.setattr(check_module, "look_for_gpu", lambda: GpuSearch(gpu, "" if gpu else "no NVIDIA driver"))
        monkeypatch.setattr(check_module, "platform_here", lambda: "linux-x86_64")

    return put


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["check", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


L4 = Gpu("NVIDIA L4", "8.9", "580.95.05")


def test_plan_that_will_run_here(plan: Path, machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("11.4.0.106", L4)
    status, out, err = run(capsys, plan)
    assert (status, err) == (0, "")
    assert re.search(r"^precision  fp16: fp16 98\.8%, fp32 1\.2% of the multiply-accumulates$", out, re.M)
    assert re.search(
        r"^runs on    compute capability 8\.9 \(NVIDIA L4\), with TensorRT 11\.4\.0\.106 and no other$", out, re.M
    )
    assert re.search(
        r"^here       NVIDIA L4 \(compute capability 8\.9\), driver 580\.95\.05, TensorRT 11\.4\.0\.106$", out, re.M
    )
    assert re.search(r"^verdict    it will run$", out, re.M)


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        ("11.4.0.107", L4, "11.4.0.107 runs plans of its own version only"),
        ("11.4.0.106", Gpu("NVIDIA A10", "8.6", "580.1"), "NVIDIA A10 (compute capability 8.6)"),
        (None, L4, "running a plan needs TensorRT, which is not installed"),
        ("11.4.0.106", None, "there is no GPU here that can be used: no NVIDIA driver"),
        ("10.2.0.19", L4, "TensorRT 10.2.0.19 is known to be broken"),
    ],
)
def test_plan_that_will_not_run_here(
    plan: Path, machine, capsys: pytest.CaptureFixture[str], version: str | None, gpu: Gpu | None, message: str
) -> None:
    machine(version, gpu)
    status, out, err = run(capsys, plan)
    assert status == 1 and "verdict    it will not run" in out
    assert message in err and "remedy:" in err and "Traceback" not in err


def test_onnx_in_place_of_a_plan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"anything")
    status, _, err = run(capsys, model)
    assert (
        status == 1
        and "m.onnx: is an ONNX file by its name, expected a plan" in err
        and f"repvgg-trt inspect {model}" in err
    )


def test_machine_without_tensorrt_is_not_said_to_have_one(
    plan: Path, machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(None, L4)
    _, out, err = run(capsys, plan)
    assert re.search(r"^here       NVIDIA L4 \(compute capability 8\.9\), driver 580\.95\.05, no TensorRT$", out, re.M)
    assert "can be built" not in err  # nobody asked for a build


@pytest.mark.parametrize(("flexible", "status"), [(True, 0), (False, 1)])
def test_lean_runtime_runs_version_compatible_plans_only(
    tmp_path: Path, machine, capsys: pytest.CaptureFixture[str], flexible: bool, status: int
) -> None:
    machine(None, L4, lean="11.4.0.106")  # a module that only has a version: it is neither used nor asked for more
    plan = write_plan(tmp_path / "x.plan", version_compatible=flexible)
    found, out, err = run(capsys, plan)
    assert found == status
    assert re.search(r"^here       NVIDIA L4 .*, TensorRT \(lean runtime\) 11\.4\.0\.106$", out, re.M)
    if not flexible:
        assert (
            "here is only the lean runtime of TensorRT 11.4.0.106, which runs version-compatible plans and no others"
            in err
        )
        assert "--version-compatible" in err and "[tensorrt]" in err
    answer = json.loads(run(capsys, plan, "--json")[1])
    assert (answer["compatible"], answer["environment"]["lean"]) == (flexible, True)


def test_lean_runtime_without_a_driver_is_never_started(
    tmp_path: Path, machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(None, None, lean="11.4.0.106")
    status, out, err = run(capsys, write_plan(tmp_path / "x.plan", version_compatible=True))
    assert status == 1 and "no GPU, TensorRT (lean runtime) 11.4.0.106" in out
    assert "there is no GPU here that can be used: no NVIDIA driver" in err


def test_whole_tensorrt_comes_before_its_lean_runtime(plan: Path, machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("11.4.0.106", L4, lean="10.16.1.11")
    status, out, _ = run(capsys, plan)
    assert status == 0 and "TensorRT 11.4.0.106\n" in out and "lean" not in out


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [
        (GOOD, 0, "it will run"),
        ("gpu=l4,trt=11.4", 0, "warning    TensorRT 11.4 is only a part of a version"),
        ("gpu=8.9", 0, "warning    the version of TensorRT was not judged"),
        ("trt=11.4.0.106", 0, "warning    the GPU was not judged"),
        ("gpu=a10,trt=11.4.0.106", 1, "target     A10 (compute capability 8.6), TensorRT 11.4.0.106"),
        ("gpu=a10,trt=10.9", 1, "it will not run"),
        ("gpu=l4,rtx=1.7.1.116", 1, "TensorRT-RTX 1.7.1.116"),
        ("gpu=rtx4090,trt=11.4.0.106,driver=535.10", 0, "the driver 535.10 is older"),
        ("gpu=orin,trt=11.4.0.106", 1, "it will not run"),
    ],
)
def test_verdict_on_a_place_that_is_described(
    plan: Path, capsys: pytest.CaptureFixture[str], target: str, status: int, text: str
) -> None:
    found, out, err = run(capsys, plan, "--target", target)
    assert found == status and text in out, out
    assert (err == "") == (status == 0)


def test_json_answers_the_same(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, plan, "--target", GOOD, "--json")
    answer = json.loads(out)
    assert (status, err, answer["compatible"], answer["reason"], answer["here"]) == (0, "", True, None, False)
    assert answer["passport"]["flavour"] == "tensorrt" and answer["environment"]["compute_capability"] == "8.9"
    status, out, _ = run(capsys, plan, "--target", "gpu=t4,trt=11.4.0.106", "--json")
    answer = json.loads(out)
    assert (status, answer["compatible"]) == (1, False) and "T4" in answer["reason"] and answer["remedy"]


def test_hardware_and_version_compatible_plan_says_where_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path / "x.plan", hardware_compatible=True, version_compatible=True)
    status, out, _ = run(capsys, plan, "--target", "gpu=h100,trt=11.5.0.1")
    assert status == 0
    assert "every GPU from Ampere (8.0) on, with TensorRT 11.4.0.106 and later of the same major version" in out


def test_faults_of_the_files_are_said(tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lonely = tmp_path / "lonely.plan"
    lonely.write_bytes(b"ftrt plan")
    changed = write_plan(tmp_path / "changed.plan")
    changed.write_bytes(b"ftrt changed")
    (tmp_path / "odd.plan").write_bytes(b"x")
    (tmp_path / "odd.plan.json").write_text("[]")
    faults = {
        lonely: "has no passport lonely.plan.json",
        changed: "is not the plan of its passport",
        tmp_path / "none.plan": "no such file",
        tmp_path: "is no file",
        tmp_path / "odd.plan": "damaged",
    }
    for path, message in faults.items():
        status, out, err = run(capsys, path, "--target", GOOD)
        assert (status, out) == (1, "") and message in err and "remedy:" in err, err
    status, out, err = run(capsys, plan, "--target", "gpu=voodoo2")
    assert status == 1 and "no GPU is known by the name 'voodoo2'" in err


@pytest.mark.parametrize("target", ["", "gpu", "gpu=", "a10", "gpu=a10,gpu=l4", "trt=10,rtx=1.7", "trt=ten"])
def test_targets_that_are_none_are_usage_errors(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "b2.plan", "--target", target])
    assert caught.value.code == 2 and "argument --target" in capsys.readouterr().err
