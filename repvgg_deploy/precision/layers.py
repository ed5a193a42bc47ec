"""Layers of a graph looked at one by one: quantized alone, or their outputs given out.

A `Cut` is one layer with what lies behind it, which `quantize_alone` runs. A `LayerRun` gives the output of every layer
of a graph in FP32, FP16 or with Q/DQ pairs alike, for a comparison of two graphs. It knows layers by the names of their
nodes (an unnamed one by its output), which no change of precision touches; the tensor that a node writes may have
another name and type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError, ModelError
from ..evaluate.agreement import decibels
from ..graph.edit import copy_model
from .grids import Grid
from .network import Layer, Network
from .round import RoundedLayer
from .run_onnx import Tensors, make_part, open_session, run_session, run_tensors

_LAYERS = ("Conv", "Gemm")
_EXPORT = "export it again with repvgg-export"
_STEP, _ZERO, _WEIGHT, _BIAS = "cut.step", "cut.zero", "cut.weight", "cut.bias"


@dataclass(frozen=True, slots=True)
class Cut:
    """A layer and the nodes behind it, as far as it reaches.

    Attributes:
        ends: Where an error is measured: the classifier's output or what is compared in the graph's answers, as far as
            it is reached.
        given: Tensors that the part reads and does not compute; the layer's input is the first.
        nodes: In order.
    """

    ends: tuple[str, ...]
    given: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]


def cut_behind(network: Network, layer: Layer) -> Cut:
    """Cuts out a layer and all that depends on it up to the ends."""
    nodes = network.model.graph.node
    reached = {layer.output}
    for node in nodes:
        if reached.intersection(node.input):
            reached.update(node.output)
    ends = tuple(name for name in network.judged if name in reached) or (layer.output,)
    producers = {name: node for node in nodes for name in node.output}
    needed: set[str] = set()
    queue = list(ends)
    while queue:
        name = queue.pop()
        if name in reached and name not in needed:
            needed.update(producers[name].output)
            queue += producers[name].input
    part = tuple(node for node in nodes if needed.intersection(node.output))
    made = {name for node in part for name in node.output} | {tensor.name for tensor in network.model.graph.initializer}
    read = dict.fromkeys([layer.input, *(name for node in part for name in node.input)])
    return Cut(ends, tuple(name for name in read if name and name not in made), part)


def quantize_alone(
    network: Network, layer: Layer, rounded: RoundedLayer, *, steps: tuple[float, Grid], images: Iterable[NDArray[Any]]
) -> dict[str, float]:
    """SQNR in decibels at each of the ends that a layer reaches, by tensor, when it alone is quantized.

    `steps` are those of its input: the real value of one, and on which grid.
    """
    scale, grid = steps
    cut = cut_behind(network, layer)
    session = _open_cut(network.model, layer, cut, grid)
    constants = {_STEP: np.array(scale, np.float32), _WEIGHT: layer.translate(rounded.weight()), _BIAS: rounded.bias}
    signal, noise = np.zeros(len(cut.ends)), np.zeros(len(cut.ends))
    for values in run_tensors(network.model, (*cut.given, *cut.ends), images):
        found = run_session(session, list(cut.ends), {**{name: values[name] for name in cut.given}, **constants})
        for index, (name, value) in enumerate(zip(cut.ends, found, strict=True)):
            signal[index] += float(np.square(values[name], dtype=np.float64).sum())
            noise[index] += float(np.square(value - values[name], dtype=np.float64).sum())
    return dict(zip(cut.ends, map(decibels, signal.tolist(), noise.tolist()), strict=True))


def _open_cut(model: onnx.ModelProto, layer: Layer, cut: Cut, grid: Grid) -> onnxruntime.InferenceSession:
    """The cut with its layer's input quantized; the scale of that, weight and bias are inputs."""
    between, after = "cut.quantized", "cut.dequantized"
    nodes = [
        helper.make_node("QuantizeLinear", [layer.input, _STEP, _ZERO], [between], name="cut.quantize"),
        helper.make_node("DequantizeLinear", [between, _STEP, _ZERO], [after], name="cut.dequantize"),
    ]
    for node in cut.nodes:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        named = {layer.weight: _WEIGHT, layer.bias: _BIAS} | ({layer.input: after} if node.name == layer.name else {})
        copy.input[:] = [named.get(name, name) for name in node.input]
        nodes.append(copy)
    given = (*cut.given, _WEIGHT, _BIAS)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given]
    inputs.append(helper.make_tensor_value_info(_STEP, TensorProto.FLOAT, []))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in cut.ends]
    part = make_part(model, nodes, inputs, outputs)
    part.graph.initializer.append(numpy_helper.from_array(grid.encode(np.array(0.0)), _ZERO))
    part.graph.initializer[-1].data_type = grid.kind
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
        # Nothing rescales a classifier.
        self.classifiers = frozenset(_name(node) for node in layers[-1:] if node.op_type == "Gemm")
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
    """What both graphs give, by name of the layer, batch by batch; one batch is in memory at a time.

    `batches` are the same images as each takes them; `LayerRun.require_same` says whether the graphs can be compared.
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
