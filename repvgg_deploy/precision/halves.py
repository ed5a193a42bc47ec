"""A graph in FP32, with Q/DQ pairs or without → the strongly typed graph that computes in FP16.

What comes before the first layer (a uint8 image's cast and normalisation) and what follows the classifier (Softmax,
TopK) stays FP32: it costs nothing there and keeps its digits. All between is FP16, so that every operator reads tensors
of one type, as a strongly typed network must; casts stand where the two meet.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError
from ..specs.values import ModelSpec, TensorSpec
from .chain import copy_model, set_nodes

Io: TypeAlias = Literal["fp32", "fp16"]
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)
_LAYERS = ("Conv", "Gemm", "QuantizeLinear", "DequantizeLinear")
_TAIL = ("Softmax", "TopK")
_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def write_halves(model: onnx.ModelProto, *, io: Io = "fp32") -> onnx.ModelProto:
    """A copy that computes in FP16, cast after the normalised image and before what follows the classifier.

    Args:
        model: FP32, or with Q/DQ pairs whose scales are FP32; not changed.
        io: Type of the graph's floating-point inputs and outputs. A uint8 image and class numbers stay what they are.

    Raises:
        CalibrationError: A stored value exceeds what FP16 holds; `fp16.fit_ranges` and `scales.fit_scales` prevent it.
    """
    result = copy_model(model)
    _Typing(result.graph, TensorProto.FLOAT16 if io == "fp16" else TensorProto.FLOAT).write()
    return result


def half_spec(spec: ModelSpec, io: Io) -> ModelSpec:
    """What a caller must know of a graph whose floating-point inputs and outputs are of type `io`."""

    def retyped(tensor: TensorSpec) -> TensorSpec:
        return dataclasses.replace(tensor, dtype="float16") if io == "fp16" and tensor.dtype == "float32" else tensor

    return dataclasses.replace(spec, input=retyped(spec.input), outputs=tuple(map(retyped, spec.outputs)))


class _Typing:
    """Gives every tensor of a graph its type, node by node, and writes a cast wherever one is read as another.

    `border` is the type of the graph's inputs and outputs, FLOAT or FLOAT16. The graph is changed in place.
    """

    def __init__(self, graph: onnx.GraphProto, border: int) -> None:
        self._graph = graph
        self._border = border
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._kinds: dict[str, int] = {}
        self._renamed: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._head = {value.name for value in graph.input}
        self._tail: set[str] = set()
        for node in reversed(graph.node):
            if node.op_type in _TAIL:
                self._tail.update(node.input)

    def write(self) -> None:
        """Rewrites the graph."""
        for value in (*self._graph.input, *self._graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = self._border
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in self._graph.input}
        for node in self._graph.node:
            self._write_node(node)
        set_nodes(self._graph, self._nodes)
        del self._graph.value_info[:]

    def _write_node(self, node: onnx.NodeProto) -> None:
        kind = TensorProto.FLOAT if self._is_full(node) else TensorProto.FLOAT16
        node.input[:] = [self._read(name, kind) for name in node.input]
        self._nodes.append(node)
        if node.op_type == "QuantizeLinear":
            return
        kept = node.op_type == "TopK"  # its second output counts classes
        for index, name in enumerate(node.output[:1] if kept else node.output):
            wanted = self._wanted(name, kind)
            self._kinds[name] = wanted
            if wanted != kind:
                node.output[index] = self._renamed[name, kind] = f"{name}.{_NAMES[kind]}"
                self._cast(node.output[index], name, wanted)

    def _is_full(self, node: onnx.NodeProto) -> bool:
        """Whether the node computes in FP32; marks what it gives as lying before the first layer."""
        if node.op_type in _TAIL:
            return True
        full = node.op_type not in _LAYERS and all(name in self._head or name in self._constants for name in node.input)
        if full:
            self._head.update(node.output)
        return full

    def _wanted(self, name: str, kind: int) -> int:
        if name in self._outputs:
            return self._border
        return int(TensorProto.FLOAT) if name in self._tail else kind

    def _read(self, name: str, kind: int) -> str:
        """The name under which a node of type `kind` reads a tensor."""
        if name in self._constants:
            if kind == TensorProto.FLOAT16:
                _halve(self._constants[name])
            return name
        if self._kinds.get(name, kind) not in _NAMES or self._kinds.get(name, kind) == kind:
            return name
        if (name, kind) not in self._renamed:
            self._renamed[name, kind] = f"{name}.{_NAMES[kind]}"
            self._cast(name, self._renamed[name, kind], kind)
        return self._renamed[name, kind]

    def _cast(self, source: str, target: str, kind: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind))


def _halve(tensor: onnx.TensorProto) -> None:
    """Rounds a stored FP32 tensor to FP16, in place; others are left as they are."""
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST:
        raise CalibrationError(
            f"{tensor.name} holds {largest:.3g}, and FP16 ends at {LARGEST:.0f}",
            remedy="make the graph with to_fp16 or to_int8, which rescale it",
        )
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
