"""Layers of a graph looked at one by one: cut out with what lies behind them, or their outputs given out.

A `Cut` is one layer with what lies behind it; a `Trial` runs it again and again with other weights and another
quantization. A `LayerRun` gives the output of every layer of a graph in FP32, FP16 or with Q/DQ pairs alike, for a
comparison of two graphs. It knows layers by the names of their nodes (an unnamed one by its output), which no change of
precision touches; the tensor that a node writes may have another name and type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError, ModelError
from .chain import Chain, Float64, FloatArray, Layer, copy_model, read_weight
from .run_onnx import Tensors, open_session, run_session

_LAYERS = ("Conv", "Gemm")
_EXPORT = "export it again with repvgg-export"
_STEP, _ZERO, _RATIO, _WEIGHT, _BIAS = "cut.step", "cut.zero", "cut.ratio", "cut.weight", "cut.bias"


@dataclass(frozen=True, slots=True)
class Cut:
    """A layer and the nodes between it and a tensor some layers on.

    Attributes:
        layer: The layer.
        end: The tensor where an error is measured: the input of a later layer, or the classifier's output.
        given: Tensors that the part reads and does not compute; the layer's input is the first.
        nodes: Of the part, in order; the first that reads the layer's input is the layer itself.
    """

    layer: Layer
    end: str
    given: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]


def cut_after(chain: Chain, layer: Layer, horizon: int) -> Cut:
    """Cuts out a layer and up to `horizon` layers behind it; where the network ends before, the classifier's output is the end."""
    model = chain.model
    index = chain.layers.index(layer)
    reached = {layer.output}
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    later = [other for other in chain.layers[index + 1 :] if other.input in reached]
    if 0 < horizon <= len(later):
        end = later[horizon - 1].input
    elif chain.layers[-1].output in reached:
        end = chain.layers[-1].output
    else:
        end = later[-1].input if later else layer.output
    nodes = _between(model, layer, reached, end)
    made = {name for node in nodes for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    read = dict.fromkeys([layer.input, *(name for node in nodes for name in node.input)])
    given = tuple(name for name in read if name and name not in made and name not in constants)
    return Cut(layer, end, given, nodes)


def _between(model: onnx.ModelProto, layer: Layer, reached: set[str], end: str) -> tuple[onnx.NodeProto, ...]:
    """The nodes that compute `end` and depend on the layer's output, with the layer's own."""
    producers = {name: node for node in model.graph.node for name in node.output}
    needed: set[str] = set()
    queue = [end]
    while queue:
        name = queue.pop()
        if name in reached and name not in needed:
            needed.update(producers[name].output)
            queue += producers[name].input
    return tuple(node for node in model.graph.node if needed.intersection(node.output))


class Trial:
    """Runs a cut with its layer's input and weight quantized, and measures the error at its end.

    Args:
        model: The graph that the cut is of, FP32.
        cut: See `cut_after`.
        values: Of each batch: what that graph gives at `cut.given` and `cut.end`.
    """

    def __init__(self, model: onnx.ModelProto, cut: Cut, values: Sequence[Tensors]) -> None:
        self._cut = cut
        self._values = values
        self._session = _open_cut(model, cut)
        self._neutral = np.ones((1, cut.layer.in_channels, *[1] * (len(cut.layer.weight_shape) - 2)), np.float32)
        self._bias = read_weight(model, cut.layer.bias)
        self.signal = float(sum(np.square(value[cut.end], dtype=np.float64).sum() for value in values))

    def error(self, step: float, factors: Float64, weight: FloatArray, *, bias: FloatArray | None = None) -> float:
        """Squared error at the cut's end, summed over all batches.

        Args:
            step: Real value of one integer of the rescaled input.
            factors: What each input channel is divided by, (in,).
            weight: Of the rescaled layer, in the layer's weight shape.
            bias: In place of the layer's own.
        """
        ratio = (self._neutral * (1 / factors).reshape(self._neutral.shape)).astype(np.float32)
        constants = {_STEP: np.array(step, np.float32), _RATIO: ratio, _WEIGHT: np.asarray(weight, np.float32)}
        constants[_BIAS] = self._bias if bias is None else bias
        total = 0.0
        for value in self._values:
            feed = {**{name: value[name] for name in self._cut.given}, **constants}
            found = run_session(self._session, [self._cut.end], feed)[0]
            total += float(np.square(found - value[self._cut.end], dtype=np.float64).sum())
        return total


def _open_cut(model: onnx.ModelProto, cut: Cut) -> onnxruntime.InferenceSession:
    """The cut with its layer's input rescaled and quantized; step, ratio, weight and bias are inputs."""
    nodes = [
        helper.make_node("Mul", [cut.layer.input, _RATIO], ["cut.rescaled"], name="cut.rescale"),
        helper.make_node("QuantizeLinear", ["cut.rescaled", _STEP, _ZERO], ["cut.quantized"], name="cut.quantize"),
        helper.make_node(
            "DequantizeLinear", ["cut.quantized", _STEP, _ZERO], ["cut.dequantized"], name="cut.dequantize"
        ),
    ]
    for node in cut.nodes:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        if node.name == cut.layer.name:
            copy.input[:] = ["cut.dequantized", _WEIGHT, _BIAS]
        nodes.append(copy)
    used = {name for node in nodes for name in node.input}
    given = (*cut.given, _RATIO, _WEIGHT, _BIAS)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given]
    inputs.append(helper.make_tensor_value_info(_STEP, TensorProto.FLOAT, []))
    output = helper.make_tensor_value_info(cut.end, TensorProto.FLOAT, None)
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    initializers.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
    graph = helper.make_graph(nodes, "cut", inputs, [output], initializers)
    part = helper.make_model(graph, opset_imports=model.opset_import)
    part.ir_version = model.ir_version
    return open_session(part)


