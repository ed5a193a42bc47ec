"""The ONNX that a plan is built from, read once, so that what is hashed is what is built."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..files.onnx import GraphSummary, graph_precision, read_graph, read_metadata, weighted_nodes
from ..files.passport import PLAN_MAGICS
from ..specs.values import ModelMetadata, Precision


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX that was read.

    Attributes:
        path: Its file.
        data: All of it.
        sha256: Of `data`.
        metadata: Checked against the content.
        graph: Without the weights.
    """

    path: Path
    data: bytes
    sha256: str
    metadata: ModelMetadata
    graph: GraphSummary

    @property
    def precision(self) -> Precision:
        """What it is typed as."""
        return graph_precision(weighted_nodes(self.graph))


def read_source(path: Path) -> Source:
    """Reads an ONNX of ours.

    Raises:
        ModelError: It is missing, damaged, changed, not one of ours, or is replaced meanwhile.
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
    return Source(path, data, hashlib.sha256(data).hexdigest(), metadata, graph)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:  # who reads it says what is wrong
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
