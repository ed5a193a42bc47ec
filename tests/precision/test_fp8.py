from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from repvgg_deploy.errors import CalibrationError, ParityError
from repvgg_deploy.files.onnx import graph_precision, read_graph, read_metadata, weighted_nodes
from repvgg_deploy.precision.check import check_quantized
from repvgg_deploy.precision.grids import FP8, INT8, find_unsuited
from repvgg_deploy.precision.int8 import FAST, Int8Options, quantize_graph
from repvgg_deploy.precision.metrics import Judge
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.options import QuantizeOptions
from repvgg_deploy.precision.quantization import quantize
from repvgg_deploy.precision.round import round_nearest, round_rows
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.precision.scales import ScaleOptions
from repvgg_deploy.runtime.engine import Engine
from tests.precision.make_chain import KINDS, ChainOptions, make_batches, make_model, save
from tests.precision.make_graph import GRAPHS, draw
from tests.precision.test_int8 import QUICK
from tests.precision.test_quantization import write_pixels

QUICK_FP8 = dataclasses.replace(QUICK, format="fp8")
FAST_FP8 = dataclasses.replace(FAST, target="trt10", format="fp8")
WIDE = ChainOptions(widths=(16, 16, 24, 32), groups=(1, 1, 1, 1))


def decode(codes: np.ndarray) -> np.ndarray:
    """E4M3 by its definition: (−1)^s · 2^(e − 7) · (1 + m / 8), and m · 2⁻⁹ where e is 0; NaN where all are set."""
    sign, exponent, mantissa = np.where(codes >> 7, -1.0, 1.0), (codes >> 3) & 15, codes & 7
    value = np.where(exponent, 2.0 ** (exponent - 7.0) * (1 + mantissa / 8), mantissa * 2.0**-9)
    return np.where((codes & 127) == 127, np.nan, sign * value)


CODES = np.arange(256)
VALUES = decode(CODES)[~np.isnan(decode(CODES))]


