"""An ONNX file of ours: its metadata, its digest, its graph without the weights. Needs neither onnx nor NumPy.

The metadata (one JSON value under `repvgg_deploy` in `metadata_props`) is bound to the graph by `content_sha256`: a
file that was truncated or edited after its export is refused before any runtime sees it, because its certificate speaks
of another graph.
Source: field numbers of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import ForeignModelError, InputError, ModelError, clean_text
from ..specs import codec
from ..specs.values import METADATA_KEY, ModelMetadata
from . import wire
from .signatures import HEAD_BYTES, name_foreign

_GRAPH, _METADATA_PROPS, _OPSET_IMPORT = 7, 14, 8
_MODEL_FIELDS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
_NODE, _INITIALIZER, _INPUT, _RAW_DATA = 1, 5, 11, 9
_ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 5, 1, 3
_CHUNK_BYTES = 1 << 20
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 11: "float64", 17: "float8e4m3fn"}
_PRECISIONS = {"int8": "int8", "float8e4m3fn": "fp8", "float16": "fp16", "float32": "fp32"}  # the lowest first
_DIGEST_FIELD = re.compile(r'"content_sha256":"[0-9a-f]*"')  # inside a JSON string the quotes would be escaped
_REEXPORT = "export it again with repvgg-export"


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """One node of a graph.

    Attributes:
        op_type: Such as `Conv`.
        name: May be empty.
        integers: Its attributes that are one whole number, not negative, such as `to` of a Cast.
    """

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """A graph without its weights.

    Attributes:
        initializers: Shape by name.
        opset: Version of the default operator set.
        types: Number type of each initializer by name: `float32`, `float16`, `int8` and so on; a type that no model of
            ours has by its number in ONNX.
    """

    nodes: tuple[NodeSummary, ...]
    initializers: dict[str, tuple[int, ...]]
    opset: int
    file_bytes: int
    types: dict[str, str]

    def count_ops(self) -> dict[str, int]:
        """How many nodes of each type."""
        return dict(Counter(node.op_type for node in self.nodes))


def read_metadata(path: Path) -> ModelMetadata:
    """Reads and checks the metadata of an ONNX that this project wrote.

    Raises:
        ModelError: The file is missing, truncated, not an ONNX, or was changed after its export.
        ForeignModelError: It is not ours.
    """
    with _mapped(path) as buffer:
        return _metadata(path, buffer)


def read_whole(path: Path) -> tuple[bytes, ModelMetadata]:
    """The bytes of an ONNX that this project wrote, read once, and its metadata, checked as `read_metadata` does.

    Raises:
        ModelError: As of `read_metadata`.
    """
    with _mapped(path) as buffer:
        data = bytes(buffer)
    return data, _metadata(path, memoryview(data))


def _metadata(path: Path, buffer: memoryview) -> ModelMetadata:
    fields = _top_level(path, buffer)
    text = _find_metadata(path, buffer, fields)
    try:
        metadata = codec.loads(ModelMetadata, text)
    except InputError as error:
        raise ModelError(
            f"{path}: its {METADATA_KEY} metadata is damaged or of another version: {error.message}", remedy=_REEXPORT
        ) from error
    parts = hashlib.sha256()
    for field in fields:
        if field.number != _METADATA_PROPS:
            # In pieces: hashing one large slice would hold all of its pages in memory at once.
            for start in range(field.start, field.end, _CHUNK_BYTES):
                parts.update(buffer[start : min(start + _CHUNK_BYTES, field.end)])
    found = _content_digest(parts, text)
    if found != metadata.content_sha256:
        raise ModelError(
            f"{path}: was changed after its export: expected content sha256 {metadata.content_sha256[:16]}…, "
            f"found {found[:16]}…",
            remedy=f"{_REEXPORT}; a changed graph has lost its certificate",
        )
    return metadata


def read_graph(path: Path) -> GraphSummary:
    """Reads the nodes, and the shapes and types of the initializers.

    Raises:
        ModelError: The file is missing, truncated or not an ONNX.
    """
    with _mapped(path) as buffer:
        fields = _top_level(path, buffer)
        try:
            graph = next(field for field in fields if field.number == _GRAPH)
            inner = list(wire.walk(buffer, graph.payload, graph.end))
            tensors = [_read_tensor(buffer, field) for field in inner if field.number == _INITIALIZER]
            nodes = tuple(_read_node(buffer, field) for field in inner if field.number == _NODE)
            opset = max((_read_opset(buffer, field) for field in fields if field.number == _OPSET_IMPORT), default=0)
        except (wire.WireError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: its graph is damaged: {error}", remedy=_REEXPORT) from error
        shapes, types = {t.name: t.shape for t in tensors}, {t.name: t.dtype for t in tensors}
        if len(shapes) != len(tensors):
            raise ModelError(f"{path}: its graph is damaged: two initializers have one name", remedy=_REEXPORT)
        return GraphSummary(nodes, shapes, opset, len(buffer), types)


@contextlib.contextmanager
def open_initializers(path: Path) -> Iterator[dict[str, tuple[tuple[int, ...], memoryview]]]:
    """Shape and raw bytes of each initializer by name, as views of the mapped file; do not keep them beyond the block.

    Raises:
        ModelError: The file is missing, truncated or not an ONNX.
    """
    with _mapped(path) as buffer:
        found = find_initializers(path, buffer)
        try:
            yield found
        finally:
            for _, view in found.values():
                view.release()


def find_initializers(path: Path, buffer: memoryview) -> dict[str, tuple[tuple[int, ...], memoryview]]:
    """The same of a file that was read, as views of its bytes; `path` is for messages."""
    graph = next(field for field in _top_level(path, buffer) if field.number == _GRAPH)
    inner = wire.walk(buffer, graph.payload, graph.end)
    tensors = [_read_tensor(buffer, field) for field in inner if field.number == _INITIALIZER]
    return {tensor.name: (tensor.shape, buffer[tensor.start : tensor.end]) for tensor in tensors}


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A read-only view of a file, closed at the end of the block."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except IsADirectoryError as error:
        remedy = "give the .onnx file itself"
        raise ModelError(f"{path}: is a folder, expected an ONNX file", remedy=remedy) from error
    except ValueError as error:
        raise ModelError(f"{path}: is empty, expected an ONNX file", remedy=_REEXPORT) from error
    except FileNotFoundError as error:
        remedy = "check the path, or export the model with repvgg-export"
        raise ModelError(f"{path}: no such file", remedy=remedy) from error
    except OSError as error:
        remedy = "check that it is a file that you may read"
        raise ModelError(f"{path}: cannot be read: {error.strerror}", remedy=remedy) from error
    with content, memoryview(content) as view:
        yield view


def _top_level(path: Path, buffer: memoryview) -> list[wire.Field]:
    try:
        fields = list(wire.walk(buffer))
    except wire.WireError as error:
        remedy = f"copy the file again, or {_REEXPORT}"
        raise _no_onnx(path, buffer) or ModelError(
            f"{path}: truncated, or not an ONNX file: {error}", remedy=remedy
        ) from error
    graphs = [field for field in fields if field.number == _GRAPH and field.wire_type == wire.BYTES]
    if len(graphs) != 1 or any(field.number not in _MODEL_FIELDS for field in fields):
        message = f"{path}: not an ONNX file: expected one graph, found {len(graphs)}"
        raise _no_onnx(path, buffer) or ModelError(message, remedy=f"give the .onnx file, or {_REEXPORT}")
    return fields


def _no_onnx(path: Path, buffer: memoryview) -> ModelError | None:
    foreign = name_foreign(path, bytes(buffer[:HEAD_BYTES]), ".onnx")
    return foreign and ModelError(f"{path}: is {foreign[0]}, expected an ONNX file", remedy=foreign[1])


def _find_metadata(path: Path, buffer: memoryview, fields: list[wire.Field]) -> str:
    for field in fields:
        if field.number != _METADATA_PROPS:
            continue
        try:
            entry = {
                inner.number: bytes(buffer[inner.payload : inner.end])
                for inner in wire.walk(buffer, field.payload, field.end)
            }
            if entry.get(1) == METADATA_KEY.encode():
                return entry.get(2, b"").decode()
        except (wire.WireError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: its metadata is damaged: {error}", remedy=_REEXPORT) from error
    raise _foreign_error(path, buffer, fields)


def _foreign_error(path: Path, buffer: memoryview, fields: list[wire.Field]) -> ForeignModelError:
    """Says of an ONNX of others what makes it one of ours; `fold` wrote no metadata where there are several inputs."""
    try:
        graph = next(field for field in fields if field.number == _GRAPH)
        inner = list(wire.walk(buffer, graph.payload, graph.end))
        weights = {_read_tensor(buffer, field).name for field in inner if field.number == _INITIALIZER}
        names = [_first_text(buffer, field) for field in inner if field.number == _INPUT]
    except (wire.WireError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: its graph is damaged: {error}", remedy=_REEXPORT) from error
    inputs = [name for name in names if name not in weights]
    message = f"{path}: an ONNX file without {METADATA_KEY} metadata"
    if len(inputs) > 1:
        return ForeignModelError(
            f"{message}: it has {len(inputs)} inputs, {', '.join(inputs)}, expected one image",
            remedy="run it in ONNX Runtime itself, or export a model that takes the image alone",
        )
    return ForeignModelError(
        f"{message}: it was not written by repvgg-export, export_module or repvgg-trt fold",
        remedy=f"{_REEXPORT}, or make one of ours of it: repvgg-trt fold {path.name} --out OUT.onnx",
    )


def _first_text(buffer: memoryview, field: wire.Field) -> str:
    """The name of an input."""
    found = (inner for inner in wire.walk(buffer, field.payload, field.end) if inner.number == 1)
    return next((_text(buffer, inner) for inner in found if inner.wire_type == wire.BYTES), "")


class _Tensor(NamedTuple):
    """An initializer: its raw bytes lie between `start` and `end` of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


