"""The structure of an exported RepVGG: layers with weights, and the interfaces between them.

An *interface* is everything between one layer's output and the layers that read it. All that may stand there (ReLU,
global average pooling, Flatten, the multiplication with an SE gate) commutes with a positive factor per channel, so
that a channel can be rescaled exactly: that is what makes a RepVGG quantizable at all. A new operator goes into
`_PASSING` if it commutes with such a factor, else into `_OTHERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError, ModelError

FloatArray: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
_PASSING = ("Relu", "GlobalAveragePool", "Flatten")
_OTHERS = ("Conv", "Gemm", "Mul", "Sigmoid", "Softmax", "TopK", "Cast", "Transpose", "Sub", "Div")
_EXPORT = "give the FP32 file that repvgg-export wrote"


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or the classifier.

    Attributes:
        input: Tensor that it reads.
        output: Tensor that it writes, before any ReLU.
        weight: Initializer, (out, in / groups, height, width) or (out, in).
        bias: Initializer, (out,).
        pads: Top, left, bottom, right.
    """

    name: str
    op_type: Literal["Conv", "Gemm"]
    input: str
    output: str
    weight: str
    bias: str
    weight_shape: tuple[int, ...]
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def in_channels(self) -> int:
        """Channels of its input."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return self.weight_shape[0]


@dataclass(frozen=True, slots=True)
class Interface:
    """What lies between a layer and those that read it.

    Attributes:
        source: Name of the layer whose output channels it carries.
        readers: Names of the layers that read it.
        blocked_by: Why its channels cannot be rescaled: the graph output or operator that sees their true values; None
            where they can.
    """

    source: str
    readers: tuple[str, ...]
    blocked_by: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """An FP32 graph, which is not changed, with its structure.

    Attributes:
        layers: In the order of execution.
        interfaces: One for each layer, in the same order.
        image: Tensor that the first layer reads: the normalised float32 image.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    interfaces: tuple[Interface, ...]
    image: str

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def quantized_tensors(self) -> tuple[str, ...]:
        """Tensors that layers read, each once, in order."""
        return tuple(dict.fromkeys(layer.input for layer in self.layers))

    def with_weights(self, weights: Mapping[str, NDArray[Any]]) -> Chain:
        """The same structure around a copy of the graph with other weights."""
        return dataclasses.replace(self, model=replace_weights(self.model, weights))


def read_chain(model: onnx.ModelProto) -> Chain:
    """Reads the structure of an FP32 graph that repvgg-export wrote.

    Raises:
        CalibrationError: The graph is typed already (FP16 or Q/DQ).
        ModelError: The graph is not one of ours.
    """
    _refuse_typed(model)
    graph = model.graph
    unknown = sorted({node.op_type for node in graph.node} - {*_PASSING, *_OTHERS})
    if unknown:
        raise ModelError(f"the graph holds {', '.join(unknown)}, and an exported RepVGG does not", remedy=_EXPORT)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    layers = tuple(_layer(node, shapes) for node in graph.node if node.op_type in ("Conv", "Gemm"))
    if not layers:
        raise ModelError("the graph holds no convolution", remedy=_EXPORT)
    if len({layer.name for layer in layers}) != len(layers) or len({layer.weight for layer in layers}) != len(layers):
        raise ModelError("two layers of the graph share a name or a weight", remedy=_EXPORT)
    by_name = {layer.name: layer for layer in layers}
    return Chain(model, layers, tuple(_interface(graph, by_name, layer) for layer in layers), layers[0].input)


