"""Q/DQ pairs and INT8 weights in a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .chain import Chain, FloatArray, copy_model, copy_without, replace_weights, set_nodes
from .round import RoundedLayer


def fake_quantize(value: NDArray[Any], scale: float) -> FloatArray:
    """What a Q/DQ pair makes of a float32 array."""
    step = np.float32(scale)
    return np.asarray(np.clip(np.rint(value / step), -128, 127) * step, np.float32)


def insert_pairs(chain: Chain, scales: Mapping[str, float], *, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of an FP32 graph with a Q/DQ pair on every layer's input but those `kept`; weights stay FP32."""
    result = copy_model(chain.model)
    readers = {layer.name for layer in chain.layers} - set(kept)
    nodes: list[onnx.NodeProto] = []
    paired: set[str] = set()
    for node in result.graph.node:
        if node.name in readers:
            tensor = node.input[0]
            if tensor not in paired:
                nodes += _pair(tensor)
                paired.add(tensor)
            node.input[0] = f"{tensor}.dequantized"
        nodes.append(node)
    set_nodes(result.graph, nodes)
    for tensor in (name for name in chain.quantized_tensors() if name in paired):
        scale, zero_point = np.array(scales[tensor], np.float32), np.array(0, np.int8)
        result.graph.initializer.append(numpy_helper.from_array(scale, f"{tensor}.scale"))
        result.graph.initializer.append(numpy_helper.from_array(zero_point, f"{tensor}.zero_point"))
    return result


def _pair(tensor: str) -> list[onnx.NodeProto]:
    constants, between, after = (
        [f"{tensor}.scale", f"{tensor}.zero_point"],
        f"{tensor}.quantized",
        f"{tensor}.dequantized",
    )
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [between], name=f"{tensor}.quantize"),
        helper.make_node("DequantizeLinear", [between, *constants], [after], name=f"{tensor}.dequantize"),
    ]


def write_integers(model: onnx.ModelProto, rounded: Mapping[str, RoundedLayer]) -> onnx.ModelProto:
    """A copy of a graph with pairs, with INT8 weights behind DequantizeLinear (axis 0), and the corrected biases."""
    arrays: dict[str, NDArray[Any]] = {}
    result = copy_without(model, {node.input[1] for node in model.graph.node if node.name in rounded})
    dequantizers = []
    for node in result.graph.node:
        if node.name not in rounded:
            continue
        layer, weight = rounded[node.name], node.input[1]
        constants, after = [weight, f"{weight}.scale", f"{weight}.zero_point"], f"{weight}.dequantized"
        arrays |= dict(
            zip(constants, (layer.integers, layer.scales, np.zeros(len(layer.scales), np.int8)), strict=True)
        )
        arrays[node.input[2]] = layer.bias
        name = f"{weight}.dequantize"
        dequantizers.append(helper.make_node("DequantizeLinear", constants, [after], name=name, axis=0))
        node.input[1] = after
    set_nodes(result.graph, [*dequantizers, *result.graph.node])
    return replace_weights(result, arrays)
