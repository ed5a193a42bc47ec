"""Q/DQ pairs and INT8 weights in a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..graph.edit import GraphView, attributes, copy_model, copy_without, replace_weights, set_nodes
from .network import FloatArray, Network, find_residuals
from .round import RoundedLayer

_MOVES = ("MaxPool", "Concat", "Resize", "Slice", "Transpose")
"""Operators that give some of the values that they read, so that integers pass them with their scale."""


def fake_quantize(value: NDArray[Any], scale: float) -> FloatArray:
    """What a Q/DQ pair makes of a float32 array."""
    step = np.float32(scale)
    return np.asarray(np.clip(np.rint(value / step), -128, 127) * step, np.float32)


def insert_pairs(network: Network, scales: Mapping[str, float], *, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of an FP32 graph with Q/DQ pairs where TensorRT fuses them; weights stay FP32.

    A pair stands on every layer's input but those `kept`; on what is added to a convolution's output (TensorRT computes
    both at once in INT8 then); and, with the same scale, on what MaxPool, Concat and other moves read whose results are
    read through a pair only, so that they move integers. None stands between a layer and its activation.
    Source: NVIDIA, TensorRT documentation, Working with Quantized Types (recommendations on Q/DQ placement).
    """
    view, readers = GraphView(network.model), {layer.name for layer in network.layers} - set(kept)
    reads = {(id(node), 0): (node.input[0], node.input[0]) for node in view.nodes if node.name in readers}
    for node, index, convolution in find_residuals(view, network.layers):
        if convolution.name in readers:
            reads[id(node), index] = (node.input[index], node.input[index])
    for tensor in dict.fromkeys(tensor for tensor, _ in list(reads.values())):
        _cover(view, tensor, tensor, reads)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    for node in view.nodes:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        for index, tensor in enumerate(node.input):
            if (id(node), index) in reads:
                _, key = reads[id(node), index]
                name = tensor if key == tensor else f"{tensor}.for.{key}"
                if f"{name}.scale" not in constants:
                    constants |= {f"{name}.scale": np.array(scales[key], np.float32)}
                    constants |= {f"{name}.zero_point": np.array(0, np.int8)}
                    nodes += _pair(tensor, name)
                copy.input[index] = f"{name}.dequantized"
        nodes.append(copy)
    result = copy_model(network.model)
    set_nodes(result.graph, nodes)
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return result


def _cover(view: GraphView, tensor: str, key: str, reads: dict[tuple[int, int], tuple[str, str]]) -> None:
    """Pairs before the moves that make a tensor, where all that reads it does so with the scale of `key`."""
    node = view.made_by.get(tensor)
    if node is None or node.op_type not in _MOVES or len(node.output) > 1 or tensor in view.kept:
        return
    if node.op_type == "Resize" and attributes(node).get("mode", b"nearest") != b"nearest":
        return
    found = [(id(n), i) for n in view.readers.get(tensor, []) for i, name in enumerate(n.input) if name == tensor]
    if any(reads.get(place, ("", ""))[1] != key for place in found):
        return
    for index in range(len(node.input) if node.op_type == "Concat" else 1):
        if view.raw_constant(node.input[index]) is None:
            reads[id(node), index] = (node.input[index], key)
            _cover(view, node.input[index], key, reads)


def _pair(tensor: str, name: str) -> list[onnx.NodeProto]:
    constants, between, after = ([f"{name}.scale", f"{name}.zero_point"], f"{name}.quantized", f"{name}.dequantized")
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [between], name=f"{name}.quantize"),
        helper.make_node("DequantizeLinear", [between, *constants], [after], name=f"{name}.dequantize"),
    ]


def write_integers(model: onnx.ModelProto, network: Network, rounded: Mapping[str, RoundedLayer]) -> onnx.ModelProto:
    """A copy of a graph of `network` with pairs, with INT8 weights behind DequantizeLinear, and the corrected biases.

    Weights have one scale per output channel, on the axis on which the graph stores those.
    """
    layers = {layer.name: layer for layer in network.layers if layer.name in rounded}
    arrays: dict[str, NDArray[Any]] = {}
    result = copy_without(model, {layer.weight for layer in layers.values()})
    dequantizers = []
    for node in result.graph.node:
        layer = layers.get(node.name)
        if layer is None:
            continue
        found, weight = rounded[node.name], layer.weight
        constants, after = [weight, f"{weight}.scale", f"{weight}.zero_point"], f"{weight}.dequantized"
        values = (layer.translate(found.integers), found.scales, np.zeros(len(found.scales), np.int8))
        arrays |= dict(zip(constants, values, strict=True))
        arrays[layer.bias] = found.bias
        name = f"{weight}.dequantize"
        axis = layer.stored_axis
        dequantizers.append(helper.make_node("DequantizeLinear", constants, [after], name=name, axis=axis))
        node.input[1] = after
    set_nodes(result.graph, [*dequantizers, *result.graph.node])
    return replace_weights(result, arrays)
