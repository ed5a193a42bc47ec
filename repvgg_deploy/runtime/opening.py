"""What kind of model a file holds, found from its content, and its metadata.

A model file → what runs it, chosen by the file's content and the device.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import InputError, ModelError, PlanError
from ..files.onnx import is_quantized, read_metadata
from ..specs.values import ModelMetadata, ModelSpec
from .options import Backend, BackendName, Device, DeviceChoice, EngineOptions, SplittingBackend, find_place

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

_PLAN_MAGICS = (
    b"ftrt",
    b"vtrt",
)  # seen in TensorRT 8 to 11 and in TensorRT-RTX 1.7; undocumented: the rest is TensorRT's to judge
_PLAN_SUFFIXES = frozenset({".plan", ".engine", ".trt"})


def as_path(path: object) -> Path:
    """A path given as text or path object.

    Raises:
        InputError: It is neither.
    """
    if (
        isinstance(path, (str, os.PathLike))
        and not isinstance(name := os.fspath(path), bytes)
        and "\0" not in name
        and name
    ):
        return Path(name)
    raise InputError(
        f"expected the path of a model file, found {path!r}", remedy='give a path, such as Engine("a0.onnx")'
    )


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
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error


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
        raise ModelError(
            f"{path}: no such file", remedy="check the path, or export the model with repvgg-export"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check the path and its permissions"
        ) from error
    if not stat.S_ISREG(mode):  # reading a pipe could wait for ever
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ModelError(
            f"{path}: is {kind}, expected an ONNX file", remedy="give the .onnx file that repvgg-export wrote"
        )


def _plan_error(path: Path) -> PlanError:
    return PlanError(
        f"{path}: looks like a TensorRT plan, whole or damaged, and what was asked for runs ONNX models only",
        remedy=f"give the .onnx that it was built from; repvgg-trt check {path.name} says what the plan is and "
        f"where it "
        f"runs",
    )


_PLAN_BACKENDS = ("tensorrt", "rtx")


def open_plan_backend(path: Path, options: EngineOptions, *, backend: BackendName | None) -> SplittingBackend:
    """Loads a TensorRT plan on the GPU of the options.

    Raises:
        InputError: The backend is not one for plans.
        PlanError: The plan is damaged, refused, or made for another GPU or TensorRT.
        CudaError: There is no usable GPU.
        MissingDependencyError: TensorRT or a CUDA package is not installed.
    """
    if backend is not None and backend not in _PLAN_BACKENDS:
        raise InputError(
            f"{path}: backend={backend!r} does not run plans", remedy='leave backend out, or give "tensorrt" or "rtx"'
        )
    from .tensorrt.backend import TensorRtBackend

    return TensorRtBackend(path, options.device_id, backend, options)


def open_backend(
    path: Path, spec: ModelSpec, device: Device, options: EngineOptions, *, backend: BackendName | None = None
) -> Backend:
    """Loads an ONNX whose metadata was read and checked.

    Args:
        path: The file.
        spec: From its metadata.
        device: Where it is to run.
        options: How.
        backend: With which library; None for ONNX Runtime, as installing a package must not change answers.

    Raises:
        InputError: No such device or backend, or the backend does not run on the device.
        ModelError: The backend refuses the file.
        CudaError: A GPU was asked for and cannot be used.
        MissingDependencyError: The backend's package is not installed.
    """
    if device not in get_args(Device):
        raise InputError(
            f"device: expected one of {', '.join(get_args(Device))}, found {device!r}",
            remedy='give device="cpu" or device="cuda"; choose the GPU with EngineOptions(device_id=…)',
        )
    if _choose(path, device, backend) == "openvino":
        from .cpu.openvino import OpenVinoBackend

        return OpenVinoBackend(path, spec, options)
    from .cpu.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, spec, device, options)


def _choose(path: Path, device: Device, backend: BackendName | None) -> Literal["onnxruntime", "openvino"]:
    if backend is not None and backend not in get_args(BackendName):
        raise InputError(
            f"backend: expected one of {', '.join(get_args(BackendName))}, found {backend!r}",
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
    chosen, reason = _find_fastest(path, device)
    logger.info("%s: the fastest backend here is %s: %s", path, chosen, reason)
    return chosen


def _find_fastest(path: Path, device: Device) -> tuple[Literal["onnxruntime", "openvino"], str]:
    if device != "cpu":
        return "onnxruntime", f"OpenVINO does not run on {device}"
    if not is_quantized(path):
        return "onnxruntime", "the graph is not INT8, and both are equally fast"
    if importlib.util.find_spec("openvino") is None:
        return "onnxruntime", "OpenVINO is not installed"
    return "openvino", "the graph is INT8"


@dataclass(frozen=True, slots=True)
class OpenModel:
    """An opened model.

    Attributes:
        metadata: All that is known of it.
        backend: What runs it.
        splitting: The same backend, if it takes any number of images itself.
        device: As the Engine names it.
    """

    metadata: ModelMetadata
    backend: Backend
    splitting: SplittingBackend | None
    device: str


def open_model(path: Path, device: DeviceChoice, backend: BackendName | None, options: EngineOptions) -> OpenModel:
    """Opens an ONNX or a plan.

    Raises:
        RepVGGDeployError: As Engine says.
    """
    if is_plan(path):
        place = find_place(device, options, default="cuda")
        if place.kind == "cpu":
            raise InputError(
                f"{path}: is a TensorRT plan, which runs on a GPU only", remedy="give the .onnx that it was built from"
            )
        plan = open_plan_backend(path, place.choose(options), backend=backend)
        return OpenModel(plan.metadata, plan, plan, place.label)
    place = find_place(device, options, default="cpu")
    metadata = read_model(path)
    return OpenModel(
        metadata,
        open_backend(path, metadata.spec, place.kind, place.choose(options), backend=backend),
        None,
        place.label,
    )
