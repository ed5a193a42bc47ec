"""INT8 graphs in ONNX Runtime and in OpenVINO: two implementations that share no code agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import openvino
import pytest

from tests.precision.compare import sqnr, values
from tests.precision.make_chain import KINDS, make_batches, make_model
from tests.precision.make_quantized import quantize_mixed, quantize_plainly
from tests.precision.make_variant import SMALL_G4, images_for, make_variant

# Both compute the same integers; a value on the edge of a rounding falls either way, by one step, where sums are taken
# in another order: 60 dB and more. OpenVINO computes an FP16 graph in FP32 when told to, ONNX Runtime rounds to FP16
# after every layer: that moves more of them, which here is still 10 dB below what INT8 itself costs.
TOLERANCE_DB = {"INT8": 50.0, "INT8+FP16": 24.0}
MAKE: dict[str, Any] = {"INT8": quantize_plainly, "INT8+FP16": quantize_mixed}


def in_openvino(model: onnx.ModelProto, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs but class numbers; in FP32, not in bfloat16, which is its default."""
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    names = [value.name for value in model.graph.output if value.name != "classes"]
    found = [compiled(batch) for batch in batches]
    return [np.concatenate([results[name] for results in found]) for name in names]


@pytest.mark.parametrize("typing", MAKE)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_graph_onnx_runtime_and_openvino_agree(kind: str, typing: str) -> None:
    batches = make_batches(KINDS[kind], 16)
    graph = MAKE[typing](make_model(KINDS[kind]), batches)
    assert sqnr(in_openvino(graph, batches), values(graph, batches)) > TOLERANCE_DB[typing]


@pytest.mark.parametrize("typing", MAKE)
def test_int8_graph_of_a_grouped_variant_onnx_runtime_and_openvino_agree(typing: str) -> None:
    model = make_variant(SMALL_G4)
    batches = images_for(model, 8)
    graph = MAKE[typing](model, batches)
    assert sqnr(in_openvino(graph, batches), values(graph, batches)) > TOLERANCE_DB[typing]


@pytest.mark.parametrize("kind", ["plain", "se_after", "grouped"])
def test_mixed_graph_computes_in_fp32_what_the_graph_with_fp32_scales_does(kind: str) -> None:
    """OpenVINO in FP32 sees only the values of the scales, which are the same: only the biases' rounding is left."""
    model, batches = make_model(KINDS[kind]), make_batches(KINDS[kind], 16)
    before = quantize_plainly(model, batches, half=True)
    assert sqnr(in_openvino(quantize_mixed(model, batches), batches), in_openvino(before, batches)) > 60
