"""A plan on its way into TensorRT: what can be refused is refused before TensorRT sees a byte, for it answers a wrong one with a crash or None.

Inputs and outputs of a plan: what the engine says of them, and whether that is what the passport says.

Which TensorRT runs a plan, and what it logs. A library is imported by `open_library`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ...errors import CudaError, CudaMemoryError, MissingDependencyError, ModelError, PlanError, PlanIncompatibleError
from ...files.passport import passport_path, read_passport, require_unchanged
from ...files.plan_place import (
    FLAVOURS,
    INSTALL,
    LEAN,
    Environment,
    Flavour,
    Incompatible,
    Library,
    import_tensorrt,
    judge_library,
    judge_plan,
    make_trt_logger,
    name_library,
    platform_here,
    quote,
)
from ...specs.values import METADATA_SCHEMA, Certificate, ModelMetadata, ModelSpec, PlanPassport, TensorSpec
from ..cuda.port import DeviceInfo

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}
"""By TensorRT's names. `trt.nptype` fails with NumPy 1.24 and newer in TensorRT 8.5."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """One input or output as the engine has it; −1 is a dynamic dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape

    def count_bytes(self, shape: Shape) -> int:
        """Size of the tensor in a shape."""
        size = self.dtype.itemsize
        for dimension in shape:
            size *= dimension
        return size


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out.

    Attributes:
        source: The input.
        outputs: In the order of the specification.
        profile: Index of the optimization profile in use.
        smallest: Input shape, the profile's minimum.
        usual: The shape that the plan is fastest at.
        largest: The profile's maximum.
    """

    source: PlanTensor
    outputs: tuple[PlanTensor, ...]
    profile: int
    smallest: Shape
    usual: Shape
    largest: Shape


def read_interface(trt: Any, engine: Any, path: Path) -> Interface:
    """Asks the engine.

    Raises:
        PlanError: There is not exactly one input, or a tensor is of a kind that NumPy does not know or without a batch.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1 or len(names) < 2:
        raise PlanError(
            f"{path}: expected one input and at least one output, found {len(inputs)} of {names}",
            remedy="build a plan of one image input",
        )
    source = _read_tensor(engine, inputs[0], path)
    if not source.shape:
        raise PlanError(
            f"{path}: the input {source.name} has no dimension that counts images",
            remedy="build a plan whose input has a batch",
        )
    outputs = tuple(_read_tensor(engine, name, path) for name in names if name != inputs[0])
    if min(source.shape) > 0:
        return Interface(source, outputs, 0, source.shape, source.shape, source.shape)
    profiles = [_read_profile(engine, source.name, index) for index in range(engine.num_optimization_profiles)]
    best = max(range(len(profiles)), key=lambda index: profiles[index][2])
    return Interface(source, outputs, best, *profiles[best])


def _read_profile(engine: Any, name: str, index: int) -> tuple[Shape, Shape, Shape]:
    smallest, usual, largest = (
        tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape(name, index)
    )
    return smallest, usual, largest


def _read_tensor(engine: Any, name: str, path: Path) -> PlanTensor:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise PlanError(
            f"{path}: the tensor {name} is {kind}, and NumPy arrays of that kind are not supported here",
            remedy=f"build the plan with inputs and outputs of {', '.join(_DTYPES.values())}",
        )
    return PlanTensor(name, np.dtype(_DTYPES[kind]), tuple(int(size) for size in engine.get_tensor_shape(name)))


def describe_interface(interface: Interface) -> ModelSpec:
    """The specification of a plan without a passport, as far as the engine knows it."""
    source = interface.source
    return ModelSpec(
        input=_describe(source, _guess_layout(source.shape)),
        outputs=tuple(_describe(output, "NC" if len(output.shape) == 2 else "other") for output in interface.outputs),
        kind="module",
    )


def _describe(tensor: PlanTensor, layout: str) -> TensorSpec:
    shape = tuple(
        size if size >= 0 else "batch" if axis == 0 else f"{tensor.name}_{axis}"
        for axis, size in enumerate(tensor.shape)
    )
    return TensorSpec(
        tensor.name,
        cast('Literal["float32", "float16", "uint8", "int64", "int32"]', tensor.dtype.name),
        shape,
        cast('Literal["NCHW", "NHWC"]', layout),
    )


def _guess_layout(shape: Shape) -> str:
    if len(shape) != 4:
        return "other"
    return "NCHW" if shape[1] == 3 or shape[3] != 3 else "NHWC"


