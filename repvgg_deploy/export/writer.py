"""Writes an ONNX file whose weights never exist twice in memory.

Fields are written in the order of their numbers, as every Protocol Buffers library does, so that loading and saving the
file elsewhere gives the same bytes. The metadata comes last: it is appended when the file has passed its verification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ..errors import ExportError
from ..files import wire
from ..files.onnx import metadata_field
from ..specs.values import ModelMetadata

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_MAX_BYTES = (1 << 31) - 1


class _Tee:
    """Writes to a file and feeds a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)


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
    headers = {name: _tensor_header(name, array) for name, array in arrays.items()}
    sizes = {
        name: len(headers[name]) + len(wire.bytes_header(_RAW_DATA, a.nbytes)) + a.nbytes for name, a in arrays.items()
    }
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
    total = len(graph) + sum(len(wire.bytes_header(_INITIALIZER, size)) + size for size in sizes.values())
    if total > _MAX_BYTES:
        raise ExportError(
            f"{path.name}: {total / 1e9:.1f} GB of weights, and an ONNX file holds 2.1 GB",
            remedy="export a smaller variant",
        )
    shell.ClearField("graph")
    before, after = _split(shell.SerializeToString(deterministic=True), _GRAPH)
    with path.open("wb") as file:
        tee = _Tee(file)
        tee.write(before + wire.bytes_header(_GRAPH, total) + early)
        for name, array in arrays.items():
            tee.write(
                wire.bytes_header(_INITIALIZER, sizes[name])
                + headers[name]
                + wire.bytes_header(_RAW_DATA, array.nbytes)
            )
            if array.nbytes:
                plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
                tee.write(plain.reshape(-1).view(np.uint8).data)
        tee.write(late + after)
    return tee.digest


def append_metadata(path: Path, digest: hashlib._Hash, metadata: ModelMetadata) -> None:
    """Adds the metadata to a file that `write_model` wrote, bound to its content."""
    with path.open("ab") as file:
        file.write(metadata_field(digest, metadata))


def _tensor_header(name: str, array: NDArray[np.generic]) -> bytes:
    """A TensorProto up to its raw data: dims, data type, name."""
    tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    return bytes(tensor.SerializeToString(deterministic=True))


def _split(message: bytes, number: int) -> tuple[bytes, bytes]:
    """The fields before `number` and those after it."""
    cut = next((field.start for field in wire.walk(message) if field.number > number), len(message))
    return message[:cut], message[cut:]
