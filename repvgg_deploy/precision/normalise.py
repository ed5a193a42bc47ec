"""An FP32 graph in one form: every layer has a name, a bias, and constants of its own that are stored in the graph.

A Gemm is x·Wᵀ + b; a MatMul with a constant is followed by the sum that holds its bias.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ..graph.edit import GraphView, attributes

KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that have weights; a MatMul, where its second operand is constant."""


def normalise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in that form; the model itself, not a copy, where it has it already."""
    view = GraphView(model)
    writer = _Normaliser(view)
    for node in view.nodes:
        writer.write(node)
    if not writer.changed:
        return model
    result = view.rebuild(writer.nodes, writer.constants)
    inferred = shape_inference.infer_shapes(result).graph.value_info
    # ONNX Runtime must be told of what is cut in the middle of a graph, where it is not float32.
    result.graph.value_info.extend(v for v in inferred if v.type.tensor_type.elem_type != TensorProto.FLOAT)
    return result


class _Normaliser:
    """Writes the nodes of a graph anew; `changed` says whether that made any difference."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._uses = Counter(name for node in view.nodes for name in node.input)
        self._stored = {tensor.name for tensor in view.model.graph.initializer}
        self._names = {node.name for node in view.nodes if node.op_type not in KINDS}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.changed = False

    def write(self, node: onnx.NodeProto) -> None:
        """A node, and for a MatMul the sum behind it that holds its bias."""
        place = len(self.nodes)
        self.nodes.append(node)
        if node.op_type not in (*KINDS, "Add", "Sub") or node.domain not in ("", "ai.onnx"):
            return
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        for index, name in enumerate(node.input):
            value = self._view.raw_constant(name) if name else None
            if value is not None and value.dtype == np.float32 and (name not in self._stored or self._uses[name] > 1):
                copy.input[index] = self._store(name, value)
        if node.op_type in KINDS:
            weight = self._view.raw_constant(node.input[1])
            if weight is not None and weight.dtype == np.float32:
                self._write_layer(copy, weight)
            if not copy.name or copy.name in self._names:
                copy.name = copy.output[0]
            self._names.add(copy.name)
        if copy != node:
            self.nodes[place] = copy
            self.changed = True

    def _write_layer(self, node: onnx.NodeProto, weight: NDArray[Any]) -> None:
        if node.op_type == "MatMul":
            if weight.ndim == 2 and self._view.raw_constant(node.input[0]) is None:
                self._add_bias(node, weight.shape[1])
            return
        named = attributes(node)
        groups, out = int(named.get("group", 1)), len(weight)
        if node.op_type == "Gemm":
            transposed = bool(named.get("transB", 0))
            alpha, beta, out = named.get("alpha", 1.0), named.get("beta", 1.0), weight.shape[0 if transposed else 1]
            if not transposed or alpha != 1:
                weight = weight if transposed else weight.T
                node.input[1] = self._store(node.input[1], np.ascontiguousarray(weight * np.float32(alpha)))
            bias = self._view.raw_constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            if bias is not None and bias.size in (1, out) and (beta != 1 or bias.shape != (out,)):
                node.input[2] = self._store(node.input[2], np.resize(bias * np.float32(beta), out))
            if not transposed or alpha != 1 or beta != 1:
                kept = [a for a in node.attribute if a.name not in ("alpha", "beta", "transB")]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute("transB", 1)])
        elif node.op_type == "ConvTranspose":
            out = weight.shape[1] * groups
        if len(node.input) < 3 or not node.input[2]:
            zeros = self._store(f"{node.output[0]}.bias", np.zeros(out, np.float32))
            node.input[:] = [*node.input[:2], zeros]

    def _add_bias(self, node: onnx.NodeProto, channels: int) -> None:
        """After a product; a sum with a constant for each channel that alone reads it is its bias already."""
        output = node.output[0]
        readers = self._view.readers.get(output, [])
        if len(readers) == 1 and readers[0].op_type == "Add" and output not in self._view.kept:
            other = next((name for name in readers[0].input if name != output), "")
            bias = self._view.raw_constant(other) if other else None
            if bias is not None and bias.shape == (channels,) and bias.dtype == np.float32:
                return
        product = f"{output}.product"
        node.output[0] = product
        zeros = self._store(f"{output}.bias", np.zeros(channels, np.float32))
        self.nodes.append(helper.make_node("Add", [product, zeros], [output], name=f"{output}.add"))
        self.changed = True

    def _store(self, near: str, value: NDArray[Any]) -> str:
        name = self._view.new_name(near)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name
