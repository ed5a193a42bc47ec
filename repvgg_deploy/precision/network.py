"""The structure of an FP32 graph: layers with weights, and the channels between them that can be rescaled.

Any graph is read: what `graph.flow` follows can be rescaled channel by channel, exactly, and that is what makes a
network quantizable at all; what it does not understand holds its channels as they are. Before that the graph is
written in one form (`normalise`), so that the rest of this room knows one kind of layer: weights and bias stored in
the graph, its own, and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from ..errors import CalibrationError, ModelError
from ..graph.edit import GraphView, attributes, replace_weights
from ..graph.flow import ChannelFlow, find_flow
from .answers import find_means, judged_tensors, makes_all
from .normalise import KINDS, normalise

FloatArray: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]
Kind: TypeAlias = Literal["Conv", "ConvTranspose", "Gemm", "MatMul"]
_TYPED = (
    "it is quantized already: build or run it as it is (repvgg-trt build); for other options quantize the FP32 file "
    "that repvgg-export or repvgg-trt fold wrote"
)
_UNKNOWN = "its shape is not known"
_ALONG_GATES = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """An operator with weights, seen as a convolution, or as a product of rows and columns.

    A transposed convolution is a convolution of its input with zeros in between, and the flipped kernel. Weights are
    always (out, in / groups, …) here, however the graph stores them; `translate` goes from one to the other.

    Attributes:
        input: Tensor that it reads.
        output: Tensor that it writes, bias included, before any activation.
        weight: Initializer.
        bias: Initializer, (out,).
        weight_shape: (out, in / groups, height, width) or (out, in).
        source: Variable of each input channel, (in,); see `graph.flow`.
        result: Variable of each output channel, (out,).
        pads: Top, left, bottom, right.
        upsampling: Every so many rows and columns of the convolution's input are the layer's input; the rest is zero.
    """

    name: str
    op_type: Kind
    input: str
    output: str
    weight: str
    bias: str
    weight_shape: tuple[int, ...]
    source: Ids
    result: Ids
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    upsampling: tuple[int, int] = (1, 1)

    @property
    def in_channels(self) -> int:
        """Channels of its input."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return self.weight_shape[0]

    @property
    def axis(self) -> int:
        """Where the channels of its input and output are: the second axis of images, the last of anything else."""
        return 1 if self.op_type in ("Conv", "ConvTranspose") else -1

    @property
    def stored_axis(self) -> int:
        """The axis of the stored weight on which its output channels are."""
        return 1 if self.op_type in ("MatMul", "ConvTranspose") else 0

    def translate(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight as the graph stores it, of one (out, in / groups, …), and the other way round."""
        if self.op_type == "MatMul":
            return np.ascontiguousarray(weight.T)
        if self.op_type == "ConvTranspose":
            return np.ascontiguousarray(weight.swapaxes(0, 1)[..., ::-1, ::-1])
        return weight


@dataclass(frozen=True, slots=True, eq=False)
class Interface:
    """Channels between layers that are rescaled together: those of one layer, or of several that meet in a sum.

    Attributes:
        source: Name of the first layer that writes them.
        readers: Names of the layers that read some of them.
        variables: Numbers of the channels that are free, ascending.
        blocked_by: Why none is: the graph output or operator that sees their true values; None where some are.
    """

    source: str
    readers: tuple[str, ...]
    variables: Ids
    blocked_by: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """An FP32 graph, which is not changed, with its structure.

    Attributes:
        layers: In the order of execution.
        interfaces: In the order of the layers that write them.
        count: Of variables: channels that can have a factor, and those that are held at 1.
        shifts: Constants that are added to channels: the initializer, and the variable of each of its elements.
        sums: What convolutions' outputs are added to: each tensor, and the variable of each of its channels.
        image: Tensor that the first layer reads: the normalised float32 image.
        classifies: Whether the last layer is a classifier: a Gemm of which every output of the graph is made.
        judged: Tensors in which answers are compared: the logits, or what `answers.judged_tensors` says.
        gates: Names of the layers of squeeze-and-excitation (SE): they make factors of channels of their averages.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    interfaces: tuple[Interface, ...]
    count: int
    shifts: tuple[tuple[str, Ids], ...]
    sums: tuple[tuple[str, Ids], ...]
    image: str
    classifies: bool
    judged: tuple[str, ...]
    gates: tuple[str, ...]

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def quantized_tensors(self) -> tuple[str, ...]:
        """Tensors that are read through a Q/DQ pair, each once: layers' inputs in order, and `sums`."""
        return tuple(dict.fromkeys([*(layer.input for layer in self.layers), *(name for name, _ in self.sums)]))

    def last_outputs(self) -> tuple[str, ...]:
        """What layers write that no other layer reads, whatever is between: logits, raw boxes and scores."""
        leads_on = {layer.input for layer in self.layers}
        for node in reversed(self.model.graph.node):
            if leads_on.intersection(node.output):
                leads_on.update(node.input)
        return tuple(layer.output for layer in self.layers if layer.output not in leads_on)

    def axes(self) -> dict[str, int]:
        """Where the channels of each tensor are that layers read or write, by name."""
        known = {name: layer.axis for layer in self.layers for name in (layer.input, layer.output)}
        return dict.fromkeys((name for name, _ in self.sums), 1) | known

    def ones(self) -> Float64:
        """A factor of 1 for every variable."""
        return np.ones(self.count)

    def free(self) -> Ids:
        """The variables that may have a factor other than 1."""
        found = [interface.variables for interface in self.interfaces if interface.blocked_by is None]
        return np.concatenate([np.empty(0, np.int64), *found])

    def blocked_by(self, layer: Layer) -> str | None:
        """Why no output channel of a layer may have a factor; None where one may."""
        if np.isin(layer.result, self.free()).any():
            return None
        return next((i.blocked_by for i in self.interfaces if i.source == layer.name), _UNKNOWN)

    def divided(self, factors: Float64) -> dict[str, Float64]:
        """What factors divide the channels of each quantized tensor by, (C,); tensors with none but 1 are left out."""
        found = {name: factors[ids] for name, ids in self.sums}
        found |= {layer.input: factors[layer.source] for layer in self.layers}
        return {name: values for name, values in found.items() if np.any(values != 1)}

    def gather(self, ranges: Mapping[str, NDArray[np.floating]]) -> Float64:
        """The largest of the values of each variable, of the layers' inputs, (C,), by tensor; 0 where nothing reads.

        What SE reads is left out: averages, before a ReLU or a gate perhaps, that say nothing of the channels behind.
        """
        found = np.zeros(self.count)
        for layer in (layer for layer in self.layers if layer.name not in self.gates):
            np.maximum.at(found, layer.source, np.asarray(ranges[layer.input], np.float64))
        return found

    def with_weights(self, weights: Mapping[str, NDArray[Any]]) -> Network:
        """The same structure around a copy of the graph with other weights, as `read_weights` gives them."""
        by_weight = {layer.weight: layer for layer in self.layers}
        stored = {name: by_weight[name].translate(w) if name in by_weight else w for name, w in weights.items()}
        return dataclasses.replace(self, model=replace_weights(self.model, stored))


def read_network(model: onnx.ModelProto) -> Network:
    """Reads the structure of an FP32 graph.

    Raises:
        CalibrationError: The graph is typed already (FP16 or Q/DQ), or gives nothing that can be compared.
        ModelError: It holds no layer with weights, has several inputs, or subgraphs (If, Loop, Scan).
    """
    _require_readable(model)
    model = normalise(model)
    view = GraphView(model)
    flow = find_flow(view)
    variables = {one.node.output[0]: (one.source, one.result) for one in flow.weighted}
    axes: dict[str, int] = {}
    layers: list[Layer] = []
    means = find_means(model)
    for node in view.nodes:
        layer = _read_layer(view, node, variables.get(node.output[0]), flow.count)
        if layer is None or node.output[0] in means:
            continue
        if axes.setdefault(layer.input, layer.axis) == layer.axis:
            layers.append(layer)
    if not layers:
        found_kinds = ", ".join(sorted({node.op_type for node in view.nodes}))
        raise ModelError(
            f"the graph holds no layer with stored weights, only {found_kinds or 'nothing'}",
            remedy="nothing of it can be quantized: build or run it as it is (repvgg-trt build)",
        )
    held = dict(flow.held)
    held[flow.count] = _UNKNOWN
    known = {layer.name for layer in layers}
    for one in flow.weighted:
        if one.node.name not in known:
            held |= dict.fromkeys((*one.source.tolist(), *one.result.tolist()), one.node.op_type)
    biases = {layer.bias for layer in layers}
    shifts = tuple((node.input[i], ids) for node, i, ids in flow.shifts if node.input[i] not in biases)
    inputs, sums = {layer.input for layer in layers}, dict[str, Ids]()
    for node, index, layer in find_residuals(view, layers):
        if node.input[index] not in inputs:
            ids = flow.tensors[node.input[index]]
            sums[node.input[index]] = np.broadcast_to(ids.ravel(), (layer.out_channels,))
    interfaces = _interfaces(layers, flow, held)
    gates = tuple(layer.name for layer in layers if _is_gate(view, layer))
    classifies = layers[-1].op_type == "Gemm" and makes_all(view, layers[-1].output)
    judged = (layers[-1].output,) if classifies else judged_tensors(view)
    structure = (tuple(layers), interfaces, flow.count + 1, shifts, tuple(sums.items()), layers[0].input)
    return Network(model, *structure, classifies, judged, gates)


def find_residuals(view: GraphView, layers: Sequence[Layer]) -> list[tuple[onnx.NodeProto, int, Layer]]:
    """Sums of a convolution's output and another image of the same channels: the node, which input that is, the layer.

    Of two convolutions that meet, the first to be computed is the other image.
    """
    order = {layer.output: index for index, layer in enumerate(layers) if layer.op_type == "Conv"}
    found = []
    for node in view.nodes:
        if (
            node.op_type != "Add"
            or len(set(node.input)) != 2
            or any(view.raw_constant(n) is not None for n in node.input)
        ):
            continue
        alone = [i for i, name in enumerate(node.input) if name in order and len(view.readers[name]) == 1]
        if not alone or any(name in view.kept for name in node.input):
            continue
        last = max(alone, key=lambda index: order[node.input[index]])
        layer, other = layers[order[node.input[last]]], view.shape(node.input[1 - last])
        if other is not None and len(other) == 4 and other[1] == layer.out_channels:
            found.append((node, 1 - last, layer))
    return found


def _is_gate(view: GraphView, layer: Layer) -> bool:
    """Whether a layer reads averages of channels, and all that comes of it is multiplied with something else."""

    def is_average(name: str) -> bool:
        shape = view.shape(name)
        return shape is not None and len(shape) >= 2 and all(size == 1 for size in shape[2:])

    if not is_average(layer.input):
        return False
    queue, multiplies = [layer.output], False
    for name in queue:
        if name in view.kept:
            return False
        for node in view.readers.get(name, []):
            beside = [other for other in node.input if other not in queue and view.raw_constant(other) is None]
            if node.op_type == "Mul" and beside:
                multiplies = True
            elif node.op_type in _ALONG_GATES and is_average(node.output[0]):
                queue += [output for output in node.output if output not in queue]
            else:
                return False
    return multiplies


def _interfaces(layers: Sequence[Layer], flow: ChannelFlow, held: Mapping[int, str]) -> tuple[Interface, ...]:
    """One for each set of channels that are rescaled together, and one for each layer whose channels are all held."""
    groups = [np.array([v for v in group.tolist() if v not in held], np.int64) for group in flow.groups()]
    group_of = {variable: index for index, group in enumerate(groups) for variable in group.tolist()}
    found: list[Interface] = []
    done: set[int] = set()
    for layer in layers:
        indices = list(dict.fromkeys(group_of[v] for v in layer.result.tolist() if v in group_of))
        for index in (index for index in indices if index not in done):
            readers = tuple(other.name for other in layers if np.isin(other.source, groups[index]).any())
            why = None if readers else "nothing that reads it"
            found.append(Interface(layer.name, readers, groups[index], why))
        done.update(indices)
        if not indices:
            reading = tuple(other.name for other in layers if np.isin(other.source, layer.result).any())
            found.append(Interface(layer.name, reading, np.empty(0, np.int64), held[int(layer.result[0])]))
    return tuple(found)


def _require_readable(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if "QuantizeLinear" in node.op_type or node.op_type.startswith("QLinear"):
            found = f"Q/DQ nodes ({node.name or node.op_type}, …)"
            raise CalibrationError(f"the graph is typed already: expected FP32, found {found}", remedy=_TYPED)
        if node.op_type in ("If", "Loop", "Scan"):
            raise ModelError(
                f"the graph holds {node.op_type} {node.name!r}, and what a branch or loop computes cannot be measured",
                remedy="export the model without it: a fixed size or `output=` before the post-processing often does",
            )
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise ModelError(
            f"the graph has {len(inputs)} inputs ({', '.join(inputs)}), and one image input was expected",
            remedy="export the model with the other inputs as constants",
        )
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            found = f"16-bit weights ({tensor.name}, …)"
            raise CalibrationError(f"the graph is typed already: expected FP32, found {found}", remedy=_TYPED)


def _read_layer(view: GraphView, node: onnx.NodeProto, variables: tuple[Ids, Ids] | None, unknown: int) -> Layer | None:
    """The layer that a node is, after `normalise`; None for any other, which stays in floating point."""
    kind, weight = node.op_type, view.raw_constant(node.input[1]) if len(node.input) > 1 else None
    if kind not in KINDS or node.domain not in ("", "ai.onnx") or weight is None or weight.dtype != np.float32:
        return None
    named, output, bias = attributes(node), node.output[0], node.input[2] if len(node.input) > 2 else ""
    if kind == "MatMul":
        if weight.ndim != 2 or view.raw_constant(node.input[0]) is not None:
            return None
        add = view.readers[output][0]
        output, bias = add.output[0], next(name for name in add.input if name != node.output[0])
    groups = int(named.get("group", 1))
    window: dict[str, Any] = {}
    shape: tuple[int, ...] = weight.shape[::-1] if kind == "MatMul" else weight.shape
    if kind in ("Conv", "ConvTranspose"):
        found = _read_window(view, node, weight.shape)
        if found is None:
            return None
        window = found
        if kind == "ConvTranspose":
            if groups > 1:
                return None  # no axis of its weight has an entry for each output channel
            shape = (weight.shape[1], weight.shape[0], *weight.shape[2:])
    elif kind == "Gemm" and (named.get("transB", 0) != 1 or named.get("transA", 0)):
        return None
    offset = view.raw_constant(bias)
    if offset is None or offset.shape != (shape[0],):
        return None
    held = np.full(max(shape[0], shape[1] * groups), unknown)
    source, result = variables or (held[: shape[1] * groups], held[: shape[0]])
    names = (node.name, cast("Kind", kind), node.input[0], output, node.input[1], bias, shape)
    return Layer(*names, source, result, groups, **window)


def _read_window(view: GraphView, node: onnx.NodeProto, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """How a 2-D convolution moves over its input; None where that is not known or not of two dimensions."""
    named = attributes(node)
    if len(shape) != 4 or named.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    strides, dilations = (tuple(named.get(name, (1, 1))) for name in ("strides", "dilations"))
    pads = tuple(named.get("pads", (0, 0, 0, 0))) if named.get("auto_pad") != b"VALID" else (0, 0, 0, 0)
    if node.op_type == "Conv":
        return {"strides": strides, "pads": pads, "dilations": dilations}
    more = named.get("output_padding", (0, 0))
    if "output_shape" in named:
        return None
    around = [dilations[axis % 2] * (shape[2 + axis % 2] - 1) - pads[axis] for axis in range(4)]
    around = [*around[:2], around[2] + more[0], around[3] + more[1]]
    return {"pads": tuple(around), "dilations": dilations, "upsampling": strides} if min(around) >= 0 else None


def read_weights(network: Network) -> dict[str, FloatArray]:
    """The float32 initializers by name, weights of layers (out, in / groups, …); copies, which may be changed."""
    by_weight = {layer.weight: layer for layer in network.layers}
    found = {}
    for tensor in network.model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            layer = by_weight.get(tensor.name)
            found[tensor.name] = np.array(value if layer is None else layer.translate(value), np.float32)
    return found


def read_layer(network: Network, layer: Layer) -> tuple[FloatArray, FloatArray]:
    """Weight (out, in / groups, …) and bias (out,) of one layer; copies."""
    weight, bias = (_read_tensor(network.model, name) for name in (layer.weight, layer.bias))
    return np.array(layer.translate(weight), np.float32), bias


def _read_tensor(model: onnx.ModelProto, name: str) -> FloatArray:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return np.array(numpy_helper.to_array(tensor), np.float32)


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