def _read_tensor(buffer: memoryview, field: wire.Field) -> _Tensor:
    name, dtype, raw = "", 0, (0, 0)
    dims: list[int] = []
    for inner in wire.walk(buffer, field.payload, field.end):
        if inner.number == 8 and inner.wire_type == wire.BYTES:
            name = _text(buffer, inner)
        elif inner.number == 2 and inner.wire_type == wire.VARINT:
            dtype = inner.value
        elif inner.number == _RAW_DATA:
            raw = raw if raw[1] else (inner.payload, inner.end)
        elif inner.number == 1:
            dims += wire.read_numbers(buffer, inner)
    return _Tensor(name, tuple(dims), _TYPES.get(dtype, str(dtype)), *raw)


def _text(buffer: memoryview, field: wire.Field) -> str:
    """A name; cleaned everywhere alike, so that it still means the same node or tensor."""
    return clean_text(bytes(buffer[field.payload : field.end]).decode())


def _read_node(buffer: memoryview, field: wire.Field) -> NodeSummary:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    integers: dict[str, int] = {}
    for inner in wire.walk(buffer, field.payload, field.end):
        if inner.number in texts and inner.wire_type == wire.BYTES:
            texts[inner.number].append(_text(buffer, inner))
        elif inner.number == _ATTRIBUTE and inner.wire_type == wire.BYTES:
            integers |= _integer_attribute(buffer, inner)
    return NodeSummary("".join(texts[4]), "".join(texts[3]), tuple(texts[1]), tuple(texts[2]), integers)


