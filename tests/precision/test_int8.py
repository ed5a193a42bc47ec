from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import ArtifactError, CalibrationError, ModelError
from repvgg_deploy.files import onnx as onnx_file
from repvgg_deploy.precision.check import check_quantized
from repvgg_deploy.precision.int8 import FAST, MAX_CALIBRATION, Int8Options, quantize_graph, to_int8
from repvgg_deploy.precision.metrics import blank_batch, count_macs, layer_sqnr
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.round import RoundOptions
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.precision.search import SearchOptions
from repvgg_deploy.precision.typed_model import load_parent, write_typed
from tests.precision.make_chain import KINDS, make_batches, make_model, save

QUICK = Int8Options(
    search=SearchOptions((0.5, 0.85), images=32, positions=1024), rounding=RoundOptions(clips=(1.0, 0.7), samples=4096)
)
QUICK_TRT8 = dataclasses.replace(QUICK, target="trt8")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
TARGETS = {"trt8": QUICK_TRT8, "trt10": QUICK}


def held_out(kind: str):
    return make_batches(KINDS[kind], 48, seed=9)


@functools.cache
def sqnr_of_usual_tools(kind: str) -> tuple[float, ...]:
    """Decibels of the logits with max calibration and with the quick steps."""
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 128)
    return tuple(quantize_graph(model, batches, one)[1].layers[-1].sqnr_db for one in (MAX_CALIBRATION, FAST))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_every_kind_of_graph_is_what_tensorrt_wants_and_beats_max_calibration(kind: str, target: str) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 128)
    graph, report = quantize_graph(model, batches, TARGETS[target])
    plain, fast = sqnr_of_usual_tools(kind)
    found = {"max": plain, "fast": fast, "ours": report.layers[-1].sqnr_db}
    # Channels spread over six octaves: per-tensor scales lose most of them. What is left to gain in a network of six
    # layers was 8 dB and more.
    assert found["ours"] >= found["max"] + 4, found
    # In so shallow a network activations are most of what is left, at 30 dB and more: the rounding may then gain
    # nothing.
    assert found["ours"] >= found["fast"] - 1.5, found
    onnx.checker.check_model(graph, full_check=True)
    gates = read_network(model).gates  # SE, and nothing else, stays in floating point
    check_quantized(graph, target=target, kept=gates)
    assert (report.images, report.kept) == (128, gates)
    assert report.int8_share == 1.0 if not gates else report.int8_share > 0.99
    assert next(entry.version for entry in graph.opset_import if not entry.domain) == (17 if target == "trt8" else 19)
    float_type = TensorProto.FLOAT if target == "trt8" else TensorProto.FLOAT16
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type in ("Conv", "Gemm") and node.name not in gates:
            weight = constants[node.input[1].removesuffix(".dequantized")]
            assert weight.data_type == TensorProto.INT8
            assert np.abs(numpy_helper.to_array(weight).astype(int)).max() <= 127
            assert constants[node.input[2]].data_type == float_type
    assert [(o.name, o.type) for o in graph.graph.output] == [(o.name, o.type) for o in model.graph.output]


@pytest.mark.parametrize("target", TARGETS)
def test_int8_held_out_images_are_computed_as_well_as_calibration_says(target: str) -> None:
    model = make_model()
    graph, report = quantize_graph(model, make_batches(count=128), TARGETS[target])
    # float32: the last layer of a trt10 graph gives FP16, and squares of its logits may exceed that.
    truth, ours = (
        np.concatenate([v["logits"] for v in run_tensors(m, ["logits"], held_out("plain"))]).astype(np.float32)
        for m in (model, graph)
    )
    sqnr = 10 * np.log10(np.square(truth).sum() / np.square(truth - ours).sum())
    assert abs(sqnr - report.layers[-1].sqnr_db) < 3  # other images, 48 of them
    assert sqnr > 20


@pytest.mark.parametrize("target", TARGETS)
def test_int8_same_input_twice_gives_the_same_bytes(target: str) -> None:
    model, batches = make_model(KINDS["se_before"]), make_batches()
    one, other = (
        quantize_graph(model, batches, TARGETS[target])[0].SerializeToString(deterministic=True) for _ in range(2)
    )
    assert one == other


def test_int8_integer_kernels_agree_with_the_graph_as_it_stands() -> None:
    """ONNX Runtime's fused integer convolutions are another implementation of the same graph."""
    model, batches = make_model(), make_batches()
    graph, _ = quantize_graph(model, batches, QUICK_TRT8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    fused = np.concatenate([session.run(["logits"], {"input": batch})[0] for batch in batches])
    plain = np.concatenate([v["logits"] for v in run_tensors(graph, ["logits"], batches)])
    # A value half-way between two integers may round the other way: a small part of the quantization noise itself.
    assert np.square(fused - plain).sum() < 1e-3 * np.square(plain).sum()


@pytest.mark.parametrize("target", TARGETS)
def test_int8_dead_channels_and_one_image_still_give_finite_weights(target: str) -> None:
    model = make_model()
    for tensor in model.graph.initializer:
        if tensor.name in ("stage1.weight", "stage1.bias"):
            values = numpy_helper.to_array(tensor).copy()
            values[2] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    graph, report = quantize_graph(model, make_batches(count=1, size=1), TARGETS[target])
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in graph.graph.initializer if t.data_type in FLOATS)
    assert report.images == 1