def order_interface(interface: Interface, spec: ModelSpec, path: Path) -> Interface:
    """The interface with the outputs in the order of the specification.

    Raises:
        PlanError: The engine has other tensors than the specification says.
    """
    by_name = {tensor.name: tensor for tensor in (interface.source, *interface.outputs)}
    for tensor in (spec.input, *spec.outputs):
        found = by_name.get(tensor.name)
        if found is None or not _agree(tensor, found):
            raise PlanError(
                f"{path}: the passport and the plan disagree: expected {tensor.name} {tensor.dtype} {tensor.shape}, "
                f"found {f'{found.dtype} {found.shape}' if found else f'only {sorted(by_name)}'}",
                remedy="build the plan again with repvgg-trt build",
            )
    outputs = tuple(by_name[output.name] for output in spec.outputs)
    return Interface(
        interface.source, outputs, interface.profile, interface.smallest, interface.usual, interface.largest
    )


def _agree(expected: TensorSpec, found: PlanTensor) -> bool:
    """Same dtype (TensorRT 8.5 gives int32 for the int64 of class numbers) and rank, and no dimension of two sizes."""
    same_dtype = expected.dtype == found.dtype.name or (expected.dtype, found.dtype.name) == ("int64", "int32")
    sizes = (
        not isinstance(want, int) or have < 0 or want == have
        for want, have in zip(expected.shape, found.shape, strict=False)
    )
    return same_dtype and len(expected.shape) == len(found.shape) and all(sizes)


logger = logging.getLogger(__name__)
_MODULES: dict[Flavour, tuple[str, ...]] = {"tensorrt": ("tensorrt", LEAN), "tensorrt_rtx": ("tensorrt_rtx",)}
_LEVELS = {
    "ERROR": logging.WARNING,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
}  # an error of TensorRT is one of ours, or was none
_KEPT = 50


class TrtLog:
    """The errors that TensorRT logged last, so that an exception can quote them; everything is passed on to our own log."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def hear(self, severity: str, message: str) -> None:
        """Keeps an error, passes everything on."""
        if severity == "ERROR":
            with self._lock:
                self._lines.append(" ".join(message.split()))
        logger.log(_LEVELS[severity], "%s", message)

    def take(self) -> list[str]:
        """What was kept since the last call, without repetitions."""
        with self._lock:
            lines = list(dict.fromkeys(self._lines))
            self._lines.clear()
        return lines


@dataclass(frozen=True, slots=True)
class LoggedLibrary(Library):
    """A TensorRT that plans are run with, and what it says."""

    log: TrtLog = field(kw_only=True)
    trt_logger: Any = field(kw_only=True)


def open_library(flavours: tuple[Flavour, ...]) -> LoggedLibrary:
    """The first of the given flavours that is installed, with its log.

    The caller has made sure that there is a driver: without one the lean runtime ends the process.

    Raises:
        MissingDependencyError: As `find_library`.
        PlanError: As `find_library`.
    """
    found, log = find_library(flavours), TrtLog()
    logger = make_trt_logger(found.trt, log.hear)
    return LoggedLibrary(found.flavour, found.trt, found.version, found.is_lean, log=log, trt_logger=logger)


def find_library(flavours: tuple[Flavour, ...]) -> Library:
    """Imports the first of the given flavours that is installed, which needs no driver; the whole TensorRT comes before its lean runtime.

    Raises:
        MissingDependencyError: None is installed, or one does not load.
        PlanError: It is of a version that plans are not run with.
    """
    for flavour in flavours:
        for module in _MODULES[flavour]:
            is_lean = module == LEAN
            remedy = f"install it again: {INSTALL[flavour]}"
            trt = import_tensorrt(module, name_library(flavour, is_lean), remedy=remedy)
            if trt is None:
                continue
            library = Library(flavour, trt, str(trt.__version__), is_lean)
            problem = judge_library(library)
            if problem is not None:
                raise PlanError(problem.reason, remedy=f"{problem.remedy}, and build the plan with it")
            return library
    wanted = " or ".join(FLAVOURS[flavour] for flavour in flavours)
    raise MissingDependencyError(
        f"running a plan needs {wanted}, which is not installed",
        remedy=", or ".join(INSTALL[flavour] for flavour in flavours),
    )


_FLAVOURS: dict[str | None, tuple[Flavour, ...]] = {
    None: ("tensorrt", "tensorrt_rtx"),
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx",),
}


@dataclass(slots=True)
class OpenPlan:
    """A plan that TensorRT has taken.

    Attributes:
        library: TensorRT.
        runtime: Lives at least as long as the engine.
        engine: The deserialized plan.
        interface: Inputs, outputs, profile.
        spec: What a caller must know.
        passport: None where there is none.
    """

    library: LoggedLibrary
    runtime: Any
    engine: Any
    interface: Interface
    spec: ModelSpec
    passport: PlanPassport | None

    def release(self) -> None:
        """Lets TensorRT's objects go, the engine before its runtime."""
        self.engine = None
        self.runtime = None

    def describe(self) -> ModelMetadata:
        """The passport in the form of an ONNX's metadata."""
        passport = self.passport
        return ModelMetadata(
            schema=METADATA_SCHEMA,
            spec=self.spec,
            variant=passport.variant if passport else None,
            source=None,
            certificate=passport.certificate if passport else Certificate("none: the plan has no passport", (), {}),
            statistics={},
            history=passport.history if passport else (),
        )


