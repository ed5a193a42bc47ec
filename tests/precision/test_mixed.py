from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from repvgg_deploy.errors import CalibrationError, ModelError
from repvgg_deploy.precision.mixed import (
    halve_quantized,
    raise_opset,
    round_activation_scales,
    round_layer_to_half,
    round_scales_to_half,
)
from repvgg_deploy.precision.network import read_network
from repvgg_deploy.precision.round import RoundedLayer
from repvgg_deploy.precision.scales import fit_scales
from tests.precision.compare import STRETCHED, batches_for, relative, sqnr, stretch, values
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_quantized import input_ranges, quantize_mixed, quantize_plainly
from tests.precision.make_variant import read_array
from tests.precision.typed_faults import put

KEPT = ("stage1.conv", "stage2.conv")


@pytest.mark.parametrize("kept", [(), KEPT], ids=["all INT8", "two kept"])
@pytest.mark.parametrize("io", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_every_kind_of_graph_computes_what_its_fp32_scales_do(kind: str, io: str, kept: tuple[str, ...]) -> None:
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 16)
    before = quantize_plainly(model, batches, kept=kept, half=True)
    graph = halve_quantized(before, io=io, kept=kept)
    onnx.checker.check_model(graph, full_check=True)
    assert (graph.opset_import[0].version, graph.ir_version) == (19, 9)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for layer in read_network(model).layers:
        assert types[layer.weight] == (TensorProto.FLOAT16 if layer.name in kept else TensorProto.INT8)
        assert types[layer.bias] == TensorProto.FLOAT16
        if layer.name not in kept:
            assert np.array_equal(read_array(graph, layer.weight), read_array(before, layer.weight))
            assert np.array_equal(
                read_array(graph, f"{layer.weight}.scale"), read_array(before, f"{layer.weight}.scale")
            )
    found = values(graph, batches_for(kind, io, 16))
    assert {value.dtype.name for value in found} == {"float16" if io == "fp16" else "float32"}
    # FP16 between the layers moves some values across a rounding boundary of INT8, by one step each: 15 dB below what
    # INT8 itself costs here.
    assert sqnr(found, values(before, batches)) > 25


def read_by(model: onnx.ModelProto, source: str) -> str:
    """The tensor in which a layer's output is read."""
    network = read_network(model)
    interface = next(interface for interface in network.interfaces if interface.source == source)
    return network.layer(interface.readers[0]).input


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**14], ids=["subnormal", "overflow"])
@pytest.mark.parametrize("kind", STRETCHED)
def test_fit_scales_layer_out_of_reach_comes_into_it_and_no_integer_changes(kind: str, factor: float) -> None:
    """A whole layer's output shrunk or grown by a power of two: neither FP32 nor INT8 see it, FP16 cannot hold it."""
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 16)
    moved = stretch(make_model(KINDS[kind]), factor, STRETCHED[kind], every=1)
    with pytest.raises(CalibrationError, match=r"exceeds|exact in FP16"):
        halve_quantized(quantize_plainly(moved, batches))
    fitted, factors = fit_scales(read_network(moved), input_ranges(moved, batches))
    assert read_by(moved, f"{STRETCHED[kind]}.conv") in fitted.divided(factors)
    assert relative(values(fitted.model, batches), values(moved, batches)) == 0.0
    one, other = quantize_mixed(model, batches), quantize_mixed(moved, batches)
    for layer in read_network(model).layers:
        assert np.array_equal(read_array(one, layer.weight), read_array(other, layer.weight))
    # Scales and biases round to FP16 alike, but for those that are subnormal in one: few values on the edge of a
    # rounding differ.
    assert sqnr(values(other, batches), values(one, batches)) > 35


@pytest.mark.parametrize("kind", ["plain", "grouped", "se_before", "se_after"])
def test_fit_scales_weak_rows_are_lifted_by_themselves(kind: str) -> None:
    model, batches = stretch(make_model(KINDS[kind]), 2.0**-18, "stage1", every=5), make_batches(KINDS[kind], 16)
    fitted, factors = fit_scales(read_network(model), input_ranges(model, batches))
    lifted = fitted.divided(factors)[read_by(model, "stage1.conv")]
    assert lifted.max() / lifted.min() >= 2.0**10
    assert relative(values(fitted.model, batches), values(model, batches)) == 0.0
    scales = read_array(quantize_plainly(fitted.model, batches), "stage1.weight.scale")
    assert scales.min() >= 2.0**-14
    # So unequal channels cost INT8 much whatever its scales are; FP16 must not add to it.
    truth = values(model, batches)
    assert (
        sqnr(values(quantize_mixed(model, batches), batches), truth)
        > sqnr(values(quantize_plainly(model, batches), batches), truth) - 0.5
    )


