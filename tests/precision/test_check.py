from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from repvgg_deploy.errors import CalibrationError
from repvgg_deploy.precision.check import Target, check_halves, check_quantized, check_types
from repvgg_deploy.precision.halves import write_halves
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_quantized import quantize_mixed, quantize_plainly
from tests.precision.typed_faults import BOTH_TARGETS, HALF, TRT8, TRT10, node

KEPT = ("stage1.conv", "linear")


def typed(target: Target, kind: str = "plain", kept: tuple[str, ...] = ()) -> onnx.ModelProto:
    make = quantize_mixed if target == "trt10" else quantize_plainly
    return make(make_model(KINDS[kind]), make_batches(KINDS[kind], 4), kept=kept)


@pytest.mark.parametrize("target", ["trt8", "trt10"])
@pytest.mark.parametrize("kind", KINDS)
def test_check_quantized_graphs_of_every_kind_pass(kind: str, target: Target) -> None:
    graph = typed(target, kind)
    check_quantized(graph, target=target)  # raises
    integers = [tensor for tensor in graph.graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.dims]
    layers = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len([tensor for tensor in integers if len(tensor.dims) > 1]) == len(layers)


@pytest.mark.parametrize(
    ("target", "name"), [(t, n) for t, own in (("trt8", TRT8), ("trt10", TRT10)) for n in {**BOTH_TARGETS, **own}]
)
def test_check_quantized_faults_are_refused_by_name(target: Target, name: str) -> None:
    fault = (BOTH_TARGETS | (TRT8 if target == "trt8" else TRT10))[name]
    graph = typed(target)
    fault.change(graph)
    with pytest.raises(CalibrationError, match=fault.message) as caught:
        check_quantized(graph, target=target)
    assert caught.value.remedy


@pytest.mark.parametrize("target", ["trt8", "trt10"])
def test_check_quantized_kept_layers_are_allowed_when_listed_and_only_then(target: Target) -> None:
    graph = typed(target, kept=KEPT)
    check_quantized(graph, target=target, kept=KEPT)
    with pytest.raises(CalibrationError, match=r"linear' reads .* without"):
        check_quantized(graph, target=target, kept=KEPT[:1])
    with pytest.raises(CalibrationError, match=r"stage2\.conv' is to be kept"):
        check_quantized(graph, target=target, kept=(*KEPT, "stage2.conv"))


@pytest.mark.parametrize("name", HALF)
def test_check_halves_faults_are_refused_by_name(name: str) -> None:
    graph = write_halves(make_model())
    check_halves(graph)
    HALF[name].change(graph)
    with pytest.raises(CalibrationError, match=HALF[name].message):
        check_halves(graph)


def test_check_halves_fp32_and_int8_graphs_are_refused() -> None:
    with pytest.raises(CalibrationError, match="computes in FLOAT, expected FLOAT16"):
        check_halves(make_model())
    with pytest.raises(CalibrationError, match="not a plain FP16 graph"):
        check_halves(typed("trt10"))


def test_check_types_image_that_is_not_cast_first_is_refused() -> None:
    model = make_model(KINDS["uint8_top5"])
    check_types(model)
    transpose, cast = node(model, "nchw"), node(model, "cast")
    transpose.input[0], cast.input[0], cast.output[0] = "input", "nchw", "turned"
    node(model, "centred").input[0] = "turned"
    nodes = [transpose, cast, *(n for n in model.graph.node if n.name not in ("nchw", "cast"))]
    ordered = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    with pytest.raises(CalibrationError, match="takes them into Cast only"):
        check_types(model)


def test_check_types_output_that_nothing_gives_is_refused() -> None:
    model = make_model()
    model.graph.output.append(helper.make_tensor_value_info("nothing", onnx.TensorProto.FLOAT, None))
    with pytest.raises(CalibrationError, match="output nothing is of type UNDEFINED"):
        check_types(model)
