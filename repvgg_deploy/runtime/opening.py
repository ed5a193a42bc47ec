"""A model file → what runs it, chosen by the file's content and the device. `open_model` tells the story.

`is_plan` and `read_model` say what a file holds without opening it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import reprlib
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import InputError, ModelError, PlanError
from ..files.onnx import graph_precision, is_quantized, read_graph, read_metadata, weighted_nodes
from ..files.signatures import HEAD_BYTES, PLAN_MAGICS
from ..specs.values import ModelMetadata, ModelSpec
from .options import BackendName, DeviceChoice, DeviceKind, EngineOptions, find_device

if TYPE_CHECKING:
    from .results import Backend, OpenModel, SplittingBackend

logger = logging.getLogger(__name__)
_PLAN_SUFFIXES = frozenset({".plan", ".engine", ".trt"})
_LONGEST_PATH = 4096  # PATH_MAX of Linux; what is longer is no path, but perhaps what a file holds
_PLAN_BACKENDS = ("tensorrt", "rtx")


def open_model(path: Path, device: DeviceChoice, backend: BackendName | None, options: EngineOptions) -> OpenModel:
    """Opens an ONNX or a plan.

    Raises:
        RepVGGDeployError: As `Engine` says.
    """
    from .results import OpenModel  # needs NumPy, which the rest of this module does not

    before = _fingerprint(path)
    plan = is_plan(path)
    kind, index, label = find_device(device, options, default="cuda" if plan else "cpu")
    options = replace(options, device_id=index)
    opened: Backend
    splitting: SplittingBackend | None = None
    if plan:
        if options.bfloat16:
            raise InputError(
                f"{path}: bfloat16 is of OpenVINO on a CPU, and this is a TensorRT plan",
                remedy="leave bfloat16 out; a plan has the precision that it was built with",
            )
        if kind == "cpu":
            raise InputError(
                f"{path}: is a TensorRT plan, which runs on a GPU only", remedy="give the .onnx that it was built from"
            )
        if backend is not None and backend not in _PLAN_BACKENDS:
            raise InputError(
                f"{path}: backend={backend!r} does not run plans",
                remedy='leave backend out, or give "tensorrt" or "rtx"',
            )
        from .tensorrt.backend import TensorRtBackend

        opened = splitting = TensorRtBackend(path, index, backend, options)
        metadata = splitting.metadata
    else:
        metadata = read_model(path)
        opened = open_backend(path, metadata.spec, kind, options, backend=backend)
    if _fingerprint(path) != before:
        opened.close()
        raise ModelError(f"{path}: was replaced while it was being opened", remedy="open it again")
    return OpenModel(metadata, opened, splitting=splitting, device=label, max_batch=options.max_batch)


def as_path(path: object) -> Path:
    """A path given as text or path object.

    Raises:
        InputError: It is neither.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_PATH or "\0" in name:
        shown = reprlib.repr(name) if isinstance(name, str) else f"an object of type {type(path).__qualname__}"
        remedy = 'give a path, such as Engine("a0.onnx")'
        if isinstance(path, (bytes, bytearray, memoryview)):
            remedy = "write the model to a file, and give its path: it is checked and loaded from there"
        raise InputError(f"expected the path of a model file, found {shown}", remedy=remedy)
    return Path(name)


def _fingerprint(path: Path) -> tuple[int, ...] | None:
    """What changes when another file takes this one's place; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_plan(path: Path) -> bool:
    """Whether a file begins like a TensorRT plan.

    Raises:
        ModelError: It is missing, a folder, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):  # reading a pipe could wait for ever
            with path.open("rb") as file:
                return file.read(HEAD_BYTES).startswith(PLAN_MAGICS)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such file", remedy="check the path, or export the model with repvgg-export"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check the path, and that you may read the file"
        ) from error
    raise ModelError(
        f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, expected an ONNX file",
        remedy="give the .onnx file itself",
    )


def read_model(path: Path) -> ModelMetadata:
    """The metadata of an ONNX, checked against its content.

    Raises:
        ModelError: The file is missing, empty, a folder, truncated, changed, or not an ONNX of ours.
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
    # Whoever changes a field of the metadata can bind it anew, too: what the Engine counts on is checked.
    spec = metadata.spec
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
    return metadata


def _plan_error(path: Path) -> PlanError:
    return PlanError(
        f"{path}: looks like a TensorRT plan, whole or damaged, and what was asked for runs ONNX models only",
        remedy=f"give the .onnx that it was built from; repvgg-trt check {path.name} says what the plan is and where "
        "it runs",
    )


def open_backend(
    path: Path, spec: ModelSpec, device: DeviceKind, options: EngineOptions, *, backend: BackendName | None
) -> Backend:
    """Loads an ONNX whose metadata was read and checked.

    Without `backend`, with ONNX Runtime: installing a package must not change answers.

    Raises:
        RepVGGDeployError: As `Engine` says.
    """
    chosen = _choose(path, device, backend)
    if options.bfloat16 and chosen != "openvino":
        raise InputError(
            f"{path}: only OpenVINO computes in bfloat16, and this model is to run on ONNX Runtime",
            remedy='give backend="openvino" (--backend openvino), or leave bfloat16 out',
        )
    if chosen == "openvino":
        from .cpu.openvino import OpenVinoBackend

        return OpenVinoBackend(path, spec, options)
    from .cpu.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, spec, device, options)


def _choose(path: Path, device: DeviceKind, backend: BackendName | None) -> Literal["onnxruntime", "openvino"]:
    if backend is not None and backend not in get_args(BackendName):
        raise InputError(
            f"backend: expected one of {', '.join(get_args(BackendName))}, found {reprlib.repr(backend)}",
            remedy='leave it out for ONNX Runtime, or give backend="openvino"',
        )
    if backend in _PLAN_BACKENDS:
        raise InputError(
            f"{path}: backend={backend!r} runs plans, and this is an ONNX",
            remedy=f"build one: repvgg-trt build {path.name}; or leave out backend",
        )
    if backend == "openvino" and device != "cpu":
        raise InputError(
            f'backend="openvino" runs on the CPU, and device={device!r} was asked for',
            remedy="leave out one of the two",
        )
    if backend != "fastest":
        return "openvino" if backend == "openvino" else "onnxruntime"
    chosen: Literal["onnxruntime", "openvino"] = "onnxruntime"
    if device != "cpu":
        reason = f"OpenVINO does not run on {device}"
    elif not is_quantized(path):
        reason = "the graph is not INT8, and both are equally fast"
    elif importlib.util.find_spec("openvino") is None:
        reason = "OpenVINO is not installed"
    elif graph_precision(weighted_nodes(read_graph(path))) == "fp8":
        reason = "the graph is FP8, and it was judged on ONNX Runtime"
    else:
        chosen, reason = "openvino", "the graph is INT8"
    logger.info("%s: the fastest backend here is %s: %s", path, chosen, reason)
    return chosen
