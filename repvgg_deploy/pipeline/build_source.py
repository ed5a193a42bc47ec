"""The ONNX that a plan is built from, read once, so that what is hashed is what is built."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..artifacts import explain_os_errors
from ..errors import ModelError
from ..graph_precision import graph_precision, weighted_nodes
from ..onnx_file import GraphSummary, read_graph, read_metadata
from ..runtime.passport import PLAN_MAGICS
from ..specs import ModelMetadata, Precision


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
        ModelError: It is missing, damaged, changed, or not one of ours.
    """
    metadata, graph = _read_metadata(path), read_graph(path)
    with explain_os_errors(path):
        data = path.read_bytes()
    return Source(path, data, hashlib.sha256(data).hexdigest(), metadata, graph)


def _read_metadata(path: Path) -> ModelMetadata:
    try:
        return read_metadata(path)
    except ModelError as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(PLAN_MAGICS[0])) in PLAN_MAGICS:
                raise ModelError(f"{path}: is a TensorRT plan already", remedy="give the .onnx that it was built from") from error
        raise
