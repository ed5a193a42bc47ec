"""Which plans are taken, and which are refused before TensorRT sees a byte."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest

from repvgg_deploy import Engine
from repvgg_deploy.errors import (
    CudaError,
    InputError,
    MissingDependencyError,
    ModelError,
    PlanError,
    PlanIncompatibleError,
)
from tests.fakes.tensorrt import Faults
from tests.files.make_passport import make_passport
from tests.runtime.gpu_world import Setting, World, assert_answers, make_world, write_passport
from tests.runtime.make_model import ModelOptions, make_onnx
from tests.runtime.tensorrt.machines import batch_of


def test_plan_without_passport_runs_with_a_warning_or_is_refused(tmp_path, monkeypatch, caplog) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    with caplog.at_level(logging.WARNING), world.open() as engine:
        assert engine.spec.kind == "module" and engine.spec.preprocessing is None
        assert_answers(world, engine, batch_of(3))
    assert any("no passport m.plan.json" in record.message for record in caplog.records)
    with pytest.raises(PlanError, match="has no passport"):
        world.open(require_passport=True)
    assert world.cuda.leaks() == {}


def test_changed_plan_is_refused_before_tensorrt_sees_it(world: World) -> None:
    world.plan.write_bytes(world.plan.read_bytes()[:-1] + b"!")
    with pytest.raises(PlanError, match="is not the plan of its passport"):
        world.open()
    assert world.trt.seen.deserialized == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compute_capabilities": ("8.9",)}, "8.9"),
        ({"tensorrt_version": "10.9.0.34"}, "10.9"),
        ({"flavour": "tensorrt_rtx"}, "RTX"),
    ],
)
def test_plan_of_another_gpu_or_tensorrt_is_refused_before_it_is_loaded(
    world: World, changes: dict[str, object], match: str
) -> None:
    write_passport(world.plan, world.onnx, **{"flavour": "tensorrt", "tensorrt_version": "10.16.1.11", **changes})
    with pytest.raises((PlanIncompatibleError, MissingDependencyError), match=match):
        world.open()
    assert world.trt.seen.deserialized == 0 and world.cuda.leaks() == {}


@pytest.mark.parametrize(
    ("version", "message"),
    [("10.2.0.19", "known to be broken"), ("8.4.3.1", "not supported"), ("9.3.0.1", "not supported")],
)
def test_version_of_tensorrt_that_does_not_do_is_refused(tmp_path, monkeypatch, version: str, message: str) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(version=version))
    with pytest.raises(PlanError, match=f"TensorRT {version} is {message}") as caught:
        world.open()
    assert "10.3 or later, and build the plan with it" in caught.value.remedy and world.trt.seen.deserialized == 0


def put_lean(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has TensorRT's lean runtime only, which has no plugins either."""
    world.trt.__name__ = "tensorrt_lean"
    del world.trt.init_libnvinfer_plugins
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", world.trt)


def test_lean_runtime_gets_version_compatible_plans_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_lean(world, monkeypatch)
    with pytest.raises(PlanIncompatibleError, match=r"only the lean runtime of TensorRT 10\.16\.1\.11") as caught:
        world.open()
    assert "--version-compatible" in caught.value.remedy and world.trt.seen.deserialized == 0
    flexible = make_passport(version_compatible=True).config
    write_passport(world.plan, world.onnx, tensorrt_version="10.16.1.11", config=flexible)
    with world.open() as engine:
        assert_answers(world, engine, batch_of(3))
        assert "TensorRT (lean runtime) 10.16.1.11" in engine.backend_name


def test_plan_without_passport_that_a_lean_runtime_refuses_says_what_it_runs(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    put_lean(world, monkeypatch)
    world.plan.write_bytes(world.plan.read_bytes()[:200])
    with pytest.raises(PlanError, match=r"TensorRT \(lean runtime\) 10\.16\.1\.11 refuses it") as caught:
        world.open()
    assert "--version-compatible" in caught.value.remedy


def test_truncated_plan_without_passport_quotes_tensorrt(tmp_path, monkeypatch) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(passport=False))
    world.plan.write_bytes(world.plan.read_bytes()[:200])
    with pytest.raises(PlanError, match="Serialization assertion failed"):
        world.open()
    assert world.cuda.leaks() == {}


NO_CUDA = "CUDA initialization failure with error: 35"
# As TensorRT 8.5 and 10 and the lean runtime of 11.4 were seen to do it on a machine whose driver is too old.
CANNOT_START = {
    "8.5.3.1": Faults(runtime_error=NO_CUDA, runtime_none=True),
    "8.6.1": Faults(runtime_error=NO_CUDA, runtime_none=True, runtime_severity="WARNING"),
    "10.16.1.11": Faults(runtime_error=f"createInferRuntime: Error Code 6: API Usage Error ({NO_CUDA})"),
    "11.4.0.106": Faults(runtime_error="Error Code 1: Cuda Runtime (cudaError 35: driver version is insufficient)"),
}


@pytest.mark.parametrize("version", CANNOT_START)
def test_tensorrt_that_cannot_start_cuda_is_an_error_and_never_ends_the_process(
    tmp_path, monkeypatch, version: str
) -> None:
    world = make_world(tmp_path, monkeypatch, Setting(version=version, faults=CANNOT_START[version]))
    for _ in range(2):
        with pytest.raises(CudaError, match="35") as caught:
            world.open()
        text = str(caught.value)
        assert f"TensorRT {version} cannot start its runtime" in text
        assert "the NVIDIA driver 580.95.05 (CUDA 13.0)" in text and "update the NVIDIA driver" in caught.value.remedy
        del caught
        gc.collect()
        assert not world.trt.seen.ended, "the runtime was let go"
    assert world.trt.seen.deserialized == 0 and world.cuda.leaks() == {}


def test_passport_and_plan_that_disagree_are_refused(world: World) -> None:
    other = make_onnx_with(world, classes=9)
    write_passport(world.plan, other, flavour="tensorrt", tensorrt_version="10.16.1.11")
    with pytest.raises(PlanError, match="passport and the plan disagree"):
        world.open()


def make_onnx_with(world: World, *, classes: int) -> Path:
    return make_onnx(world.plan.with_name("other.onnx"), ModelOptions(classes=classes))


@pytest.mark.parametrize(
    ("device", "backend", "error"),
    [
        ("cpu", None, InputError),
        ("cuda:1", None, CudaError),
        (3, None, CudaError),
        (None, "openvino", InputError),
        ("tpu", None, InputError),
    ],
)
def test_places_where_a_plan_cannot_run_are_refused(
    world: World, device: object, backend: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        world.open(device, backend)
    assert world.cuda.leaks() == {}


def test_onnx_is_not_run_by_tensorrt(world: World) -> None:
    with pytest.raises(InputError, match="runs plans"):
        Engine(world.onnx, backend="tensorrt")
    with pytest.raises(ModelError):
        Engine(world.plan.with_name("none.plan"))
