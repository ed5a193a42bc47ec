"""Number types of the tensors of a typed graph, read without the onnx package, for a TensorRT that does not take them from the graph itself (8.x)."""

from __future__ import annotations

from ..files.onnx import GraphSummary, NodeSummary
from ..specs.values import ModelSpec

_CAST = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
# Operators whose result has the type of another input than the first, or one of its own.
_OF_SCALE = 1
_FIXED = {"Shape": "int64", "Size": "int64", "ArgMax": "int64", "Equal": "bool", "Greater": "bool", "Less": "bool"}


def tensor_types(graph: GraphSummary, spec: ModelSpec) -> dict[str, str]:
    """Number type of every tensor by name, in NumPy's names; one that cannot be known is left out."""
    types = {**graph.types, spec.input.name: spec.input.dtype}
    for node in graph.nodes:
        found = _result_type(node, types)
        for index, output in enumerate(node.outputs):
            kind = "int64" if node.op_type == "TopK" and index == 1 else found
            if kind is not None and output:
                types[output] = kind
    return types


def _result_type(node: NodeSummary, types: dict[str, str]) -> str | None:
    if node.op_type == "Cast":
        return _CAST.get(node.integers.get("to", 0))
    if node.op_type in _FIXED:
        return _FIXED[node.op_type]
    if node.op_type == "QuantizeLinear":
        return types.get(node.inputs[2], "int8") if len(node.inputs) > 2 else "uint8"
    source = _OF_SCALE if node.op_type == "DequantizeLinear" else 0
    return types.get(node.inputs[source]) if len(node.inputs) > source else None