def test_to_int8_file_carries_metadata_bound_to_it(tmp_path: Path) -> None:
    parent = save(tmp_path / "fp32.onnx", make_model())
    seen: dict[str, list[tuple[int, int]]] = {}
    typed, report = to_int8(
        parent,
        make_batches(),
        QUICK,
        progress=lambda stage, done, all_: seen.setdefault(stage, []).append((done, all_)),
    )
    assert write_typed(tmp_path / "int8.onnx", typed) == "written"
    assert write_typed(tmp_path / "int8.onnx", typed) == "up to date"
    metadata = onnx_file.read_metadata(tmp_path / "int8.onnx")
    assert [entry.stage for entry in metadata.history] == ["export", "int8"]
    assert metadata.history[-1].parent_sha256 == load_parent(parent).sha256
    assert metadata.history[-1].options["data_sha256"] == report.scales.data_sha256
    assert metadata.spec == onnx_file.read_metadata(parent).spec
    assert metadata.history[-1].options["target"] == "trt10"
    assert list(seen) == ["ranges", "equalize", "round", "measure layers"]  # in the order of the work
    assert seen["ranges"] == [(16 * (index + 1), 128) for index in range(8)]  # 64 images, twice
    assert seen["equalize"] == [(index + 1, 5) for index in range(5)]
    assert seen["round"] == [(index + 1, 6) for index in range(6)]
    model = onnx.load(tmp_path / "int8.onnx")
    assert model.SerializeToString(deterministic=True) == (tmp_path / "int8.onnx").read_bytes()
    assert (
        (tmp_path / "int8.onnx").stat().st_size < 0.6 * parent.stat().st_size
    )  # a quarter of the weights; names and metadata weigh in so small a graph
    again, _ = to_int8(onnx.load(parent), make_batches(), QUICK)
    assert again.model.SerializeToString(deterministic=True) == typed.model.SerializeToString(deterministic=True)
    with pytest.raises(ArtifactError, match="differs"):
        write_typed(tmp_path / "fp32.onnx", typed)
    with pytest.raises(CalibrationError, match="typed already"):
        to_int8(tmp_path / "int8.onnx", make_batches(), QUICK)


def test_load_parent_without_or_with_damaged_metadata_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ModelError, match="no repvgg_deploy metadata"):
        to_int8(model, make_batches(), QUICK)
    model.metadata_props.add(key="repvgg_deploy", value="{}")
    with pytest.raises(ModelError, match="damaged"):
        load_parent(model)
    with pytest.raises(ModelError, match="no such file"):
        load_parent(tmp_path / "none.onnx")


def _change(model: onnx.ModelProto, name: str, value) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def _bias_pair(model: onnx.ModelProto) -> None:
    _change(model, "stage0.bias", np.ones(8, np.int32))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "bs"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int32), "bz"))
    model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["stage0.bias", "bs", "bz"], ["b"], name="bias.dequantize", axis=0)
    )
    next(n for n in model.graph.node if n.name == "stage0.conv").input[2] = "b"


def _pair_before_relu(model: onnx.ModelProto) -> None:
    constants = ["stage0.scale", "stage0.zero_point"]
    index, relu = next((i, n) for i, n in enumerate(model.graph.node) if n.name == "stage0")
    relu.input[0] = "between"
    model.graph.node.insert(index, helper.make_node("DequantizeLinear", ["q", *constants], ["between"], name="d"))
    model.graph.node.insert(
        index, helper.make_node("QuantizeLinear", ["stage0.conv", *constants], ["q"], name="between.quantize")
    )


BROKEN = {
    "zero point": (lambda m: _change(m, "stage0.zero_point", np.int8(3)), "zero point other than 0"),
    "unsigned": (lambda m: _change(m, "stage0.zero_point", np.uint8(0)), "is of UINT8"),
    "scale": (lambda m: _change(m, "stage0.scale", np.float32(0)), "not positive"),
    "per tensor": (lambda m: _change(m, "stage0.weight.scale", np.float32(0.1)), "one scale per output channel"),
    "bias": (_bias_pair, "is of INT32"),
    "before relu": (_pair_before_relu, "between a convolution and its ReLU"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_quantized_what_tensorrt_refuses_is_refused(name: str) -> None:
    graph, _ = quantize_graph(make_model(), make_batches(), MAX_CALIBRATION)
    check_quantized(graph)
    change, message = BROKEN[name]
    change(graph)
    with pytest.raises(CalibrationError, match=message):
        check_quantized(graph)


def test_check_quantized_unpaired_layer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="without a Q/DQ pair"):
        check_quantized(make_model())


def test_layer_sqnr_equal_graphs_have_no_noise() -> None:
    model = make_model()
    assert set(layer_sqnr(read_network(model), model, make_batches()).values()) == {200.0}


def test_int8_old_opset_is_refused() -> None:
    model = make_model()
    model.opset_import[0].version = 11
    with pytest.raises(CalibrationError, match="opset 11"):
        quantize_graph(model, make_batches())


def test_int8_scales_saved_for_fp32_are_refused_where_fp16_must_hold_them() -> None:
    model, batches = make_model(), make_batches()
    _, report = quantize_graph(model, batches, dataclasses.replace(QUICK, target="trt8"))
    assert report.scales.target == "trt8"
    with pytest.raises(CalibrationError, match="made for trt8"):
        quantize_graph(model, batches, dataclasses.replace(QUICK, target="trt10"), saved=report.scales)
    _, wider = quantize_graph(model, batches, dataclasses.replace(QUICK, target="trt10"))
    graph, _ = quantize_graph(model, batches, dataclasses.replace(QUICK, target="trt8"), saved=wider.scales)
    check_quantized(graph)


def test_count_macs_of_a_blank_batch_are_those_of_an_image() -> None:
    for kind in ("plain", "grouped", "uint8_top5"):
        model = make_model(KINDS[kind])
        assert count_macs(read_network(model), blank_batch(model)) == count_macs(
            read_network(model), make_batches(KINDS[kind], 1)[0]
        )
