"""Test graphs spoilt and their outputs compared."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from repvgg_deploy.precision.metrics import Judge, Verification
from repvgg_deploy.precision.network import read_network, scale_inputs
from repvgg_deploy.precision.run_onnx import rounds_halves, widen_quantizers
from tests.precision.make_chain import KINDS, make_batches
from tests.precision.typed_faults import put

# FP16 rounds to 5e-4 of a value; six layers, SE, and an image that may be rounded first.
TOLERANCE = 5e-3
FREE = {
    "plain": "stage1",
    "grouped": "stage1",
    "se_before": "stage1",
    "se_after": "stage1",
    "uint8_top5": "stage1",
    "probabilities": "stage1",
}
STRETCHED = {**FREE, "features": "stage0"}  # stage1 is one of its outputs


def stretch(model: onnx.ModelProto, factor: float, source: str = "stage0", *, every: int = 2) -> onnx.ModelProto:
    """Every second (or so) of a layer's channels times `factor`, the columns that read them the other way: the same."""
    network = read_network(model)
    interface = next(i for i in network.interfaces if i.source == f"{source}.conv")
    channels = np.where(np.arange(network.layer(interface.source).out_channels) % every, 1.0, factor)
    arrays = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    layer = network.layer(interface.source)
    put(model, layer.weight, (arrays[layer.weight] * channels.reshape(-1, 1, 1, 1)).astype(np.float32))
    put(model, layer.bias, (arrays[layer.bias] * channels).astype(np.float32))
    for reader in map(network.layer, interface.readers):
        put(model, reader.weight, scale_inputs(arrays[reader.weight], reader.groups, 1 / channels).astype(np.float32))
    return model


def judge(model: onnx.ModelProto, graph: onnx.ModelProto, images: list[np.ndarray]) -> Verification:
    return Judge(read_network(model), images).compare(graph)


def batches_for(kind: str, io: str, count: int = 64) -> list[np.ndarray]:
    batches = make_batches(KINDS[kind], count)
    return [batch.astype(np.float16) for batch in batches] if io == "fp16" and kind != "uint8_top5" else batches


def values(model: onnx.ModelProto, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs but class numbers. An optimizer of ONNX Runtime that quantizes biases to INT32 by itself is off."""
    model = model if rounds_halves() else widen_quantizers(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    names = [value.name for value in model.graph.output if value.name != "classes"]
    found = [session.run(names, {session.get_inputs()[0].name: batch}) for batch in batches]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def close(found: list[np.ndarray], truth: list[np.ndarray]) -> bool:
    return all(np.abs(f - t).max() <= TOLERANCE * np.abs(t).max() for f, t in zip(found, truth, strict=True))


def relative(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return max(
        float(np.abs(f.astype(np.float64) - t).max() / np.abs(t).max()) for f, t in zip(found, truth, strict=True)
    )


def sqnr(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    noise = [max(float(np.square(f.astype(np.float64) - t).sum()), 1e-30) for f, t in zip(found, truth, strict=True)]
    return min(
        float(10 * np.log10(np.square(t, dtype=np.float64).sum() / n)) for t, n in zip(truth, noise, strict=True)
    )
