"""Plans on a real GPU: built, run in every way, compared with ONNX Runtime, freed."""

from __future__ import annotations

import gc
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_parts.bare import BareLoop, DeviceBatch
from repvgg_deploy.builder.library import open_library
from repvgg_deploy.errors import InputError, PlanError, PlanIncompatibleError
from repvgg_deploy.pipeline.build import BuildOptions, build_plan
from repvgg_deploy.pipeline.quantize_options import QuantizeOptions
from repvgg_deploy.precision.int8_options import FAST
from repvgg_deploy.runtime.engine import Engine, EngineOptions
from repvgg_deploy.runtime.passport import passport_path
from repvgg_deploy.specs import BuildConfig, ShapeProfile

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

TOLERANCES = {"fp32": 2e-3, "fp16": 2e-2, "int8": 0.25}
"""Of the largest logit. FP32: other orders of sums. FP16: 5e-4 an operation over ten layers. INT8: --fast weights; scales and layout show at once."""


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8"])
def plan(request: pytest.FixtureRequest, gpu: Any, sample_onnx: Path, sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The sample's plan in each precision, for batches of 1 to 8."""
    precision = request.param
    out = tmp_path_factory.mktemp("plans") / f"{precision}.plan"
    quantize = QuantizeOptions("int8", sample_dir / "calib.npz", int8=FAST, min_agreement=0.9) if precision == "int8" else None
    targets = ("current",) if open_library("auto").is_rtx else ()
    options = BuildOptions(BuildConfig(precision, ShapeProfile(1, 4, 8)), True, targets=targets, quantize=quantize, use_cache=False)
    result = build_plan(sample_onnx, out, options)
    assert result.passport.precision == precision, "the layer inspector"
    return precision, out


def images(engine: Engine, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *engine.spec.input.shape[1:])).astype(np.float32)


def close(found: Any, expected: Any, precision: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[precision] * float(np.abs(expected).max()))


@pytest.mark.parametrize("graphs", [True, False])
def test_any_number_of_images_is_what_onnx_runtime_gives(plan: tuple[str, Path], sample_onnx: Path, graphs: bool) -> None:
    precision, path = plan
    with Engine(path, options=EngineOptions(cuda_graphs=graphs)) as engine, Engine(sample_onnx) as reference:
        for count in (1, 2, 3, 8, 9, 16, 17, 40):
            batch = images(engine, count, seed=count)
            for _ in range(3):
                close(engine.infer(batch), reference.infer(batch), precision)


def test_threads_batcher_and_submit(plan: tuple[str, Path], sample_onnx: Path) -> None:
    precision, path = plan
    with Engine(path) as engine, Engine(sample_onnx) as reference, ThreadPoolExecutor(32) as pool:
        batches = [images(engine, 1 + index % 11, seed=index) for index in range(64)]
        expected = [reference.infer(batch) for batch in batches]
        for found, wanted in zip(pool.map(engine.infer, batches), expected, strict=True):
            close(found, wanted, precision)
        with engine.batcher(max_batch=8, concurrency=2) as batcher:
            small = [batch[:1] for batch in batches]
            for found, wanted in zip(pool.map(batcher.infer, small), expected, strict=True):
                close(found, wanted[:1], precision)
        close(engine.submit(batches[0]).result(60), expected[0], precision)


def test_device_arrays_of_our_own_torch_and_cupy(plan: tuple[str, Path], gpu: Any, sample_onnx: Path) -> None:
    precision, path = plan
    with Engine(path) as engine, Engine(sample_onnx) as reference:
        batch = images(engine, 11)
        expected = reference.infer(batch)
        with gpu.on_device(0):
            array = DeviceBatch(gpu, batch)
            close(engine.infer(array), expected, precision)
            array.free()
        if importlib.util.find_spec("torch") is not None:
            import torch

            if torch.cuda.is_available():
                stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    result = torch.from_dlpack(engine.infer_device(torch.from_numpy(batch).cuda(), stream=stream)[0])
                stream.synchronize()
                close(result.float().cpu().numpy(), expected, precision)
                with pytest.raises(InputError):
                    engine.infer(torch.from_numpy(batch).cuda().double())
        if importlib.util.find_spec("cupy") is not None:
            import cupy  # type: ignore[import-not-found]

            close(cupy.asnumpy(cupy.from_dlpack(engine.infer_device(cupy.asarray(batch))[0])), expected, precision)


def test_bare_loop_gives_the_same_and_memory_is_given_back(plan: tuple[str, Path], gpu: Any) -> None:
    _, path = plan
    free: list[int] = []
    for _ in range(4):
        with Engine(path) as engine:
            batch = images(engine, 4)
            found = engine.infer(batch)
            with gpu.on_device(0):
                array = DeviceBatch(gpu, batch)
                with BareLoop(engine, array) as bare:
                    bare.enqueue()
                    bare.wait()
                array.free()
            assert np.isfinite(found).all()
        gc.collect()
        free.append(_free_bytes())
    assert free[-1] >= free[1] - (8 << 20), free  # the first time CUDA loads modules, which stay


def _free_bytes() -> int:
    driver: Any = pytest.importorskip("cuda.bindings.driver")
    status, device = driver.cuDeviceGet(0)
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    driver.cuCtxPushCurrent(context)
    status, free, _ = driver.cuMemGetInfo()
    driver.cuCtxPopCurrent()
    assert int(status) == 0
    return int(free)


def test_plans_of_another_tensorrt_or_changed_are_refused(plan: tuple[str, Path], tmp_path: Path) -> None:
    from repvgg_deploy import codec
    from repvgg_deploy.runtime.passport import read_passport

    _, path = plan
    copy = tmp_path / "copy.plan"
    copy.write_bytes(path.read_bytes())
    passport = read_passport(path)
    assert passport is not None
    passport_path(copy).write_text(codec.dumps(replace(passport, tensorrt_version="9.9.9.9")), encoding="utf-8")
    with pytest.raises(PlanIncompatibleError):
        Engine(copy)
    passport_path(copy).write_text(codec.dumps(passport), encoding="utf-8")
    copy.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(PlanError):
        Engine(copy)


def test_pycuda_runs_the_same_plan(plan: tuple[str, Path], sample_onnx: Path) -> None:
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    precision, path = plan
    with Engine(path, options=EngineOptions(cuda="pycuda")) as engine, Engine(sample_onnx) as reference:
        for count in (1, 8, 20):
            batch = images(engine, count)
            close(engine.infer(batch), reference.infer(batch), precision)
