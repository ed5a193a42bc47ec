"""Q/DQ pairs and 8-bit weights in a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..graph.edit import GraphView, attributes, copy_model, copy_without, replace_weights, set_nodes
from .grids import INT8, Grid
from .network import Network, find_residuals
from .round import RoundedLayer

_MOVES = ("MaxPool", "Concat", "Resize", "Slice", "Split", "Transpose")
"""Operators that give some of the values that they read, so that integers pass them with their scale."""
_Place: TypeAlias = tuple[int, int]
"""The id of a node of a view, and the number of one of its inputs."""


def insert_pairs(
    network: Network, scales: Mapping[str, float], *, kept: Collection[str] = (), grid: Grid = INT8
) -> onnx.ModelProto:
    """A copy of an FP32 graph with Q/DQ pairs where TensorRT fuses them; weights stay FP32.

    A pair stands on every layer's input but those `kept`; on what is added to a convolution's output (TensorRT computes
    both at once in INT8 then); and, with the same scale, on what MaxPool, Concat and other moves read whose results are
    read through pairs of one scale only, so that they move integers. None stands between a layer and its activation.
    A tensor that is read with one scale has one pair, and one that is read with several has several.
    Source: NVIDIA, TensorRT documentation, Working with Quantized Types (recommendations on Q/DQ placement).
    """
    view = GraphView(network.model)
    reads = _find_reads(view, network, scales, kept)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    names: dict[tuple[str, float], str] = {}
    for node in view.nodes:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        for index, tensor in enumerate(node.input):
            key = reads.get((id(node), index))
            if key is not None:
                if (tensor, scales[key]) not in names:
                    own = scales.get(tensor) == scales[key]
                    name = names[tensor, scales[key]] = tensor if own else f"{tensor}.for.{key}"
                    constants |= {f"{name}.scale": np.array(scales[key], np.float32)}
                    constants |= {f"{name}.zero_point": grid.encode(np.array(0.0))}
                    nodes += _pair(tensor, name)
                copy.input[index] = f"{names[tensor, scales[key]]}.dequantized"
        nodes.append(copy)
    result = copy_model(network.model)
    set_nodes(result.graph, nodes)
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return _stored_as(result, {name for name in constants if name.endswith(".zero_point")}, grid)


def _stored_as(model: onnx.ModelProto, names: Collection[str], grid: Grid) -> onnx.ModelProto:
    """The model, whose named initializers are bytes so far, with the type that those bytes are of."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.data_type = grid.kind
    return model


def find_meetings(network: Network, kept: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Tensors with scales of their own that could have one: with it, what they have in common is quantized once.

    Two meet where a tensor is read with the scales of both (by a layer, and by a Concat for another layer), or where a
    move gives both (Split).
    """
    view, tensors = GraphView(network.model), network.quantized_tensors()
    reads = _find_reads(view, network, dict.fromkeys(tensors, 1.0), kept)
    places = _find_places(view)
    together = [{reads[place] for place in found if place in reads} for found in places.values()]
    for node in view.nodes:
        if (id(node), 0) in reads and node.op_type in _MOVES:
            together.append({reads[place] for output in node.output for place in places.get(output, [])})
    groups: list[set[str]] = []
    for found in together:
        touched = [group for group in groups if group & found]
        groups = [group for group in groups if not group & found] + [found.union(*touched)]
    return [tuple(name for name in tensors if name in group) for group in groups if len(group) > 1]


def find_requantized(model: onnx.ModelProto) -> tuple[str, ...]:
    """Tensors of a Q/DQ graph that are quantized with several scales, each once for every scale but the first."""
    seen = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return tuple(name for index, name in enumerate(seen) if name in seen[:index])


def _find_reads(
    view: GraphView, network: Network, scales: Mapping[str, float], kept: Collection[str]
) -> dict[_Place, str]:
    """What is read through a pair: by node and number of its input, the tensor with whose scale it is."""
    readers = {layer.name for layer in network.layers} - set(kept)
    reads: dict[_Place, str] = {(id(node), 0): node.input[0] for node in view.nodes if node.name in readers}
    for node, index, convolution in find_residuals(view, network.layers):
        if convolution.name in readers:
            reads[id(node), index] = node.input[index]
    places = _find_places(view)
    for node in reversed(view.nodes):
        if node.op_type not in _MOVES or not view.kept.isdisjoint(node.output):
            continue
        if node.op_type == "Resize" and attributes(node).get("mode", b"nearest") != b"nearest":
            continue
        keys = [reads.get(place) for output in node.output for place in places.get(output, [])]
        known = [key for key in keys if key is not None]
        if not known or len(known) < len(keys) or len({scales[key] for key in known}) > 1:
            continue
        for index in range(len(node.input) if node.op_type == "Concat" else 1):
            if view.raw_constant(node.input[index]) is None:
                reads[id(node), index] = known[0]
    return reads


def _find_places(view: GraphView) -> dict[str, list[_Place]]:
    """Where each tensor is read: nodes, and the numbers of their inputs."""
    found: dict[str, list[_Place]] = {}
    for node in view.nodes:
        for index, name in enumerate(node.input):
            found.setdefault(name, []).append((id(node), index))
    return found


def _pair(tensor: str, name: str) -> list[onnx.NodeProto]:
    constants, between, after = ([f"{name}.scale", f"{name}.zero_point"], f"{name}.quantized", f"{name}.dequantized")
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [between], name=f"{name}.quantize"),
        helper.make_node("DequantizeLinear", [between, *constants], [after], name=f"{name}.dequantize"),
    ]


def write_integers(
    model: onnx.ModelProto, network: Network, rounded: Mapping[str, RoundedLayer], grid: Grid = INT8
) -> onnx.ModelProto:
    """A copy of a graph of `network` with pairs, with 8-bit weights behind DequantizeLinear, and the corrected biases.

    Weights have one scale per output channel, on the axis on which the graph stores those.
    """
    layers = {layer.name: layer for layer in network.layers if layer.name in rounded}
    arrays: dict[str, NDArray[Any]] = {}
    result = copy_without(model, {layer.weight for layer in layers.values()})
    dequantizers = []
    stored = set[str]()
    for node in result.graph.node:
        layer = layers.get(node.name)
        if layer is None:
            continue
        found, weight = rounded[node.name], layer.weight
        constants, after = [weight, f"{weight}.scale", f"{weight}.zero_point"], f"{weight}.dequantized"
        codes, zeros = grid.encode(layer.translate(found.integers)), grid.encode(np.zeros(len(found.scales)))
        values = (codes, found.scales, zeros)
        stored.update((weight, constants[2]))
        arrays |= dict(zip(constants, values, strict=True))
        arrays[layer.bias] = found.bias
        name = f"{weight}.dequantize"
        axis = layer.stored_axis
        dequantizers.append(helper.make_node("DequantizeLinear", constants, [after], name=name, axis=axis))
        node.input[1] = after
    set_nodes(result.graph, [*dequantizers, *result.graph.node])
    return _stored_as(replace_weights(result, arrays), stored, grid)
