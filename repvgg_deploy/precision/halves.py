"""A graph in FP32, with Q/DQ pairs or without → the strongly typed graph that computes in FP16.

What comes before the first layer (a uint8 image's cast and normalisation) stays FP32, and so does what makes answers of
the last layers' outputs: Softmax, TopK, arithmetic with anchors and strides (above 512, FP16 has steps of half a pixel
and more). It costs nothing there. All between is FP16, so that every operator reads tensors of one type, as a strongly
typed network must; casts stand where the two meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import CalibrationError
from ..graph.edit import copy_model, set_nodes
from ..specs.values import ModelSpec, TensorSpec
from .answers import find_answers, find_types, is_layer

Io: TypeAlias = Literal["fp32", "fp16"]
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)
FULL_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that are FP32 whatever the operator computes in."""
_FULL_RESULTS = ("Cast", "ConstantOfShape", "RandomNormal", "RandomUniform", "Range", "Constant", "EyeLike")
"""Operators whose own attributes or inputs say the type of their result."""
_NAMES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


def write_halves(model: onnx.ModelProto, *, io: Io = "fp32", full: Collection[str] = ()) -> onnx.ModelProto:
    """A copy that computes in FP16, cast after the normalised image and before what makes answers of the outputs.

    Args:
        model: FP32, or with Q/DQ pairs whose scales are FP32; not changed.
        io: Type of the graph's floating-point inputs and outputs. A uint8 image and class numbers stay what they are.
        full: Outputs of nodes that compute in FP32 wherever they are.

    Raises:
        CalibrationError: A stored value exceeds what FP16 holds; `fp16.fit_ranges` and `scales.fit_scales` prevent it.
    """
    result = copy_model(model)
    _Typing(result, TensorProto.FLOAT16 if io == "fp16" else TensorProto.FLOAT, full).write()
    return result


def half_spec(spec: ModelSpec, io: Io) -> ModelSpec:
    """What a caller must know of a graph whose floating-point inputs and outputs are of type `io`."""

    def retyped(tensor: TensorSpec) -> TensorSpec:
        return dataclasses.replace(tensor, dtype="float16") if io == "fp16" and tensor.dtype == "float32" else tensor

    return dataclasses.replace(spec, input=retyped(spec.input), outputs=tuple(map(retyped, spec.outputs)))


class _Typing:
    """Gives every tensor of a graph its type, node by node, and writes a cast wherever one is read as another.

    `border` is the type of the graph's inputs and outputs, FLOAT or FLOAT16; `full` are outputs of nodes that compute
    in FP32 wherever they are. The model is changed in place.
    """

    def __init__(self, model: onnx.ModelProto, border: int, full: Collection[str]) -> None:
        graph = self._graph = model.graph
        self._border = border
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        types = find_types(model)
        self._floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self._kinds: dict[str, int] = {}
        self._renamed: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        answers = find_answers(model)
        self._full = {node.output[0] for node in answers}
        head = {*self._constants, *(value.name for value in graph.input)}
        for node in graph.node:
            if node.output[0] in full or (not is_layer(node, self._constants.keys()) and head.issuperset(node.input)):
                self._full.add(node.output[0])
            if node.output[0] in self._full and head.issuperset(node.input):
                head.update(node.output)
        self._tail = {name for node in answers for name in node.input} - {n for node in answers for n in node.output}

    def write(self) -> None:
        """Rewrites the graph."""
        for value in (*self._graph.input, *self._graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = self._border
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in self._graph.input}
        for node in self._graph.node:
            self._write_node(node)
        set_nodes(self._graph, self._nodes)
        read = {name for node in self._nodes for name in node.input} | self._outputs
        kept = [tensor for tensor in self._constants.values() if tensor.name in read]
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self._graph.initializer[:]
        self._graph.initializer.extend(copies)
        del self._graph.value_info[:]

    def _write_node(self, node: onnx.NodeProto) -> None:
        kind = int(TensorProto.FLOAT if node.output[0] in self._full else TensorProto.FLOAT16)
        if node.op_type not in _FULL_RESULTS:
            as_they_are = FULL_INPUTS.get(node.op_type, ())
            for index, name in enumerate(node.input):
                if name in self._floats:
                    node.input[index] = self._read(name, int(TensorProto.FLOAT) if index in as_they_are else kind)
        else:
            kind = int(TensorProto.FLOAT)
        self._nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in self._floats:
                continue
            wanted = self._wanted(name, kind)
            self._kinds[name] = wanted
            if wanted != kind:
                node.output[index] = self._renamed[name, kind] = f"{name}.{_NAMES[kind]}"
                self._cast(node.output[index], name, wanted)

    def _wanted(self, name: str, kind: int) -> int:
        if name in self._outputs:
            return self._border
        return int(TensorProto.FLOAT) if name in self._tail else kind

    def _read(self, name: str, kind: int) -> str:
        """The name under which a node of type `kind` reads a tensor."""
        if name in self._constants:
            return self._halved(name) if kind == TensorProto.FLOAT16 else name
        if self._kinds.get(name, kind) == kind:
            return name
        if (name, kind) not in self._renamed:
            self._renamed[name, kind] = f"{name}.{_NAMES[kind]}"
            self._cast(name, self._renamed[name, kind], kind)
        return self._renamed[name, kind]

    def _halved(self, name: str) -> str:
        """A stored tensor in FP16; under its own name, unless something reads it in FP32."""
        if self._kinds.get(name) == TensorProto.FLOAT16:
            return name
        full = [node for node in self._graph.node if name in node.input and self._reads_full(node, name)]
        if full:
            copy = f"{name}.{_NAMES[TensorProto.FLOAT16]}"
            if copy not in self._constants:
                self._constants[copy] = onnx.TensorProto.FromString(self._constants[name].SerializeToString())
                self._constants[copy].name = copy
                _halve(self._constants[copy])
            return copy
        _halve(self._constants[name])
        self._kinds[name] = int(TensorProto.FLOAT16)
        return name

    def _reads_full(self, node: onnx.NodeProto, name: str) -> bool:
        fixed = [node.input[index] for index in FULL_INPUTS.get(node.op_type, ()) if index < len(node.input)]
        return name in fixed or node.output[0] in self._full

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
