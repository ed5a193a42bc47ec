"""The two ends of a change of precision: the parent as it was read, and the typed graph as it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx

from ..errors import CalibrationError, InputError, ModelError
from ..files import onnx as onnx_file
from ..files import wire
from ..files.output import atomic_output
from ..files.versions import installed_versions
from ..graph.edit import copy_model
from ..specs import codec
from ..specs.values import METADATA_KEY, HistoryEntry, ModelMetadata, ModelSpec
from .network import Network, read_network

StrPath: TypeAlias = str | os.PathLike[str]
_TOOLS = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
_METADATA_PROPS = 14
_MAX_BYTES = (1 << 31) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Parent:
    """An FP32 ONNX of ours, read once: everything that is made of it starts here.

    Attributes:
        network: The graph, without metadata of its own, and its structure.
        metadata: What it carries.
        sha256: Of the file; None for a model in memory.
    """

    network: Network
    metadata: ModelMetadata
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TypedModel:
    """A graph and what is known of it.

    Attributes:
        model: Without metadata of its own.
        metadata: Its `content_sha256` is set when it is written.
    """

    model: onnx.ModelProto
    metadata: ModelMetadata


def load_parent(source: StrPath | onnx.ModelProto | Parent) -> Parent:
    """Reads an FP32 ONNX of ours and its structure; a file is read once. A `Parent` is given back as it is.

    Raises:
        CalibrationError: The graph is typed already (FP16 or Q/DQ).
        ModelError: The file is missing, damaged, changed after its export, or not one of ours.
    """
    if isinstance(source, Parent):
        return source
    if isinstance(source, onnx.ModelProto):
        text = next((entry.value for entry in source.metadata_props if entry.key == METADATA_KEY), None)
        if text is None:
            raise ModelError(
                f"the model carries no {METADATA_KEY} metadata", remedy="load the file as it was exported or folded"
            )
        try:
            metadata = codec.loads(ModelMetadata, text)
        except InputError as error:
            raise ModelError(
                f"the model's metadata is damaged: {error.message}", remedy="load the file as it was exported or folded"
            ) from error
        model, digest = copy_model(source), None
    else:
        data, metadata = onnx_file.read_whole(Path(source))
        model, digest = onnx.load_from_string(data), hashlib.sha256(data).hexdigest()
    del model.metadata_props[:]
    return Parent(read_network(model), metadata, digest)


def extend(
    parent: Parent,
    model: onnx.ModelProto,
    *,
    stage: str,
    options: dict[str, str | int | float | bool | None],
    spec: ModelSpec | None = None,
) -> TypedModel:
    """The typed graph, made of `parent`, with its metadata and one more history entry: the stage and how it was done.

    Statistics are left out: they speak of the channels as they were before any rescaling. `spec` is given where inputs
    or outputs have changed.
    """
    digest = parent.sha256 or parent.metadata.content_sha256 or None
    entry = HistoryEntry(stage, installed_versions(_TOOLS), options, digest)
    changed = dataclasses.replace(
        parent.metadata,
        spec=spec or parent.metadata.spec,
        statistics={},
        history=(*parent.metadata.history, entry),
        content_sha256="",
    )
    return TypedModel(model, changed)


def write_typed(path: Path, typed: TypedModel, *, force: bool = False) -> str:
    """Writes the file whole or not at all, its metadata bound to its content.

    Args:
        path: The `.onnx`.
        typed: What `to_fp16` or `to_int8` made.
        force: Replace a different file.

    Returns:
        `written` or `up to date`.

    Raises:
        ArtifactError: It cannot be written, or a different file stands there.
        CalibrationError: The graph exceeds the 2 GiB that an ONNX file can hold.
    """
    if typed.model.ByteSize() > _MAX_BYTES:
        raise CalibrationError(
            f"{path.name}: the graph exceeds 2.1 GB, and an ONNX file holds no more",
            remedy="quantize a smaller variant",
        )
    data = typed.model.SerializeToString(deterministic=True)
    digest = hashlib.sha256()
    for field in wire.walk(data):
        # Metadata comes last, so that saving the file elsewhere changes nothing.
        assert field.number < _METADATA_PROPS, f"field {field.number} stands where metadata must"
        digest.update(data[field.start : field.end])
    with atomic_output(path, force=force) as output:
        output.partial.write_bytes(data + onnx_file.metadata_field(digest, typed.metadata))
    return output.status
