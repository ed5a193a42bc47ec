"""A whole graph rescaled by what its channel flow says, constant by constant, on its own code: the product rescales the
layers that it quantizes (`precision.equalize`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from repvgg_deploy.graph.edit import GraphView, attributes
from repvgg_deploy.graph.flow import ChannelFlow, LayerFlow

Array = NDArray[np.float64]


def rescale_channels(view: GraphView, flow: ChannelFlow, factors: Array) -> onnx.ModelProto:
    """A graph that computes the same, its tensors divided by factors.

    Args:
        view: A graph.
        flow: Its variables.
        factors: Positive, float64 (`flow.count`,), 1 where `flow.held` says so.

    Returns:
        A copy. Weights are multiplied by the factors of what they read and divided by those of what they make, in
        float64, and stored in their own type; what several nodes share gets a copy for each that needs another.
    """
    places = [(node, index, 1 / factors[ids]) for node, index, ids in flow.shifts]
    for layer in flow.weighted:
        places.append((layer.node, 1, _weight_factors(view, layer, factors)))
        if len(layer.node.input) > 2 and layer.node.input[2]:
            places.append((layer.node, 2, 1 / factors[layer.result]))
    changed: dict[int, dict[int, NDArray[Any]]] = {}
    for node, index, factor in places:
        value = view.raw_constant(node.input[index])
        assert value is not None
        if np.any(factor != 1):
            changed.setdefault(id(node), {})[index] = (value.astype(np.float64) * factor).astype(value.dtype)
    nodes, added = [], []
    for node in view.nodes:
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()) if id(node) in changed else node)
        for index, value in changed.get(id(node), {}).items():
            nodes[-1].input[index] = view.new_name(node.input[index])
            added.append(numpy_helper.from_array(np.ascontiguousarray(value), nodes[-1].input[index]))
    return view.rebuild(nodes, added)


def _weight_factors(view: GraphView, layer: LayerFlow, factors: Array) -> Array:
    """Of the weight's shape: what its columns read, by what its rows make."""
    weight = view.raw_constant(layer.node.input[1])
    assert weight is not None
    columns, rows, groups = factors[layer.source], factors[layer.result], layer.groups
    if layer.node.op_type in ("Gemm", "MatMul"):
        found = columns[:, None] / rows
        return found.T if attributes(layer.node).get("transB", 0) else found
    if layer.node.op_type == "ConvTranspose":  # (in, out / groups, …)
        found = columns.reshape(groups, -1, 1) / rows.reshape(groups, 1, -1)
    else:  # (out, in / groups, …)
        found = columns.reshape(groups, 1, -1) / rows.reshape(groups, -1, 1)
    return found.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))
