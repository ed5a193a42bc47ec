"""Q/DQ pairs and INT8 weights in a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .chain import FloatArray, copy_without, read_chain, replace_weights
from .round import RoundedLayer


def fake_quantize(value: NDArray[Any], scale: float) -> FloatArray:
    """What a Q/DQ pair makes of a float32 array."""
    step = np.float32(scale)
    return np.asarray(np.clip(np.rint(value / step), -128, 127) * step, np.float32)


def insert_pairs(model: onnx.ModelProto, scales: Mapping[str, float], *, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A copy with a Q/DQ pair on every layer's input; weights stay FP32.

    Args:
        model: FP32; not changed.
        scales: By name of a layer's input.
        kept: Names of layers that stay in floating point and get none.
    """
    chain = read_chain(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
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
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    for tensor in (name for name in chain.quantized_tensors() if name in paired):
        result.graph.initializer.append(
            numpy_helper.from_array(np.array(scales[tensor], np.float32), f"{tensor}.scale")
        )
        result.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), f"{tensor}.zero_point"))
    return result


def _pair(tensor: str) -> list[onnx.NodeProto]:
    constants = [f"{tensor}.scale", f"{tensor}.zero_point"]
    quantize = helper.make_node(
        "QuantizeLinear", [tensor, *constants], [f"{tensor}.quantized"], name=f"{tensor}.quantize"
    )
    return [
        quantize,
        helper.make_node(
            "DequantizeLinear",
            [f"{tensor}.quantized", *constants],
            [f"{tensor}.dequantized"],
            name=f"{tensor}.dequantize",
        ),
    ]


def write_integers(model: onnx.ModelProto, rounded: Mapping[str, RoundedLayer]) -> onnx.ModelProto:
    """A copy with INT8 weights behind DequantizeLinear (axis 0), and the corrected biases.

    Args:
        model: With pairs on the activations.
        rounded: By name of the layer's node.
    """
    arrays: dict[str, NDArray[Any]] = {}
    result = copy_without(model, {node.input[1] for node in model.graph.node if node.name in rounded})
    dequantizers = []
    for node in result.graph.node:
        if node.name not in rounded:
            continue
        layer, weight = rounded[node.name], node.input[1]
        constants = [weight, f"{weight}.scale", f"{weight}.zero_point"]
        arrays |= {
            weight: layer.integers,
            constants[1]: layer.scales,
            constants[2]: np.zeros(len(layer.scales), np.int8),
            node.input[2]: layer.bias,
        }
        dequantizers.append(
            helper.make_node(
                "DequantizeLinear", constants, [f"{weight}.dequantized"], name=f"{weight}.dequantize", axis=0
            )
        )
        node.input[1] = f"{weight}.dequantized"
    nodes = [*dequantizers, *result.graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return replace_weights(result, arrays)