def _integer_attribute(buffer: memoryview, field: wire.Field) -> dict[str, int]:
    name, value = "", None
    for inner in wire.walk(buffer, field.payload, field.end):
        if inner.number == _ATTRIBUTE_NAME and inner.wire_type == wire.BYTES:
            name = _text(buffer, inner)
        elif inner.number == _ATTRIBUTE_INTEGER and inner.wire_type == wire.VARINT:
            value = inner.value
    return {} if value is None or value >> 63 else {name: value}


def _read_opset(buffer: memoryview, field: wire.Field) -> int:
    domain, version = "", 0
    for inner in wire.walk(buffer, field.payload, field.end):
        if inner.number == 1:
            domain = _text(buffer, inner)
        elif inner.number == 2:
            version = inner.value
    return version if domain in ("", "ai.onnx") else 0


def _content_digest(parts: hashlib._Hash, text: str) -> str:
    """The value of `content_sha256`: of every top-level field but `metadata_props`, which `parts` has seen, and `text`.

    The metadata's text counts, its own `content_sha256` empty, and not its meaning: a later version of this project,
    with more fields, still finds the files of this one unchanged.
    """
    digest = parts.copy()
    digest.update(_DIGEST_FIELD.sub('"content_sha256":""', text, count=1).encode())
    return digest.hexdigest()


