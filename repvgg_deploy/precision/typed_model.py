"""A typed graph with its metadata: read from the parent, extended, written and bound to its content."""

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
from ..files.output import atomic_output, explain_os_errors, sha256_file
from ..files.versions import installed_versions
from ..specs import codec
from ..specs.values import METADATA_KEY, HistoryEntry, ModelMetadata, ModelSpec

StrPath: TypeAlias = str | os.PathLike[str]
_TOOLS = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
_METADATA_PROPS = 14
_MAX_BYTES = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class TypedModel:
    """A graph and what is known of it.

    Attributes:
        model: Without metadata of its own.
        metadata: Its `content_sha256` is set when it is written.
        sha256: Of the file that it was read from; None for one that was made in memory.
    """

    model: onnx.ModelProto
    metadata: ModelMetadata
    sha256: str | None = None


def load_parent(source: StrPath | onnx.ModelProto) -> TypedModel:
    """Reads an ONNX of ours; of a file, its digest is checked.

    Raises:
        ModelError: The file is missing, damaged, changed after its export, or not one of ours.
    """
    if isinstance(source, onnx.ModelProto):
        text = next((entry.value for entry in source.metadata_props if entry.key == METADATA_KEY), None)
        if text is None:
            raise ModelError(
                f"the model carries no {METADATA_KEY} metadata", remedy="load the file that repvgg-export wrote"
            )
        try:
            metadata = codec.loads(ModelMetadata, text)
        except InputError as error:
            raise ModelError(
                f"the model's metadata is damaged: {error.message}", remedy="load the file that repvgg-export wrote"
            ) from error
        return TypedModel(_without_metadata(source), metadata)
    path = Path(source)
    metadata = onnx_file.read_metadata(path)
    with explain_os_errors(path):
        model = onnx.load(path)
        del model.metadata_props[:]
        return TypedModel(model, metadata, sha256_file(path))


def _without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.metadata_props[:]
    return result


def extend(
    parent: TypedModel,
    model: onnx.ModelProto,
    *,
    stage: str,
    options: dict[str, str | int | float | bool | None],
    spec: ModelSpec | None = None,
) -> TypedModel:
    """The typed graph with its parent's metadata and one more history entry.

    Statistics are left out: they speak of the channels as they were before any rescaling.

    Args:
        parent: What `model` was made of.
        model: The typed graph.
        stage: Name of what was done.
        options: How.
        spec: Where inputs or outputs have changed.
    """
    entry = HistoryEntry(
        stage, installed_versions(_TOOLS), options, parent.sha256 or parent.metadata.content_sha256 or None
    )
    changed = dataclasses.replace(
        parent.metadata,
        spec=spec or parent.metadata.spec,
        statistics={},
        history=(*parent.metadata.history, entry),
        content_sha256="",
    )
    return TypedModel(_without_metadata(model), changed)


def write_typed(path: Path, typed: TypedModel, *, force: bool = False) -> str:
    """Writes the file whole or not at all, its metadata bound to its content.

    Args:
        path: The `.onnx`.
        typed: See `extend`.
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
    later = []
    for field in wire.walk(data):
        digest.update(data[field.start : field.end])
        later.append(field.number)
    assert all(number < _METADATA_PROPS for number in later), (
        "metadata comes last, so that saving the file elsewhere changes nothing"
    )
    with atomic_output(path, force=force) as output:
        output.partial.write_bytes(data + onnx_file.metadata_field(digest, typed.metadata))
    return output.status
