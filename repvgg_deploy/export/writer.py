"""Writes an ONNX file whose weights never exist twice in memory.

Fields are written in the order of their numbers, as every Protocol Buffers library does, so that loading and saving the
file elsewhere gives the same bytes. The metadata comes last: it is appended when the file has passed its verification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..errors import ExportError
from ..files import wire
from ..files.onnx import metadata_field
from ..specs.values import ModelMetadata

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_MAX_BYTES = (1 << 31) - 1


def write_model(
    path: Path, model: onnx.ModelProto, weights: Mapping[str, NDArray[np.generic]] | None = None
) -> hashlib._Hash:
    """Writes a model, its weights as initializers.

    Args:
        path: The file; overwritten.
        model: Stays as it is; initializers of its own are copied in memory.
        weights: By name; in the file they are no graph inputs. C-contiguous arrays are written from where they are.

    Returns:
        SHA-256 fed with all that was written, for `append_metadata`.

    Raises:
        ExportError: The file would exceed the 2 GiB that Protocol Buffers can hold.
        OSError: The file cannot be written.
    """
    weights = weights or {}
    own = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    arrays: dict[str, NDArray[np.generic]] = {**own, **weights}
    headers = {}
    for name, array in arrays.items():
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor_bytes = bytes(tensor.SerializeToString(deterministic=True))  # up to its raw data
        header = tensor_bytes + wire.bytes_header(_RAW_DATA, array.nbytes)
        headers[name] = wire.bytes_header(_INITIALIZER, len(header) + array.nbytes) + header
    shell = onnx.ModelProto()
    shell.CopyFrom(model)
    del shell.graph.initializer[:]
    inputs = [value for value in model.graph.input if value.name not in weights]
    del shell.graph.input[:]
    shell.graph.input.extend(inputs)
    # onnxsim leaves its options there; ours is the only entry, and the digest does not cover the field.
    del shell.metadata_props[:]
    graph = shell.graph.SerializeToString(deterministic=True)
    early, late = _split(graph, _INITIALIZER)
    total = len(graph) + sum(len(headers[name]) + array.nbytes for name, array in arrays.items())
    if total > _MAX_BYTES:
        raise ExportError(
            f"{path.name}: {total / 1e9:.1f} GB of weights, and an ONNX file holds 2.1 GB",
            remedy="export a smaller variant",
        )
    shell.ClearField("graph")
    before, after = _split(shell.SerializeToString(deterministic=True), _GRAPH)
    pieces = chain(
        [before + wire.bytes_header(_GRAPH, total) + early],
        chain.from_iterable((headers[name], _raw_bytes(array)) for name, array in arrays.items()),
        [late + after],
    )
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    return digest


def append_metadata(path: Path, digest: hashlib._Hash, metadata: ModelMetadata) -> None:
    """Adds the metadata to a file that `write_model` wrote, bound to its content."""
    with path.open("ab") as file:
        file.write(metadata_field(digest, metadata))


def _raw_bytes(array: NDArray[np.generic]) -> bytes | memoryview:
    """Little-endian values in C order; of a contiguous array a view."""
    if not array.nbytes:
        return b""
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return plain.reshape(-1).view(np.uint8).data


def _split(message: bytes, number: int) -> tuple[bytes, bytes]:
    """The fields before `number` and those after it."""
    cut = next((field.start for field in wire.walk(message) if field.number > number), len(message))
    return message[:cut], message[cut:]
