"""What kind of model a file holds, found from its content, and its metadata."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import InputError, ModelError, PlanError
from ..files.onnx import read_metadata
from ..specs.values import ModelMetadata, ModelSpec

_PLAN_MAGICS = (b"ftrt", b"vtrt")  # seen in TensorRT 8 to 11 and in TensorRT-RTX 1.7; undocumented: the rest is TensorRT's to judge
_PLAN_SUFFIXES = frozenset({".plan", ".engine", ".trt"})


def as_path(path: object) -> Path:
    """A path given as text or path object.

    Raises:
        InputError: It is neither.
    """
    if isinstance(path, (str, os.PathLike)) and not isinstance(name := os.fspath(path), bytes) and "\0" not in name and name:
        return Path(name)
    raise InputError(f"expected the path of a model file, found {path!r}", remedy='give a path, such as Engine("a0.onnx")')


def read_model(path: Path) -> ModelMetadata:
    """Finds out what a file holds and reads its metadata, checked against the content.

    Raises:
        ModelError: It is missing, empty, a folder, truncated, changed, or not an ONNX of ours.
        PlanError: It is a TensorRT plan.
    """
    if is_plan(path):
        raise _plan_error(path)
    try:
        metadata = read_metadata(path)
    except ModelError as error:
        if path.suffix.lower() in _PLAN_SUFFIXES:
            raise _plan_error(path) from error
        raise
    _require_sense(path, metadata.spec)
    return metadata


def is_plan(path: Path) -> bool:
    """Whether a file begins like a TensorRT plan.

    Raises:
        ModelError: It is missing, a folder, or cannot be read.
    """
    _require_file(path)
    try:
        with path.open("rb") as file:
            return file.read(len(_PLAN_MAGICS[0])) in _PLAN_MAGICS
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read") from error


def _require_sense(path: Path, spec: ModelSpec) -> None:
    """Whoever changes a field of the metadata can bind it anew, too; what the Engine counts on is checked."""
    ranks = {"top5": [2, 2], "logits": [2], "probabilities": [2]}.get(spec.kind)
    sizes = [size for tensor in (spec.input, *spec.outputs) for size in tensor.shape if isinstance(size, int)]
    rank = {"NCHW": 4, "NHWC": 4}.get(spec.input.layout, max(1, len(spec.input.shape)))
    if (
        (ranks is not None and [len(output.shape) for output in spec.outputs] != ranks)
        or len(spec.input.shape) != rank
        or not spec.outputs
        or min(sizes, default=1) < 1
    ):
        raise ModelError(
            f"{path}: its metadata contradicts itself: a {spec.kind} model with {spec.input} and {spec.outputs}",
            remedy="export it again with repvgg-export",
        )


def fingerprint(path: Path) -> tuple[int, ...] | None:
    """What changes when another file takes this one's place: device, inode, size and time; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file", remedy="check the path, or export the model with repvgg-export") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", remedy="check the path and its permissions") from error
    if not stat.S_ISREG(mode):  # reading a pipe could wait for ever
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ModelError(f"{path}: is {kind}, expected an ONNX file", remedy="give the .onnx file that repvgg-export wrote")


def _plan_error(path: Path) -> PlanError:
    return PlanError(
        f"{path}: looks like a TensorRT plan, whole or damaged, and what was asked for runs ONNX models only",
        remedy=f"give the .onnx that it was built from; repvgg-trt check {path.name} says what the plan is and where it runs",
    )
