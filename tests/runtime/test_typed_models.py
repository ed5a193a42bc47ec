"""The Engine on typed graphs: Q/DQ pairs are computed as they stand, and float16 inputs and outputs look like float32 ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from repvgg_deploy.errors import InputError
from repvgg_deploy.runtime.engine import Engine
from repvgg_deploy.specs.values import ModelMetadata, TensorSpec
from tests.runtime.cpu.test_onnxruntime import CPU, FakeRuntime, install
from tests.runtime.make_model import ModelOptions, make_metadata, make_onnx, random_batch, write_bound

OPTIONS = ModelOptions(classes=8)


def pair(tensor: str, scale: str) -> list[NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, "zero"], [f"{tensor}.q"]),
        helper.make_node("DequantizeLinear", [f"{tensor}.q", scale, "zero"], [f"{tensor}.dq"]),
    ]


def build_quantized() -> onnx.ModelProto:
    """Two INT8 convolutions with FP16 around their pairs."""
    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "s1": np.array(0.02, np.float16),
        "s2": np.array(0.05, np.float16),
        "zero": np.array(0, np.int8),
    }
    nodes = [helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16)]
    source = "half"
    for name, channels, scale in (("c1", 3, "s1"), ("c2", 8, "s2")):
        arrays |= {
            f"{name}.w": generator.integers(-127, 128, (8, channels, 3, 3)).astype(np.int8),
            f"{name}.s": generator.uniform(0.001, 0.01, 8).astype(np.float16),
            f"{name}.z": np.zeros(8, np.int8),
            f"{name}.b": (3 * generator.standard_normal(8)).astype(np.float16),
        }
        nodes += [
            *pair(source, scale),
            helper.make_node("DequantizeLinear", [f"{name}.w", f"{name}.s", f"{name}.z"], [f"{name}.wd"], axis=0),
            helper.make_node("Conv", [f"{source}.dq", f"{name}.wd", f"{name}.b"], [name], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [name], [f"{name}.relu"]),
        ]
        source = f"{name}.relu"
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["logits"], to=TensorProto.FLOAT),
    ]
    values = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8]),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], constants), opset_imports=[helper.make_opsetid("", 19)]
    )
    model.ir_version = 9
    return model


def test_quantized_graph_is_computed_as_it_stands(tmp_path: Path) -> None:
    """ONNX Runtime's own default optimizers compute this very graph wrongly: the second assertion says when they no longer do."""
    model, batch = build_quantized(), random_batch(OPTIONS, 4)
    path = write_bound(tmp_path / "int8.onnx", model.SerializeToString(), make_metadata(OPTIONS))
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