def through_onnxruntime(values: np.ndarray) -> np.ndarray:
    """The bytes that ONNX Runtime's QuantizeLinear to E4M3 gives, with scale 1."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]
    nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    one = numpy_helper.from_array(np.float32(1), "scale")
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], [one, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0])


def test_e4m3_every_value_is_its_own_nearest_and_its_own_byte() -> None:
    assert np.array_equal(FP8.nearest(VALUES), VALUES)
    assert np.array_equal(np.signbit(FP8.nearest(VALUES)), np.signbit(VALUES))
    assert np.array_equal(FP8.encode(VALUES), CODES[~np.isnan(decode(CODES))])


def test_e4m3_between_two_values_the_nearer_one_wins_and_a_tie_goes_to_the_even_one() -> None:
    grid = np.unique(np.abs(VALUES))
    middle = (grid[:-1] + grid[1:]) / 2
    even = np.where(np.arange(len(grid) - 1) % 2, grid[1:], grid[:-1])  # bytes ascend with the values: even bytes
    assert np.array_equal(FP8.nearest(middle), even)
    assert np.array_equal(FP8.nearest(np.nextafter(middle, 0)), grid[:-1])
    assert np.array_equal(FP8.nearest(np.nextafter(middle, 999)), grid[1:])
    assert FP8.nearest(np.array([2.0**-10, 3 * 2.0**-10])).tolist() == [0.0, 2.0**-8]  # subnormal steps of 2⁻⁹
    assert FP8.nearest(np.array([463.0, 465.0, 1e9, -np.inf])).tolist() == [448.0, 448.0, 448.0, -448.0]


def test_e4m3_is_what_onnxruntime_computes() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(4000) * 2.0 ** random.integers(-12, 10, 4000)).astype(np.float32)
    assert np.array_equal(FP8.through(values, 1.0), through_onnxruntime(values))


def test_round_rows_on_e4m3_gives_values_of_the_grid_and_less_error_than_nearest() -> None:
    random = np.random.default_rng(1)
    mixing = random.standard_normal((40, 40))
    rows, covariance = random.standard_normal((12, 40)), mixing @ mixing.T
    values, scales = round_rows(rows, covariance, np.zeros((12, 40)), QUICK.rounding, grid=FP8)
    assert np.isin(values, VALUES).all()

    def error(found: np.ndarray) -> float:
        return float(np.einsum("oi,ij,oj->", found - rows, covariance, found - rows))

    plain = round_nearest(rows.astype(np.float32), np.zeros(12, np.float32), FP8)
    assert np.isin(plain.integers, VALUES).all()
    # On integers the same steps halve the error and more; here, too.
    assert error(values * scales[:, None]) < 0.5 * error(plain.weight())


def types_of_pairs(graph: onnx.ModelProto) -> set[tuple[int, int]]:
    """Types of zero point and scale of every pair and every weight."""
    stored = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {(stored[node.input[2]], stored[node.input[1]]) for node in nodes}


def test_fp8_chain_is_typed_as_tensorrt_wants_and_near_fp32() -> None:
    model, batches = make_model(WIDE), make_batches(WIDE, 96)
    graph, report = quantize_graph(model, batches, QUICK_FP8)
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version >= 19
    assert types_of_pairs(graph) == {(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16)}
    check_quantized(graph, target="trt10", kept=report.kept, grid=FP8)
    assert report.format == report.scales.format == "fp8"
    # The stem reads three channels; all others are FP8.
    assert (report.kept, dict(report.unsuited)) == (
        ("stage0.conv",),
        {"stage0.conv": "a convolution of 3 to 16 channels"},
    )
    found = Judge(read_network(model), make_batches(WIDE, 48, seed=9)).compare(graph)
    # Three bits of mantissa: an error of 31 dB at each rounding, of which the second-order steps win some back.
    assert found.sqnr_db > 26


@pytest.mark.parametrize("name", GRAPHS)
def test_fp8_any_graph_keeps_what_tensorrt_has_no_kernels_for_and_says_why(name: str) -> None:
    network = read_network(GRAPHS[name]())
    graph, report = quantize_graph(network, draw(16), FAST_FP8)
    onnx.checker.check_model(graph, full_check=True)
    wanted = {
        layer.name
        for layer in network.layers
        if layer.op_type in ("Conv", "ConvTranspose")
        and (layer.op_type != "Conv" or layer.groups > 1 or min(layer.weight_shape[:2]) < 16)
    }
    assert set(report.unsuited) == wanted <= set(report.kept)
    assert all(why.startswith("a ") for why in report.unsuited.values())


def test_find_unsuited_takes_up_to_32_taps_and_leaves_int8_alone() -> None:
    layer = dataclasses.replace(read_network(make_model(WIDE)).layers[1], weight_shape=(16, 16, 4, 8))
    larger = dataclasses.replace(layer, weight_shape=(16, 16, 7, 7))
    assert find_unsuited([layer], FP8) == {}
    assert find_unsuited([larger], FP8) == {larger.name: "a convolution of 7 × 7 taps"}
    assert find_unsuited([dataclasses.replace(larger, groups=16)], INT8) == {}


def test_fp8_graph_with_the_wrong_kind_of_zero_point_is_refused() -> None:
    graph, report = quantize_graph(make_model(WIDE), make_batches(WIDE, 16), FAST_FP8)
    with pytest.raises(CalibrationError, match="FLOAT8E4M3FN, expected INT8"):
        check_quantized(graph, target="trt10", kept=report.kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "trt8"}, "TensorRT 8 knows no FP8"),
        ({"scales": ScaleOptions("entropy")}, "entropy counts integers"),
        ({"format": "fp4"}, "int8 or fp8"),
    ],
)
def test_fp8_options_that_cannot_hold_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        dataclasses.replace(Int8Options(format="fp8"), **changes)  # type: ignore[arg-type]


def test_fp8_saved_scales_serve_again_and_not_for_int8() -> None:
    model, batches = make_model(KINDS["plain"]), make_batches(KINDS["plain"], 16)
    graph, report = quantize_graph(model, batches, FAST_FP8)
    again, _ = quantize_graph(model, batches, FAST_FP8, saved=report.scales)
    assert again == graph
    with pytest.raises(CalibrationError, match="of FP8"):
        quantize_graph(model, batches, dataclasses.replace(FAST, target="trt10"), saved=report.scales)


def test_fp8_file_is_judged_written_named_and_run_by_the_engine(tmp_path: Path) -> None:
    source, pixels = save(tmp_path / "m.onnx", make_model(WIDE)), write_pixels(tmp_path / "pixels.npz")
    result = quantize(source, None, QuantizeOptions("fp8", pixels, int8=dataclasses.replace(FAST, target="trt10")))
    out = tmp_path / "m-fp8.onnx"
    assert result.output.target == out and result.int8 is not None and result.int8.format == "fp8"
    metadata = read_metadata(out)
    assert [entry.stage for entry in metadata.history] == ["export", "fp8"]
    assert metadata.certificate.checks[-1].name.startswith("fp8 against fp32 in ONNX Runtime, 12 held-out images")
    graph = read_graph(out)
    assert [node.precision for node in weighted_nodes(graph)] == ["fp16", "fp8", "fp8", "fp8", "fp8"]
    assert graph_precision(weighted_nodes(graph)) == "fp8"
    batch = make_batches(WIDE, 4)[0]
    truth = next(run_tensors(onnx.load(out), ["logits"], [batch]))["logits"]
    with Engine(out, backend="fastest") as engine:
        assert "ONNX Runtime" in engine.backend_name
        assert np.array_equal(engine.infer(batch), truth)


def test_fp8_graph_that_is_too_far_is_refused_by_its_own_name(tmp_path: Path) -> None:
    source, pixels = save(tmp_path / "m.onnx", make_model(KINDS["features"])), write_pixels(tmp_path / "pixels.npz")
    steps = dataclasses.replace(FAST, target="trt10")
    with pytest.raises(ParityError, match="FP8 is too far from FP32"):
        quantize(source, None, QuantizeOptions("fp8", pixels, int8=steps, min_sqnr_db=90))


def test_fp8_graph_is_built_by_rtx_for_the_gpus_that_have_it() -> None:
    pytest.importorskip("tensorrt_rtx")
    from tests.precision.rtx import build

    graph, _ = quantize_graph(make_model(WIDE), make_batches(WIDE, 16), FAST_FP8)
    assert build(graph, plan=False).errors == ()
