"""One layer of a graph with what lies behind it, cut out so that it can be run again and again with other weights and another quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .chain import Chain, FloatArray, Layer
from .execute import open_session, run_session

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


def cut_after(model: onnx.ModelProto, chain: Chain, layer: Layer, horizon: int) -> Cut:
    """Cuts out a layer and up to `horizon` layers behind it.

    Args:
        model: FP32, as exported.
        chain: Its structure.
        layer: One of its layers.
        horizon: How many layers behind it take part; where the network ends before, the classifier's output is the end.
    """
    index = chain.layers.index(layer)
    reached = {layer.output}
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    later = [other for other in chain.layers[index + 1 :] if other.input in reached]
    last = chain.layers[-1].output if chain.layers[-1].output in reached else (later[-1].input if later else layer.output)
    end = later[horizon - 1].input if 0 < horizon <= len(later) else last
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
        model: The graph that the cut is of.
        cut: See `cut_after`.
        values: Of each batch: arrays of `cut.given` by name.
    """

    def __init__(self, model: onnx.ModelProto, cut: Cut, values: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        self._cut = cut
        self._values = values
        self._session = _open(model, cut)
        self._neutral = np.ones((1, cut.layer.in_channels, *[1] * (len(cut.layer.weight_shape) - 2)), np.float32)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.weight: FloatArray = np.asarray(numpy_helper.to_array(constants[cut.layer.weight]), np.float32)
        self._bias: FloatArray = np.asarray(numpy_helper.to_array(constants[cut.layer.bias]), np.float32)
        reference = open_session(_reference(model, cut))
        self._truth = [run_session(reference, [cut.end], {name: v[name] for name in cut.given})[0] for v in values]
        self.signal = float(sum(np.square(truth, dtype=np.float64).sum() for truth in self._truth))

    def error(self, step: float, factors: NDArray[np.float64], weight: FloatArray, *, bias: FloatArray | None = None) -> float:
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
        for value, truth in zip(self._values, self._truth, strict=True):
            feed = {**{name: value[name] for name in self._cut.given}, **constants}
            found = run_session(self._session, [self._cut.end], feed)[0]
            total += float(np.square(found - truth, dtype=np.float64).sum())
        return total


def _part(model: onnx.ModelProto, cut: Cut, nodes: Sequence[onnx.NodeProto], extra: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    inputs = [*(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in cut.given), *extra]
    output = helper.make_tensor_value_info(cut.end, TensorProto.FLOAT, None)
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    initializers.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
    part = helper.make_model(helper.make_graph(list(nodes), "cut", inputs, [output], initializers), opset_imports=model.opset_import)
    part.ir_version = model.ir_version
    return part


def _reference(model: onnx.ModelProto, cut: Cut) -> onnx.ModelProto:
    return _part(model, cut, cut.nodes, ())


def _open(model: onnx.ModelProto, cut: Cut) -> onnxruntime.InferenceSession:
    nodes = [
        helper.make_node("Mul", [cut.layer.input, _RATIO], ["cut.rescaled"], name="cut.rescale"),
        helper.make_node("QuantizeLinear", ["cut.rescaled", _STEP, _ZERO], ["cut.quantized"], name="cut.quantize"),
        helper.make_node("DequantizeLinear", ["cut.quantized", _STEP, _ZERO], ["cut.dequantized"], name="cut.dequantize"),
    ]
    for node in cut.nodes:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        if node.name == cut.layer.name:
            copy.input[:] = ["cut.dequantized", _WEIGHT, _BIAS]
        nodes.append(copy)
    extra = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (_RATIO, _WEIGHT, _BIAS)]
    extra.append(helper.make_tensor_value_info(_STEP, TensorProto.FLOAT, []))
    return open_session(_part(model, cut, nodes, extra))
