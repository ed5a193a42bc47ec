"""OpenVINO as a backend of the Engine: the same answers as ONNX Runtime, from any thread, in memory of their own."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest

from repvgg_deploy.errors import InputError, MissingDependencyError, ModelError
from repvgg_deploy.runtime.cpu import processor
from repvgg_deploy.runtime.cpu.processor import read_features
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.runtime.options import EngineOptions
from tests.runtime.make_model import ModelOptions, make_metadata, make_onnx, random_batch, strip_metadata, write_bound

# FP32 in another order of additions.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(),
        ModelOptions(uint8=True),
        ModelOptions(kind="top5"),
        ModelOptions(kind="features"),
        ModelOptions(batch=4),
        ModelOptions(size=("height", "width")),
    ],
    ids=["logits", "uint8", "top5", "features", "fixed", "any_size"],
)
def test_openvino_answers_as_onnx_runtime_does(tmp_path: Path, options: ModelOptions) -> None:
    path = make_onnx(tmp_path / "m.onnx", options)
    with Engine(path) as one, Engine(path, backend="openvino") as two:
        assert two.backend_name.startswith(f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU")
        for count in (1, 2, 5, 67):
            batch = random_batch(options, count, seed=count)
            answers = [values(engine.infer(batch)) for engine in (one, two)]
            for ours, theirs in zip(*answers, strict=True):
                assert ours.dtype == theirs.dtype
                np.testing.assert_allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE)


def test_one_engine_of_any_size_answers_images_of_one_size_after_another(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx", ModelOptions(size=("height", "width")))
    random = np.random.default_rng(0)
    with Engine(path) as one, Engine(path, backend="openvino") as two:
        for height, width in ((16, 16), (7, 33), (40, 8), (16, 16)):
            batch = random.standard_normal((3, 3, height, width), np.float32)
            ours, theirs = (values(engine.infer(batch))[0] for engine in (one, two))
            np.testing.assert_allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE)


def values(result: object) -> list[np.ndarray]:
    if isinstance(result, np.ndarray):
        return [result]
    return list(result.values()) if isinstance(result, dict) else [result.scores, result.classes]


def test_openvino_computes_float32_as_float32(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx")
    with Engine(path, backend="openvino") as engine:
        assert engine._backend._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.fixture
def processor_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """Pretends to be an x86 with these features; None: they cannot be read."""

    def pretend(flags: str | None) -> None:
        path = tmp_path / "cpuinfo"
        if flags is not None:
            path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n", encoding="utf-8")
        monkeypatch.setattr(processor, "_CPUINFO", path)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    return pretend


class Library:
    """Takes down the settings of OpenVINO, and has no bfloat16 itself: on processors without it, it runs float32."""

    __version__ = openvino.__version__

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}

    def Core(self) -> Library:
        return self

    def read_model(self, source: object) -> openvino.Model:
        return openvino.Core().read_model(source)

    def compile_model(self, model: openvino.Model, device: str, settings: dict[str, object]) -> openvino.CompiledModel:
        self.settings = settings
        return openvino.Core().compile_model(model, device, {**settings, "INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("features", ["avx512_bf16", "amx_tile amx_bf16"])
def test_bfloat16_is_asked_of_openvino_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor_with: Callable[[str | None], None], features: str
) -> None:
    processor_with(features)
    library = Library()
    monkeypatch.setattr("repvgg_deploy.runtime.cpu.openvino.import_backend", lambda *_, **__: library)
    path = make_onnx(tmp_path / "m.onnx")
    with Engine(path, backend="openvino", options=EngineOptions(bfloat16=True)) as engine:
        assert library.settings["INFERENCE_PRECISION_HINT"] == "bf16"
        assert engine.backend_name.endswith(", CPU in bfloat16")
        assert "in bfloat16" in repr(engine)
    with Engine(path, backend="openvino") as engine:
        assert library.settings["INFERENCE_PRECISION_HINT"] == "f32"
        assert engine.backend_name.endswith(", CPU")


@pytest.mark.skipif(
    not (read_features() or frozenset()) & {"amx_bf16", "avx512_bf16"}, reason="this processor has no bfloat16"
)
def test_bfloat16_answers_almost_as_float32(tmp_path: Path) -> None:
    path, batch = make_onnx(tmp_path / "m.onnx"), random_batch(ModelOptions(), 8)
    with (
        Engine(path, backend="openvino") as exact,
        Engine(path, backend="openvino", options=EngineOptions(bfloat16=True)) as engine,
    ):
        assert engine._backend._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        truth, found = exact.infer(batch), engine.infer(batch)
    assert found.dtype == np.float32
    error = np.abs(found - truth).max() / np.abs(truth).max()
    assert 1e-6 < error < 2**-6  # a number keeps eight bits; two layers


@pytest.mark.parametrize(
    ("flags", "why"), [("avx512f avx512_vnni", "neither AMX nor AVX512-BF16"), (None, "does not say what it has")]
)
def test_bfloat16_on_a_processor_without_it_is_refused(
    tmp_path: Path, processor_with: Callable[[str | None], None], flags: str | None, why: str
) -> None:
    processor_with(flags)
    with pytest.raises(InputError, match=why) as caught:
        Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino", options=EngineOptions(bfloat16=True))
    assert "quantize --int8" in caught.value.remedy


@pytest.mark.parametrize("backend", [None, "onnxruntime", "fastest"])
def test_bfloat16_on_onnx_runtime_is_refused_and_never_chosen(
    tmp_path: Path, processor_with: Callable[[str | None], None], backend: Any
) -> None:
    processor_with("amx_bf16")
    path = make_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="only OpenVINO computes in bfloat16") as caught:
        Engine(path, backend=backend, options=EngineOptions(bfloat16=True))
    assert "--backend openvino" in caught.value.remedy
    with Engine(path, backend=backend) as engine:
        assert "bfloat16" not in engine.backend_name


def test_openvino_answers_are_not_overwritten_by_later_batches(tmp_path: Path) -> None:
    with Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino") as engine:
        first = engine.infer(random_batch(ModelOptions(), 3))
        kept = first.copy()
        engine.infer(random_batch(ModelOptions(), 3, seed=1))
        np.testing.assert_array_equal(first, kept)
        assert first.flags.writeable


def test_openvino_takes_arrays_that_are_read_only(tmp_path: Path) -> None:
    batch = random_batch(ModelOptions(), 3)
    with Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino") as engine:
        expected = engine.infer(batch)
        batch.flags.writeable = False
        np.testing.assert_array_equal(engine.infer(batch), expected)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_openvino_from_many_threads_answers_each_with_its_own(tmp_path: Path, threads: int | None) -> None:
    with Engine(
        make_onnx(tmp_path / "m.onnx"), backend="openvino", options=EngineOptions(intra_op_threads=threads)
    ) as engine:
        batches = [random_batch(ModelOptions(), 1 + seed % 4, seed=seed) for seed in range(64)]
        expected = [engine.infer(batch) for batch in batches]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(engine.infer, batches * 4))
        assert 1 <= len(engine._backend._idle) <= 17
    for index, answer in enumerate(found):
        np.testing.assert_allclose(answer, expected[index % 64], rtol=TOLERANCE, atol=TOLERANCE)


def test_openvino_error_is_one_of_ours_and_the_engine_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(ModelOptions(), 3)
    with Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino") as engine:
        real = engine._backend._idle.pop()

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no memory\n left")

        engine._backend._idle.append(SimpleNamespace(infer=fail))
        with pytest.raises(ModelError, match=r"float32 \(3, 3, 16, 16\): no memory left"):
            engine.infer(batch)
        engine._backend._idle.append(real)
        assert engine.infer(batch).shape == (3, 7)


def test_openvino_refuses_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    from onnx import load_model_from_string

    proto = load_model_from_string(strip_metadata(make_onnx(tmp_path / "m.onnx").read_bytes()))
    proto.graph.node[-1].op_type = "NoSuchOperator"
    path = write_bound(tmp_path / "odd.onnx", proto.SerializeToString(), make_metadata())
    with pytest.raises(ModelError, match=r"OpenVINO .* refuses it") as caught:
        Engine(path, backend="openvino")
    assert "onnxruntime" in caught.value.remedy


def test_openvino_refuses_a_graph_that_is_not_the_specified_one(tmp_path: Path) -> None:
    graph = strip_metadata(make_onnx(tmp_path / "m.onnx").read_bytes())
    path = write_bound(tmp_path / "other.onnx", graph, make_metadata(ModelOptions(classes=9)))
    with pytest.raises(ModelError, match="disagree"):
        Engine(path, backend="openvino")


def test_openvino_on_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs on the CPU"):
        Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino", device="cuda")


def test_missing_openvino_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="needs OpenVINO") as caught:
        Engine(make_onnx(tmp_path / "m.onnx"), backend="openvino")
    assert "'.[openvino]'" in caught.value.remedy


_PROGRAM = """
import os, sys, time
import numpy as np
from repvgg_deploy.errors import InputError
from repvgg_deploy.runtime.engine import Engine, EngineOptions

with Engine(sys.argv[1], backend="openvino", options=EngineOptions(intra_op_threads=1)) as engine:
    engine.infer(np.zeros((3, 3, 16, 16), np.float32))
    child = os.fork()
    if not child:
        try:
            engine.infer(np.zeros((3, 3, 16, 16), np.float32))
        except InputError as error:
            engine.close()
            os._exit(7 if "before a fork" in error.message else 8)
        os._exit(9)
    for _ in range(400):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        sys.exit("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 7
    assert engine.infer(np.zeros((3, 3, 16, 16), np.float32)).shape == (3, 7)
"""


def test_child_of_fork_does_not_wait_for_threads_that_are_not_there(tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "m.onnx")
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
