"""The deploy-form graph of any variant as repvgg-export writes it, with seeded weights and without torch."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from repvgg_deploy.precision.fp16 import DEVIATIONS
from repvgg_deploy.specs import codec
from repvgg_deploy.specs.values import METADATA_KEY, ChannelStatistics, VariantSpec
from repvgg_deploy.specs.variants import alternating_groups
from tests.precision.make_chain import ChainOptions, _finish, _Graph, _head, _tail, metadata_of

PLAIN = ChainOptions()
SMALL_G4 = VariantSpec(
    "small-g4", (1, 2, 3, 1), (16, 16, 32, 48, 64), alternating_groups((1, 2, 3, 1), 4), num_classes=10
)


def make_variant(spec: VariantSpec, options: ChainOptions = PLAIN, *, seed: int = 0, size: int = 32) -> onnx.ModelProto:
    """The graph, with metadata. Of `options` count `uint8`, `tail` and `heavy`; the rest `spec` says.

    Args:
        spec: Architecture.
        options: Input and outputs.
        seed: Of the weights.
        size: Height and width of the image.
    """
    graph = _Graph(dataclasses.replace(options, heavy=1.0), seed)
    x, stages = _head(graph), {}
    for layer in spec.layers():
        shape = (layer.out_channels, layer.in_channels // layer.groups, 3, 3)
        x = graph.conv(x, layer.name, shape, stride=layer.stride, groups=layer.groups)
        if spec.se == "before_relu":
            x = _se(graph, x, layer.name, layer.out_channels, spec.se_reduction)
        last = layer.stage if options.tail == "features" else None
        x = graph.add("Relu", [x], f"{layer.name}.relu")
        if spec.se == "after_relu":
            x = _se(graph, x, layer.name, layer.out_channels, spec.se_reduction)
        if last:
            stages[last] = x
    if options.tail == "features":
        names = [stages[stage] for stage in (1, 2, 3, 4)]
    else:
        names = _tail(graph, x, spec.widths[4])
    return _stamp(_finish(graph, names), size, uint8=options.uint8)


def _se(graph: _Graph, x: str, name: str, channels: int, reduction: int) -> str:
    gate = graph.add("GlobalAveragePool", [x], f"{name}.se.pool")
    gate = graph.conv(gate, f"{name}.se.down", (channels // reduction, channels, 1, 1))
    gate = graph.add("Relu", [gate], f"{name}.se.relu")
    gate = graph.conv(gate, f"{name}.se.up", (channels, channels // reduction, 1, 1))
    return graph.add("Mul", [x, graph.add("Sigmoid", [gate], f"{name}.se.gate")], f"{name}.se.scaled")


def _stamp(model: onnx.ModelProto, size: int, *, uint8: bool) -> onnx.ModelProto:
    for axis in (1, 2) if uint8 else (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    metadata = metadata_of(model)
    assert metadata.spec.preprocessing is not None
    preprocessing = dataclasses.replace(metadata.spec.preprocessing, resize_short=size, crop=(size, size))
    metadata = dataclasses.replace(metadata, spec=dataclasses.replace(metadata.spec, preprocessing=preprocessing))
    model.metadata_props.add(key=METADATA_KEY, value=codec.dumps(metadata))
    return model


def state_statistics(model: onnx.ModelProto, ranges: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with BatchNorm statistics in its metadata whose |mean| + DEVIATIONS·σ are `ranges`, by tensor."""
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    metadata = codec.loads(type(metadata_of(model)), entry.value)
    statistics = {
        name: ChannelStatistics(_encode(-value / 2), _encode(value / 2 / DEVIATIONS)) for name, value in ranges.items()
    }
    entry.value = codec.dumps(dataclasses.replace(metadata, statistics=statistics))
    return model


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode("ascii")


def images_for(model: onnx.ModelProto, count: int = 2, *, seed: int = 3) -> list[np.ndarray]:
    """One batch of random images as the graph takes them."""
    value = model.graph.input[0].type.tensor_type
    shape = [count, *(dim.dim_value for dim in value.shape.dim[1:])]
    random = np.random.default_rng(seed)
    if value.elem_type == onnx.TensorProto.UINT8:
        return [random.integers(0, 256, shape, dtype=np.uint8)]
    dtype = helper.tensor_dtype_to_np_dtype(value.elem_type)
    return [random.standard_normal(shape).astype(dtype)]


def read_array(model: onnx.ModelProto, name: str) -> np.ndarray:
    """The values of an initializer."""
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))