def _refuse_typed(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if "QuantizeLinear" in node.op_type or node.op_type.startswith("QLinear"):
            found = f"Q/DQ nodes ({node.name or node.op_type}, …)"
            raise CalibrationError(f"the graph is typed already: expected FP32, found {found}", remedy=_EXPORT)
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            found = f"16-bit weights ({tensor.name}, …)"
            raise CalibrationError(f"the graph is typed already: expected FP32, found {found}", remedy=_EXPORT)


def _layer(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Layer:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    where = f"{node.op_type} {node.name!r}"
    if len(node.input) != 3 or any(name not in shapes for name in node.input[1:]):
        raise ModelError(f"{where}: expected a weight and a bias that are stored in the graph", remedy=_EXPORT)
    shape = shapes[node.input[1]]
    op_type: Literal["Conv", "Gemm"] = "Gemm" if node.op_type == "Gemm" else "Conv"
    common = (node.name, op_type, node.input[0], node.output[0], node.input[1], node.input[2], shape)
    if node.op_type == "Gemm":
        if (
            attributes.get("transB", 0) != 1
            or attributes.get("transA", 0) != 0
            or any(attributes.get(n, 1.0) != 1.0 for n in ("alpha", "beta"))
        ):
            raise ModelError(f"{where}: expected x·Wᵀ + b, found {attributes}", remedy=_EXPORT)
        return Layer(*common)
    if len(shape) != 4 or "auto_pad" in attributes or any(d != 1 for d in attributes.get("dilations", [1])):
        raise ModelError(
            f"{where}: expected a plain 2-D convolution, found weight {shape}, {attributes}", remedy=_EXPORT
        )
    return Layer(
        *common,
        groups=int(attributes.get("group", 1)),
        strides=tuple(attributes.get("strides", (1, 1))),
        pads=tuple(attributes.get("pads", (0, 0, 0, 0))),
    )


def _interface(graph: onnx.GraphProto, layers: Mapping[str, Layer], layer: Layer) -> Interface:
    """Finds who reads a layer's output, through all that commutes with a factor per channel."""
    outputs = {value.name for value in graph.output}
    gates = {name for node in graph.node if node.op_type == "Sigmoid" for name in node.output}
    found: dict[str, None] = {}
    blocked: str | None = None
    queue = [layer.output]
    while queue:
        tensor = queue.pop(0)
        blocked = blocked or (f"output {tensor}" if tensor in outputs else None)
        for node in (node for node in graph.node if tensor in node.input):
            # Whether an SE gate multiplies the tensor, and the tensor is not the gate.
            is_gated = node.op_type == "Mul" and {*node.input} - {tensor} <= gates and len({*node.input}) == 2
            if node.op_type in _PASSING or is_gated:
                queue.append(node.output[0])
            elif node.name in layers and layers[node.name].in_channels == layer.out_channels:
                found[node.name] = None
            else:
                blocked = blocked or node.op_type
    return Interface(layer.name, tuple(found), blocked if blocked or found else "nothing that reads it")


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set; 0 where the graph names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def read_weights(model: onnx.ModelProto) -> dict[str, FloatArray]:
    """The float32 initializers by name; copies, which may be changed."""
    return {
        t.name: numpy_helper.to_array(t).astype(np.float32)
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT
    }


def read_weight(model: onnx.ModelProto, name: str) -> FloatArray:
    """One float32 initializer; a copy."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return np.array(numpy_helper.to_array(tensor), np.float32)


def set_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> None:
    """Adds initializers, or changes their values, in place: copying a large model for each layer would be slow."""
    there = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in weights.items():
        tensor = there[name] if name in there else model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replaces the nodes of a graph in place; the new ones may be its own."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, weights and all."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def replace_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy with other values of some initializers, by name; those that the graph does not have are added."""
    result = copy_without(model, weights)
    set_weights(result, weights)
    return result


def copy_without(model: onnx.ModelProto, names: Container[str]) -> onnx.ModelProto:
    """A copy without some initializers, which are never copied.

    What is deleted from a message keeps its memory until the whole message goes, and weights are most of a model.
    """
    result = onnx.ModelProto()
    _copy_fields(model, result, leave_out="graph")
    _copy_fields(model.graph, result.graph, leave_out="initializer")
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    return result


def _copy_fields(source: Any, target: Any, *, leave_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == leave_out:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def scale_inputs(weight: NDArray[Any], groups: int, factors: NDArray[Any]) -> NDArray[Any]:
    """Multiplies each input channel of a weight (out, in / groups, …) by its factor (in,)."""
    out, inner = weight.shape[:2]
    grouped = weight.reshape(groups, out // groups, inner, -1)
    return np.asarray((grouped * factors.reshape(groups, 1, inner, 1)).reshape(weight.shape), weight.dtype)


def input_norms(weight: NDArray[Any], groups: int, *, order: Literal["max", "square"]) -> Float64:
    """Largest magnitude, or sum of squares, of each input channel of a weight (out, in / groups, …); float64 (in,)."""
    out, inner = weight.shape[:2]
    grouped = np.abs(weight.reshape(groups, out // groups, inner, -1).astype(np.float64))
    reduced = grouped.max(axis=(1, 3)) if order == "max" else np.square(grouped).sum(axis=(1, 3))
    return np.asarray(reduced.reshape(-1), np.float64)
