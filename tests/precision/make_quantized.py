"""Q/DQ graphs with the plainest calibration (largest values, weights to nearest): for tests of a graph's form."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx

from repvgg_deploy.precision.halves import Io
from repvgg_deploy.precision.mixed import halve_quantized, round_activation_scales, round_layer_to_half
from repvgg_deploy.precision.network import read_network, read_weights
from repvgg_deploy.precision.qdq import insert_pairs, write_integers
from repvgg_deploy.precision.round import round_nearest
from repvgg_deploy.precision.run_onnx import run_tensors
from repvgg_deploy.precision.scales import fit_scales


def input_ranges(model: onnx.ModelProto, batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Largest absolute value of each channel of every layer's input."""
    found: dict[str, np.ndarray] = {}
    for values in run_tensors(model, read_network(model).quantized_tensors(), batches):
        for name, value in values.items():
            largest = np.abs(value).max(axis=(0, *range(2, value.ndim))).astype(np.float64)
            found[name] = np.maximum(found.get(name, 0.0), largest)
    return found


def quantize_plainly(
    model: onnx.ModelProto, batches: list[np.ndarray], *, kept: Collection[str] = (), half: bool = False
) -> onnx.ModelProto:
    """FP32 scales; with `half`, each of them exact in FP16."""
    ranges, network = input_ranges(model, batches), read_network(model)
    weights = read_weights(network)
    scales = {name: float(np.float32(max(value.max(), 1e-30) / 127)) for name, value in ranges.items()}
    rounded = {
        layer.name: round_nearest(weights[layer.weight], weights[layer.bias])
        for layer in network.layers
        if layer.name not in kept
    }
    if half:
        scales, rounded = (
            round_activation_scales(scales),
            {name: round_layer_to_half(layer) for name, layer in rounded.items()},
        )
    result = write_integers(insert_pairs(network, scales), network, rounded)
    for node in result.graph.node:
        if node.name in kept:
            node.input[0] = node.input[0].removesuffix(".dequantized")
    read = {name for node in result.graph.node for name in node.input}
    unused = [node for node in result.graph.node if node.op_type == "DequantizeLinear" and node.output[0] not in read]
    unused += [
        node for node in result.graph.node if node.output[0] in {name for node in unused for name in node.input[:1]}
    ]
    for node in unused:
        result.graph.node.remove(node)
    return result


def quantize_mixed(
    model: onnx.ModelProto, batches: list[np.ndarray], *, io: Io = "fp32", kept: Collection[str] = ()
) -> onnx.ModelProto:
    """INT8 with FP16 for the rest."""
    fitted = fit_scales(read_network(model), input_ranges(model, batches), kept=kept)[0].model
    return halve_quantized(quantize_plainly(fitted, batches, kept=kept, half=True), io=io, kept=kept)