def test_fit_scales_comfortable_network_stays_as_it_is() -> None:
    model, batches = make_model(), make_batches()
    _, factors = fit_scales(read_network(model), input_ranges(model, batches))
    assert (factors == 1).all()


def test_fit_scales_weak_layer_that_cannot_be_rescaled_is_lifted_from_before() -> None:
    """The classifier's rows shrink: its input grows instead."""
    model, batches = make_model(), make_batches()
    put(model, "linear.weight", read_array(model, "linear.weight") * np.float32(2.0**-12))
    fitted, factors = fit_scales(read_network(model), input_ranges(model, batches))
    assert np.abs(read_array(fitted.model, "linear.weight")).max(axis=1).min() > 127 * 2.0**-14
    grown = fitted.divided(factors)["flatten"]
    assert np.array_equal(grown, np.exp2(np.round(np.log2(grown))))


def test_fit_scales_factors_rescale_the_ranges_that_they_were_chosen_from() -> None:
    model, batches = (
        stretch(make_model(KINDS["se_after"]), 2.0**-20, "stage1", every=1),
        make_batches(KINDS["se_after"]),
    )
    ranges = input_ranges(model, batches)
    fitted, factors = fit_scales(read_network(model), ranges)
    for name, found in input_ranges(fitted.model, batches).items():
        assert np.allclose(found, ranges[name] / fitted.divided(factors).get(name, 1.0), rtol=1e-6)


def test_fit_scales_what_cannot_be_rescaled_is_refused() -> None:
    model, batches = make_model(), make_batches(count=4)
    ranges = input_ranges(model, batches)
    with pytest.raises(CalibrationError, match="ranges of stage0: expected 8 finite numbers, found nothing"):
        fit_scales(read_network(model), {name: value for name, value in ranges.items() if name != "stage0"})
    put(model, "linear.bias", np.full(10, 1e6, np.float32))
    with pytest.raises(CalibrationError, match="linear: FP16 ends at 65504") as caught:
        fit_scales(read_network(model), ranges)
    assert "trt8" in caught.value.remedy


def test_round_scales_are_exact_in_fp16_and_never_subnormal() -> None:
    scales = np.array([1.0, 0.1, 2.0**-14, 1e-6, 1e-30, 6e4], np.float32)
    found = round_scales_to_half(scales)
    assert found.dtype == np.float32
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert found.min() == 2.0**-14
    assert np.abs(found[:3] / scales[:3] - 1).max() <= 2.0**-11
    assert round_activation_scales({"x": 0.1}) == {"x": float(np.float16(0.1))}
    with pytest.raises(CalibrationError, match="exceeds FP16"):
        round_scales_to_half(np.array([1e5]))


def test_round_layer_subnormal_rows_are_rounded_again() -> None:
    integers = np.array([[127, -64], [127, 64]], np.int8)
    layer = round_layer_to_half(
        RoundedLayer(integers, np.array([0.1, 2.0**-16], np.float32), np.array([0.3, 5.0], np.float32))
    )
    assert layer.integers.tolist() == [[127, -64], [32, 16]]
    assert layer.scales[1] == 2.0**-14
    assert layer.bias.tolist() == [float(np.float16(0.3)), 5.0]
    with pytest.raises(CalibrationError, match="bias exceeds FP16"):
        round_layer_to_half(RoundedLayer(integers, np.ones(2, np.float32), np.array([1e6, 0], np.float32)))


def test_halve_quantized_scales_that_are_not_exact_are_refused() -> None:
    model, batches = make_model(), make_batches(count=4)
    with pytest.raises(CalibrationError, match="is not exact in FP16, or subnormal"):
        halve_quantized(quantize_plainly(model, batches))
    with pytest.raises(CalibrationError, match="without a Q/DQ pair"):
        halve_quantized(quantize_plainly(model, batches, half=True, kept=KEPT))


def test_raise_opset_keeps_a_higher_one_and_refuses_operators_that_changed() -> None:
    model = make_model()
    model.opset_import[0].version = 20
    raise_opset(model, 19)
    assert (model.opset_import[0].version, model.ir_version) == (20, 9)
    model.opset_import[0].version = 17
    model.graph.node.append(helper.make_node("AveragePool", ["logits"], ["r"], name="r", ceil_mode=1))
    with pytest.raises(ModelError, match=r"AveragePool .* with ceil_mode"):
        raise_opset(model, 19)
    del model.opset_import[:]
    with pytest.raises(ModelError, match="names no ONNX operator set"):
        raise_opset(model, 19)
