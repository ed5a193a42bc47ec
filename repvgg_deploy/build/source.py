"""The ONNX that a plan is built from, read once, so that what is hashed is what is built; and its number types."""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..files.onnx import (
    GraphSummary,
    NodeSummary,
    find_initializers,
    graph_precision,
    read_graph,
    read_metadata,
    weighted_nodes,
)
from ..files.signatures import PLAN_MAGICS
from ..specs.values import ModelMetadata, ModelSpec, Precision

_CAST = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    16: "bfloat16", 17: "float8e4m3fn"
}  # fmt: skip
"""NumPy's names of TensorProto.DataType."""
_FIXED = {"Shape": "int64", "Size": "int64", "ArgMax": "int64", "Equal": "bool", "Greater": "bool", "Less": "bool"}
"""Operators whose result has a type of its own."""
_GROUP = 4


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX that was read.

    Attributes:
        sha256: Digest of `data`, all of the file.
        metadata: Ours, checked against the content.
        graph: Without the weights.
        precision: The lowest that its convolutions compute in.
    """

    path: Path
    data: bytes
    sha256: str
    metadata: ModelMetadata
    graph: GraphSummary
    precision: Precision

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs."""
        return self.metadata.spec


def read_source(path: Path) -> Source:
    """Reads an ONNX of ours.

    Raises:
        ModelError: It is missing, damaged, changed, not one of ours, or was replaced meanwhile.
    """
    before = _stamp(path)
    metadata, graph = _read_metadata(path), read_graph(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error
    if _stamp(path) != before:  # the certificate may speak of another graph than the one that would be built
        raise ModelError(f"{path}: was replaced while it was read", remedy="build it again")
    return Source(path, data, hashlib.sha256(data).hexdigest(), metadata, graph, graph_precision(weighted_nodes(graph)))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:  # reading it will say what is wrong
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_metadata(path: Path) -> ModelMetadata:
    try:
        return read_metadata(path)
    except ModelError as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(PLAN_MAGICS[0])) in PLAN_MAGICS:
                raise ModelError(
                    f"{path}: is a TensorRT plan already", remedy="give the .onnx that it was built from"
                ) from error
        raise


def tensor_types(graph: GraphSummary, spec: ModelSpec) -> dict[str, str]:
    """Number type of every tensor by name, in NumPy's names; one that cannot be known is left out.

    TensorRT 8 does not take the types from the graph itself. They are read without the onnx package.
    """
    types = {**graph.types, spec.input.name: spec.input.dtype}
    for node in graph.nodes:
        found = _result_type(node, types)
        for index, output in enumerate(node.outputs):
            kind = "int64" if node.op_type == "TopK" and index == 1 else found
            if kind is not None and output:
                types[output] = kind
    return types


_BYTES = {"float8e4m3fn": "u1"}  # NumPy has no such type; all that counts is what is zero


def find_dense_layers(source: Source) -> tuple[list[str], int]:
    """Layers whose weights are not 2:4 sparse, and how many layers could be: those of four input channels or more.

    Of each four input channels, at least two weights must be zero, for every output channel and kernel position.
    Source: NVIDIA, TensorRT developer guide, "Sparsity".
    """
    import numpy as np  # the rest of a build does without

    weights = find_initializers(source.path, memoryview(source.data))
    producers = {name: node for node in source.graph.nodes for name in node.outputs}
    dense, count = [], 0
    for node in source.graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 2:
            continue
        producer, name = producers.get(node.inputs[1]), node.inputs[1]
        if producer is not None and producer.op_type == "DequantizeLinear":
            name = producer.inputs[0]
        kind = source.graph.types.get(name, "")
        shape, data = weights.get(name, ((), memoryview(b"")))
        turned = node.op_type == "Gemm" and not node.integers.get("transB", 0)
        if len(shape) < 2 or len(data) == 0 or shape[0 if turned else 1] < _GROUP:
            continue
        count += 1
        array = np.frombuffer(data, np.dtype(_BYTES.get(kind, kind))).reshape(shape)
        nonzero = (array & 0x7F if kind in _BYTES else array) != 0
        nonzero = (nonzero.T if turned else nonzero).reshape(shape[1 if turned else 0], shape[0 if turned else 1], -1)
        padded = np.pad(nonzero, ((0, 0), (0, -nonzero.shape[1] % _GROUP), (0, 0)))
        groups = padded.reshape(len(padded), -1, _GROUP, math.prod(shape[2:]))
        if groups.sum(axis=2).max() > _GROUP // 2:
            dense.append(node.name or node.outputs[0])
    return dense, count


def _result_type(node: NodeSummary, types: dict[str, str]) -> str | None:
    if node.op_type == "Cast":
        return _CAST.get(node.integers.get("to", 0))
    if node.op_type in _FIXED:
        return _FIXED[node.op_type]
    if node.op_type == "QuantizeLinear":
        return types.get(node.inputs[2], "int8") if len(node.inputs) > 2 else "uint8"
    source = 1 if node.op_type == "DequantizeLinear" else 0  # its result has the type of the scale
    return types.get(node.inputs[source]) if len(node.inputs) > source else None
