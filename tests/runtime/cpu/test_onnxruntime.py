"""The GPU or an error, never the CPU in its place; missing packages are named. Fakes stand in for GPU builds of ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import CudaError, InputError, MissingDependencyError, ModelError
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from tests.runtime.make_model import ModelOptions, make_onnx, random_batch

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
    assert "repvgg-deploy[gpu]" in caught.value.remedy


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
    assert f"repvgg-deploy[{'gpu' if device == 'cuda' else 'cpu'}]" in caught.value.remedy


def test_model_of_a_later_opset_is_refused_by_name(tmp_path: Path) -> None:
    from onnx import load_model_from_string

    from tests.runtime.make_model import make_metadata, write_bound
    from tests.runtime.test_model_files import strip_metadata

    proto = load_model_from_string(strip_metadata(make_onnx(tmp_path / "m.onnx").read_bytes()))
    proto.opset_import[0].version = 999
    path = write_bound(tmp_path / "later.onnx", proto.SerializeToString(), make_metadata())
    with pytest.raises(ModelError, match=r"ONNX Runtime .* refuses it") as caught:
        Engine(path)
    assert "--opset" in caught.value.remedy


IMPORTS = """
import sys
{statement}
heavy = sorted({{"numpy", "onnx", "onnxruntime", "torch", "PIL", "onnxsim"}} & set(sys.modules))
print(",".join(heavy))
"""


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import repvgg_deploy.runtime.engine", "numpy"),
        ("from repvgg_deploy import Engine", "numpy"),
        ("import repvgg_deploy.runtime.opening", ""),
        ("from repvgg_deploy import Engine; Engine({model!r}).close()", "numpy,onnxruntime"),
        ("from repvgg_deploy import Engine; Engine({quantized!r}).close()", "numpy,onnxruntime"),
        (
            "import numpy; from repvgg_deploy import Engine; Engine({model!r}).infer(numpy.zeros((2, 3, 16, 16), "
            "'f4'))",
            "numpy,onnxruntime",
        ),
    ],
)
def test_runtime_imports_only_what_it_runs_with(model: Path, tmp_path: Path, statement: str, allowed: str) -> None:
    from tests.precision.make_chain import make_batches, make_model, save
    from tests.precision.make_quantized import quantize_mixed

    quantized = save(tmp_path / "int8.onnx", quantize_mixed(make_model(), make_batches(count=4)))
    script = IMPORTS.format(statement=statement.format(model=str(model), quantized=str(quantized)))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == allowed
