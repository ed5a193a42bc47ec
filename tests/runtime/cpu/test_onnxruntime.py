"""The Engine on ONNX Runtime: the GPU or an error, never the CPU in its place; typed graphs computed as they stand.

Fakes stand in for GPU builds of ONNX Runtime. Float16 inputs and outputs look like float32 ones.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from repvgg_deploy.errors import CudaError, InputError, MissingDependencyError, ModelError
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from repvgg_deploy.specs.values import ModelMetadata, TensorSpec
from tests.precision.make_chain import make_batches, save
from tests.precision.make_chain import make_model as make_chain
from tests.precision.make_quantized import quantize_mixed
from tests.runtime.make_model import (
    QUANTIZED,
    ModelOptions,
    build_quantized,
    make_metadata,
    make_onnx,
    random_batch,
    strip_metadata,
    write_bound,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class FakeSessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@dataclass
class FakeRuntime:
    """A GPU build of ONNX Runtime, as far as the backend knows one."""

    available: list[str]
    used: list[str]
    error: Exception | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    fallback: bool = True
    __version__: str = "9.9"
    SessionOptions = FakeSessionOptions

    def get_available_providers(self) -> list[str]:
        return self.available

    def InferenceSession(self, path: str, **options: Any) -> FakeRuntime:
        self.opened = options
        return self

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_providers(self) -> list[str]:
        return self.used

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="images", type="tensor(float)", shape=["batch", 3, 16, 16])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits", type="tensor(float)", shape=["batch", 7])]

    def run(self, names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
        if self.error is not None:
            raise self.error
        return [np.zeros((len(feed["images"]), 7), np.float32)]


def install(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> FakeRuntime:
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    return runtime


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tmp_path_factory.mktemp("model") / "m.onnx")


def test_cuda_on_cpu_build_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    install(monkeypatch, FakeRuntime([CPU], [CPU]))
    with pytest.raises(CudaError, match=f"offers only {CPU}") as caught:
        Engine(model, device="cuda")
    assert "'.[gpu]'" in caught.value.remedy


def test_cuda_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    install(monkeypatch, FakeRuntime([CUDA, CPU], [CPU]))
    with pytest.raises(CudaError, match=f"fell back to {CPU}") as caught:
        Engine(model, device="cuda")
    assert "nvidia-smi" in caught.value.remedy


@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_session_cannot_fall_back_and_has_tf32_off_unless_asked(
    monkeypatch: pytest.MonkeyPatch, model: Path, tf32: bool
) -> None:
    runtime = install(monkeypatch, FakeRuntime([CUDA, CPU], [CUDA, CPU]))
    with Engine(model, device="cuda", options=EngineOptions(device_id=2, tf32=tf32)) as engine:
        assert engine.infer(random_batch(ModelOptions(), 3)).shape == (3, 7)  # type: ignore[union-attr]
        assert engine.backend_name == f"ONNX Runtime 9.9, {CUDA}"
    assert runtime.fallback is False
    assert runtime.opened["enable_fallback"] is False
    assert runtime.opened["providers"] == [(CUDA, {"device_id": "2", "use_tf32": str(int(tf32))})]
    assert runtime.opened["sess_options"].entries == {"session.disable_cpu_ep_fallback": "1"}


def test_cuda_that_does_not_open_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    runtime = install(monkeypatch, FakeRuntime([CUDA, CPU], [CUDA, CPU]))

    def fail(path: str, **options: Any) -> FakeRuntime:
        raise RuntimeError("CUDA failure 100:\n no CUDA-capable device is detected")

    monkeypatch.setattr(runtime, "InferenceSession", fail)
    with pytest.raises(CudaError, match="GPU 1: CUDA failure 100: no CUDA-capable device"):
        Engine(model, device="cuda", options=EngineOptions(device_id=1))


def test_run_that_fails_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    batch = random_batch(ModelOptions(), 3)
    install(monkeypatch, FakeRuntime([CUDA, CPU], [CUDA, CPU], error=RuntimeError("out of memory")))
    with (
        Engine(model, device="cuda") as engine,
        pytest.raises(CudaError, match=r"float32 \(3, 3, 16, 16\): out of memory"),
    ):
        engine.infer(batch)
    with Engine(model) as engine, pytest.raises(ModelError, match="out of memory") as caught:
        engine.infer(batch)
    assert "max_batch" in caught.value.remedy


def test_cpu_names_its_provider_though_a_gpu_is_there(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    runtime = install(monkeypatch, FakeRuntime([CUDA, CPU], [CPU]))
    Engine(model, options=EngineOptions(intra_op_threads=3)).close()
    assert runtime.opened["providers"] == [CPU]
    assert runtime.opened["sess_options"].intra_op_num_threads == 3


def test_cuda_on_this_machine_is_never_silently_cpu(model: Path) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this machine has a GPU build of ONNX Runtime")
    with pytest.raises(CudaError):
        Engine(model, device="cuda")


def test_unknown_device_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="found 'gpu'") as caught:
        Engine(model, device="gpu")
    assert "device_id" in caught.value.remedy


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch, model: Path, device: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="ONNX Runtime") as caught:
        Engine(model, device=device)
    assert f"'.[{'gpu' if device == 'cuda' else 'cpu'}]" in caught.value.remedy


def test_model_of_a_later_opset_is_refused_by_name(tmp_path: Path) -> None:
    proto = onnx.load_model_from_string(strip_metadata(make_onnx(tmp_path / "m.onnx").read_bytes()))
    proto.opset_import[0].version = 999
    path = write_bound(tmp_path / "later.onnx", proto.SerializeToString(), make_metadata())
    with pytest.raises(ModelError, match=r"ONNX Runtime .* refuses it") as caught:
        Engine(path)
    assert "--opset" in caught.value.remedy


# What is loaded only grows, so each step is looked at in one process.
IMPORTS = """
import sys
for statement in {statements!r}:
    exec(statement)
    print(",".join(sorted({{"numpy", "onnx", "onnxruntime", "torch", "PIL", "onnxsim"}} & set(sys.modules))))