def open_plan(path: Path, device: DeviceInfo, *, backend: str | None, require_passport: bool) -> OpenPlan:
    """Judges, reads and deserializes a plan, in the device context that is current.

    Args:
        path: The plan.
        device: The GPU whose context is current.
        backend: `tensorrt`, `rtx`, or None: what the passport says, else what is installed.
        require_passport: Whether a plan without one is refused.

    Raises:
        PlanIncompatibleError: It was built for another GPU, TensorRT or platform.
        PlanError: It is changed, truncated, without passport though one is required, or TensorRT refuses it.
        CudaError: CUDA fails, or has no memory for it.
        MissingDependencyError: The TensorRT that it needs is not installed.
    """
    passport = read_passport(path)
    if passport is None:
        _miss_passport(path, require_passport)
    wanted: tuple[Flavour, ...] = (
        (passport.flavour,) if passport is not None and backend is None else _FLAVOURS[backend]
    )
    if passport is not None:
        _judge(
            path,
            passport,
            Environment(
                wanted[0], None, device.name, device.compute_capability, device.driver_version or None, platform_here()
            ),
        )
    library = open_library(wanted)
    if passport is not None:
        here = Environment(
            library.flavour,
            library.version,
            device.name,
            device.compute_capability,
            device.driver_version or None,
            lean=library.is_lean,
        )
        _judge(path, passport, here)
    content = _read(path)
    if passport is not None:
        require_unchanged(path, hashlib.sha256(content).hexdigest(), passport)
    # A version-compatible plan carries the code that reads it; it is run only where a passport vouches for its bytes.
    runtime, engine = _deserialize(
        library, content, path, carries_code=passport is not None and passport.config.version_compatible
    )
    interface = read_interface(library.trt, engine, path)
    if passport is None:
        return OpenPlan(library, runtime, engine, interface, describe_interface(interface), None)
    return OpenPlan(library, runtime, engine, order_interface(interface, passport.spec, path), passport.spec, passport)


def _miss_passport(path: Path, required: bool) -> None:
    name = passport_path(path).name
    if required:
        raise PlanError(
            f"{path}: has no passport {name}, and one is required",
            remedy="copy it beside the plan, or leave out require_passport",
        )
    logger.warning(
        "%s: no passport %s beside it: shapes come from the plan, and how images are prepared is not known", path, name
    )


def _judge(path: Path, passport: PlanPassport, environment: Environment) -> None:
    verdict = judge_plan(passport, environment)
    if isinstance(verdict, Incompatible):
        raise PlanIncompatibleError(f"{path}: {verdict.reason}", remedy=verdict.remedy)
    if environment.tensorrt_version is not None:
        for warning in verdict.warnings:
            logger.warning("%s: %s", path, warning)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror}", remedy="check that it is a file that you may read"
        ) from error


def _deserialize(library: LoggedLibrary, content: bytes, path: Path, *, carries_code: bool) -> tuple[Any, Any]:
    trt, log = library.trt, library.log
    log.take()
    runtime = trt.Runtime(library.trt_logger)
    lines = log.take()
    if runtime is None or any(
        "CUDA initialization failure" in line for line in lines
    ):  # to use such a runtime ends the process
        raise CudaError(
            f"{library.name} cannot use the GPU:{quote(lines)}",
            remedy="update the NVIDIA driver, or install a TensorRT made for its CUDA version",
        )
    if carries_code and library.flavour == "tensorrt":
        runtime.engine_host_code_allowed = True
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(library.trt_logger, "")
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        lines = log.take()
        if any("out of memory" in line.lower() for line in lines):
            raise CudaMemoryError(
                f"{path}: no GPU memory for it:{quote(lines)}", remedy="free GPU memory: nvidia-smi shows who has it"
            )
        remedy = "build it again on this machine with repvgg-trt build: it is truncated, or of another TensorRT or GPU"
        if library.is_lean:
            remedy = (
                "build it with --version-compatible, for a lean runtime runs no other plans; or install the whole "
                "TensorRT that built it"
            )
        raise PlanError(f"{path}: {library.name} refuses it:{quote(lines)}", remedy=remedy)
    return runtime, engine