class LayerRun:
    """A graph opened so that it gives the output of each layer, before any ReLU.

    Args:
        source: File, or the model in memory; not changed.

    Raises:
        ModelError: It cannot be read or run.
    """

    def __init__(self, source: Path | onnx.ModelProto) -> None:
        if isinstance(source, onnx.ModelProto):
            model = copy_model(source)
        else:
            try:
                model = onnx.load(source)
            except Exception as error:  # protobuf's and onnx's errors share no base class
                raise ModelError(f"{source}: cannot be read as ONNX: {_first_line(error)}", remedy=_EXPORT) from error
        layers = [node for node in model.graph.node if node.op_type in _LAYERS]
        self.outputs = {_name(node): node.output[0] for node in layers}
        self.classifiers = frozenset(_name(node) for node in layers if node.op_type == "Gemm")  # nothing rescales them
        self._shapes = _weight_shapes(model)
        self._input = model.graph.input[0].name
        del model.graph.output[:]  # ONNX Runtime infers the types of the new ones
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs.values())
        self._session = open_session(model, memory_arena=False)

    def require_same(self, other: LayerRun) -> None:
        """The other must have layers of the same names in the same order, with weights of the same shape.

        Raises:
            InputError: The two are different networks.
        """
        if list(self.outputs) != list(other.outputs) or self._shapes != other._shapes:
            missing = next(
                (name for name in self.outputs if self._shapes[name] != other._shapes.get(name)), "one of the other's"
            )
            raise InputError(
                f"the layers cannot be compared: the two are different networks: {missing} is not the same in both",
                remedy="compare two graphs of one checkpoint",
            )

    def run(self, batch: NDArray[Any]) -> Tensors:
        """By name of the layer: its output as float32, (N, C, H, W) or (N, C).

        A float32 batch is given to a graph of float16 as such, as the Engine does.

        Raises:
            ModelError: ONNX Runtime failed.
        """
        half = self._session.get_inputs()[0].type == "tensor(float16)" and batch.dtype == np.float32
        try:
            feed = {self._input: batch.astype(np.float16) if half else batch}
            values = self._session.run(list(self.outputs.values()), feed)
        except Exception as error:  # its errors share no base class
            raise ModelError(
                f"ONNX Runtime failed on {batch.dtype} {batch.shape}: {_first_line(error)}", remedy=_EXPORT
            ) from error
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, values, strict=True)}


def run_pairs(
    reference: LayerRun, other: LayerRun, batches: Iterable[tuple[NDArray[Any], NDArray[Any]]]
) -> Iterator[Mapping[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """By name of the layer: what both graphs give, batch by batch; one batch is in memory at a time.

    Args:
        reference: The first graph.
        other: Another of the same network; see `LayerRun.require_same`.
        batches: The same images as each takes them.
    """
    for one, two in batches:
        truth, found = reference.run(one), other.run(two)
        yield {name: (truth[name], found[name]) for name in truth}


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _weight_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """By name of the layer; weights may stand behind DequantizeLinear or Cast."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in _LAYERS:
            weight = node.input[1]
            while weight not in shapes and weight in producers:
                weight = producers[weight].input[0]
            found[_name(node)] = shapes.get(weight, ())
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