"""


def test_runtime_imports_only_what_it_runs_with(model: Path, tmp_path: Path) -> None:
    quantized = save(tmp_path / "int8.onnx", quantize_mixed(make_chain(), make_batches(count=4)))
    statements = {
        "import repvgg_deploy.runtime.opening, repvgg_deploy.runtime.options": "",
        "import repvgg_deploy.runtime.engine": "numpy",
        "from repvgg_deploy import Engine": "numpy",
        f"Engine({str(model)!r}).close()": "numpy,onnxruntime",
        f"Engine({str(quantized)!r}).close()": "numpy,onnxruntime",
        f"import numpy; Engine({str(model)!r}).infer(numpy.zeros((2, 3, 16, 16), 'f4'))": "numpy,onnxruntime",
    }
    script = IMPORTS.format(statements=list(statements))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert dict(zip(statements, done.stdout.splitlines(), strict=True)) == statements


def test_quantized_graph_is_computed_as_it_stands(tmp_path: Path) -> None:
    """ONNX Runtime's default optimizers compute this graph wrongly: the second assertion says when no longer."""
    model, batch = build_quantized(), random_batch(QUANTIZED, 4)
    path = write_bound(tmp_path / "int8.onnx", model.SerializeToString(), make_metadata(QUANTIZED))
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    truth = onnxruntime.InferenceSession(str(path), session_options, providers=[CPU]).run(None, {"images": batch})[0]
    with Engine(path) as engine:
        found = engine.infer(batch)
    # FP16 sums in another order, and a value half-way between two integers may round the other way.
    assert np.abs(found - truth).max() < 0.02 * np.abs(truth).max()
    session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    usual = onnxruntime.InferenceSession(str(path), session_options, providers=[CPU]).run(None, {"images": batch})[0]
    if onnxruntime.__version__.startswith("1.32."):
        assert np.abs(usual - truth).max() > 0.2 * np.abs(truth).max()


@pytest.mark.parametrize("quantized", [False, True])
def test_optimizer_is_switched_off_for_quantized_graphs_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quantized: bool
) -> None:
    runtime = install(monkeypatch, FakeRuntime([CPU], [CPU]))
    path = make_onnx(tmp_path / "m.onnx")
    if quantized:
        path = write_bound(tmp_path / "q.onnx", build_quantized().SerializeToString(), make_metadata())
    Engine(path).close()
    assert runtime.opened.get("disabled_optimizers") == (["WeightBiasQuantization"] if quantized else None)


def make_half(path: Path) -> Path:
    """A graph with float16 input and output."""
    model = onnx.load(str(make_onnx(path)))
    graph = model.graph
    for tensor in graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.metadata_props[:]
    metadata = make_metadata()
    source, output = (
        dataclasses.replace(tensor, dtype="float16") for tensor in (metadata.spec.input, *metadata.spec.outputs)
    )
    return write_bound(path, model.SerializeToString(), with_tensors(metadata, source, output))


def with_tensors(metadata: ModelMetadata, source: TensorSpec, output: TensorSpec) -> ModelMetadata:
    return dataclasses.replace(metadata, spec=dataclasses.replace(metadata.spec, input=source, outputs=(output,)))


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return make_half(tmp_path / "half.onnx")


def test_float16_model_takes_float32_and_float16_and_gives_float32(half: Path, tmp_path: Path) -> None:
    batch = random_batch(ModelOptions(), 5)
    with Engine(half) as engine, Engine(make_onnx(tmp_path / "m.onnx")) as reference:
        found = engine.infer(batch)
        assert found.dtype == np.float32
        assert np.array_equal(found, engine.infer(batch.astype(np.float16)))
        truth = reference.infer(batch)
        assert np.abs(found - truth).max() < 5e-3 * np.abs(truth).max()  # eleven digits of two, a few layers
        engine.warm_up()


@pytest.mark.parametrize(
    ("value", "message"),
    [(70000.0, "float16 holds, at most 65504, found 70000"), (np.nan, "NaN"), (-np.inf, "infinite")],
)
def test_float16_model_refuses_what_float16_cannot_hold(half: Path, value: float, message: str) -> None:
    batch = random_batch(ModelOptions(), 2)
    batch[1, 1, 1, 1] = value
    with Engine(half) as engine, pytest.raises(InputError, match=message):
        engine.infer(batch)


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_float16_model_refuses_other_dtypes(half: Path, dtype: Any) -> None:
    with Engine(half) as engine, pytest.raises(InputError, match="the dtype differs: expected float16"):
        engine.infer(np.zeros((1, 3, 16, 16), dtype))