def metadata_field(parts: hashlib._Hash, metadata: ModelMetadata) -> bytes:
    """The bytes to append to a file whose other fields were fed to `parts`: its metadata, bound to them."""
    digest = _content_digest(parts, codec.dumps(metadata))
    text = codec.dumps(dataclasses.replace(metadata, content_sha256=digest))
    entry = wire.bytes_field(1, METADATA_KEY.encode()) + wire.bytes_field(2, text.encode())
    return wire.bytes_field(_METADATA_PROPS, entry)


@dataclass(frozen=True, slots=True)
class WeightedNode:
    """A convolution or classifier, and the precision that it computes in: that in which its weight is stored.

    Attributes:
        name: The name of the node, or of its output where the node has none.
        op_type: `Conv` or `Gemm`.
        weight_shape: None where the weight is not stored in the file.
        precision: `int8` or `fp8` (the weight stands before a DequantizeLinear), `fp16` or `fp32`; else what is
            stored.
    """

    name: str
    op_type: str
    weight_shape: tuple[int, ...] | None
    precision: str


def weighted_nodes(graph: GraphSummary) -> tuple[WeightedNode, ...]:
    """The layers of a graph, in order."""
    producers = {name: node for node in graph.nodes for name in node.outputs}
    result = []
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        producer = producers.get(weight)
        if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs:
            weight = producer.inputs[0]
        kind = graph.types.get(weight, "unknown")
        name, shape = node.name or node.outputs[0], graph.initializers.get(weight)
        result.append(WeightedNode(name, node.op_type, shape, _PRECISIONS.get(kind, kind)))
    return tuple(result)


def graph_precision(nodes: Iterable[WeightedNode]) -> Literal["fp32", "fp16", "fp8", "int8"]:
    """What a graph is typed as: the lowest precision that any of its layers computes in."""
    found = {node.precision for node in nodes}
    return "int8" if "int8" in found else "fp8" if "fp8" in found else "fp16" if "fp16" in found else "fp32"


def precision_of(row: str, nodes: Iterable[WeightedNode]) -> str | None:
    """The precision of a row of the layer table: `stage1.0`, `stage1.0.se`, `linear`; None where no node is its."""
    if row.endswith(".se"):
        block = row.removesuffix("se")
        found = {node.precision for node in nodes if node.name.startswith(block) and node.name != f"{block}conv"}
    else:
        found = {node.precision for node in nodes if node.name in (row, f"{row}.conv")}
    return "+".join(sorted(found)) or None


def describe_shares(counts: Iterable[tuple[str, int]], what: str) -> str:
    """`int8 97.1 %, fp16 2.9 % of the multiply-accumulates`, or the one precision there is.

    Args:
        counts: Precision and how much computes in it.
        what: What is counted.
    """
    totals = share_by_precision(counts)
    if len(totals) <= 1:
        return next(iter(totals), "unknown")
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in totals.items()) + f" of the {what}"


def share_by_precision(counts: Iterable[tuple[str, int]]) -> dict[str, float]:
    """By precision, the lowest first: its share, 0 to 1."""
    totals: dict[str, int] = {}
    for name, count in counts:
        totals[name] = totals.get(name, 0) + count
    order = list(_PRECISIONS.values())
    names = sorted(totals, key=lambda name: order.index(name) if name in order else len(order))
    whole = sum(totals.values())
    return {name: totals[name] / whole for name in names} if whole else {}


def count_weights(node: WeightedNode) -> int:
    """Numbers in its weight."""
    return math.prod(node.weight_shape or (0,))


def is_quantized(path: Path) -> bool:
    """Whether an ONNX holds Q/DQ pairs, of INT8 or of FP8.

    Raises:
        ModelError: It is not an ONNX.
    """
    return any(node.op_type == "QuantizeLinear" for node in read_graph(path).nodes)
