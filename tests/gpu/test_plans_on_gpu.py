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
from benchmarks.gpu_parts.checks import compare_graphs
from benchmarks.gpu_parts.models import SAMPLE, path_of
from repvgg_deploy.build.build import build_plan
from repvgg_deploy.build.library import open_library
from repvgg_deploy.build.options import BuildOptions
from repvgg_deploy.errors import InputError, PlanError, PlanIncompatibleError
from repvgg_deploy.files.passport import passport_path, read_passport
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import BuildConfig, ShapeProfile
from tests.gpu.reference import Reference, require_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    # Those of torch and CuPy on a machine that nobody here chose are no failures.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8"])
def plan(
    request: pytest.FixtureRequest, gpu: Any, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The sample's plan in each precision, for batches of 1 to 8."""
    precision = request.param
    library = open_library("auto")
    kind = "int8-trt8" if precision == "int8" and not library.is_rtx and library.number < (10, 0) else precision
    out = tmp_path_factory.mktemp("plans") / f"{precision}.plan"
    targets = ("current",) if library.is_rtx else ()
    build_plan(
        path_of(models, SAMPLE, kind),
        out,
        BuildOptions(BuildConfig(profile=ShapeProfile(1, 4, 8)), True, targets=targets, use_cache=False),
    )
    return precision, out


def test_layer_inspector_shows_the_precision(plan: tuple[str, Path]) -> None:
    """A test of its own: a TensorRT that says too little of its layers must not cost all the others."""
    precision, path = plan
    passport = read_passport(path)
    assert passport is not None and passport.precision == precision


@pytest.mark.parametrize("graphs", [True, False])
def test_any_number_of_images_is_what_onnx_runtime_gives(
    plan: tuple[str, Path], reference: Reference, graphs: bool
) -> None:
    precision, path = plan
    with Engine(path, options=EngineOptions(cuda_graphs=graphs)) as engine:
        for count in (1, 2, 3, 8, 9, 16, 17, 40):
            batch, expected = reference.draw(count, start=count)
            for _ in range(3):
                require_close(engine.infer(batch), expected, precision)


def test_cuda_graphs_change_no_bit(plan: tuple[str, Path], reference: Reference) -> None:
    """Other kernels may round otherwise: TensorRT-RTX runs some until it has compiled those of a shape."""
    _, path = plan
    assert compare_graphs(path, reference.draw(20)[0], EngineOptions(), sizes=(1, 4, 8, 20)) <= 2e-2


def test_threads_batcher_and_submit(plan: tuple[str, Path], reference: Reference) -> None:
    precision, path = plan
    with Engine(path) as engine, ThreadPoolExecutor(32) as pool:
        batches, expected = zip(*(reference.draw(1 + index % 11, start=index) for index in range(64)), strict=True)
        for found, wanted in zip(pool.map(engine.infer, batches), expected, strict=True):
            require_close(found, wanted, precision)
        with engine.batcher(max_batch=8, concurrency=2) as batcher:
            small = [batch[:1] for batch in batches]
            for found, wanted in zip(pool.map(batcher.infer, small), expected, strict=True):
                require_close(found, wanted[:1], precision)
        require_close(engine.submit(batches[0]).result(60), expected[0], precision)


def test_two_engines_of_plans_run_at_once_and_a_closed_one_says_so(
    plan: tuple[str, Path], reference: Reference
) -> None:
    precision, path = plan
    batch, expected = reference.draw(20)
    with Engine(path) as one, Engine(path) as two, ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda index: (one, two)[index % 2].infer(batch), range(32)):
            require_close(found, expected, precision)
        one.close()
        with pytest.raises(InputError, match="closed"):
            one.infer(batch)
        require_close(two.infer(batch), expected, precision)


def test_device_array_of_our_own(plan: tuple[str, Path], gpu: Any, reference: Reference) -> None:
    precision, path = plan
    batch, expected = reference.draw(11)
    with Engine(path) as engine, gpu.on_device(0):
        array = DeviceBatch(gpu, batch)
        require_close(engine.infer(array), expected, precision)
        array.free()


def test_device_arrays_of_torch(plan: tuple[str, Path], reference: Reference) -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is installed without CUDA")
    precision, path = plan
    batch, expected = reference.draw(11)
    with Engine(path) as engine:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            result = torch.from_dlpack(engine.infer_device(torch.from_numpy(batch).cuda(), stream=stream)[0])
        stream.synchronize()
        require_close(result.float().cpu().numpy(), expected, precision)
        with pytest.raises(InputError):
            engine.infer(torch.from_numpy(batch).cuda().double())


def test_device_arrays_of_cupy(plan: tuple[str, Path], reference: Reference) -> None:
    cupy: Any = pytest.importorskip("cupy")
    precision, path = plan
    batch, expected = reference.draw(11)
    with Engine(path) as engine:
        require_close(cupy.asnumpy(cupy.from_dlpack(engine.infer_device(cupy.asarray(batch))[0])), expected, precision)


def test_bare_loop_gives_the_same_and_memory_is_given_back(
    plan: tuple[str, Path], gpu: Any, reference: Reference
) -> None:
    _, path = plan
    free: list[int] = []
    for _ in range(4):
        with Engine(path) as engine:
            batch, _ = reference.draw(4)
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
    driver.cuDevicePrimaryCtxRelease(device)
    assert int(status) == 0
    return int(free)


def test_plans_of_another_tensorrt_or_changed_are_refused(plan: tuple[str, Path], tmp_path: Path) -> None:
    _, path = plan
    copy = tmp_path / "copy.plan"
    copy.write_bytes(path.read_bytes())
    passport = read_passport(path)
    assert passport is not None
    passport_path(copy).write_text(codec.dumps(replace(passport, tensorrt_version="9.9.9.9")), encoding="utf-8")
    with pytest.raises(PlanIncompatibleError):
        Engine(copy)
    passport_path(copy).write_text(codec.dumps(passport), encoding="utf-8")
    content = path.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PlanError):
        Engine(copy)


def test_pycuda_runs_the_same_plan(plan: tuple[str, Path], reference: Reference) -> None:
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("pycuda is not installed")
    precision, path = plan
    with Engine(path, options=EngineOptions(cuda="pycuda")) as engine:
        for count in (1, 8, 20):
            batch, expected = reference.draw(count)
            require_close(engine.infer(batch), expected, precision)
