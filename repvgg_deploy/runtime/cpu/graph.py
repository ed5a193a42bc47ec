"""An ONNX graph in memory whose nodes and small tensors can be changed, without the package onnx.

Stored tensors stay views of the file until they are replaced, so that a large model is copied once, when it is
serialized.
Source: field numbers of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files import wire

FLOAT, FLOAT16 = 1, 10
_DTYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}
_GRAPH, _METADATA_PROPS = 7, 14
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_GRAPH_ATTRIBUTES = (6, 11)  # a node with a graph inside reads names that its inputs do not list


class GraphError(ValueError):
    """The graph holds what is not edited here; the message says what. Callers run the file as it stands."""


@dataclass(slots=True)
class Node:
    """One node.

    Attributes:
        op_type: Such as `Conv`.
        inputs: Names; an empty one for an input that is left out.
        rest: Its other fields as they are in a file: name, attributes.
        domain: The operator's; empty for ONNX's own.
    """

    op_type: str
    inputs: list[str]
    outputs: list[str]
    rest: bytes = b""
    domain: str = ""

    def attribute(self, name: str) -> int | None:
        """The value of an integer attribute."""
        for outer in wire.walk(self.rest):
            if outer.number == 5:
                inner = list(wire.walk(self.rest, outer.payload, outer.end))
                if any(item.number == 1 and self.rest[item.payload : item.end] == name.encode() for item in inner):
                    return next((item.value for item in inner if item.number == 3), 0)
        return None

    def serialize(self) -> bytes:
        """The fields of a NodeProto."""
        named = [*((1, name) for name in self.inputs), *((2, name) for name in self.outputs), (4, self.op_type)]
        return b"".join(wire.bytes_field(number, text.encode()) for number, text in named) + self.rest


@dataclass(slots=True)
class Graph:
    """A graph and what surrounds it in its file.

    Attributes:
        nodes: In order.
        kinds: Number type of each stored tensor, of each input and of each output of the graph.
        inputs: Names of the graph's inputs that are not stored tensors.
        outputs: Names of the graph's outputs.
    """

    nodes: list[Node] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    _tensors: dict[str, memoryview | bytes] = field(default_factory=dict)
    _others: list[memoryview] = field(default_factory=list)
    _around: list[memoryview] = field(default_factory=list)

    def holds(self, name: str) -> bool:
        """Whether a name is that of a stored tensor."""
        return name in self._tensors

    def stored(self) -> list[str]:
        """Names of the stored tensors."""
        return list(self._tensors)

    def read(self, name: str) -> NDArray[Any]:
        """A stored tensor; its memory is the file's.

        Raises:
            GraphError: It is not stored as raw bytes of a known type.
        """
        data = self._tensors[name]
        dims: list[int] = []
        raw = None
        for item in wire.walk(data):
            if item.number == 9:
                raw = memoryview(data)[item.payload : item.end]
            elif item.number == 1:
                dims += wire.read_numbers(data, item)
        if raw is None or self.kinds[name] not in _DTYPES:
            raise GraphError(f"the tensor {name} is not stored as raw bytes")
        return np.frombuffer(raw, _DTYPES[self.kinds[name]]).reshape(dims)

    def store(self, name: str, array: NDArray[Any]) -> str:
        """Adds a tensor, or puts another in its place; gives its name back."""
        kind = next(kind for kind, dtype in _DTYPES.items() if array.dtype == dtype)
        dims = b"".join(wire.varint(1 << 3) + wire.varint(size) for size in array.shape)
        head = dims + wire.varint(2 << 3) + wire.varint(kind)
        self._tensors[name] = head + wire.bytes_field(8, name.encode()) + wire.bytes_field(9, array.tobytes())
        self.kinds[name] = kind
        return name

    def serialize(self) -> bytes:
        """The file, without metadata; stored tensors that nothing reads are left out."""
        used = {name for node in self.nodes for name in node.inputs} | set(self.outputs)
        pieces: list[bytes | memoryview] = [wire.bytes_field(_NODE, node.serialize()) for node in self.nodes]
        pieces += self._others
        for name, data in self._tensors.items():
            if name in used:
                pieces += [wire.bytes_header(_INITIALIZER, len(data)), data]
        header = wire.bytes_header(_GRAPH, sum(map(len, pieces)))
        return b"".join([*self._around, header, *pieces])


def parse(buffer: memoryview) -> Graph:
    """Reads the bytes of an ONNX file; the graph keeps views of them.

    Raises:
        GraphError: It is damaged, or has what is not edited here: graphs inside nodes, tensors in other files.
    """
    graph = Graph()
    try:
        outer = list(wire.walk(buffer))
        body = next(item for item in outer if item.number == _GRAPH)
        rest = [item for item in outer if item.number not in (_GRAPH, _METADATA_PROPS)]
        graph._around = [buffer[item.start : item.end] for item in rest]
        for item in wire.walk(buffer, body.payload, body.end):
            part = buffer[item.payload : item.end]
            if item.number == _NODE:
                graph.nodes.append(_read_node(part))
            elif item.number == _INITIALIZER:
                name, kind = _read_tensor(part)
                graph._tensors[name], graph.kinds[name] = part, kind
            elif item.number in (_INPUT, _OUTPUT):
                name, kind = _read_value(part)
                (graph.inputs if item.number == _INPUT else graph.outputs).append(name)
                graph.kinds.setdefault(name, kind)
            # Types of inner tensors may change, and are optional.
            if item.number not in (_NODE, _INITIALIZER, _VALUE_INFO):
                graph._others.append(buffer[item.start : item.end])
    except (wire.WireError, UnicodeDecodeError, StopIteration) as error:
        raise GraphError(f"the graph cannot be read: {error}") from error
    graph.inputs = [name for name in graph.inputs if not graph.holds(name)]
    return graph


def _read_node(part: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: [], 7: []}
    rest = []
    for item in wire.walk(part):
        if item.number in texts:
            texts[item.number].append(bytes(part[item.payload : item.end]).decode())
        if item.number == 5:
            inner = wire.walk(part, item.payload, item.end)
            if any(one.number in _GRAPH_ATTRIBUTES for one in inner):
                raise GraphError("a node holds a graph of its own")
        if item.number not in (1, 2, 4):
            rest.append(bytes(part[item.start : item.end]))
    return Node("".join(texts[4]), texts[1], texts[2], b"".join(rest), "".join(texts[7]).removeprefix("ai.onnx"))


def _read_tensor(part: memoryview) -> tuple[str, int]:
    """Name and number type of a stored tensor."""
    name, kind = "", 0
    for item in wire.walk(part):
        if item.number == 8:
            name = bytes(part[item.payload : item.end]).decode()
        elif item.number == 2:
            kind = item.value
        elif item.number == 13:
            raise GraphError("a tensor lies in another file")
    return name, kind


def _read_value(part: memoryview) -> tuple[str, int]:
    """Name and number type of a graph's input or output: type.tensor_type.elem_type."""
    name, kind = "", 0
    for item in wire.walk(part):
        if item.number == 1:
            name = bytes(part[item.payload : item.end]).decode()
        elif item.number == 2:
            for inner in wire.walk(part, item.payload, item.end):
                if inner.number == 1:
                    leaves = wire.walk(part, inner.payload, inner.end)
                    kind = next((leaf.value for leaf in leaves if leaf.number == 1), 0)
    return name, kind


def readers(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """By name of a tensor, the nodes that read it, once for each time."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            found.setdefault(name, []).append(node)
    return found


def makers(nodes: Iterable[Node]) -> dict[str, Node]:
    """By name of a tensor, the node that makes it."""
    return {name: node for node in nodes for name in node.outputs}
